"""What a host tells a replica's entrypoint, as environment variables both sides read from here.

A host is whoever starts a function image or folder: `gpufn up`, a container engine, a kubelet.
Every value has a default that suits an image started by hand, so that `docker run` alone works.
The names of of-watchdog (``exec_timeout``, ``max_inflight`` …) and Knative (``PORT``) are honoured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from adapter.errors import ConfigError
from adapter.keys import ENV_PREFIX, SECRETS_PATH, SNAPSHOT_PATH
from adapter.units import parse_duration_s, parse_size_bytes


def _switch(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off", ""}:
        return False
    raise ValueError("true or false")


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError("a whole number, zero or more")
    return int(text)


def _port(text: str) -> int:
    """Of ``8080``, or of an address as func gives it: ``[::]:8080``."""
    number = text.rpartition(":")[2]
    if not number.isdecimal() or int(number) > 65535:
        raise ValueError("a whole number like 8080, or an address like [::]:8080")
    return int(number)


def _when(text: str) -> str:
    if text not in {"auto", "on", "off"}:
        raise ValueError("auto, on or off")
    return text


def _whose(text: str) -> str:
    if text not in {"held", "asked"}:
        raise ValueError("held or asked")
    return text


def _taker(text: str) -> str:
    if text not in {"replica", "host"}:
        raise ValueError("replica or host")
    return text


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.replace(",", " ").split() if word)


def _variable(names: str, parse: Callable[[str], Any], default: Any, doc: str) -> Any:
    """A field read from the first of `names` (space-separated) that is set."""
    return field(default=default, metadata={"names": tuple(names.split()), "parse": parse, "doc": doc})


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """One replica's settings. Times in seconds, sizes in bytes, descriptors as numbers (-1: none)."""

    function: str = _variable("GPUFN_FUNCTION OPENFAAS_NAME K_SERVICE", str, "function", "name of the function")
    namespace: str = _variable("GPUFN_NAMESPACE OPENFAAS_NAMESPACE", str, "openfaas-fn", "its namespace")
    revision: str = _variable("GPUFN_REVISION K_REVISION", str, "1", "image and configuration, made unique")
    replica: str = _variable("GPUFN_REPLICA HOSTNAME", str, "replica", "name of this replica")
    folder: str = _variable("GPUFN_FOLDER", str, "/function", "function folder: handler.py and its neighbours")
    python: str = _variable("GPUFN_PYTHON", str, "", "interpreter with the function's packages; empty: our own")
    runtime_dir: str = _variable("GPUFN_RUNTIME_DIR", str, "", "private folder of this replica; empty: a temporary one")
    snapshot_dir: str = _variable(
        "GPUFN_SNAPSHOT_DIR",
        str,
        "",
        f"snapshot store; empty: no snapshots; not set: {SNAPSHOT_PATH} where that is mounted and can be written",
    )
    snapshot_limit_bytes: int = _variable(
        "GPUFN_SNAPSHOT_LIMIT", parse_size_bytes, 20 * 2**30, "the store is kept below this, least recently used first"
    )
    snapshot_by: str = _variable(
        "GPUFN_SNAPSHOT_BY", _taker, "replica", "who takes process snapshots; host: it is told when one is due"
    )
    secrets_dir: str = _variable("GPUFN_SECRETS_DIR secret_mount_path", str, SECRETS_PATH, "folder of secret files")
    port: int = _variable("PORT GPUFN_PORT port LISTEN_ADDRESS", _port, 8080, "where requests arrive, on every address")
    listen_fd: int = _variable("GPUFN_LISTEN_FD", int, -1, "a listening socket to use instead of `port`")
    metrics_port: int = _variable("GPUFN_METRICS_PORT", _count, 8081, "Prometheus metrics; 0: none")
    events_fd: int = _variable("GPUFN_EVENTS_FD", int, -1, "events go here as JSON lines; none: to standard output")
    commands_fd: int = _variable("GPUFN_COMMANDS_FD", int, -1, "commands come from here; its end stops the replica")
    in_flight: int = _variable("GPUFN_IN_FLIGHT max_inflight", _count, 8, "requests handled at once (threads)")
    queue: int = _variable("GPUFN_QUEUE", _count, 100, "requests that may wait for a thread; more get 429")
    held: int = _variable("GPUFN_HELD", _count, 1000, "requests that may wait for a start; more get 503")
    body_limit_bytes: int = _variable("GPUFN_BODY_LIMIT", parse_size_bytes, 16 * 2**20, "larger bodies get 413")
    start_timeout_s: float = _variable(
        "GPUFN_START_TIMEOUT", parse_duration_s, 300.0, "a start that takes longer fails"
    )
    exec_timeout_s: float = _variable("exec_timeout GPUFN_EXEC_TIMEOUT", parse_duration_s, 30.0, "one request; 0: none")
    read_timeout_s: float = _variable("read_timeout", parse_duration_s, 30.0, "reading one request")
    write_timeout_s: float = _variable("write_timeout", parse_duration_s, 30.0, "writing one answer; drain bound")
    healthcheck_interval_s: float = _variable(
        "healthcheck_interval", parse_duration_s, 0.0, "between SIGTERM and the drain, for load balancers to notice"
    )
    ready_path: str = _variable("ready_path", str, "", "readiness asks the handler at this path")
    suppress_lock: bool = _variable(
        "suppress_lock", _switch, False, "no file .lock in the temporary folder, which exec probes look for"
    )
    log_call_id: bool = _variable("log_callid log_call_id", _switch, False, "log each request's X-Call-Id")
    process_snapshot: str = _variable(
        "GPUFN_PROCESS_SNAPSHOT", _when, "auto", "take and restore process snapshots; auto: where `load` is defined"
    )
    weight_snapshot: str = _variable(
        "GPUFN_WEIGHT_SNAPSHOT", _when, "auto", "keep and map weight snapshots; auto: where `build` is defined"
    )
    weights_dir: str = _variable(
        "GPUFN_WEIGHTS", str, "", "folder of the weights that the image brings; empty: it brings none"
    )
    verify_weights: str = _variable(
        "GPUFN_VERIFY_WEIGHTS", _when, "auto", "compare their checksums: on, at each start; auto, once for each store"
    )
    device: str = _variable(
        "GPUFN_DEVICE", str, "", "device that `load` is given; empty: cuda:0 where there is one, else cpu"
    )
    resume: str = _variable(
        "GPUFN_RESUME", _whose, "held", "a parked process is woken by a held request, or when the host has asked for it"
    )
    gpu_helper: str = _variable(
        "GPUFN_GPU_HELPER", str, "", "socket of the machine's GPU helper; empty: the replica starts its own"
    )
    gpu_capabilities: str = _variable(
        "GPUFN_GPU_CAPABILITIES", str, "", "file with what was found to work on the machine's GPUs; empty: unknown"
    )
    snapshot_env: tuple[str, ...] = _variable(
        "GPUFN_SNAPSHOT_ENV", _words, (), "variables that `load` sees and the snapshot may hold; all others come later"
    )
    tenant: str = _variable("GPUFN_TENANT", str, "default", "whose snapshots: folders are kept apart by tenant")

    def to_env(self, names: Collection[str] | None = None) -> dict[str, str]:
        """The environment that `from_env` reads back to the same settings: all, or those fields that are named."""
        env = {}
        for item in fields(self):
            if names is not None and item.name not in names:
                continue
            value = getattr(self, item.name)
            if isinstance(value, tuple):
                value = ",".join(value)
            elif isinstance(value, bool):
                value = str(value).lower()
            elif isinstance(value, float):
                value = f"{value:.9f}".rstrip("0").rstrip(".")  # never in scientific notation
            env[item.metadata["names"][0]] = str(value)
        return env

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *, mounted: str = SNAPSHOT_PATH) -> ReplicaSettings:
        """Raises `ConfigError` naming the variable, its value and the accepted form.

        `mounted` is the store of who mounts a folder there and sets no variable, as `docker run -v` does.
        """
        _refuse_authentication(environ)
        values: dict[str, Any] = {}
        if os.path.isdir(mounted) and os.access(mounted, os.W_OK | os.X_OK):
            values["snapshot_dir"] = mounted
        for item in fields(cls):
            for name in item.metadata["names"]:
                text = environ.get(name)
                if text is None:
                    continue
                try:
                    values[item.name] = item.metadata["parse"](text)
                except ValueError as exc:
                    raise ConfigError(
                        f"The variable {name}={text!r} cannot be used.",
                        why=f"It says: {item.metadata['doc']}.",
                        hint=f"Accepted: {_accepted(item.metadata['parse'], exc)}.",
                        code="bad-variable",
                    ) from exc
                break
        if values.get("in_flight") == 0:  # of-watchdog's "no limit"; a thread pool needs a number
            values["in_flight"] = 64
        elif "max_inflight" in environ and "GPUFN_IN_FLIGHT" not in environ:
            values.setdefault("queue", 0)  # of-watchdog's limit: what is above it does not wait
        return cls(**values)


