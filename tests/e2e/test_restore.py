"""Real process snapshots of real replicas: what a restored one has, must not have, and falls back to."""

import asyncio
import json

import pytest

from adapter.keys import SECRETS_PATH
from adapter.records import EventName
from tests.fakes.host import Listener, ask, deployment, running, write_function

pytestmark = [pytest.mark.e2e, pytest.mark.criu]


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 110))


async def lives(state, functions, times, *, before=None, secrets=(), **env):
    """The answers of that many lives of one function, each begun from zero; the first takes the snapshot."""
    answers, records = [], []
    wanted = deployment("fn", secrets=secrets, **env)
    async with running(state, functions) as host:
        await host.prepare(wanted)
        for life in range(times):
            if life and before is not None:
                before(state)
            listener = Listener()
            replica = await host.start(wanted, listener)
            answers.append((await ask(replica, b"")).decode())
            records.append((await listener.heard(EventName.STARTED)).fields["record"])
            if not life:
                taken = await listener.heard(EventName.SNAPSHOT, 2)
                assert taken.fields["state"] == "published", taken.fields
            await replica.stop(30)
    return answers, records


def images(state):
    return [path for path in (state / "snapshots").rglob("*") if path.is_file()]


def test_restored_replicas_answer_alike_and_share_no_random_stream(tmp_path, state_dir):
    write_function(
        tmp_path / "functions", "fn",
        "import random\ndef load(device):\n    return 'the model'\n"
        "def handle(event, context):\n    return f'{context.model} {random.random()}'\n",
    )  # fmt: skip
    answers, records = asyncio.run(lives(state_dir, tmp_path / "functions", 3))
    assert [record["rung"] for record in records] == ["load", "restore", "restore"]
    assert all(answer.startswith("the model ") for answer in answers)
    assert len(set(answers)) == 3


def test_secrets_and_variables_are_there_for_requests_and_in_no_image(tmp_path, state_dir):
    """Even of a `load` that reads what it can: the process that is kept sees no secret."""
    write_function(
        tmp_path / "functions", "fn",
        "import glob, os\n"
        f"def secrets():\n    return [open(p).read() for p in glob.glob('{SECRETS_PATH}/*')]\n"
        "def load(device):\n    return [os.environ.get('TOKEN', 'unseen'), secrets()]\n"
        "def handle(event, context):\n"
        "    return {'load': context.model, 'handle': [os.environ['TOKEN'], secrets()], 'told': context.secret('key')}\n",
    )  # fmt: skip
    folder = state_dir / "secrets" / "openfaas-fn"
    folder.mkdir(parents=True, mode=0o700)
    (folder / "key").write_text("correct-horse-battery")
    answers, records = asyncio.run(
        lives(state_dir, tmp_path / "functions", 2, secrets=("key",), TOKEN="a-token-of-mine")
    )
    plain, restored = map(json.loads, answers)
    assert records[1]["rung"] == "restore"
    for answer in (plain, restored):
        assert answer["told"] == "correct-horse-battery"
        assert answer["handle"] == ["a-token-of-mine", ["correct-horse-battery"]]
    assert plain["load"] == ["unseen", ["correct-horse-battery"]]
    assert restored["load"] == ["unseen", []]
    files = images(state_dir)
    assert any(path.name.startswith("pages-") for path in files)
    for path in files:
        data = path.read_bytes() if path.stat().st_blocks * 512 >= path.stat().st_size else _data_of(path)
        assert b"correct-horse" not in data, path
        assert b"a-token-of-mine" not in data, path


MAPS = """
import ctypes, mmap, os
from pathlib import Path

CONTENT = bytes(range(256)) * 100
ALLOCATOR = None

def mapped(descriptor, protection):
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return libc.mmap(None, len(CONTENT), protection, mmap.MAP_SHARED, descriptor, 0)

def load(device):
    engine = Path(os.environ["GPUFN_ENGINE_CACHE"], "engine")
    engine.parent.mkdir(parents=True, exist_ok=True)
    engine.write_bytes(CONTENT)
    with engine.open("r+b") as file:
        written = mapped(file.fileno(), mmap.PROT_READ | mmap.PROT_WRITE)
        read = mapped(file.fileno(), mmap.PROT_READ)
    ctypes.memset(written + 5000, 1, 1)
    return written, read

def handle(event, context):
    expected = bytearray(CONTENT)
    expected[5000] = 1
    return {"statusCode": 200, "body": [ctypes.string_at(at, len(CONTENT)) == expected for at in context.model]}
"""


@pytest.mark.parametrize("allocator", [False, True], ids=["", "an allocator whose memory stays with CRIU"])
def test_files_that_a_compiler_left_mapped_are_in_the_image(tmp_path, state_dir, allocator):
    """However they are mapped: the folder that they lay in goes with whoever took the snapshot."""
    library = tmp_path / "libjemalloc.so"
    library.write_bytes(bytes(8192))
    also = f"mmap.mmap(os.open({str(library)!r}, os.O_RDONLY), 0, access=mmap.ACCESS_READ)" if allocator else "None"
    write_function(tmp_path / "functions", "fn", MAPS.replace("ALLOCATOR = None", f"ALLOCATOR = {also}"))
    answers, records = asyncio.run(lives(state_dir, tmp_path / "functions", 2))
    assert [record["rung"] for record in records] == ["load", "restore"]
    assert [json.loads(answer) for answer in answers] == [[True, True]] * 2


