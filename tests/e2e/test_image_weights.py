"""Weights that an image brings: a replica starts from them, and its process snapshot maps them."""

import asyncio
import json
import os
import shutil
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from adapter.hosts.folders import FunctionFolders
from adapter.hosts.process import ProcessHost
from adapter.packaging.sources import WeightsConfig, fetch_weights
from adapter.records import EventName
from tests.fakes.host import Listener, ask, deployment, write_function

pytestmark = [pytest.mark.e2e, pytest.mark.torch]

HANDLER = """
import os, torch

def load(device):
    from safetensors.torch import load_file
    model = torch.nn.Linear(2, 1)
    model.load_state_dict(load_file(os.environ['MODEL_DIR'] + '/model.safetensors'))
    return model

def build(device):
    with torch.device('meta'):
        return torch.nn.Linear(2, 1)

def handle(event, context):
    return str(context.model(torch.tensor([10.0, 100.0])).item())
"""
ANSWER = "210.5"


class ImageHost(ProcessHost):
    """Replicas as an image has them: with weights, and a store where one is mounted."""

    weights: Path
    store = ""

    def _orders(self, *args):
        return replace(super()._orders(*args), weights_dir=str(self.weights), snapshot_dir=self.store)


@asynccontextmanager
async def image_host(state, functions, weights, store):
    host = ImageHost(state, FunctionFolders([functions]), python=Path(sys.executable))
    host.weights, host.store = weights, str(store or "")
    try:
        yield host
    finally:
        await host.close()


async def lives(state, functions, weights, store, times=1, *, takes=True):
    """Answers, start records and what was said of snapshots, of lives one after the other, each from zero."""
    answers, records, news = [], [], []
    wanted = deployment("fn")
    async with image_host(state, functions, weights, store) as host:
        await host.prepare(wanted)
        for life in range(times):
            listener = Listener()
            replica = await host.start(wanted, listener)
            answers.append((await ask(replica)).decode())
            records.append((await listener.heard(EventName.STARTED)).fields["record"])
            if not life and store and takes:
                news.append((await listener.heard(EventName.SNAPSHOT, 2)).fields)
            await replica.stop(30)
    return answers, records, news


def run(*args, **options):
    return asyncio.run(asyncio.wait_for(lives(*args, **options), 110))


@pytest.fixture
def weights(tmp_path):
    """What a builder makes of a checkpoint in the function folder."""
    import torch
    from safetensors.torch import save_file

    folder = write_function(tmp_path / "functions", "fn", HANDLER)
    (folder / "net").mkdir()
    tensors = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([0.5])}
    save_file(tensors, folder / "net" / "model.safetensors")
    made = fetch_weights(WeightsConfig("./net"), folder, tmp_path / "weights").folder
    shutil.rmtree(folder / "net")
    return made


def test_without_a_store_a_replica_starts_from_the_images_weights(tmp_path, state_dir, weights):
    answers, records, _ = run(state_dir, tmp_path / "functions", weights, None)
    assert answers == [ANSWER]
    assert [record["rung"] for record in records] == ["start"]


@pytest.mark.criu
def test_a_process_snapshot_maps_them_and_is_found_again(tmp_path, state_dir, weights):
    store = tmp_path / "store"
    before = {path: path.lstat().st_mtime_ns for path in weights.rglob("*")}
    answers, records, news = run(state_dir, tmp_path / "functions", weights, store, 2)
    assert news[0]["state"] == "published", news
    assert answers == [ANSWER, ANSWER]
    assert [record["rung"] for record in records] == ["start", "restore"]
    published = [path.name.split("-")[0] for path in store.glob("*/*/*-*") if not path.name.startswith(".")]
    assert published == ["process"]
    assert {path: path.lstat().st_mtime_ns for path in weights.rglob("*")} == before


def test_damaged_weights_are_refused_by_name_and_stay_where_they_are(tmp_path, state_dir, weights):
    os.truncate(weights / "weights.json", 300)
    (tmp_path / "functions" / "fn" / "handler.py").write_text("def build(device): ...\n" + PLAIN)
    answers, records, _ = run(state_dir, tmp_path / "functions", weights, tmp_path / "store", takes=False)
    assert answers == ["by load"]
    assert records[0]["rung"] == "load"
    assert "image's weights are damaged: weights.json" in json.dumps(records[0]["skipped"])
    assert (weights / "weights.json").stat().st_size == 300


PLAIN = "def load(device):\n    return 'by load'\ndef handle(event, context):\n    return context.model\n"

OTHERWISE_NAMED = """
class Named(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)
"""


@pytest.mark.criu
def test_weights_that_do_not_fit_give_way_to_own_ones(tmp_path, state_dir, weights):
    """`build` makes a model with other names than the checkpoint's: `load` serves, and what it made is kept."""
    code = HANDLER.replace("return torch.nn.Linear(2, 1)", "return Named(torch.nn.Linear(2, 1))")
    code = code.replace("return model\n", "return Named(model)\n") + OTHERWISE_NAMED
    (tmp_path / "functions" / "fn" / "handler.py").write_text(code)
    answers, records, news = run(state_dir, tmp_path / "functions", weights, tmp_path / "store", 2)
    assert news[0]["state"] == "published", news
    assert answers == [ANSWER, ANSWER]
    assert [record["rung"] for record in records] == ["load", "restore"]
    assert (weights / "weights.json").exists()
