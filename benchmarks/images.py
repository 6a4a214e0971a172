"""An image of `embed`: what a build costs and weighs, and how soon a container of it answers.

Real parts throughout: the CNB lifecycle in a container of the build image, a docker daemon and a registry on
loopback, CRIU in the container. Base images and wheels are the tests' (`tests/images`); torch is the base image's.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.hosts.criu import lend
from adapter.keys import SNAPSHOT_PATH
from benchmarks.results_file import Bar
from tests.images import machine, wheels
from tests.images.containers import Docker

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

REPOSITORY = Path(__file__).parents[1]
CACHE = Path(
    os.environ.get("GPUFN_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "gpufn"
)
FUNCTION = "embed"
_ANSWER_LIMIT_S = 120.0
_GPUFN = [sys.executable, "-m", "adapter.cli.main"]
_OURS_OF_PACKAGES = ("flask", "gunicorn", "werkzeug", "itsdangerous", "blinker", "click")
"""Distributions in `embed`'s packages that are there for the shim alone; its requirements ask for none of them."""


def run(options: Options) -> Iterator[Bar]:
    why_not = machine.why_not()
    if why_not:
        raise SystemExit(f"images are not measured here: {why_not}")
    with _laboratory() as lab:
        yield from _builds(lab)
        yield from _starts(lab, options.runs)


@dataclass(frozen=True)
class _Laboratory:
    """A daemon, a registry (host:port), the base images in it, a folder of wheels, and a folder for what is made."""

    docker: Docker
    registry: str
    wheels: Path
    folder: Path

    def build(self, name: str, cache: Path) -> tuple[float, list[dict[str, Any]]]:
        """Seconds of a whole `gpufn build --publish`, and its layers."""
        began = time.monotonic()
        said = self.gpufn(
            "build", str(self.function), f"{self.registry}/{name}", "--publish", "--engine", "docker",
            "--builder", f"{self.registry}/base-build:trixie", "--run-image", f"{self.registry}/base-run:trixie",
            "--wheels", str(self.wheels), "--env", "BP_GPUFN_FROM_BASE=torch", "--cache", str(cache), "-o", "json",
        )  # fmt: skip
        return time.monotonic() - began, json.loads(said)

    def gpufn(self, *words: str) -> str:
        env = {**os.environ, "DOCKER_HOST": self.docker.host}
        return subprocess.run([*_GPUFN, *words], env=env, check=True, stdout=subprocess.PIPE, text=True).stdout

    @property
    def function(self) -> Path:
        return self.folder / FUNCTION

    @property
    def criu(self) -> Path:
        return self.folder / "lent-criu"

    @property
    def state(self) -> Path:
        return self.folder / "state"


@contextlib.contextmanager
def _laboratory() -> Iterator[_Laboratory]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gpufn-bench-", dir="/var/tmp")))
        machine.run_script(REPOSITORY, "install-docker.sh", str(CACHE / "docker"))
        docker = stack.enter_context(machine.daemon(CACHE / "docker"))
        registry = stack.enter_context(_registry(folder))
        machine.run_script(REPOSITORY, "install-lifecycle.sh", str(CACHE / "lifecycle"))
        machine.run_script(
            REPOSITORY, "base-image.sh", "--with", "python3-torch", "--lifecycle", str(CACHE / "lifecycle"),
            "--to", f"docker://{registry}/base", str(folder / "base"),
        )  # fmt: skip
        why_not = lend(folder / "lent-criu")
        if why_not:
            raise SystemExit(f"no CRIU for containers: {why_not}")
        shutil.copytree(REPOSITORY / "functions" / FUNCTION, folder / FUNCTION)
        asked = (folder / FUNCTION / "requirements.txt").read_text()
        found = wheels.fetch(CACHE, f"{asked}\nflask\ngunicorn\n", REPOSITORY / "requirements-dev.lock")
        yield _Laboratory(docker, registry, found, folder)


@contextlib.contextmanager
def _registry(folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = folder / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\nhttp: {{addr: '{address}'}}\n"
        f"storage: {{filesystem: {{rootdirectory: {folder}/registry}}}}\n"
    )
    process = subprocess.Popen(["docker-registry", "serve", str(config)], stderr=subprocess.DEVNULL)
    try:
        _until(lambda: _status(address, "/v2/") == 200)
        yield address
    finally:
        process.terminate()
        process.wait()


