"""The first thing an entrypoint does: listen, and say so. Imports little, so that it is soon.

What comes before the rest of the entrypoint is imported waits in the kernel's queue of the socket.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import suppress

from adapter.records import Event, EventName
from adapter.replica import ReplicaSettings

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def listen(settings: ReplicaSettings) -> socket.socket:
    """The socket that requests arrive on: the host's, or one of our own. Raises `OSError`."""
    if settings.listen_fd >= 0:
        listener = socket.socket(fileno=settings.listen_fd)
    else:
        listener = socket.create_server(("0.0.0.0", settings.port), backlog=1024)  # noqa: S104
        # Inherited by connections: without it, small answers on kept ones wait for the client's delayed ACK.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    say(events_fd(settings), Event(EventName.LISTENING, time.time_ns(), {"port": listener.getsockname()[1]}))
    return listener


def events_fd(settings: ReplicaSettings) -> int:
    """Where events go: to the host's descriptor, else to standard output."""
    return settings.events_fd if settings.events_fd >= 0 else 1


def say(descriptor: int, event: Event) -> None:
    with suppress(OSError):  # whoever listened is gone: that is found on the commands, not here
        os.write(descriptor, event.to_line())