def _refuse_authentication(environ: Mapping[str, str]) -> None:
    """A function that was deployed to ask its callers who they are must not serve everybody."""
    text = environ.get("jwt_auth", "")
    if text.lower() in {"1", "true", "yes", "on"}:
        raise ConfigError(
            f"The variable jwt_auth={text!r} cannot be used.",
            why="of-watchdog would ask callers for a token; gpufn does not, and the function would be open to all.",
            hint="Remove it, and let the gateway ask for credentials.",
            code="bad-variable",
        )


def _accepted(parse: Callable[[str], Any], error: ValueError) -> str:
    return "a whole number" if parse is int else str(error)


OWN_VARIABLES = frozenset(name for item in fields(ReplicaSettings) for name in item.metadata["names"])
"""Every variable that configures the entrypoint."""

WATCHDOG_VARIABLES = frozenset(
    {"exec_timeout", "read_timeout", "write_timeout", "healthcheck_interval", "ready_path", "log_callid",
     "log_call_id", "max_inflight"}
)  # fmt: skip
"""Settings of of-watchdog that a deployment may make through its environment; they win over the spec."""

BASE_VARIABLES = frozenset(
    {"PATH", "HOME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "USER", "LOGNAME", "SHELL", "LD_LIBRARY_PATH",
     "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE",
     "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
     "PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED"}
)  # fmt: skip
"""Variables of the machine, which a model process has from its first instruction."""


