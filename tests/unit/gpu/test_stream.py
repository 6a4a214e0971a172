"""Streams into device memory through the real bindings, on a simulated GPU: right bytes, bounded memory, clear errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.stubs.simulated import Simulated, StubGpu, uuid_of

pytestmark = pytest.mark.gpu

MIB = 2**20
SIZE = 21 * MIB + 4567

PROGRAM = """
import json, random, threading
from adapter.errors import AdapterError
from adapter.gpu.stream import Options, stream

path, options = sys.argv[1], Options(**json.loads(sys.argv[2]))
use()
fd = os.open(path, os.O_RDONLY)
size = os.fstat(fd).st_size
parts, at = [], 8  # of random lengths, in random places of the device, with small and large gaps
random.seed(5)
while at < size:
    part = min(size - at, random.choice([1, 7, 4096, 100_000, 3_000_000]))
    parts.append((at, part))
    at += part + random.choice([0, 0, 64, 700_000])
random.shuffle(parts)
memory = int(ok(cuda.cuMemAlloc(size)))
ok(cuda.cuMemsetD8(memory, 0, size))
ranges, to = [], memory
for at, part in parts:
    ranges.append((at, part, to))
    to += part

pinned, alloc, free = set(), cuda.cuMemHostAlloc, cuda.cuMemFreeHost

def counted_alloc(size, flags):
    code, address = alloc(size, flags)
    if code == 0:
        pinned.add(address)
    return code, address

def counted_free(address):
    pinned.discard(address)
    return free(address)

cuda.cuMemHostAlloc, cuda.cuMemFreeHost = counted_alloc, counted_free

def right():
    for at, part, address in ranges:
        back = bytearray(part)
        ok(cuda.cuMemcpyDtoH(back, address, part))
        if bytes(back) != os.pread(fd, part, at):
            return False
    return True

answer = {}
threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
try:
    done = stream(fd, ranges, options=options)
    answer["bytes"], answer["reads"], answer["mode"] = done.bytes, done.reads, done.mode.value
except AdapterError as error:
    answer["error"], answer["code"], answer["why"] = error.message, error.code, error.why
answer["right"] = right() if os.path.getsize(path) == size and not os.path.exists(os.environ["GPUFN_STUB_DIR"] + "/lost") else None
answer["left"] = [threading.active_count() - threads, len(os.listdir("/proc/self/fd")) - descriptors, len(pinned)]
print(json.dumps(answer))
"""


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def run(simulated: Simulated, weights: Path, repository: Path):
    def run(before: str = "", **options: int) -> dict:
        program = before + PROGRAM
        return json.loads(
            simulated.run(program, str(weights), json.dumps(options), PYTHONPATH=str(repository)).splitlines()[-1]
        )

    return run


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"threads": 1, "buffers": 1},
        {"threads": 1, "buffers": 2},
        {"threads": 7, "buffers": 3},
        {"buffer_bytes": 4096},
    ],
    ids=str,
)
def test_every_part_is_on_the_device_bit_for_bit(run, options: dict) -> None:
    answer = run(**options)
    assert answer["right"]
    assert answer["left"] == [0, 0, 0]


def test_a_buffer_is_not_filled_before_the_copy_from_it_is_done(run, simulated: Simulated) -> None:
    """Slow copies: a buffer that is reused too early brings wrong bytes."""
    simulated.fault("stream-work * delay 20")
    assert run(threads=2, buffers=2, buffer_bytes=MIB)["right"]


def test_nothing_to_stream_needs_no_gpu() -> None:
    from adapter.gpu.stream import stream

    assert stream(0, []).bytes == 0


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("cuMemHostAlloc 1 fail 2", "out-of-host-memory", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuMemHostAlloc 3 fail 2", "out-of-host-memory", "CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuStreamCreate 2 fail 999", "gpu-failed", "cuStreamCreate"),
        ("cuEventCreate 2 fail 999", "gpu-failed", "cuEventCreate"),
        ("cuMemcpyHtoDAsync 4 fail 700", "gpu-failed", "CUDA_ERROR_ILLEGAL_ADDRESS"),
        ("cuEventRecord 3 fail 999", "gpu-failed", "cuEventRecord"),
        ("cuEventSynchronize 4 fail 719", "gpu-failed", "CUDA_ERROR_LAUNCH_FAILED"),
        ("cuStreamSynchronize 1 fail 719", "gpu-failed", "cuStreamSynchronize"),
        ("cuDevicePrimaryCtxRetain 2 fail 2", "gpu-out-of-memory", "cuDevicePrimaryCtxRetain"),
    ],
)
def test_a_driver_that_refuses_is_said_so_and_leaves_nothing(
    fault: str, code: str, said: str, run, simulated: Simulated
) -> None:
    simulated.fault(fault)
    answer = run(buffer_bytes=MIB)
    assert answer["code"] == code
    assert said in answer["why"]
    assert answer["left"] == [0, 0, 0]


def test_a_gpu_that_falls_off_the_bus_is_said_so_and_nothing_hangs(run, simulated: Simulated) -> None:
    simulated.fault("cuMemcpyHtoDAsync 5 lost")
    answer = run(buffer_bytes=MIB)
    assert answer["code"] == "gpu-failed"
    assert answer["left"] == [0, 0, 0]


READS = """
import os
real, count = os.preadv, 0
def preadv(fd, buffers, at, *flags):
    global count
    count += 1
    {body}
    return real(fd, buffers, at, *flags)
