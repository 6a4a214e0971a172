"""Builds the stub libraries with the system's C compiler; they are found through LD_LIBRARY_PATH.

python -m tests.stubs.build FOLDER
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent

LIBRARIES = {
    "libcuda.so.1": ("machine.c", "process.c", "memory.c", "stream.c", "checkpoint.c"),
    "libnvidia-ml.so.1": ("machine.c", "nvml.c"),
}

_FLAGS = ["-std=c11", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-fvisibility=hidden", "-fPIC", "-shared", "-pthread"]


def why_not() -> str:
    """What is missing to build them; empty: nothing."""
    if shutil.which("cc") is None:
        return "no C compiler (cc) for the stub driver"
    if _header() is None:
        return "no cuda.h of CUDA 13 for the stub driver: it comes with torch's CUDA libraries (make setup)"
    return ""


def _header() -> Path | None:
    """NVIDIA's own header, so that the compiler compares our functions with the real ones."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    found = [header for place in places for header in place.glob("*/include/cuda.h")]
    return next((header for header in found if "CUcheckpointGpuPair" in header.read_text(errors="replace")), None)


def build(folder: Path) -> Path:
    """Returns `folder`, with the libraries in it. Raises `CalledProcessError` with what the compiler said."""
    header = _header()
    assert header is not None, why_not()
    for library, sources in LIBRARIES.items():
        files = [str(SOURCES / source) for source in sources]
        where = ["-isystem", str(header.parent), f"-Wl,-soname,{library}", "-o", str(folder / library)]
        subprocess.run(["cc", *_FLAGS, *files, *where], check=True)
    return folder


if __name__ == "__main__":
    build(Path(sys.argv[1]))
