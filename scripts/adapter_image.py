"""Builds the image of gpufn's components for a cluster, with what this machine has, and writes it as an archive.

    python -m scripts.adapter_image OUT.tar

Then, on a node: `ctr -n k8s.io images import OUT.tar`; with Docker: `docker load -i OUT.tar`. Its name is `gpufn:dev`, the
one of `manifests/image/kustomization.yaml`. No registry is asked: the base image is made of Debian's packages, wheels are
fetched beforehand, the daemon is a private one (or $DOCKER_HOST). The same tree gives the same layers, and an archive
that was built once is kept in $GPUFN_CACHE (default ~/.cache/gpufn).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from adapter import __version__
from tests.images import machine, wheels
from tests.images.conftest import CACHE
from tests.images.containers import Docker

REPOSITORY = Path(__file__).parents[1]
RECIPE = REPOSITORY / "manifests" / "image"
NAME = "gpufn:dev"
_BASE = "gpufn-base:trixie"
_BUILDS_WHEELS = ("hatchling",)
_STAGES = ("criu", "packages")
_KEPT = 3
"""Archives of earlier trees that stay in the cache."""


def archive(out: Path | None = None) -> Path:
    """The image of this tree as an archive: at `out`, or where the cache has it. Raises `DockerFailed`, `AssertionError`."""
    folder = CACHE / "adapter-image"
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / f"{_key()}.tar"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            with tempfile.TemporaryDirectory(prefix="gpufn-image-", dir="/var/tmp") as work:  # too large for /tmp
                _built(Path(work), kept.with_suffix(".new")).rename(kept)
            for unfinished in folder.glob("*.new"):
                unfinished.unlink()
            for old in sorted(folder.glob("*.tar"), key=lambda path: path.stat().st_mtime)[:-_KEPT]:
                old.unlink()
    if out is None:
        return kept
    shutil.copyfile(kept, out)
    return out


def extras() -> list[str]:
    """Those of the Dockerfile."""
    found = re.search(r"^ARG EXTRAS=(\S+)$", (RECIPE / "Dockerfile").read_text(), re.MULTILINE)
    assert found, "the Dockerfile says which extras it installs"
    return found[1].split(",")


def requirements(names: Iterable[str]) -> list[str]:
    """What these extras of gpufn ask for. Raises `CalledProcessError` for one that is none."""
    command = [sys.executable, str(RECIPE / "requirements.py"), str(REPOSITORY / "pyproject.toml"), ",".join(names)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def _sources() -> list[Path]:
    """What the image is made of, as .dockerignore says, and nothing that is made in the tree."""
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    found = [path for name in allowed for path in (REPOSITORY / name, *(REPOSITORY / name).rglob("*"))]
    made = {"__pycache__", "wheels", "criu"}
    return sorted(path for path in found if path.is_file() and not made & set(path.relative_to(REPOSITORY).parts))


def _key() -> str:
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in [*_sources(), REPOSITORY / "scripts" / "base-image.sh"]:
        digest.update(f"{path.relative_to(REPOSITORY)}\0{path.stat().st_mode & 0o111}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _built(work: Path, out: Path) -> Path:
    context = work / "context"
    for path in _sources():
        target = context / path.relative_to(REPOSITORY)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    recipe = context / RECIPE.relative_to(REPOSITORY)
    asked = "\n".join([*requirements(extras()), *_BUILDS_WHEELS])
    shutil.copytree(wheels.fetch(CACHE, asked, REPOSITORY / "requirements-dev.lock"), recipe / "wheels")
    machine.run_script(REPOSITORY, "install-criu.sh", str(CACHE / "criu"))
    shutil.copytree(CACHE / "criu", recipe / "criu", symlinks=True)

    machine.run_script(REPOSITORY, "install-lifecycle.sh", str(CACHE / "lifecycle"))
    layout = work / "base"
    machine.run_script(REPOSITORY, "base-image.sh", "--lifecycle", str(CACHE / "lifecycle"), str(layout))
    with _docker() as docker:
        base = work / "base.tar"
        subprocess.run(["skopeo", "copy", "--quiet", f"oci:{layout}:run", f"docker-archive:{base}:{_BASE}"], check=True)
        docker("load", "--input", str(base))
        words = ["build", "--network", "none", "--file", str(recipe / "Dockerfile")]
        words += ["--build-arg", f"BASE={_BASE}", "--build-arg", f"VERSION={__version__}"]
        for stage in _STAGES:  # by name, so that the next build finds what has not changed
            print(docker(*words, "--target", stage, "--tag", f"gpufn-{stage}:dev", str(context), timeout=900))
        print(docker(*words, "--tag", NAME, str(context), timeout=300))
        docker("save", "--output", str(out), NAME, timeout=300)
        docker("image", "prune", "--force")
    return out


@contextlib.contextmanager
def _docker() -> Iterator[Docker]:
    if os.environ.get("DOCKER_HOST"):
        yield Docker(os.environ["DOCKER_HOST"])
        return
    machine.run_script(REPOSITORY, "install-docker.sh", str(CACHE / "docker"))
    with machine.daemon(CACHE / "docker", CACHE / "adapter-image" / "docker") as docker:
        yield docker


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m scripts.adapter_image", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("out", type=Path, help="the archive to write")
    why = machine.why_not()
    if why:
        raise SystemExit(
            f"adapter-image: no image can be built here.\n{why}\nBuild it with Docker: {RECIPE / 'Dockerfile'}"
        )
    print(archive(parser.parse_args().out))
