"""What is said to a watchdog, and how its answers are kept: the same for recording and for the test."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HANDLER = Path(__file__).with_name("handler.py")
HOST = "function.example"
NOT_KEPT = {"date", "server", "connection", "keep-alive", "transfer-encoding"}
"""Headers of the server and of the connection, not of the answer."""

LIMIT_S = 30.0


@dataclass(frozen=True)
class Ask:
    """One request and its answer, on a connection of its own."""

    name: str
    path: str
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: str = ""
    body_repeats: int = 1
    chunked: bool = False


@dataclass(frozen=True)
class Hold:
    """A request that stays inside the handler until `Free`."""

    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Free:
    """Lets the held request through and keeps its answer; `late`: only after the answer has come."""

    name: str
    late: bool = False


@dataclass(frozen=True)
class Scrape:
    """The request metrics, once they tell of so many requests."""

    requests: int
    name: str = "metrics"


@dataclass(frozen=True)
class Lock:
    """Whether the lock file is there."""

    name: str


@dataclass(frozen=True)
class Terminate:
    """SIGTERM, and until the lock file is gone."""


@dataclass(frozen=True)
class End:
    """The exit status, once the program has ended."""

    name: str = "exit"


Act = Ask | Hold | Free | Scrape | Lock | Terminate | End


@dataclass(frozen=True)
class Scene:
    """One life of a program with `environment`. `starts`: whether its function comes up."""

    name: str
    acts: tuple[Act, ...]
    environment: tuple[tuple[str, str], ...] = ()
    starts: bool = True


SCENES = (
    Scene(
        "requests",
        (
            Lock("lock once up"),
            Ask("root", "/"),
            *(
                Ask(f"seen {method}", "/some/where?a=1&a=2&b=%20x", method, (("X-Own", "one"),))
                for method in ("GET", "DELETE")
            ),
            *(
                Ask(f"seen {method}", "/", method, (("Content-Type", "text/x-own"), ("X-Own", "one")), "body " + method)
                for method in ("POST", "PUT", "PATCH")
            ),
            Ask("seen form", "/form", "POST", (("Content-Type", "application/x-www-form-urlencoded"),), "a=1&b=2"),
            Ask("chunked body", "/chunked", "POST", body="in parts", chunked=True),
            Ask("large body", "/size", "POST", body="x" * 1024, body_repeats=1024),
            Ask("head", "/", "HEAD"),
            Ask("options", "/", "OPTIONS"),
            Ask("unknown method", "/", "PURGE"),
            Ask("escaped path", "/a%2Fb/%C3%A9"),
            Ask("nothing", "/nothing"),
            Ask("created", "/created"),
            Ask("cookies", "/cookies"),
            Ask("moved", "/moved"),
            Ask("missing", "/missing"),
            Ask("broken", "/broken"),
            Ask("call id", "/seen", headers=(("X-Call-Id", "a-call"),)),
            Ask("kubelet", "/", headers=(("User-Agent", "kube-probe/1.33"),)),
            Ask("health", "/_/health"),
            Ask("health by POST", "/_/health", "POST"),
            Ask("ready", "/_/ready"),
            Ask("ready by POST", "/_/ready", "POST"),
        ),
    ),
    Scene("metrics", (Ask("root", "/"), Ask("post", "/", "POST", body="x"), Ask("missing", "/missing"), Scrape(3))),
    Scene(
        "streams",
        (
            Ask("events", "/events", headers=(("Accept", "text/event-stream"),)),
            Ask("events unasked", "/events"),
            Ask("lines", "/lines", headers=(("Accept", "application/x-ndjson"),)),
            Ask("plain where events are accepted", "/", headers=(("Accept", "text/event-stream"),)),
        ),
    ),
    Scene(
        "at its limit",
        (
            Hold(),
            Ask("one too many", "/"),
            Ask("ready", "/_/ready"),
            Ask("health", "/_/health"),
            Free("the one inside"),
            Ask("after it", "/"),
            Ask("ready after it", "/_/ready"),
            Scrape(3),
        ),
        (("max_inflight", "1"),),
    ),
    Scene("exec_timeout", (Hold(), Free("too long", late=True), Ask("in time", "/")), (("exec_timeout", "300ms"),)),
    Scene(
        "X-Timeout",
        (
            Hold((("X-Timeout", "300ms"),)),
            Free("lowered", late=True),
            Ask("higher than allowed", "/", headers=(("X-Timeout", "1h"),)),
            Ask("no duration", "/", headers=(("X-Timeout", "soon"),)),
        ),
        (("exec_timeout", "20s"),),
    ),
    Scene("X-Timeout without a limit", (Hold((("X-Timeout", "1ms"),)), Free("not lowered")), (("exec_timeout", "0"),)),
    Scene(
        "ready_path not ready", (Ask("ready", "/_/ready"), Ask("health", "/_/health")), (("ready_path", "/loading"),)
    ),
    Scene("ready_path ready", (Ask("ready", "/_/ready"), Ask("health", "/_/health")), (("ready_path", "/loaded"),)),
    Scene("suppress_lock", (Lock("lock"), Ask("root", "/")), (("suppress_lock", "true"),)),
    Scene(
        "no function",
        (Ask("root", "/"), Ask("health", "/_/health"), Ask("ready", "/_/ready"), Lock("lock")),
        starts=False,
    ),
    Scene(
        "SIGTERM",
        (
            Hold(),
            Terminate(),
            Ask("health", "/_/health"),
            Ask("ready", "/_/ready"),
            Ask("a late request", "/"),
            Free("the one inside"),
            End(),
        ),
        (("healthcheck_interval", "2s"), ("write_timeout", "20s")),
    ),
)


@dataclass
class Program:
    """A running watchdog, or what stands for it."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    temporary: Path
    gate: socket.socket
    inside: list[tuple[socket.socket, http.client.HTTPConnection]] = field(default_factory=list)

    @property
    def lock(self) -> Path:
        return self.temporary / ".lock"

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        for gate, connection in self.inside:
            gate.close()
            connection.close()
        self.gate.close()


