"""Process snapshots through CRIU: find one that works, dump a process, and the command that restores it.

A process that can be dumped waits at its snapshot point with four pipes as descriptors 0 to 3 (orders
in, output, errors, status out) and nothing else open that leads outside: see `adapter.runtime.model`.
On restore the pipes are replaced by the new replica's. CRIU's own log stays in the folder when it fails.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter.errors import SnapshotCorrupt, SnapshotError
from adapter.keys import ENV_CRIU
from adapter.replica import private_criu
from adapter.snapshot.image import MEMORY_FILE, MEMORY_NAME

PIPE_DESCRIPTORS = 4
"""Descriptors 0 to 3 of a dumped process are pipes that its next parent supplies."""

_RIGHTS = ("--unprivileged",)
"""As root too: CAP_CHECKPOINT_RESTORE is all that is ever needed, so that is what is used everywhere."""

_KERNEL_FACTS = "criu.kdat"
_RUNTIME_DIR = "XDG_RUNTIME_DIR"
"""Where CRIU looks for the file above: what it found out about the kernel, which takes it 25 ms.

It keeps the file on a tmpfs only, of which a container gets a fresh one each time. A snapshot fits one kernel
and so may carry it.
"""

_MEMORY_DIR = "/dev/shm"  # noqa: S108  # a tmpfs everywhere

_CHECK_TIMEOUT_S = 20.0
_DUMP_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Criu:
    """A CRIU that works here."""

    path: str
    version: str

    def command(self, verb: str, images: Path, *options: str) -> list[str]:
        return [self.path, verb, "--images-dir", str(images), "--shell-job", "-v1", *_RIGHTS, *options]


def candidates(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Paths where a CRIU may be, best first. A path that the user names is the only one."""
    if environ.get(ENV_CRIU):
        return [environ[ENV_CRIU]]
    installed = shutil.which("criu", path=environ.get("PATH"))
    places = [private_criu(environ), "/opt/gpufn/criu/criu", installed]
    return [place for place in places if place and os.access(place, os.X_OK)]


def find_criu(environ: Mapping[str, str] = os.environ) -> Criu:
    """The first CRIU that passes its own check on this kernel, found by trying it, never by its version.

    Raises `SnapshotError` naming each that was tried and what it said.
    """
    tried = []
    for path in candidates(environ):
        said = _run([path, "check", *_RIGHTS], _CHECK_TIMEOUT_S)
        if said is None or (said.returncode != 0 and not _misses_nothing(said.stderr)):
            tried.append(f"{path}: {_last_line(said.stderr) if said else 'does not run'}")
            continue
        version = _run([path, "--version"], _CHECK_TIMEOUT_S)
        words = version.stdout.split() if version else []
        return Criu(path, words[1] if len(words) > 1 else "unknown")
    raise SnapshotError(
        "No working CRIU here: functions start without process snapshots.",
        why="; ".join(tried) if tried else "None is installed.",
        hint="Install a private one with: make criu",
        code="criu-missing",
    )


def _misses_nothing(said: str) -> bool:
    """Whether a check failed only for a file that containers cannot write, and no restore here needs.

    CRIU asks the kernel for a process id with `clone3`; the file is its way on kernels before 5.5.
    """
    errors = [line for line in said.splitlines() if line.startswith("Error ")]
    return bool(errors) and all("ns_last_pid" in line for line in errors)


def _run(
    command: Sequence[str], timeout_s: float, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str] | None:
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            env=environment,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no output"


@dataclass(frozen=True, slots=True)
class ProcessFacts:
    """What the manifest of a process snapshot says beside its files."""

    criu: str
    """Path of the CRIU that dumped it, and restores it."""
    criu_version: str
    pid: int
    """Of the process, in its own pid namespace."""
    pipes: tuple[str, ...]
    """Names of its descriptors 0 to 3, which a restore replaces."""
    mapped_bytes: int
    copied_bytes: int
    weights: str = ""
    """Key of the weight snapshot that it maps, or gave up."""
    weights_left_out: bool = False
    """It gave its weights up before the dump: they are brought back after a restore."""
    keeps_addresses: bool = False
    """On a GPU they come back to reserved addresses."""
    gpu: str = ""
    """Where its GPU memory was, which the driver brings back after a restore; empty: it has none."""

    rights: int = 0
    """Its capabilities, as a mask: a restore needs to have them."""

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> ProcessFacts:
        """Raises `SnapshotCorrupt` for anything that no dump here has written."""
        try:
            known = cls(**{**facts, "pipes": tuple(facts["pipes"])})
        except (KeyError, TypeError) as exc:
            raise SnapshotCorrupt("The manifest does not describe a process.", why=f"{exc!r}.") from exc
        texts = (known.criu, known.criu_version, known.weights, known.gpu, *known.pipes)
        numbers = (known.pid, known.mapped_bytes, known.copied_bytes, known.rights)
        if (
            not all(isinstance(text, str) for text in texts)
            or not all(type(number) is int and number >= 0 for number in numbers)
            or not 1 < known.pid < 2**22
            or len(known.pipes) != PIPE_DESCRIPTORS
        ):
            raise SnapshotCorrupt("The manifest does not describe a process.", why="A value is of the wrong kind.")
        return known


