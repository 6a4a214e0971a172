"""Stands for a model that is compiled: says whether its compiler found what it had made, and keeps it where told.

What it makes is a library, which it loads from where it lies and calls, as TorchInductor and Triton do.
"""

import ctypes
import os
import shutil
from pathlib import Path


def load(device):
    kernel = Path(os.environ["TRITON_CACHE_DIR"], "kernel.so")
    found = kernel.exists()
    if not found:
        kernel.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mathematics(), kernel)
        os.utime(kernel, ns=(1_700_000_000_123_456_789,) * 2)
    library = ctypes.CDLL(str(kernel))
    library.exp2.restype, library.exp2.argtypes = ctypes.c_double, [ctypes.c_double]
    return library, f"found, of {kernel.stat().st_mtime_ns}" if found else "compiled"


def mathematics():
    """The path of the C library's, which is loaded already."""
    return next(line.split()[-1] for line in Path("/proc/self/maps").open() if "/libm.so" in line or "/libm-" in line)


def handle(event, context):
    library, said = context.model
    here = Path(os.environ["TRITON_CACHE_DIR"])
    if event.query.get("compile"):
        here.mkdir(parents=True, exist_ok=True)
        (here / "later.cubin").write_bytes(b"by a request")
    return {
        "statusCode": 200,
        "body": {
            "load": said if library.exp2(10.0) == 1024.0 else "broken",
            "here": sorted(os.listdir(here)) if here.exists() else [],
        },
    }