def user_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The function's own variables: neither the machine's nor the entrypoint's."""
    return {
        name: value
        for name, value in environ.items()
        if name not in OWN_VARIABLES and name not in BASE_VARIABLES and not name.startswith(ENV_PREFIX)
    }


def base_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The machine's variables, without which an interpreter or its libraries behave differently."""
    return {name: value for name, value in environ.items() if name in BASE_VARIABLES}


STANDBY_VARIABLE = "GPUFN_STANDBY"
"""``"<socket> <events>"``: an entrypoint started with it waits on that socket for its environment (one JSON
line) and its listening socket, and takes commands from it afterwards; events go to the other descriptor.
Or the path of a Unix socket: an entrypoint in a container connects to it, gets the same, adds what the image says
where the orders say nothing, and uses the connection for both. Its end is a command too: STOP."""

TASK_VARIABLE, TASK_SNAPSHOT = "GPUFN_TASK", "snapshot"
"""Set for a container that serves nobody: it takes the function's snapshots and ends."""
RESULT_VARIABLE = "GPUFN_RESULT"
"""Such a container's file for what came of it, one JSON line; none: it goes to the host's connection, or is printed."""


class Command:
    """What a host may say to an entrypoint on `commands_fd`: one word a line. The end of the stream is STOP."""

    PARK = b"park\n"
    """Freeze the model process when no request is in flight, and give its GPU memory back; the next request wakes
    it, or on a GPU RESUME does."""
    RESUME = b"resume "
    """Wake it on the GPUs that follow: UUIDs with commas between, in the order of the ones it was parked on. They
    are the replica's from now on, for whatever it starts later too. Said only to parked ones."""
    STOP = b"stop\n"
    """Drain and exit, as SIGTERM does."""

    @classmethod
    def resume(cls, devices: Sequence[str]) -> bytes:
        """The line that wakes a process on `devices`."""
        return cls.RESUME + ",".join(devices).encode() + b"\n"

    @classmethod
    def devices_in(cls, line: bytes) -> tuple[str, ...]:
        """The devices that a RESUME line names."""
        return _words(line.removeprefix(cls.RESUME).decode())


def private_criu(environ: Mapping[str, str]) -> str:
    """Where scripts/install-criu.sh puts a CRIU of one's own, whether or not it has."""
    data = environ.get("XDG_DATA_HOME") or os.path.join(environ.get("HOME", "/root"), ".local/share")
    return os.path.join(data, "gpufn/criu/criu")


def shim_path() -> str:
    """The folder that holds this package: what a function's interpreter needs on its path."""
    return os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