# Builds ---------------------------------------------------------------------------------------------------------


def _builds(lab: _Laboratory) -> Iterator[Bar]:
    first_s, _ = lab.build("embed:1", lab.folder / "cache-1")
    yield Bar.of("first_build_s", first_s, "s", [first_s])
    lab.build("again:1", lab.folder / "cache-2")
    mine, others = _layers(lab, "embed:1"), _layers(lab, "again:1")
    differing = set(mine) ^ set(others)
    yield Bar.of("reproducible_layers_differing", len(differing), "layers", [mine, others])
    yield from _weight(lab)
    rebuilds, pushed = [], set()
    for turn in range(5):
        handler = lab.function / "handler.py"
        handler.write_text(handler.read_text() + f"\n# edit {turn}\n")
        seconds, layers = lab.build("embed:1", lab.folder / "cache-1")
        rebuilds.append(seconds)
        pushed |= {layer["layer"] for layer in layers if not layer["is_reused"]}
    yield Bar.of("rebuild_code_s", statistics.median(rebuilds), "s", rebuilds)
    yield Bar.of("rebuild_code_layers_besides_app", len(pushed - {"app"}), "layers", [sorted(pushed)])


def _layers(lab: _Laboratory, name: str) -> list[str]:
    connection = http.client.HTTPConnection(lab.registry)
    repository, _, tag = name.partition(":")
    accept = "application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.manifest.v1+json"
    connection.request("GET", f"/v2/{repository}/manifests/{tag}", headers={"Accept": accept})
    manifest = json.loads(connection.getresponse().read())
    return [layer["digest"] for layer in manifest["layers"]]


_SIZES = """
import importlib.metadata, json, os, sys
home = "/layers/gpufn_gpu-function"
def size(path):
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)
layers = {name: size(f"{home}/{name}") for name in os.listdir(home)}
layers["launcher"] = size("/cnb") ; layers["sbom"] = size("/layers/sbom")
site = next(path for path in sys.path if path.startswith(home) and path.endswith("site-packages"))
tag = f"cpython-{sys.version_info[0]}{sys.version_info[1]}.pyc"
ours = wheels = 0
for found in importlib.metadata.distributions(path=[site]):
    named = {str(file.locate()) for file in found.files or ()}
    for path in [path for path in named if path.endswith(".py")]:
        folder, name = os.path.split(path)
        named.add(f"{folder}/__pycache__/{name[:-3]}.{tag}")
    files = sum(os.lstat(path).st_size for path in named if os.path.exists(path))
    if found.metadata["Name"].lower() in sys.argv[1].split(","):
        ours += files
    else:
        wheels += files
print(json.dumps({"layers": layers, "ours": ours, "wheels": wheels}))
"""


def _weight(lab: _Laboratory) -> Iterator[Bar]:
    """Installed bytes that are ours: layers other than packages and weights, and of packages what is no wheel of embed's."""
    lab.docker("pull", "--quiet", f"{lab.registry}/embed:1")
    said = lab.docker(
        "run", "--rm", "--network", "none", "--entrypoint", "/cnb/lifecycle/launcher", f"{lab.registry}/embed:1",
        "--", "python", "-c", _SIZES, ",".join(_OURS_OF_PACKAGES),
    )  # fmt: skip
    sizes = json.loads(said.splitlines()[-1])
    layers = sizes["layers"]
    added = sum(size for name, size in layers.items() if name not in ("packages", "weights"))
    added += layers["packages"] - sizes["wheels"]
    yield Bar.of("image_added_mb", added / 1e6, "MB", [sizes])
    yield Bar.of("image_criu_mb", layers.get("criu", 0) / 1e6, "MB", [layers.get("criu", 0)])


# Starts ---------------------------------------------------------------------------------------------------------


