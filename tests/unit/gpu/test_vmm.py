"""Memory that comes back at the same address, through the real bindings on a simulated GPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.stubs.simulated import GIB, Simulated, StubGpu, uuid_of

pytestmark = pytest.mark.gpu

PROGRAM = """
from adapter.errors import GpuError
from adapter.gpu.stream import stream
from adapter.gpu.vmm import Region
use()

def used():
    free, total = ok(cuda.cuMemGetInfo())
    return total - free >> 20
"""


@pytest.fixture
def run(simulated: Simulated, repository: Path):
    def run(program: str, *arguments: str) -> str:
        return simulated.run(PROGRAM + program, *arguments, PYTHONPATH=str(repository))

    return run


def test_a_region_is_filled_given_up_and_filled_again_at_the_same_address(run, tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * 20_000)
    said = run(
        """
fd = os.open(sys.argv[1], os.O_RDONLY)
size = os.path.getsize(sys.argv[1])
with Region(size) as region:
    address = region.address
    for _ in range(2):
        region.map()
        region.map()
        stream(fd, [(0, size, region.address)])
        back = bytearray(size)
        ok(cuda.cuMemcpyDtoH(back, address, size))
        print(region.is_mapped, region.address == address, used() > 0, back == os.pread(fd, size, 0))
        region.unmap()
        region.unmap()
        print(region.is_mapped, used(), cuda.cuMemcpyDtoH(back, address, size)[0].name)
print(region.address, used())
""",
        str(path),
    )
    filled, empty = "True True True True", "False 0 CUDA_ERROR_INVALID_VALUE"
    assert said.splitlines() == [filled, empty, filled, empty, "0 0"]


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_map_that_fails_leaves_no_memory_and_can_be_tried_again(call: str, run, simulated: Simulated) -> None:
    simulated.fault(f"{call} 1 fail 2")
    said = run("""
with Region(3 << 20) as region:
    try:
        region.map()
    except GpuError as error:
        print(error.code, region.is_mapped, used())
    region.map()
    print(region.is_mapped, used() >= 3)
""")
    assert said.splitlines() == ["gpu-out-of-memory False 0", "True True"]


def test_more_than_the_gpu_has_is_refused(run, simulated: Simulated) -> None:
    simulated.set(StubGpu(uuid_of(0), bytes=1 * GIB))
    said = run("""
with Region(2 << 30) as region:
    try:
        region.map()
    except GpuError as error:
        print(error.message, error.code)
""")
    assert said == "The GPU has no memory left. gpu-out-of-memory"


@pytest.mark.parametrize("end", ["region.unmap()", "region.close()", "del region"])
def test_work_that_uses_the_memory_is_done_before_it_goes(end: str, run, simulated: Simulated) -> None:
    simulated.fault("stream-work 1 delay 200")
    said = run(f"""
region = Region(1 << 20)
region.map()
host, stream = ok(cuda.cuMemHostAlloc(1 << 20, 0)), ok(cuda.cuStreamCreate(1))
ok(cuda.cuMemcpyHtoDAsync(region.address, host, 1 << 20, stream))
{end}
print(cuda.cuCtxSynchronize()[0].name, used())
""")
    assert said == "CUDA_SUCCESS 0"


def test_a_region_that_cannot_keep_the_context_leaves_it_to_those_who_do(run, simulated: Simulated) -> None:
    simulated.fault("cuDevicePrimaryCtxRetain 3 fail 2")  # after the program's, and that of the call itself
    said = run("""
try:
    Region(1 << 20)
except GpuError as error:
    print(error.code)
print(ok(cuda.cuDevicePrimaryCtxGetState(0)))
""")
    assert said.splitlines() == ["gpu-out-of-memory", "(0, 1)"]


def test_a_region_that_gets_no_addresses_does_not_keep_the_context(run, simulated: Simulated) -> None:
    simulated.fault("cuMemAddressReserve 1 fail 2")
    said = run("""
try:
    Region(1 << 20)
except GpuError as error:
    print(error.code)
ok(cuda.cuDevicePrimaryCtxRelease(0))
print(ok(cuda.cuDevicePrimaryCtxGetState(0)))
""")
    assert said.splitlines() == ["gpu-out-of-memory", "(0, 0)"]