os.preadv = preadv
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ('if count == 5: raise OSError(5, "Input/output error")', "read-failed", "Input/output error at byte"),
        ("if count == 5: os.truncate(sys.argv[1], 2**20)", "snapshot-corrupt", "has become shorter"),
    ],
    ids=["read error", "truncated"],
)
def test_a_disk_that_fails_in_the_middle_is_said_so_and_leaves_nothing(body: str, code: str, said: str, run) -> None:
    answer = run(READS.format(body=body), buffer_bytes=MIB)
    assert answer["code"] == code
    assert said in answer["why"]
    assert answer["left"] == [0, 0, 0]


@pytest.mark.parametrize(
    "body", ["if count % 2: raise InterruptedError", "buffers = [buffers[0][:12345]]"], ids=["interrupted", "short"]
)
def test_reads_that_are_interrupted_or_short_bring_all_bytes(body: str, run) -> None:
    assert run(READS.format(body=body), buffer_bytes=MIB)["right"]


def test_pinned_memory_is_bounded_and_given_back(simulated: Simulated, weights: Path, repository: Path) -> None:
    with weights.open("r+b") as file:
        file.truncate(600 * MIB)  # a hole reads like any other part
    program = """
        from adapter.gpu.stream import Options, stream
        use()
        sizes = []
        real = cuda.cuMemHostAlloc, cuda.cuMemFreeHost
        def alloc(size, flags):
            sizes.append(size)
            return real[0](size, flags)
        def free(address):
            sizes.append(-1)
            return real[1](address)
        cuda.cuMemHostAlloc, cuda.cuMemFreeHost = alloc, free
        size = os.path.getsize(sys.argv[1])
        memory = int(ok(cuda.cuMemAlloc(size)))
        stream(os.open(sys.argv[1], os.O_RDONLY), [(0, size, memory)])
        taken, most = [size for size in sizes if size > 0], Options()
        print(0 < sum(taken) <= most.threads * most.buffers * most.buffer_bytes <= 128 << 20)
        print(len(taken) == sizes.count(-1))
    """
    assert simulated.run(program, str(weights), PYTHONPATH=str(repository)).split() == ["True", "True"]


def test_a_second_gpu_is_filled_too(simulated: Simulated, weights: Path, repository: Path) -> None:
    simulated.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)))
    program = """
        from adapter.gpu.stream import stream
        use(1)
        memory = int(ok(cuda.cuMemAlloc(1 << 20)))
        ok(cuda.cuCtxSetCurrent(0))
        fd = os.open(sys.argv[1], os.O_RDONLY)
        stream(fd, [(4, 1 << 20, memory)], device=1)
        before = int(ok(cuda.cuCtxGetCurrent()))
        ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(1))))
        back = bytearray(1 << 20)
        ok(cuda.cuMemcpyDtoH(back, memory, len(back)))
        print(back == os.pread(fd, len(back), 4), before)
    """
    assert simulated.run(program, str(weights), PYTHONPATH=str(repository)) == "True 0"


def test_without_a_driver_it_says_so(weights: Path) -> None:
    """The test's own process has no driver, real or simulated, unless there is a GPU."""
    from adapter.errors import GpuError
    from adapter.gpu.stream import stream

    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver here")
    with weights.open("rb") as file, pytest.raises(GpuError, match="driver cannot be called") as caught:
        stream(file.fileno(), [(0, 10, 10)])
    assert caught.value.code == "no-driver"
