"""``python -m adapter.runtime``: the entrypoint of a function image or folder."""

import time

BEGAN_NS = time.monotonic_ns()

import importlib  # noqa: E402  # the clock starts before anything is imported
import json  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402
from typing import NoReturn  # noqa: E402

from adapter.errors import AdapterError  # noqa: E402
from adapter.replica import (  # noqa: E402
    RESULT_VARIABLE,
    STANDBY_VARIABLE,
    TASK_SNAPSHOT,
    TASK_VARIABLE,
    ReplicaSettings,
)
from adapter.runtime.port import STOP_SIGNALS, listen  # noqa: E402

_ENTRYPOINT = "adapter.runtime.entrypoint"
_ORDERS_LIMIT_BYTES = 4 * 2**20


def main() -> int:
    """Exit code of the replica: 0 drained, 3 settings that cannot be used, 5 a port that is taken."""
    environ, began_ns = dict(os.environ), BEGAN_NS
    if STANDBY_VARIABLE in environ:
        importlib.import_module(_ENTRYPOINT)  # while nobody waits
        environ = _await_orders(environ[STANDBY_VARIABLE])
        began_ns = time.monotonic_ns()
        if not environ:
            return 0  # whoever kept us waiting is gone
    # The first process of a container never sees what comes before it has a handler: it is to wait until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    if environ.get(TASK_VARIABLE) == TASK_SNAPSHOT:
        _become_snapshotter(environ)
    try:
        settings = ReplicaSettings.from_env(environ)
    except AdapterError as error:
        print(f"gpufn: {error.message} {error.why} {error.hint}", file=sys.stderr)
        return error.exit_code
    try:
        listener = listen(settings)
    except OSError as error:
        print(f"gpufn: port {settings.port} cannot be used: {error.strerror}. Set PORT to another.", file=sys.stderr)
        return 5
    entrypoint = importlib.import_module(_ENTRYPOINT)  # most of the imports, with requests arriving already
    code: int = entrypoint.Entrypoint(settings, environ, began_ns, listener).run()
    return code


def _await_orders(standby: str) -> dict[str, str]:
    """The environment to run with, once a host needs this entrypoint; empty when it never will."""
    if standby.startswith("/"):
        return _ask_for_orders(standby)
    line_fd, events_fd = map(int, standby.split())
    with socket.socket(fileno=os.dup(line_fd)) as line:
        orders = _receive_orders(line)
    return orders and orders | _descriptors(line_fd, events_fd)


def _ask_for_orders(path: str) -> dict[str, str]:
    """Of a host outside of our container: what it says goes over what the image says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        try:
            line.connect(path)
        except OSError as error:
            print(f"gpufn: no host answers at {path}: {error.strerror}.", file=sys.stderr)
            return {}
        orders = _receive_orders(line)
        kept = line.detach() if orders else -1
    image = {name: value for name, value in os.environ.items() if name != STANDBY_VARIABLE}
    return orders and image | orders | _descriptors(kept, kept)


def _receive_orders(line: socket.socket) -> dict[str, str]:
    data, descriptors, _, _ = socket.recv_fds(line, _ORDERS_LIMIT_BYTES, 1)
    while not data.endswith(b"\n"):
        more = line.recv(_ORDERS_LIMIT_BYTES) if data else b""
        if not more:
            return {}
        data += more
    environ: dict[str, str] = json.loads(data)
    if descriptors:
        environ["GPUFN_LISTEN_FD"] = str(descriptors[0])
    return environ


def _become_snapshotter(environ: dict[str, str]) -> NoReturn:
    """In a container that was started for it. What it has to say goes to who asked, what functions print does not."""
    if "GPUFN_EVENTS_FD" in environ:
        os.dup2(int(environ.pop("GPUFN_EVENTS_FD")), 1)
        os.close(int(environ.pop("GPUFN_COMMANDS_FD")))
    elif RESULT_VARIABLE in environ:
        os.dup2(os.open(environ[RESULT_VARIABLE], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
    os.execve(sys.executable, [sys.executable, "-m", "adapter.runtime.snapshotter"], environ)


def _descriptors(commands_fd: int, events_fd: int) -> dict[str, str]:
    return {"GPUFN_COMMANDS_FD": str(commands_fd), "GPUFN_EVENTS_FD": str(events_fd)}


if __name__ == "__main__":
    sys.exit(main())
