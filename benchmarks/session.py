"""A real `gpufn up` over a throw-away state folder, driven over HTTP as faas-cli and callers do.

The demo, the benchmarks and the end-to-end tests share it. Standard library only, so that what it
measures is not its own client.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from adapter.keys import ENV_CRIU

REPOSITORY = Path(__file__).parents[1]
FUNCTIONS = REPOSITORY / "functions"

_POLL_S = 0.02
_STOP_LIMIT_S = 60.0


def cache_folder() -> Path:
    """Where functions' environments stay from run to run: torch alone is 5 GB."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpufn" / "envs"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call got. `seconds` is from connecting until the last byte, `first_s` until the first of the body."""

    status: int
    body: bytes
    headers: http.client.HTTPMessage
    seconds: float
    first_s: float

    def json(self) -> Any:
        return json.loads(self.body)


class Session:
    """A running gateway. Use as a context manager; leaving it stops everything."""

    def __init__(
        self,
        state: Path,
        functions: Path = FUNCTIONS,
        *,
        envs: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.state = state
        self._variables = dict(variables or {})
        self._functions = functions
        self._envs = envs or cache_folder()
        self._process: subprocess.Popen[str] | None = None
        self.url = ""
        self.host, self.port = "", 0

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.stop()
        self.end()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def log(self) -> Path:
        """What the gateway says on standard error; beside the state folder, to outlive it."""
        return self.state.with_name(self.state.name + ".log")

    def start(self) -> None:
        """Raises `RuntimeError` with the gateway's own words where it does not come up."""
        command = [*gpufn(), "up", "--port", "0", "--state", str(self.state), "--envs", str(self._envs)]
        self._envs.mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {**clean_environment(), **self._variables}
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                [*command, "--functions", str(self._functions)],
                stdout=subprocess.PIPE, stderr=log, stdin=subprocess.DEVNULL, text=True, cwd="/", env=environment,
            )  # fmt: skip
        assert self._process.stdout is not None
        words = self._process.stdout.readline().split()
        self.url = next((word for word in words if word.startswith("http://")), "")
        if not self.url:
            self._process.kill()
            self._process.wait()
            raise RuntimeError(f"gpufn up did not start:\n{self.log.read_text()[-2000:]}")
        address = urlsplit(self.url)
        self.host, self.port = address.hostname or "", address.port or 0

    def stop(self) -> None:
        """Drain and end it. Raises `RuntimeError` where it does not end by itself."""
        if self._process is None:
            return
        process, self._process = self._process, None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(_STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise RuntimeError(f"gpufn up did not stop within {_STOP_LIMIT_S:g} s") from None
        finally:
            if process.stdout is not None:
                process.stdout.close()
        if code != 0:
            raise RuntimeError(f"gpufn up ended with code {code}:\n{self.log.read_text()[-2000:]}")

    def kill(self) -> None:
        """End it as a crash would."""
        assert self._process is not None
        process, self._process = self._process, None
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()

    def end(self) -> None:
        """Make sure that it does not run, however this session went so far."""
        if self._process is not None:
            self.kill()

    # The API ------------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 330,
    ) -> Answer:
        """One request on a connection of its own, without credentials unless `headers` have them."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            first = response.read(1)
            first_s = time.perf_counter() - began
            rest = response.read()
        finally:
            connection.close()
        return Answer(response.status, first + rest, response.headers, time.perf_counter() - began, first_s)

    def api(self, method: str, path: str, body: object = None, *, ok: tuple[int, ...] = (200, 202)) -> Answer:
        """One request of the REST API, with the password. Raises `RuntimeError` for other codes than `ok`."""
        password = (self.state / "basic-auth-password").read_text().strip()
        credentials = base64.b64encode(f"admin:{password}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}", "Content-Type": "application/json"}
        answer = self.request(method, path, b"" if body is None else json.dumps(body).encode(), headers=headers)
        if answer.status not in ok:
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.body[:500].decode(errors='replace')}")
        return answer

    def deploy(self, name: str, annotations: Mapping[str, str], *, image: str = "", limit_s: float = 1200) -> None:
        """What `faas-cli deploy` sends: PUT, and POST when there is nothing to update. Waits until it can start."""
        body = {"service": name, "image": image or f"{name}:latest", "annotations": dict(annotations), "labels": {}}
        if self.api("PUT", "/system/functions", body, ok=(200, 202, 404)).status == http.HTTPStatus.NOT_FOUND:
            self.api("POST", "/system/functions", body)
        self.wait(lambda: not self.preparing(name), f"{name} is prepared", limit_s)
        if self._status(name):
            raise RuntimeError(f"{name}: {self._status(name)}")

    def preparing(self, name: str) -> bool:
        return self._status(name).startswith("preparing")

    def _status(self, name: str) -> str:
        found = self.api("GET", f"/system/function/{name}").json()
        return str(found.get("annotations", {}).get("gpufn.dev/status", ""))

    def call(self, name: str, body: bytes = b"", **options: Any) -> Answer:
        """What a caller does: `POST /function/NAME`."""
        return self.request("POST", f"/function/{name}", body, **options)

    def starts(self, name: str, limit: int = 100) -> list[dict[str, Any]]:
        """Start records, the latest first."""
        found: list[dict[str, Any]] = self.api("GET", f"/gpufn/v1/starts?function={name}&limit={limit}").json()
        return found

    def replicas(self, name: str) -> list[dict[str, Any]]:
        found = self.api("GET", "/gpufn/v1/replicas").json()
        return [replica for replica in found if replica["function"] == name]

    def snapshot(self, name: str) -> dict[str, Any]:
        """The last news about a function's process snapshot; empty when there is none."""
        found = self.api("GET", "/gpufn/v1/snapshots").json()
        return next((news for news in found if news["function"].split(".")[0] == name), {})

    def wait_for_snapshot(self, name: str, limit_s: float = 120) -> dict[str, Any]:
        """The news that it is published. Raises `RuntimeError` where it says anything else."""
        self.wait(lambda: self.snapshot(name).get("state") not in (None, "building"), f"a snapshot of {name}", limit_s)
        news = self.snapshot(name)
        if news["state"] != "published":
            raise RuntimeError(f"{name} has no snapshot: {news.get('state')}: {news.get('reason')}")
        return news

    def wait_for_gpus(self, limit_s: float = 120) -> None:
        """Until it has been tried what works on the GPUs: no canary holds memory of one any more."""
        found = self.state / "gpu" / "capabilities.json"
        self.wait(found.exists, "it is known what works on the GPUs", limit_s)

    def to_zero(self, name: str, limit_s: float = 60) -> None:
        """Scale to zero as an operator does, and wait until nothing is left."""
        self.api("POST", f"/system/scale-function/{name}", {"serviceName": name, "replicas": 0})
        self.wait_for_zero(name, limit_s)

    def wait_for_zero(self, name: str, limit_s: float = 120) -> None:
        self.wait(lambda: not self.replicas(name), f"{name} is at zero", limit_s)

    def wait(self, condition: Callable[[], bool], what: str, limit_s: float) -> None:
        """Ask until it is so. Raises `RuntimeError`."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if self._process is not None and self._process.poll() is not None:
                raise RuntimeError(f"gpufn up ended by itself:\n{self.log.read_text()[-2000:]}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"not within {limit_s:g} s: {what}\n{self.log.read_text()[-2000:]}")
            time.sleep(_POLL_S)

    def cli(self, *arguments: str) -> str:
        """What the real command prints about this gateway."""
        environment = {**clean_environment(), "GPUFN_HOME": str(self.state), "OPENFAAS_URL": self.url}
        done = subprocess.run([*gpufn(), *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise RuntimeError(f"gpufn {' '.join(arguments)}: exit {done.returncode}\n{done.stderr}")
        return done.stdout


def gpufn() -> list[str]:
    """The command, of the interpreter that runs us."""
    return [sys.executable, "-m", "adapter.cli.main"]


def clean_environment() -> dict[str, str]:
    """Ours without what would change what is measured: settings of gpufn, and Python compiling anew at each start."""
    ours = ("GPUFN_", "OPENFAAS_", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name == ENV_CRIU or not name.startswith(ours)}
    return {**kept, "PYTHONPATH": str(REPOSITORY)}


# What is left -----------------------------------------------------------------------------------


def leftovers(state: Path, port: int = 0) -> list[str]:
    """Processes, mounts and listeners that still belong to a gateway over `state`; empty when it is gone."""
    mark = os.fsencode(state)
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        if int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes()
            if mark in command or mark in (folder / "environ").read_bytes():
                found.append(f"process {folder.name}: {command.replace(bytes(1), b' ').decode(errors='replace')}")
            elif mark in (folder / "mountinfo").read_bytes():
                found.append(f"mount in process {folder.name}")
        except OSError:  # ended meanwhile, or a kernel thread
            continue
    if port:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                found.append(f"listener on port {port}")
    return found


def wait_until_gone(state: Path, port: int = 0, limit_s: float = 20) -> list[str]:
    """`leftovers`, once there are none or `limit_s` has passed."""
    deadline = time.monotonic() + limit_s
    while (found := leftovers(state, port)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return found
