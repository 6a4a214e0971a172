"""What the image tests run on: a docker daemon and a registry of their own, and what this machine lacks for them."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.images.containers import Docker

REGISTRY_IMAGE = "gpufn-test/registry"

PROGRAMS = {
    "docker": "docker.io",
    "runc": "runc",
    "docker-compose": "docker-compose",
    "docker-registry": "docker-registry",
    "debootstrap": "debootstrap",
    "skopeo": "skopeo",
    "umoci": "umoci",
}
"""Program → the Debian package that brings it."""


def why_not() -> str:
    """What is missing to build and run images here; empty: nothing."""
    if os.getuid() != 0:
        return "images are built and run as root here: debootstrap and dockerd need it"
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing:
        return f"not installed: {', '.join(missing)} (apt-get install --no-install-recommends {' '.join(missing)})"
    return ""


@contextlib.contextmanager
def daemon(programs: Path, data: Path | None = None) -> Iterator[Docker]:
    """The docker daemon that `scripts/install-docker.sh` put into `programs`; it has no networks but `host` and `none`.

    Everything of its own is in a folder that is removed after; but for its images, where `data` says where to keep them.
    One daemon at a time may have that."""
    # Not below pytest's folders: the paths of containerd's sockets would be too long.
    folder = Path(tempfile.mkdtemp(prefix="gpufn-docker-"))
    dockerd = str(programs / "dockerd")
    command = ["setpriv", "--pdeathsig", "TERM", dockerd, f"--host=unix://{folder}/docker.sock"]  # never outlives us
    command += [
        f"--data-root={data or folder / 'data'}",
        f"--exec-root={folder}/exec",
        f"--pidfile={folder}/docker.pid",
    ]
    log = folder / "dockerd.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--iptables=false", "--bridge=none", "--userland-proxy=false"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},  # its containerd
        )
    try:
        docker = Docker(f"unix://{folder}/docker.sock")
        docker.wait_until_up(process, log)
        yield docker
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for line in Path("/proc/mounts").read_text().splitlines():
            if (place := line.split()[1]).startswith(f"{folder}/"):  # its network namespace it leaves mounted
                subprocess.run(["umount", "--lazy", place], check=False)
        shutil.rmtree(folder)


def import_registry(docker: Docker) -> None:
    """The Debian package's registry as an image: the program and the libraries that it is linked against."""
    program = shutil.which("docker-registry")
    assert program, why_not()
    libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=False).stdout
    config = b"version: 0.1\nlog: {level: warn, accesslog: {disabled: true}}\nhttp: {}\n"
    config += b"storage: {filesystem: {rootdirectory: /registry}, delete: {enabled: true}}\n"
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", dereference=True) as tar:
        tar.add(program, "registry.bin")
        for library in re.findall(r"/\S+", libraries):
            tar.add(library, library.lstrip("/"))
        member = tarfile.TarInfo("config.yaml")
        member.size = len(config)
        tar.addfile(member, io.BytesIO(config))
    changes = ['ENTRYPOINT ["/registry.bin", "serve", "/config.yaml"]', "VOLUME /registry"]
    docker(
        "import",
        *(word for change in changes for word in ("--change", change)),
        "-",
        REGISTRY_IMAGE,
        stdin=archive.getvalue(),
    )


def run_script(repository: Path, script: str, *arguments: str) -> None:
    """Runs a script of the repository; its output is the test's. Raises `AssertionError` with what it said last."""
    ended = subprocess.run(
        [str(repository / "scripts" / script), *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    print(ended.stdout)
    assert ended.returncode == 0, f"{script} {' '.join(arguments)}: {ended.stdout[-2000:]}"
