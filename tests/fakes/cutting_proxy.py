"""A TCP proxy between a client and a server on this machine, which cuts connections, or lets them hang."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress


class CuttingProxy:
    """Passes bytes on to `port`. `cuts` are numbers of bytes from the server after which a connection ends, one for
    each connection in turn that gets so far; `received` counts what went to the client."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts: list[int] = []
        self.hangs = False
        self.hung = threading.Event()
        self.received = 0
        self.on_bytes = lambda count: None
        self._ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextmanager
    def running(self):
        thread = threading.Thread(target=self._accept, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._ended.set()
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            thread.join()

    def _accept(self) -> None:
        while not self._ended.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                client.close()
                continue
            threading.Thread(target=self._up, args=(client, server), daemon=True).start()
            threading.Thread(target=self._down, args=(client, server), daemon=True).start()

    def _up(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _down(self, client: socket.socket, server: socket.socket) -> None:
        passed = 0
        with client, server, suppress(OSError):
            while data := server.recv(16384):
                if self.hangs:
                    self.hung.set()
                    self._ended.wait()
                    return
                passed += len(data)
                with self._lock:
                    cut = bool(self.cuts) and passed >= self.cuts[0]
                    if cut:
                        self.cuts.pop(0)
                    self.received += len(data)
                client.sendall(data[: len(data) // 2] if cut else data)
                self.on_bytes(self.received)
                if cut:
                    client.shutdown(socket.SHUT_RDWR)
                    return
