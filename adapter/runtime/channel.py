"""Messages between entrypoint and model process: JSON and file descriptors over a Unix socket.

SOCK_SEQPACKET keeps messages apart; SCM_RIGHTS carries sockets (the listener, accepted connections).
The path is in the replica's private folder, and the model process connects after it was restored, so
that a process dump never meets this socket.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

MAX_DESCRIPTORS = 200
"""Descriptors in one message; the kernel allows 253 (SCM_MAX_FD)."""

_MESSAGE_BYTES = 128 * 1024
_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


class Channel:
    """One end of the conversation. `receive` returns ``({}, [])`` once the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock

    @classmethod
    def connect(cls, path: str) -> Channel:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.connect(path)
        return cls(sock)

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """False when the other end is gone. At most `MAX_DESCRIPTORS` descriptors."""
        try:
            socket.send_fds(self._socket, [json.dumps(message).encode()], list(descriptors))
        except OSError:
            return False
        return True

    def receive(self) -> tuple[dict[str, Any], list[int]]:
        """The next message; blocks where the socket does."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, MAX_DESCRIPTORS)
        except BlockingIOError:
            raise
        except OSError:
            return {}, []
        if not data:
            return {}, []
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        message: dict[str, Any] = json.loads(data)
        return message, descriptors

    def close(self) -> None:
        self._socket.close()


def listen(path: str) -> socket.socket:
    """A listening socket at `path` (at most 107 bytes) that only this user can connect to."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    old = os.umask(0o177)
    try:
        sock.bind(path)
    finally:
        os.umask(old)
    sock.listen(4)
    sock.setblocking(False)
    return sock


def peer_pid(connection: socket.socket) -> int:
    """The process that connected, as the kernel had it then: it may be gone (unix(7), SO_PEERCRED)."""
    pid, _, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(pid)