def _starts(lab: _Laboratory, runs: int) -> Iterator[Bar]:
    """Ways to start alternate: plain, restored from this machine's folder, restored by an empty node from the registry."""
    image = f"{lab.registry}/embed:1"
    lab.docker("pull", image)
    lab.gpufn("snapshot", "create", image, "--state", str(lab.state))
    lab.gpufn("snapshot", "push", image, "--state", str(lab.state))
    plain: list[float] = []
    local: list[float] = []
    pulled: list[float] = []
    for _ in range(runs):
        plain.append(_first_answer(lab, image, None, rung="load"))
        local.append(_first_answer(lab, image, lab.state / "snapshots", rung="restore"))
        with tempfile.TemporaryDirectory(dir=lab.folder) as node:
            began = time.monotonic()
            lab.gpufn("snapshot", "pull", image, "--into", f"{node}/snapshots")
            pulled.append(_first_answer(lab, image, Path(node) / "snapshots", rung="restore", began=began))
    medians = [statistics.median(times) for times in (plain, local, pulled)]
    raw = [{"plain_s": p, "local_s": n, "registry_s": r} for p, n, r in zip(plain, local, pulled, strict=True)]
    yield Bar.of("container_plain_over_restored", medians[0] / medians[1], "ratio", raw)
    yield Bar.of("container_restored_s", medians[1], "s", local)
    yield Bar.of("registry_restore_over_local", medians[2] / medians[1], "ratio", raw)
    yield Bar.of("registry_restore_over_plain", medians[2] / medians[0], "ratio", raw)


def _first_answer(lab: _Laboratory, image: str, snapshots: Path | None, *, rung: str, began: float = 0.0) -> float:
    """Seconds from `docker run` (or `began`) to the last byte of the right answer. Raises where another rung served."""
    name = f"gpufn-bench-{uuid.uuid4().hex[:8]}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["--env", f"PORT={port}", "--env", "GPUFN_METRICS_PORT=0", "--env", f"GPUFN_FUNCTION={FUNCTION}"]
    if snapshots is not None:
        # As the container host does: the one right that a restore needs, in the file of a CRIU that it lends to the
        # image's ordinary user, under our profile; and the function's own folder of snapshots.
        profile = REPOSITORY / "adapter" / "hosts" / "seccomp.json"
        words += ["--cap-drop", "ALL", "--cap-add", "CHECKPOINT_RESTORE", "--security-opt", f"seccomp={profile}"]
        place = f"default/{FUNCTION}.openfaas-fn"
        words += ["--volume", f"{snapshots}/{place}:{SNAPSHOT_PATH}/{place}"]
        words += ["--volume", f"{lab.criu}:/opt/gpufn/lent-criu:ro", "--env", "GPUFN_CRIU=/opt/gpufn/lent-criu/criu"]
        words += ["--env", f"GPUFN_SNAPSHOT_DIR={SNAPSHOT_PATH}", "--env", "GPUFN_SNAPSHOT_BY=host"]
    example = json.loads(next((lab.function / "examples").glob("*.json")).read_text())
    started = began or time.monotonic()
    lab.docker("run", "--detach", "--network", "host", "--name", name, *words, image)
    try:
        body = _ask_until_answered(port, json.dumps(example["request"]["body"]).encode())
        seconds = time.monotonic() - started
        got = json.loads(body)["embeddings"][0]
        wanted = example["response"]["json"]["embeddings"][0]
        if max(abs(one - other) for one, other in zip(got, wanted, strict=True)) > 1e-3:
            raise RuntimeError(f"a wrong answer from {rung}")
        _until(lambda: _rung_of(lab, name) != "")
        if _rung_of(lab, name) != rung:
            raise RuntimeError(f"started by another way than {rung}: {lab.docker('logs', name)[-2000:]}")
        return seconds
    finally:
        lab.docker("rm", "--force", "--volumes", name)


def _rung_of(lab: _Laboratory, name: str) -> str:
    for line in lab.docker("logs", name).splitlines():
        with contextlib.suppress(ValueError, AttributeError):
            event = json.loads(line)
            if event.get("event") == "serving":
                return str(event["rung"])
    return ""


def _ask_until_answered(port: int, body: bytes) -> bytes:
    end = time.monotonic() + _ANSWER_LIMIT_S
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_ANSWER_LIMIT_S)
        try:
            connection.request("POST", "/", body)
            answer = connection.getresponse()
            if answer.status == 200:
                return answer.read()
            raise RuntimeError(f"{answer.status}: {answer.read()[:500]!r}")
        except ConnectionRefusedError:  # it does not listen yet
            if time.monotonic() > end:
                raise
            time.sleep(0.002)
        finally:
            connection.close()


def _status(address: str, path: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def _until(true: Callable[[], bool], within_s: float = 30.0) -> None:
    end = time.monotonic() + within_s
    while not true():
        if time.monotonic() > end:
            raise TimeoutError("a part of the benchmark did not come up")
        time.sleep(0.02)
