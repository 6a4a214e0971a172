"""CRIU alone on a published process snapshot: what of a restored wake is CRIU's own.

    unshare --pid --fork --kill-child --mount --mount-proc python -m benchmarks.bare_restore SNAPSHOT

Prints the seconds from starting `criu restore` until it has ended well: the process runs, and waits at its
snapshot point. It never gets orders; it ends with the namespace.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from adapter.snapshot.process import PIPE_DESCRIPTORS, open_memory, restore_command
from adapter.snapshot.store import read_snapshot

NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc")


def seconds(snapshot: Path) -> float:
    """One bare restore, in a namespace of its own. Raises `RuntimeError` where CRIU fails."""
    command = [*NAMESPACE, sys.executable, "-m", "benchmarks.bare_restore", str(snapshot)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise RuntimeError(f"the bare restore failed: {done.stderr}")
    return float(done.stdout)


def main() -> int:
    snapshot = read_snapshot(Path(sys.argv[1]))
    images = snapshot.path / "images"
    memory = open_memory(images)
    pipes = [os.pipe() for _ in range(PIPE_DESCRIPTORS)]
    ends = [pipes[0][0], *(pipe[1] for pipe in pipes[1:])]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "restore.log"
        command = restore_command(snapshot.facts["criu"], images, snapshot.facts["pipes"], ends, memory, log=log)
        began = time.perf_counter()
        done = subprocess.run(command, pass_fds=[*ends, *([memory] if memory >= 0 else [])], check=False)
        print(time.perf_counter() - began)
        if done.returncode:
            print(log.read_text(), file=sys.stderr)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
