"""A docker daemon through its command line, and the containers that tests start with it."""

from __future__ import annotations

import dataclasses
import http.client
import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class DockerFailed(Exception):
    """A docker command that failed, with what it said."""


@dataclasses.dataclass(frozen=True)
class Docker:
    """A daemon at `host` (``unix:///…``). Called with a command's words, it returns what the command printed."""

    host: str

    def __call__(self, *words: str, stdin: bytes = b"", timeout: float = 300) -> str:
        """Output and errors as one text, without the last newline. Raises `DockerFailed`."""
        command = ["docker", "--host", self.host, *words]
        ended = subprocess.run(
            command, input=stdin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout, check=False
        )
        output = ended.stdout.decode(errors="replace").rstrip("\n")
        if ended.returncode:
            raise DockerFailed(f"docker {' '.join(words)}: exit status {ended.returncode}: {output[-4000:]}")
        return output

    def wait_until_up(self, process: subprocess.Popen[bytes], log: Path, *, within: float = 60) -> None:
        """Returns when the daemon answers. Raises `DockerFailed` with the end of its log when it ended or does not."""
        end = time.monotonic() + within
        while True:
            try:
                self("version")
                return
            except DockerFailed as error:
                if process.poll() is not None or time.monotonic() > end:
                    raise DockerFailed(f"dockerd did not start: {log.read_text()[-4000:]}") from error
            time.sleep(0.1)

    def inspect(self, name: str) -> dict[str, Any]:
        """What docker knows of an image or a container."""
        found: list[dict[str, Any]] = json.loads(self("inspect", name))
        return found[0]


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclasses.dataclass(frozen=True)
class Container:
    """A container on the host's network whose process listens on 127.0.0.1:`port`, its metrics on `metrics_port`."""

    docker: Docker
    id: str
    port: int
    metrics_port: int

    def ask(
        self,
        path: str = "/",
        body: Any = None,
        *,
        method: str = "",
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
        port: int = 0,
    ) -> Answer:
        """One request; a `body` that is neither bytes nor text is sent as JSON. Raises `OSError` when nobody answers."""
        if body is not None and not isinstance(body, bytes | str):
            body = json.dumps(body)
        connection = http.client.HTTPConnection("127.0.0.1", port or self.port, timeout=timeout)
        try:
            connection.request(method or ("GET" if body is None else "POST"), path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def wait_until_ready(self, path: str = "/_/ready", *, within: float = 90) -> None:
        """Returns at the first 200. Raises `AssertionError` with the log when the container ended or time is up."""
        end = time.monotonic() + within
        last = "no answer"
        while time.monotonic() < end:
            try:
                answer = self.ask(path, timeout=5)
            except OSError as error:
                last = repr(error)
            else:
                if answer.status == 200:
                    return
                last = f"{answer.status} {answer.body[:200]!r}"
            assert self.running(), f"the container ended with {self.exit_code()}: {self.logs()}"
            time.sleep(0.02)
        raise AssertionError(f"not ready in {within} s, last: {last}; its log: {self.logs()}")

    def running(self) -> bool:
        return bool(self.docker.inspect(self.id)["State"]["Running"])

    def exit_code(self) -> int:
        return int(self.docker.inspect(self.id)["State"]["ExitCode"])

    def wait_until_ended(self, *, within: float = 60) -> int:
        """Its exit status."""
        return int(self.docker("wait", self.id, timeout=within))

    def logs(self) -> str:
        return self.docker("logs", self.id)

    def execute(self, *command: str, user: str = "") -> str:
        """What a command printed that ran inside."""
        return self.docker("exec", *(["--user", user] if user else []), self.id, *command)

    def kill(self, name: str = "KILL") -> None:
        """Sends a signal to process 1."""
        self.docker("kill", "--signal", name, self.id)


def run_words(
    environment: Mapping[str, str],
    mounts: Mapping[Path | str, str],
    capabilities: Sequence[str],
    security: Sequence[str],
    user: str,
) -> list[str]:
    """The options of `docker run`; a mount's value is the path inside, with `:ro` after it or not."""
    words = [word for name, value in environment.items() for word in ("--env", f"{name}={value}")]
    words += [word for outside, inside in mounts.items() for word in ("--volume", f"{outside}:{inside}")]
    words += [word for capability in capabilities for word in ("--cap-add", capability)]
    words += [word for option in security for word in ("--security-opt", option)]
    return [*words, *(["--user", user] if user else [])]
