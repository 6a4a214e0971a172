"""What works with this driver, GPU and interpreter, found by trying it: no list of versions says it.

    python -m adapter.gpu.capabilities FOLDER      verdicts as one JSON line; kept in FOLDER for the next time

For each feature a canary (`canary`) is parked and resumed, in a process group of its own that is killed at its
time limit: a driver that cannot do it may refuse, lose the process, or hang.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from adapter.errors import AdapterError, GpuError
from adapter.files import write_whole
from adapter.gpu.checkpoint import full_mapping
from adapter.gpu.client import HelperClient, HelperProcess, start_helper
from adapter.gpu.inventory import Inventory, take_inventory
from adapter.gpu.wire import Operation

_LIMIT_S = 60.0
"""For each of a canary's steps. They take a few seconds where they do not hang."""

_FORMAT = 1


class Feature(str, Enum):
    """What a function's process may use and still be parked."""

    PLAIN = "plain"
    """Memory of cuMemAlloc, which is what torch uses by default."""
    VIRTUAL = "virtual"
    """Memory of cuMemCreate and cuMemMap: torch's expandable segments."""
    MANAGED = "managed"
    REMAP = "remap"
    """Resuming with a mapping of GPUs: onto another one of the same kind, where there is one."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """`works` is None where it could not be tried: the GPU was full, the canary did not start."""

    works: bool | None
    code: str = ""
    reason: str = ""
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """`identity`: what the verdicts depend on; with another one they are found anew."""

    identity: dict[str, str]
    verdicts: dict[Feature, Verdict]

    def works(self, feature: Feature) -> bool:
        return bool(self.verdicts[feature].works)

    def to_json(self) -> str:
        verdicts = {feature.value: asdict(verdict) for feature, verdict in self.verdicts.items()}
        return json.dumps({"format": _FORMAT, "identity": self.identity, "verdicts": verdicts})

    @classmethod
    def from_json(cls, text: str) -> Capabilities:
        """Raises `ValueError`, `KeyError`, `TypeError` for what `to_json` does not make."""
        data = json.loads(text)
        if data["format"] != _FORMAT:
            raise ValueError("another format")
        return cls(data["identity"], {feature: Verdict(**data["verdicts"][feature.value]) for feature in Feature})


def find_capabilities(folder: Path, environ: Mapping[str, str] = os.environ) -> Capabilities:
    """Those kept in `folder` for this machine and interpreter, or else found now, which takes some seconds.

    Verdicts are kept only when all features could be tried. Raises `GpuError` where there is no GPU, `OSError`.
    """
    inventory = take_inventory()
    identity = _identity(inventory)
    path = folder / f"gpu-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # none yet, or damaged
        kept = Capabilities.from_json(path.read_text())
        if kept.identity == identity:
            return kept
    found = Capabilities(identity, try_all(inventory, environ))
    if all(verdict.works is not None for verdict in found.verdicts.values()):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, found.to_json().encode())
    return found


def _identity(inventory: Inventory) -> dict[str, str]:
    return {
        "driver": inventory.driver_version,
        "gpus": ", ".join(f"{gpu.name}{' MIG' if gpu.mig else ''}" for gpu in inventory.gpus),
        "cuda-bindings": _version("cuda-bindings"),
        "torch": _version("torch"),
    }


def _version(package: str) -> str:
    """Without importing it: torch would take a second."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def try_all(inventory: Inventory, environ: Mapping[str, str], limit_s: float = _LIMIT_S) -> dict[Feature, Verdict]:
    """Each feature with a canary and a helper of its own, so that none suffers from another's hang."""
    verdicts = {}
    for feature in Feature:
        with (
            tempfile.TemporaryDirectory(prefix="gpufn-") as folder,
            start_helper(f"{folder}/helper", environ=environ) as helper,
        ):
            verdicts[feature] = _try(feature, helper, inventory, environ, limit_s)
    return verdicts


def _try(
    feature: Feature, helper: HelperProcess, inventory: Inventory, environ: Mapping[str, str], limit_s: float
) -> Verdict:
    canary = _Canary("plain" if feature is Feature.REMAP else feature.value, environ)
    try:
        uuid = canary.hear(limit_s)
        if not uuid.startswith("GPU-"):
            return Verdict(None, "canary-failed", f"The canary did not start: {uuid or 'no word'}.")
        mapping = _mapping(uuid, inventory) if feature is Feature.REMAP else {}
        with helper.connect() as client:
            refused = _park_and_resume(client, canary, mapping, limit_s)
        if refused is not None:
            return Verdict(False, refused.code, refused.why, refused.hint)
        canary.tell()
        said = canary.hear(limit_s)
        return Verdict(True) if said == "same" else Verdict(False, "bytes-changed", f"Its memory is {said or 'gone'}.")
    except GpuError as error:  # no answer
        return Verdict(False, error.code, error.why, error.hint)
    finally:
        canary.end()


def _park_and_resume(
    client: HelperClient, canary: _Canary, mapping: Mapping[str, str], limit_s: float
) -> GpuError | None:
    for operation in (Operation.PARK, Operation.RESUME):
        goes = mapping if operation is Operation.RESUME else {}
        answer = client.ask(operation, canary.pidfd, mapping=goes, limit_s=limit_s)
        if answer.error is not None:
            return answer.error
    return None


def _mapping(uuid: str, inventory: Inventory) -> dict[str, str]:
    """Onto another GPU of the same kind if there is one, else a mapping that changes nothing."""
    here = next((gpu for gpu in inventory.gpus if gpu.uuid == uuid), None)
    others = [gpu.uuid for gpu in inventory.gpus if here and gpu.name == here.name and gpu.uuid != uuid]
    return full_mapping({uuid: others[0] if others else uuid}, [gpu.uuid for gpu in inventory.gpus])


class _Canary:
    """The process, in a group of its own."""

    def __init__(self, kind: str, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adapter.gpu.canary", kind],
            env=dict(environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pidfd = os.pidfd_open(self._process.pid)

    def tell(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()

    def hear(self, limit_s: float) -> str:
        """Its next word; empty when it says none in time, or has ended."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            return ""
        return self._process.stdout.readline().decode(errors="replace").strip()

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()
        os.close(self.pidfd)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and the canary is ended on the way out
    try:
        print(find_capabilities(Path(sys.argv[1])).to_json())
    except AdapterError as error:
        print(json.dumps(error.to_json()))
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
