"""A simulated machine with GPUs, as tests set it up: see machine.h for what its files mean."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

GIB = 1 << 30

# CUresult (cuda.h) and nvmlReturn_t (nvml.h) that tests ask for.
CUDA_OUT_OF_MEMORY = 2
CUDA_ILLEGAL_STATE = 401
CUDA_NOT_READY = 600
CUDA_NOT_PERMITTED = 800
CUDA_NOT_SUPPORTED = 801
CUDA_UNKNOWN = 999

PRELUDE = """
import ctypes, os, sys
from cuda.bindings import driver as cuda

def ok(answer):
    if answer[0] != 0:
        raise SystemExit(f"failed: {answer[0].name}")
    return answer[1] if len(answer) == 2 else answer[1:]

def use(device=0):
    ok(cuda.cuInit(0))
    ok(cuda.cuCtxSetCurrent(ok(cuda.cuDevicePrimaryCtxRetain(device))))
"""
"""What programs for `Simulated.run` begin with."""


@dataclass(frozen=True, slots=True)
class StubGpu:
    uuid: str
    bytes: int = 8 * GIB
    mig: bool = False
    name: str = "Simulated GPU"


def uuid_of(number: int) -> str:
    return f"GPU-{number:08x}-0000-4000-8000-0000000000a0"


class Simulated:
    """Its folder and the libraries that show it. Starts as one GPU of 8 GiB."""

    is_real = False

    def __init__(self, folder: Path, libraries: Path) -> None:
        self.folder = folder
        self.environment = {"GPUFN_STUB_DIR": str(folder), "LD_LIBRARY_PATH": str(libraries)}
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o777)  # processes of other users take part
        for library in libraries.glob("*.so.*"):
            (folder / library.name).symlink_to(library)
        self.set()

    @property
    def search_path(self) -> str:
        """LD_LIBRARY_PATH for processes that get no other variable of ours, such as functions."""
        return str(self.folder)

    def set(self, *gpus: StubGpu, driver: str = "580.95.05", cuda: int = 13000, **switches: bool) -> None:
        """Switches: persistence, checkpoint, remap (machine.h)."""
        lines = [f"driver {driver}", f"cuda {cuda}"]
        lines += [f"{name} {_on(is_on)}" for name, is_on in switches.items()]
        lines += [f"gpu {gpu.uuid} {gpu.bytes} {_on(gpu.mig)} {gpu.name}" for gpu in gpus or (StubGpu(uuid_of(0)),)]
        self._write("machine", lines)

    def fault(self, *lines: str) -> None:
        """What goes wrong from now on, instead of what did before; counting starts anew."""
        for count in self.folder.glob("faults.*"):
            count.unlink()
        self._write("faults", lines)

    def lose(self) -> None:
        """The GPUs fall off the bus."""
        self._write("lost", ())

    def held_bytes(self) -> int:
        """Device memory that living processes hold, all GPUs together."""
        leases = self.folder / "leases"
        held = 0
        for lease in leases.iterdir() if leases.is_dir() else ():
            if _is_locked(lease):
                held += sum(map(int, lease.read_text().split()[1:]))
        return held

    def run(self, program: str, *arguments: str, timeout_s: float = 60, **environment: str) -> str:
        """What a program with `PRELUDE` prints. One that fails raises what it said."""
        done = subprocess.run(
            [sys.executable, "-c", PRELUDE + textwrap.dedent(program), *arguments],
            env={**os.environ, **self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _write(self, name: str, lines: Sequence[str]) -> None:
        part = self.folder / f".{name}"
        part.write_text("".join(f"{line}\n" for line in lines))
        part.rename(self.folder / name)


def _is_locked(lease: Path) -> bool:
    """Whether its owner lives: its process id may be of another pid namespace."""
    try:
        with lease.open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except FileNotFoundError:
        pass
    return False


def _on(is_on: bool) -> str:
    return "on" if is_on else "off"
