"""What compilers made while a model warmed up, kept so that the next start need not compile again.

    FOLDER/{inductor,triton,cuda,engines}  live caches of one model process: its variables point there
    BUNDLE                                 all of their files with their times, in a snapshot of its own

TorchInductor, Triton and the CUDA driver's JIT find what is theirs by content, so the folder may be another
one each time. Their files are code: a bundle is made by the snapshotter, whose process no request has
reached, and used like all snapshots only after its checksum was found right, within one tenant's function.
Engines that a handler builds itself (TensorRT and its like) go where GPUFN_ENGINE_CACHE says.
Variables: https://docs.pytorch.org/docs/stable/torch.compiler_troubleshooting.html (TORCHINDUCTOR_CACHE_DIR),
Triton's knobs (TRITON_CACHE_DIR), CUDA C Programming Guide, "Just-in-Time Compilation" (CUDA_CACHE_PATH),
ONNX Runtime's TensorRT provider (ORT_TENSORRT_CACHE_PATH).
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from adapter.errors import SnapshotCorrupt

BUNDLE = "compile.tar"
LIMIT_BYTES = 2**30
"""Of a bundle. What is older than the newest gigabyte is compiled again."""

_CACHES = {
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "CUDA_CACHE_PATH": "cuda",
    "ORT_TENSORRT_CACHE_PATH": "engines",
    "GPUFN_ENGINE_CACHE": "engines",
}
_MTIME = "GPUFN.mtime_ns"


def variables(folder: Path) -> dict[str, str]:
    """What points the compilers of a process to `folder`; before it imports any of them."""
    return {variable: str(folder / name) for variable, name in _CACHES.items()}


@dataclass(frozen=True, slots=True)
class Packed:
    files: int
    bytes: int
    left_out: int
    """Files beyond the limit."""


def is_used(folder: Path) -> bool:
    """Whether a compiler has put anything there."""
    return next(_files(folder), None) is not None


def pack(folder: Path, bundle: Path, limit_bytes: int = LIMIT_BYTES) -> Packed:
    """Write the caches in `folder` into the file `bundle`, the newest files first; none where there are none.

    Files that go while this reads are left out. Raises `OSError`.
    """
    found = sorted(_files(folder), key=lambda item: (-item[1].st_mtime_ns, item[0]))
    kept, total = [], 0
    for path, facts in found:
        if total + facts.st_size <= limit_bytes:
            kept.append((path, facts))
            total += facts.st_size
    if kept:
        with tarfile.open(bundle, "x", format=tarfile.PAX_FORMAT) as archive:
            for path, facts in kept:
                with suppress(FileNotFoundError):
                    _add(archive, path, path.relative_to(folder).as_posix(), facts.st_mtime_ns)
    return Packed(len(kept), total, len(found) - len(kept))


def unpack(bundle: Path, folder: Path, limit_bytes: int = LIMIT_BYTES) -> None:
    """Bring the caches back into `folder`, with their times. Raises `SnapshotCorrupt` on anything `pack` does not write."""
    left = limit_bytes
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        with tarfile.open(bundle, "r:") as archive:
            for member in archive:
                left -= member.size
                _check(member, left)
                _write(archive, member, folder / member.name)
    except (tarfile.TarError, EOFError, ValueError, KeyError, OverflowError, RecursionError, FileExistsError) as exc:
        raise SnapshotCorrupt(f"{bundle.name} cannot be read.", why=f"{exc}.") from exc


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for name in sorted(set(_CACHES.values())):
        for parent, _, names in os.walk(folder / name):
            for entry in names:
                path = Path(parent, entry)
                with suppress(FileNotFoundError):  # a lock or a draft of a compiler
                    facts = os.lstat(path)
                    if stat.S_ISREG(facts.st_mode):
                        yield path, facts


def _add(archive: tarfile.TarFile, path: Path, name: str, mtime_ns: int) -> None:
    """Name, content and time, which tar itself would round; no owner and no mode."""
    with path.open("rb") as file:
        member = tarfile.TarInfo(name)
        member.size = os.fstat(file.fileno()).st_size
        member.pax_headers = {_MTIME: str(mtime_ns)}
        archive.addfile(member, file)


def _check(member: tarfile.TarInfo, left: int) -> None:
    path = PurePosixPath(member.name)
    inside = len(path.parts) > 1 and path.parts[0] in _CACHES.values() and ".." not in path.parts
    if not member.isreg() or member.issparse() or not inside or str(path) != member.name or member.size < 0 or left < 0:
        raise SnapshotCorrupt(
            f"{BUNDLE} holds {member.name!r}.", why="It is no plain file of a cache, or more than a bundle may hold."
        )


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    source = archive.extractfile(member)
    assert source is not None
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        shutil.copyfileobj(source, file)
    mtime_ns = int(member.pax_headers[_MTIME])
    os.utime(path, ns=(mtime_ns, mtime_ns))
