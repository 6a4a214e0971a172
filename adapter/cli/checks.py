"""What `gpufn doctor` looks at. Each check tries the thing itself and says what it found, never just a version.

A check fails (✗) where `gpufn up` cannot work, and warns (!) where it works with less: a slower start, no GPU.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from adapter.errors import SnapshotError
from adapter.units import format_size

if TYPE_CHECKING:
    from adapter.gpu.capabilities import Capabilities

_LEAST_DISK_BYTES = 2**30
_ENOUGH_DISK_BYTES = 10 * 2**30
"""An environment with torch takes 5 GiB, and snapshots up to 20 GiB."""

_ENOUGH_FILES = 4096
"""Held requests are open sockets, 500 of them twice."""


_LIMITS = {
    "virtual": "not with torch's expandable segments",
    "managed": "not with managed memory",
    "remap": "each wakes on its own GPU only",
}
"""What else is tried (`adapter.gpu.capabilities.Feature`), and what it means that it does not work."""


class Verdict(str, Enum):
    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check. `fix` is a command or a sentence; empty where there is nothing to do."""

    name: str
    verdict: Verdict
    reason: str
    fix: str = ""

    def to_json(self) -> dict[str, str]:
        return {"name": self.name, "verdict": self.verdict.value, "reason": self.reason, "fix": self.fix}


def ok(name: str, reason: str) -> Finding:
    return Finding(name, Verdict.OK, reason)


def warning(name: str, reason: str, fix: str = "") -> Finding:
    return Finding(name, Verdict.WARNING, reason, fix)


def failed(name: str, reason: str, fix: str = "") -> Finding:
    return Finding(name, Verdict.FAILED, reason, fix)


Check: TypeAlias = Callable[[], "Finding | list[Finding]"]


def all_checks(state: Path, port: int) -> list[Check]:
    """The checks in the order in which they are shown."""
    return [
        check_python,
        check_system,
        check_installer,
        check_namespaces,
        check_resume,
        check_restore,
        check_secrets_path,
        check_gpus,
        lambda: check_parking(state),
        check_open_files,
        lambda: check_state(state),
        lambda: check_disk(state),
        lambda: check_snapshots(state),
        lambda: check_port(port, state),
    ]


def check_python() -> Finding:
    return ok("python", f"{platform.python_version()}; functions get the same")


def check_system() -> Finding:
    system = platform.system()
    if system == "Linux":
        return ok("system", f"Linux {platform.release()} on {platform.machine()}")
    return failed("system", f"{system}: replicas need Linux", "Use a Linux machine, virtual or real.")


def check_installer() -> Finding:
    if find_spec("uv") is not None or shutil.which("uv"):
        return ok("uv", "builds functions' environments, packages shared between them")
    if find_spec("ensurepip") is not None:
        return warning("uv", "not found: pip builds environments, slower and each with its own copy", "pip install uv")
    return failed("uv", "neither uv nor pip can build functions' environments", "pip install uv")


def check_namespaces() -> Finding:
    from adapter.hosts.shell import Isolation

    isolation = Isolation.find()
    if not isolation.wrapper:
        return warning(
            "namespaces",
            f"none ({isolation.why_not}): no process snapshots, and strays are ended one by one",
            "Run as root, or allow user namespaces: sysctl -w kernel.unprivileged_userns_clone=1",
        )
    if "--user" in isolation.wrapper:
        return ok("namespaces", "process ids, inside a user namespace")
    return ok("namespaces", "process ids and mounts")


