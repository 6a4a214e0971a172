"""The stub driver itself: what the bindings see of memory, streams and events."""

import os
import signal
import subprocess
import sys

import pytest

from tests.stubs.simulated import GIB, PRELUDE, Simulated, StubGpu, uuid_of

pytestmark = pytest.mark.gpu


def test_bytes_come_back_from_the_device_as_they_went(simulated: Simulated):
    program = """
        use()
        sent = os.urandom(1 << 20)
        address = ok(cuda.cuMemAlloc(len(sent)))
        ok(cuda.cuMemcpyHtoD(address, sent, len(sent)))
        back = bytearray(len(sent))
        ok(cuda.cuMemcpyDtoH(back, address, len(back)))
        print(back == sent)
    """
    assert simulated.run(program) == "True"


def test_a_copy_beyond_what_was_allocated_is_refused(simulated: Simulated):
    program = """
        use()
        address = ok(cuda.cuMemAlloc(4096))
        print(cuda.cuMemcpyHtoD(int(address) + 1, bytes(4096), 4096)[0].name)
    """
    assert simulated.run(program) == "CUDA_ERROR_INVALID_VALUE"


def test_memory_of_another_process_counts_until_it_is_killed(simulated: Simulated):
    simulated.set(StubGpu(uuid_of(0), bytes=1 * GIB))
    holder = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + "use(); ok(cuda.cuMemAlloc(3 << 28)); print(flush=True); sys.stdin.read()"],
        env={**os.environ, **simulated.environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        program = "use(); print(cuda.cuMemAlloc(1 << 29)[0].name, ok(cuda.cuMemGetInfo())[0] >> 20)"
        assert simulated.run(program) == "CUDA_ERROR_OUT_OF_MEMORY 256"
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert simulated.run(program) == "CUDA_SUCCESS 512"
    finally:
        holder.kill()
        holder.communicate()


def test_an_event_behind_a_copy_is_not_done_before_the_copy(simulated: Simulated):
    simulated.fault("stream-work 1 delay 200")
    program = """
        use()
        n = 1 << 20
        address, host = ok(cuda.cuMemAlloc(n)), ok(cuda.cuMemHostAlloc(n, 0))
        stream, event = ok(cuda.cuStreamCreate(1)), ok(cuda.cuEventCreate(0))
        ctypes.memset(host, 7, n)
        ok(cuda.cuMemcpyHtoDAsync(address, host, n, stream))
        ok(cuda.cuEventRecord(event, stream))
        early = cuda.cuEventQuery(event)[0].name
        ok(cuda.cuEventSynchronize(event))
        back = bytearray(n)
        ok(cuda.cuMemcpyDtoH(back, address, n))
        print(early, cuda.cuEventQuery(event)[0].name, back == bytes([7]) * n)
    """
    assert simulated.run(program) == "CUDA_ERROR_NOT_READY CUDA_SUCCESS True"


def test_pinned_memory_that_is_reused_before_its_event_spoils_the_copy(simulated: Simulated):
    """So that a loader that does so is found out. Pageable memory is copied in the call."""
    simulated.fault("stream-work 1 delay 200")
    program = """
        use()
        n = 4096
        for pinned in (True, False):
            buffer = ctypes.create_string_buffer(n)
            host = ok(cuda.cuMemHostAlloc(n, 0)) if pinned else ctypes.addressof(buffer)
            address, stream = ok(cuda.cuMemAlloc(n)), ok(cuda.cuStreamCreate(1))
            ctypes.memset(host, 1, n)
            ok(cuda.cuMemcpyHtoDAsync(address, host, n, stream))
            ctypes.memset(host, 2, n)
            ok(cuda.cuStreamSynchronize(stream))
            back = bytearray(n)
            ok(cuda.cuMemcpyDtoH(back, address, n))
            print(back[0], end=" ")
    """
    assert simulated.run(program) == "2 1"


def test_a_stream_that_waits_for_an_event_comes_behind_it(simulated: Simulated):
    simulated.fault("stream-work 1 delay 200")
    program = """
        use()
        n = 4096
        address, host = ok(cuda.cuMemAlloc(n)), ok(cuda.cuMemHostAlloc(n, 0))
        one, two, event = ok(cuda.cuStreamCreate(1)), ok(cuda.cuStreamCreate(1)), ok(cuda.cuEventCreate(2))
        ctypes.memset(host, 1, n)
        ok(cuda.cuMemcpyHtoDAsync(address, host, n, one))
        ok(cuda.cuEventRecord(event, one))
        ok(cuda.cuStreamWaitEvent(two, event, 0))
        ok(cuda.cuMemsetD8Async(address, 2, n, two))
        ok(cuda.cuStreamSynchronize(two))
        back = bytearray(n)
        ok(cuda.cuMemcpyDtoH(back, address, n))
        print(back[0])
    """
    assert simulated.run(program) == "2"


def test_virtual_memory_has_the_same_address_and_bytes_after_a_remap(simulated: Simulated):
    program = """
        use()
        n = 4 << 20
        kind = cuda.CUmemAllocationProp()
        kind.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        kind.location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access = cuda.CUmemAccessDesc()
        access.location = kind.location
        access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        address = ok(cuda.cuMemAddressReserve(n, 0, 0, 0))
        handle = ok(cuda.cuMemCreate(n, kind, 0))
        ok(cuda.cuMemMap(address, n, 0, handle, 0))
        refused = cuda.cuMemcpyHtoD(address, bytes(8), 8)[0].name
        ok(cuda.cuMemSetAccess(address, n, [access], 1))
        ok(cuda.cuMemcpyHtoD(int(address) + n - 8, b"12345678", 8))
        ok(cuda.cuMemUnmap(address, n))
        ok(cuda.cuMemMap(address, n, 0, handle, 0))
        ok(cuda.cuMemSetAccess(address, n, [access], 1))
        back = bytearray(8)
        ok(cuda.cuMemcpyDtoH(back, int(address) + n - 8, 8))
        ok(cuda.cuMemUnmap(address, n)); ok(cuda.cuMemRelease(handle)); ok(cuda.cuMemAddressFree(address, n))
        free, total = ok(cuda.cuMemGetInfo())
        print(refused, bytes(back).decode(), total - free)
    """
    assert simulated.run(program) == "CUDA_ERROR_INVALID_VALUE 12345678 0"


def test_a_child_of_a_fork_has_no_cuda(simulated: Simulated):
    program = """
        use()
        child = os.fork()
        if child == 0:
            print(cuda.cuDeviceGetCount()[0].name, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
    """
    assert simulated.run(program) == "CUDA_ERROR_NOT_INITIALIZED"


@pytest.mark.parametrize(
    ("visible", "count"), [("0,1", 2), ("1", 1), ("", 0), ("GPU-00000001", 1), ("0,9,1", 1), ("none", 0)]
)
def test_devices_are_those_that_are_visible(simulated: Simulated, visible, count):
    simulated.set(StubGpu(uuid_of(0)), StubGpu(uuid_of(1)))
    program = "print(ok(cuda.cuDeviceGetCount()) if cuda.cuInit(0)[0] == 0 else 0)"
    assert simulated.run(program, CUDA_VISIBLE_DEVICES=visible) == str(count)


def test_a_gpu_that_fell_off_the_bus_fails_every_call(simulated: Simulated):
    simulated.fault("cuMemGetInfo 2 lost")
    program = """
        import pynvml
        use()
        ok(cuda.cuMemGetInfo())
        cuda.cuMemGetInfo()
        pynvml.nvmlInit()
        try:
            pynvml.nvmlDeviceGetHandleByIndex(0)
        except pynvml.NVMLError_GpuIsLost:
            print(cuda.cuMemAlloc(1)[0].name)
    """
    assert simulated.run(program) == "CUDA_ERROR_UNKNOWN"
