"""Ports for programs that cannot take 0."""

from __future__ import annotations

import socket


def free_port(address: str = "127.0.0.1") -> int:
    """One that was free a moment ago. Prefer port 0 where it can be given."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        return int(probe.getsockname()[1])
