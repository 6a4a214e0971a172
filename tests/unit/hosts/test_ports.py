import os
import socket

import pytest

from adapter.errors import Conflict
from adapter.hosts.ports import listen, listener_on


def test_port_zero_takes_a_free_one():
    with listen("127.0.0.1", 0) as sock:
        assert sock.getsockname()[1] > 0


def test_a_port_in_use_says_by_whom():
    with listen("127.0.0.1", 0) as sock, pytest.raises(Conflict) as caught:
        listen("127.0.0.1", sock.getsockname()[1])
    assert f"Process {os.getpid()} " in caught.value.why
    assert "--port" in caught.value.hint


def test_nobody_listens_on_a_free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))  # bound, not listening
        assert listener_on(sock.getsockname()[1]) == ""
