"""``python -m adapter.runtime``: the entrypoint of a function image or folder."""

import time

BEGAN_NS = time.monotonic_ns()

import importlib  # noqa: E402  # the clock starts before anything is imported
import json  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import sys  # noqa: E402

from adapter.errors import AdapterError  # noqa: E402
from adapter.replica import STANDBY_VARIABLE, ReplicaSettings  # noqa: E402
from adapter.runtime.port import listen  # noqa: E402

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
    line_fd, events_fd = map(int, standby.split())
    with socket.socket(fileno=os.dup(line_fd)) as line:
        data, descriptors, _, _ = socket.recv_fds(line, _ORDERS_LIMIT_BYTES, 1)
        while data and not data.endswith(b"\n"):
            data += line.recv(_ORDERS_LIMIT_BYTES)
    if not data:
        return {}
    environ: dict[str, str] = json.loads(data)
    fixed = {"GPUFN_LISTEN_FD": descriptors[0], "GPUFN_EVENTS_FD": events_fd, "GPUFN_COMMANDS_FD": line_fd}
    return environ | {name: str(number) for name, number in fixed.items()}


if __name__ == "__main__":
    sys.exit(main())