def open_gate(folder: Path) -> tuple[socket.socket, str]:
    """Where requests to /gate say that they are inside; a short path, as sockets need."""
    gate = socket.socket(socket.AF_UNIX)
    gate.bind(str(folder / "gate"))
    gate.listen()
    gate.settimeout(LIMIT_S)
    return gate, str(folder / "gate")


def play(scene: Scene, program: Program) -> Iterator[tuple[str, Any]]:
    """What was heard: each act's name, with what is kept of it."""
    for act in scene.acts:
        heard = _do(act, program)
        if heard is not None:
            assert not isinstance(act, Hold | Terminate)
            yield act.name, heard


def _do(act: Act, program: Program) -> Any:
    if isinstance(act, Ask):
        return _ask(act, program.port)
    if isinstance(act, Hold):
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=LIMIT_S)
        connection.request("GET", "/gate", headers={"Host": HOST, **dict(act.headers)})
        inside, _ = program.gate.accept()
        program.inside.append((inside, connection))
    elif isinstance(act, Free):
        inside, connection = program.inside.pop()
        if act.late:
            kept = _kept(connection.getresponse())
            inside.close()
        else:
            inside.close()
            kept = _kept(connection.getresponse())
        connection.close()
        return kept
    elif isinstance(act, Scrape):
        return _scrape(program.metrics_port, act.requests)
    elif isinstance(act, Lock):
        return {"there": program.lock.exists()}
    elif isinstance(act, Terminate):
        program.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + LIMIT_S
        while program.lock.exists() and time.monotonic() < end:
            time.sleep(0.01)  # a file that goes is no event
    elif isinstance(act, End):
        program.process.communicate(timeout=LIMIT_S)
        return {"status": program.process.returncode}
    return None


def _ask(act: Ask, port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    body: Any = act.body * act.body_repeats
    if act.chunked:
        body = iter(part.encode() for part in re.split("( )", act.body))
    headers = {"Host": HOST, **dict(act.headers)}
    try:
        connection.request(act.method, act.path, body or None, headers, encode_chunked=act.chunked)
        return _kept(connection.getresponse())
    finally:
        connection.close()


def _kept(answer: http.client.HTTPResponse) -> dict[str, Any]:
    body = answer.read().decode()
    headers: dict[str, list[str]] = {}
    for name, value in answer.getheaders():
        if name.lower() not in NOT_KEPT:
            headers.setdefault(name.lower(), []).append(_without_chance(name.lower(), value))
    kind = headers.get("content-type", [""])[0]
    content = json.loads(body) if kind == "application/json" and body else body
    return {"status": answer.status, "headers": headers, "body": content}


def _without_chance(name: str, value: str) -> str:
    """A header's value, but for what differs from run to run."""
    if name == "x-duration-seconds" and re.fullmatch(r"\d+\.\d{6}", value):
        return "SECONDS"
    if name == "x-call-id" and value != "a-call":
        return "ID"
    return value


def _scrape(port: int, requests: int) -> dict[str, Any]:
    """A request is counted when it is over, which may be a moment after its answer has been read."""
    end = time.monotonic() + LIMIT_S
    while True:
        heard = _scrape_once(port)
        counted = sum(value for name, value in heard["samples"].items() if name.startswith("http_requests_total"))
        if counted >= requests or time.monotonic() > end:
            return heard


def _scrape_once(port: int) -> dict[str, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    samples, buckets = {}, set()
    for line in text.splitlines():
        name, _, value = line.rpartition(" ")
        if name.startswith("http_") and "_sum" not in name:  # seconds are of no use here, nor where they fall
            if bound := re.search(r',?le="([^"]+)"', name):
                buckets.add(float(bound[1]))
            else:
                samples[name] = float(value)
    return {"samples": dict(sorted(samples.items())), "buckets": [str(bound) for bound in sorted(buckets)]}


def own_environment(program: dict[str, str], scene: Scene) -> dict[str, str]:
    """The environment of a program: little of ours, what the scene says, and what is the program's own."""
    kept = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LANG", "PYTHONPATH"}}
    return {**kept, **dict(scene.environment), **program}