def dump(criu: Criu, pid: int, images: Path) -> list[str]:
    """Dump the process `pid`, which ends with that, into the empty folder `images`.

    Returns the names of its four pipes, in order, which a restore must replace. Raises `SnapshotError`
    with CRIU's last words.
    """
    pipes = []
    for descriptor in range(PIPE_DESCRIPTORS):
        target = os.readlink(f"/proc/{pid}/fd/{descriptor}")
        if not target.startswith("pipe:["):
            raise SnapshotError(f"Descriptor {descriptor} of the process is {target}, not a pipe.", code="not-dumpable")
        pipes.append(target)
    log = images / "dump.log"
    command = criu.command("dump", images, "--tree", str(pid), "--log-file", log.name)
    with tempfile.TemporaryDirectory(prefix="gpufn-", dir=_MEMORY_DIR if os.path.isdir(_MEMORY_DIR) else None) as found:
        done = _run(command, _DUMP_TIMEOUT_S, {**os.environ, _RUNTIME_DIR: found})
        with suppress(FileNotFoundError):  # none where that folder is no tmpfs: each restore finds out anew
            shutil.copyfile(Path(found) / _KERNEL_FACTS, images / _KERNEL_FACTS)
    if done is None:
        raise SnapshotError(f"CRIU did not finish its dump in {_DUMP_TIMEOUT_S:.0f} s.", code="dump-timeout")
    if done.returncode != 0:
        raise SnapshotError(
            "CRIU could not dump the process.",
            why=error_lines(log) or f"It ended with code {done.returncode}.",
            hint="See which files, sockets and processes `load` leaves open; `before_snapshot` can close them.",
            code="dump-failed",
        )
    return pipes


def restore_command(
    criu_path: str, images: Path, pipes: Sequence[str], descriptors: Sequence[int], memory: int, *, log: Path
) -> list[str]:
    """The command that restores `images` and leaves the process to its caller's process-id namespace.

    `descriptors` are the caller's pipe ends that take the places of `pipes`; `memory` is an open
    descriptor of the memory file, or -1 where the image has none. The command must inherit them all.
    """
    criu = Criu(criu_path, "")
    options = ("--restore-detached", "--work-dir", str(log.parent), "--log-file", log.name)
    command = criu.command("restore", images, *options)
    for name, descriptor in zip(pipes, descriptors, strict=True):
        command += ["--inherit-fd", f"fd[{descriptor}]:{name}"]
    if memory >= 0:
        command += ["--inherit-fd", f"fd[{memory}]:{MEMORY_NAME}"]
    return command


def restore_environment(environ: Mapping[str, str], images: Path) -> dict[str, str]:
    """The variables of CRIU itself; the restored process has those it was dumped with."""
    return {**environ, _RUNTIME_DIR: str(images)}


def open_memory(images: Path) -> int:
    """A descriptor of the image's memory file for `restore_command`; -1 where it has none."""
    try:
        return os.open(images / MEMORY_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1


def error_lines(log: Path, limit: int = 3) -> str:
    """The last errors of a CRIU log as one line, without the harmless one about RLIMIT_NOFILE."""
    try:
        lines = log.read_text(errors="replace").splitlines()
    except OSError:
        return ""
    errors = [line.split("Error ", 1)[1] for line in lines if "Error " in line and "RLIMIT_NOFILE" not in line]
    return "; ".join(error.strip() for error in errors[:limit])


def raise_process_ids(least: int) -> None:
    """Make the next process of this namespace have an id of `least` or more.

    A restored process takes the id it was dumped with, so it must not be one that a fresh namespace
    gives out first. Writes the kernel's counter, or where that is read-only uses ids up until it is reached:
    threads take them from the same row as processes, and cost a tenth.
    """
    try:
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(least - 1))
        return
    except OSError:
        pass
    used: list[int] = []
    for _ in range(least):
        thread = threading.Thread(target=lambda: used.append(threading.get_native_id()))
        thread.start()
        thread.join()
        if used[-1] >= least:
            return


def kernel() -> str:
    """Release of the running kernel, part of a snapshot's identity."""
    return platform.release()
