"""The GPU helper of this machine: one process for all replicas, which has the driver initialised before they need it.

The listening socket is ours and stays: whoever asks while a helper that died is replaced waits in its queue.
The program is the shim's (``python -m adapter.gpu.helper``); it ends when this process does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from adapter.replica import shim_path

logger = logging.getLogger(__name__)

_AGAIN_S = 1.0
"""Between a helper's end and the next: one that cannot start must not be started all the time."""


class GpuHelper:
    """Runs from its making until `close`. Make it inside a running event loop. Raises `OSError`."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gpufn-"))  # a socket's path must be short
        self.path = str(self._folder / "gpu")
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(self.path)  # in a folder of mode 0700
        self._listener.listen(64)
        self._owner_r, self._owner_w = os.pipe()
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._start()

    @property
    def pid(self) -> int:
        """0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def _start(self) -> None:
        self._timer = None
        listener = self._listener.fileno()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "adapter.gpu.helper", "--listen", str(listener), "--owner", str(self._owner_r)],
            stdin=subprocess.DEVNULL,
            pass_fds=(listener, self._owner_r),
            env={**os.environ, "PYTHONPATH": shim_path()},
            start_new_session=True,
            cwd="/",
        )
        self._pidfd = os.pidfd_open(self._process.pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        code = self._forget()
        logger.warning("the GPU helper ended and is started again", extra={"fields": {"exit_code": code}})
        self._timer = asyncio.get_running_loop().call_later(_AGAIN_S, self._start)

    def _forget(self) -> int:
        assert self._process is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        process, self._process = self._process, None
        return process.wait()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._process is not None:
            self._process.kill()
            self._forget()
        self._listener.close()
        os.close(self._owner_r)
        os.close(self._owner_w)
        shutil.rmtree(self._folder, ignore_errors=True)
