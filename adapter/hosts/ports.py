"""Listening sockets, and who has a port that is taken."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

from adapter.errors import Conflict

BACKLOG = 1024
"""Connections that may wait to be accepted."""

_LISTENING = "0A"


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `Conflict` saying by whom a port is used."""
    try:
        listener = socket.create_server((host, port), backlog=BACKLOG)
    except OSError as exc:
        raise port_conflict(host, port, exc) from exc
    # Connections inherit it. Without it an answer's body waits 40 ms for the acknowledgement of its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def port_conflict(host: str, port: int, error: OSError) -> Conflict:
    """The error of a port that cannot be listened on."""
    who = listener_on(port)
    return Conflict(
        f"Port {port} on {host} cannot be used.",
        why=f"{who} listens on it." if who else f"{error.strerror}.",
        hint="Stop that, or choose another with --port.",
        code="port-in-use",
    )


def listener_on(port: int) -> str:
    """``Process 123 (name)`` that listens on a TCP port, where /proc lets us see it; else empty."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTENING and int(words[1].rsplit(":", 1)[1], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    if not inodes:
        return ""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # ended meanwhile, or another user's
            if any(str(fd.readlink()) in inodes for fd in (process / "fd").iterdir()):
                return f"Process {process.name} ({(process / 'comm').read_text().strip()})"
    return ""