def check_resume() -> Finding:
    """The `resume` rung: a process that is stopped keeps its memory and goes on."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.DEVNULL) as process:
        try:
            os.kill(process.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED)
            os.kill(process.pid, signal.SIGCONT)
            os.waitid(os.P_PID, process.pid, os.WCONTINUED | os.WEXITED)
        finally:
            process.kill()
    return ok("resume", "idle replicas are frozen and wake in milliseconds")


def check_restore() -> Finding:
    """The `restore` rung: CRIU, tried on this kernel."""
    from adapter.snapshot.process import find_criu

    try:
        criu = find_criu()
    except SnapshotError as error:
        why = error.why[:1].lower() + error.why[1:].rstrip(".")
        fix = "`make criu` where gpufn was cloned, or CRIU 4.1 or newer of your own (GPUFN_CRIU names one elsewhere)."
        return warning("restore", f"no CRIU works here: {why}; functions start without process snapshots", fix)
    return ok("restore", f"CRIU {criu.version} works on this kernel ({criu.path})")


def check_secrets_path() -> Finding:
    from adapter.hosts.shell import Isolation
    from adapter.keys import SECRETS_PATH

    if Isolation.find().shows_secrets:
        return ok("secrets", f"each replica sees its own in {SECRETS_PATH}")
    return warning("secrets", f"handlers cannot read {SECRETS_PATH}; `context.secret(name)` works", "Run as root.")


def check_gpus() -> list[Finding]:
    """One finding a GPU, or MIG slice; or one that says why there is none."""
    from adapter.hosts.inventory import read_inventory

    inventory = read_inventory()
    if not inventory.devices:
        return [warning("gpu", f"{inventory.why_not.rstrip('.')}: functions run on the CPU", "nvidia-smi")]
    findings = []
    for number, gpu in enumerate(inventory.devices):
        said = f"{gpu.model}, {format_size(gpu.memory_bytes)}, {gpu.uuid}; driver {inventory.driver}"
        if gpu.uuid in inventory.asleep:
            said += "; without persistence mode each first process waits seconds for it"
            findings.append(warning(f"gpu {number}", said, "nvidia-smi -pm 1"))
        else:
            findings.append(ok(f"gpu {number}", said))
    return findings


def check_parking(state: Path) -> list[Finding]:
    """What a process may use on the GPUs here and still be parked: tried, which takes a minute the first time.

    Process snapshots of GPU functions are taken of parked processes, so they rest on the same.
    """
    from adapter.gpu.capabilities import Capabilities
    from adapter.hosts.capabilities import try_gpus

    try:
        said = try_gpus(state / "gpu")
        if "error" in json.loads(said):
            return []  # there is no GPU, and `check_gpus` has said why
        return [_parking(Capabilities.from_json(said))]
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as exc:
        return [warning("parking", f"it could not be tried what works on the GPUs: {exc!r}", "nvidia-smi")]


def _parking(found: Capabilities) -> Finding:
    from adapter.gpu.capabilities import Feature

    plain = found.verdicts[Feature.PLAIN]
    where = "" if len(set(found.identity["gpus"].split(", "))) == 1 else " (tried on the first GPU)"
    if plain.works is None:
        return warning("parking", f"it could not be tried{where}: {plain.reason}", plain.hint or "nvidia-smi")
    if not plain.works:
        said = f"processes cannot be parked{where}: {plain.reason} Idle functions keep their GPU until they are stopped, and no process snapshots are taken of them"
        return warning("parking", said, plain.hint)
    limits = [said for feature, said in _LIMITS.items() if not found.works(Feature(feature))]
    said = "; ".join(["idle functions give their GPU memory back, and process snapshots can be taken of them", *limits])
    return ok("parking", f"{said}{where}")


def check_open_files() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= _ENOUGH_FILES:
        return ok("open files", f"{'no limit' if soft == resource.RLIM_INFINITY else f'up to {soft}'}")
    return warning("open files", f"at most {soft}: bursts of held requests need more", f"ulimit -n {_ENOUGH_FILES}")


def check_state(state: Path) -> Finding:
    place = _existing(state)
    if not os.access(place, os.W_OK | os.X_OK):
        return failed("state", f"{place} is not writable", "Choose another folder: --state FOLDER, or GPUFN_HOME.")
    if place == state and state.stat().st_mode & 0o077:
        return warning("state", f"{state} is open to other users: snapshots hold memory", f"chmod 700 {state}")
    return ok("state", f"{state}" if place == state else f"{state} will be made")


def check_disk(state: Path) -> Finding:
    free = shutil.disk_usage(_existing(state)).free
    said = f"{format_size(free)} free for environments and snapshots"
    if free < _LEAST_DISK_BYTES:
        return failed("disk", said, "Make room, or choose another folder: --state FOLDER.")
    return warning("disk", said, "gpufn snapshot prune -A") if free < _ENOUGH_DISK_BYTES else ok("disk", said)


def check_snapshots(state: Path) -> Finding:
    from adapter.cli.kept import kept
    from adapter.snapshot.store import Store

    found = kept(Store(state / "snapshots"))
    damaged = [item for item in found if item.snapshot is None]
    if damaged:
        said = f"{len(damaged)} of {len(found)} damaged and not used: {damaged[0].damage}"
        return warning("snapshots", said, "gpufn snapshot prune -A")
    size = format_size(sum(item.size_bytes for item in found))
    return ok("snapshots", f"{len(found)} ({size}), sizes and owners as published" if found else "none yet")


def check_port(port: int, state: Path) -> Finding:
    from adapter.hosts.ports import listener_on

    who = listener_on(port)
    if not who:
        return ok(f"port {port}", "free")
    if who.split()[1] == _holder(state):
        return ok(f"port {port}", f"gpufn up runs there (process {who.split()[1]})")
    return warning(f"port {port}", f"{who} listens on it", f"gpufn up --port {port + 1}")


def _holder(state: Path) -> str:
    try:
        return (state / "lock").read_text()
    except OSError:
        return ""


def _existing(path: Path) -> Path:
    """The nearest folder that exists."""
    while not path.exists():
        path = path.parent
    return path