def test_a_file_of_a_compiler_that_stays_open_is_named_and_no_snapshot_taken(tmp_path, state_dir):
    write_function(
        tmp_path / "functions", "fn",
        "import os\ndef load(device):\n    os.makedirs(os.environ['GPUFN_ENGINE_CACHE'])\n"
        "    return open(os.environ['GPUFN_ENGINE_CACHE'] + '/engine', 'w')\n"
        "def handle(event, context):\n    return 'here'\n",
    )  # fmt: skip

    async def scenario():
        async with running(state_dir, tmp_path / "functions") as host:
            await host.prepare(deployment("fn"))
            listener = Listener()
            await ask(await host.start(deployment("fn"), listener))
            taken = (await listener.heard(EventName.SNAPSHOT, 2)).fields
            assert (taken["state"], taken["code"]) == ("failed", "not-dumpable")
            assert "/engines/engine is its descriptor" in taken["reason"]

    run(scenario())


MODEL = """
import torch
WORDS = 6_000_000

def build(device):
    with torch.device('meta'):
        model = torch.nn.Module()
        model.register_buffer('words', torch.empty(WORDS, dtype=torch.int64))
        return model

def load(device):
    model = torch.nn.Module()
    model.register_buffer('words', torch.full((WORDS,), int.from_bytes(b'a weight', 'little')))
    return model

def handle(event, context):
    return str(int(context.model.words.sum()))
"""
WEIGHTS_BYTES = 48_000_000


@pytest.mark.torch
def test_weights_that_can_be_mapped_are_in_no_process_image(tmp_path, state_dir):
    sizes = {}
    for name, code in {"mapped": MODEL, "inside": MODEL.replace("def build", "def other")}.items():
        write_function(tmp_path / name, "fn", code)
        (state_dir / name).mkdir(parents=True)
        answers, records = asyncio.run(lives(state_dir / name, tmp_path / name, 2))
        assert len(set(answers)) == 1
        assert records[1]["rung"] == "restore"
        process = [path for path in images(state_dir / name) if path.parent.name == "images"]
        sizes[name] = sum(path.stat().st_blocks * 512 for path in process)
        weights = sum(_data_of(path).count(b"a weight" * 512) * 4096 for path in process)
        assert weights == 0 if name == "mapped" else weights > 0.99 * WEIGHTS_BYTES
    assert sizes["inside"] - sizes["mapped"] > 0.9 * WEIGHTS_BYTES


def _data_of(path):
    """A sparse file's bytes without its holes."""
    from adapter.snapshot.checksum import CHUNK_BYTES, data_chunks

    with path.open("rb") as file:
        parts = []
        for chunk in data_chunks(file.fileno(), path.stat().st_size):
            file.seek(chunk * CHUNK_BYTES)
            parts.append(file.read(CHUNK_BYTES))
    return b"".join(parts)


def test_a_flipped_bit_is_found_and_the_request_answered_by_a_plain_start(tmp_path, state_dir):
    write_function(
        tmp_path / "functions", "fn", "def load(device):\n    return 'm'\ndef handle(e, c):\n    return c.model\n"
    )

    def flip(state):
        pages = next(path for path in images(state) if path.name.startswith("pages-"))
        pages.chmod(0o600)
        with pages.open("r+b") as file:
            byte = file.read(1)
            file.seek(0)
            file.write(bytes([byte[0] ^ 1]))

    answers, records = asyncio.run(lives(state_dir, tmp_path / "functions", 2, before=flip))
    assert answers == ["m", "m"]
    assert records[1]["rung"] == "load"
    assert [s["code"] for s in records[1]["skipped"] if s["rung"] == "restore"] == ["snapshot-corrupt"]


def test_a_restored_process_that_answers_its_example_wrongly_is_replaced(tmp_path, state_dir):
    folder = write_function(
        tmp_path / "functions", "fn",
        "def load(device):\n    return ['right']\ndef handle(e, c):\n    return c.model[0]\n"
        "def after_restore(model):\n    model[0] = 'wrong'\n",
    )  # fmt: skip
    (folder / "examples").mkdir()
    example = {"request": {"body": ""}, "response": {"body": "right"}}
    (folder / "examples" / "one.json").write_text(json.dumps(example))

    async def scenario():
        await lives(state_dir, tmp_path / "functions", 1)
        wanted = deployment("fn")
        async with running(state_dir, tmp_path / "functions") as host:
            await host.prepare(wanted)
            listener = Listener()
            replica = await host.start(wanted, listener)
            exited = await listener.heard(EventName.MODEL_EXITED)
            assert exited.fields["code"] == "wrong-answer"
            assert "one" in exited.fields["reason"]
            record = (await listener.heard(EventName.STARTED, 2)).fields["record"]
            assert record["rung"] == "load"
            assert await ask(replica, b"") == b"right"

    run(scenario())
