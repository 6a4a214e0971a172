"""A cluster to play with: `python -m tests.testbed up [--plain]`, `down`; `load ARCHIVE` and `function FOLDER` give it images."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.testbed import functions
from tests.testbed.cluster import Cluster
from tests.testbed.images import write_archive
from tests.testbed.machines import TestbedFailed
from tests.testbed.nodes import import_archive, two_nodes
from tests.testbed.programs import PYTHON, why_not
from tests.testbed.slots import SLOTS

PID_FILE = "served-by"


def up(words: list[str]) -> int:
    """Starts a cluster in a process of its own; returns when it is ready, and says how to reach it."""
    read, write = os.pipe()
    command = [sys.executable, "-m", "tests.testbed", "serve", *words]
    output = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=write,
        pass_fds=(),
        start_new_session=True,
        env={**os.environ, **PYTHON},
    )
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()  # until it is ready, or has ended
    print(text, end="")
    return 0 if output.poll() is None else 1


def serve(*, knative: bool) -> int:
    """A cluster until SIGTERM. Closes its standard output when it is ready."""
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Cluster(two_nodes(), knative=knative) as cluster:
        (cluster.folder / PID_FILE).write_text(str(os.getpid()))
        print(_welcome(cluster, time.monotonic() - began), flush=True)
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        while True:
            signal.pause()


def down() -> int:
    """Stops every cluster that `up` started."""
    for number, pid in _served():
        os.kill(pid, signal.SIGTERM)
        while Path(f"/proc/{pid}").exists():
            time.sleep(0.1)
        print(f"cluster {number} is down")
    return 0


def _served() -> Iterator[tuple[str, int]]:
    for file in SLOTS.glob(f"*/{PID_FILE}"):
        pid = int(file.read_text())
        command = Path(f"/proc/{pid}/cmdline")
        if command.exists() and b"tests.testbed" in command.read_bytes():
            yield file.parent.name, pid


def _welcome(cluster: Cluster, seconds: float) -> str:
    nodes = ", ".join(f"{name} ({node.node.gpus} GPUs)" for name, node in cluster.nodes.items())
    lines = [
        f"export KUBECONFIG={cluster.kubeconfig}",
        f"export PATH={cluster.site.programs.kubernetes}:$PATH",
        f"# Up after {seconds:.0f} s: {nodes}. State and logs are in {cluster.folder}.",
    ]
    if "ingress" in cluster.components:
        lines.append(f"# Functions: curl -H 'Host: NAME.NAMESPACE.functions.test' {cluster.ingress_url}")
    lines += [
        f"# Images: {sys.executable} -m tests.testbed load ARCHIVE; of a function's folder: … function FOLDER",
        "# make cluster-down ends it.",
    ]
    return "\n".join(lines)


def load(archive: Path) -> int:
    """Gives the images of an archive to all nodes of what `up` started. Raises `TestbedFailed` where that is nothing."""
    served = list(_served())
    if not served:
        raise TestbedFailed("no cluster to give images to is up: make cluster-up")
    for number, _ in served:
        for socket in sorted(SLOTS.glob(f"{number}/*/run/containerd/containerd.sock")):
            import_archive(socket, archive)
    return 0


def function(folder: Path) -> int:
    """Makes an image of a function's folder, dev.local/NAME:1, and gives it to all nodes of what `up` started."""
    name = f"dev.local/{folder.resolve().name}:1"
    wanted = folder / "requirements.txt"
    with tempfile.TemporaryDirectory(prefix="gpufn-function-") as work:
        base = functions.base_layout(Path(work, "base"))
        packages = wanted.read_text() if wanted.exists() else ""
        image = functions.function_image(name, folder, base, Path(work), packages)
        load(write_archive([image], Path(work, "image.tar")))
    print(name)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.testbed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("up", "serve"):
        commands.add_parser(name).add_argument("--plain", action="store_true", help="without Knative")
    commands.add_parser("down")
    commands.add_parser("load").add_argument("archive", type=Path)
    commands.add_parser("function").add_argument("folder", type=Path)
    given = parser.parse_args()
    if reason := why_not():
        print(f"testbed: {reason}", file=sys.stderr)
        return 1
    try:
        if given.command == "up":
            return up(["--plain"] if given.plain else [])
        if given.command == "serve":
            return serve(knative=not given.plain)
        if given.command == "function":
            return function(given.folder)
        return down() if given.command == "down" else load(given.archive)
    except TestbedFailed as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
