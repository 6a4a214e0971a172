"""How long an entrypoint takes from exec until it listens: `listen_ms`."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from adapter.records import Event, EventName
from adapter.replica import ReplicaSettings, base_environment
from benchmarks.results_file import Bar
from benchmarks.session import FUNCTIONS, clean_environment

if TYPE_CHECKING:
    from benchmarks.__main__ import Options


def run(options: Options) -> Iterable[Bar]:
    once()  # the first one reads the interpreter from the disk
    runs = [round(once() * 1000, 2) for _ in range(2 * options.runs)]
    yield Bar.of("listen_ms", statistics.median(runs), "ms", runs)


def once() -> float:
    """Seconds from before the fork until its LISTENING event is here, which is a little more than asked for."""
    events_r, events_w = os.pipe()
    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as folder, os.fdopen(events_r, "rb") as events:
        settings = ReplicaSettings(
            function="echo", folder=str(FUNCTIONS / "echo"), python=sys.executable, runtime_dir=folder,
            port=0, metrics_port=0, events_fd=events_w,
        )  # fmt: skip
        environment = {**base_environment(clean_environment()), **settings.to_env()}
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "adapter.runtime"],
            env=environment, pass_fds=(events_w,), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(events_w)
        try:
            for line in events:
                if Event.from_line(line).name is EventName.LISTENING:
                    return time.perf_counter() - began
            raise RuntimeError("the entrypoint ended without listening")
        finally:
            process.terminate()
            process.wait()
