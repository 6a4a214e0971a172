"""The webhook and the controller at size, beside a real API server: 1,000 GPU nodes with 500 snapshots each.

KWOK keeps the nodes, heartbeats included; the agents' GpuNode objects are as agents write them; the components are
processes with the rights that the manifests give them. Measured is what the API server sees of the webhook (over TLS, on
one kept connection as it keeps one, verified by the authority that the controller made; and pods that it creates, dry,
with the webhook and without), how long a pod that fits nowhere waits for the Event that says so, and memory at its peak.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapter.cluster.resources import EVENTS, GPU_NODES, PODS
from adapter.keys import DOMAIN, FUNCTION_LABEL, NVIDIA_GPU, SNAPSHOTS_LABEL
from benchmarks.admission import MODELS, NAMESPACE, NODE_COUNT, TAINT, agent_status, node_labels, quantile, review
from benchmarks.results_file import Bar

if TYPE_CHECKING:
    from benchmarks.__main__ import Options
    from tests.testbed.cluster import Cluster
    from tests.testbed.components import Process

REVIEWS, ROUNDS, CREATED, WAITING = 1000, 3, 200, 40
_AT_ONCE = 4
"""Requests of ours to the API server."""
_SPOT_SHARE = 5
"""One node of so many is spot."""
_MOST_GPUS = max(model.gpus for model in MODELS)
_START_S = 300.0
_EVENT_S = 60.0


def run(options: Options) -> Iterable[Bar]:
    from tests.testbed.cluster import Cluster
    from tests.testbed.installation import applied

    nodes, reviews = (NODE_COUNT, REVIEWS) if options.runs >= 10 else (NODE_COUNT // 10, REVIEWS // 10)
    with tempfile.TemporaryDirectory() as made, Cluster() as cluster, applied(cluster, "knative", "knative-serving"):
        folder = Path(made)
        yield from _fill(cluster, nodes)
        with _components(cluster, folder) as (controller, webhook, port):
            yield from _admission(port, folder, reviews)
            yield from _creation(cluster)
            lags = _lags(cluster)
            yield Bar.of("controller_lag_s", quantile(lags, 0.99), "s", [round(lag, 3) for lag in lags])
            yield Bar.of("controller_lag_median_s", statistics.median(lags), "s")
            yield Bar.of("controller_rss_mb", controller.peak_bytes() / 1e6, "MB")
            yield Bar.of("webhook_rss_mb", webhook.peak_bytes() / 1e6, "MB")


# --------------------------------------------------------------------------------------------------- the cluster


def _fill(cluster: Cluster, count: int) -> Iterator[Bar]:
    """Nodes of every model, spot and not, and what their agents say."""
    cluster.make_namespace(NAMESPACE, {SNAPSHOTS_LABEL: "enabled"})
    names: list[str] = []
    for number, model in enumerate(MODELS):
        share = count // len(MODELS)
        for is_spot, nodes in ((True, share // _SPOT_SHARE), (False, share - share // _SPOT_SHARE)):
            names += cluster.add_kwok_nodes(
                nodes,
                gpus=model.gpus,
                cpus=8 * model.gpus,
                memory=f"{64 * model.gpus}Gi",
                labels=node_labels(model, is_spot=is_spot),
                taints=[TAINT],
                prefix=f"kind-{number}-{'spot' if is_spot else 'own'}",
            )
    chance = random.Random(0)  # noqa: S311  # the same each time, not secret
    status = [agent_status(chance) for _ in names]
    size = sum(len(json.dumps(each, separators=(",", ":"))) for each in status)
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        list(threads.map(_Writer(cluster).write, names, status))
    yield Bar.of("controller_nodes", len(names), "nodes")
    yield Bar.of("controller_gpunodes_mb", size / 1e6, "MB")


class _Writer:
    """Writes GpuNode objects with a session for each thread."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster, self._own = cluster, threading.local()

    def write(self, name: str, status: dict[str, Any]) -> None:
        if not hasattr(self._own, "session"):
            self._own.session = self._cluster.session()
        session, server = self._own.session, self._cluster.site.server
        session.post(f"{server}{GPU_NODES.path()}", json=GPU_NODES.body(name)).raise_for_status()
        path, kind = f"{server}{GPU_NODES.path(name=name)}/status", "application/merge-patch+json"
        body = json.dumps({"status": status})
        session.patch(path, data=body, headers={"Content-Type": kind}).raise_for_status()


@contextmanager
def _components(cluster: Cluster, folder: Path) -> Iterator[tuple[Process, Process, int]]:
    """The controller, the webhook and its port, both knowing the cluster; the API server's calls lead there."""
    from tests.ports import free_port
    from tests.testbed.components import WEBHOOK_SECRET, lead, secret, started
    from tests.testbed.machines import wait_until

    with ExitStack() as stack:

        def start(component: str, *words: str) -> Process:
            process = started(cluster, component, folder / component, *words)
            stack.callback(process.end, signal.SIGKILL)
            return process

        controller = start("controller")
        wait_until("controller", controller.is_ready, _START_S)
        wait_until("certificate", lambda: secret(cluster, WEBHOOK_SECRET), _START_S)
        for name, data in secret(cluster, WEBHOOK_SECRET).items():
            (folder / name).write_bytes(data)
        port = free_port()
        webhook = start("webhook", f"--port={port}", f"--tls={folder}")
        wait_until("webhook", webhook.is_ready, _START_S)
        lead(cluster, "gpufn-webhook", port)
        yield controller, webhook, port


# --------------------------------------------------------------------------------------------------- the webhook


def _admission(port: int, folder: Path, reviews: int) -> Iterator[Bar]:
    rounds = [_asked(port, folder / "ca.crt", reviews, seed) for seed in range(ROUNDS)]
    tails = [quantile(taken, 0.99) for taken in rounds]
    medians = [statistics.median(taken) for taken in rounds]
    yield Bar.of("admission_tls_p99_ms", statistics.median(tails), "ms", [round(tail, 3) for tail in tails])
    yield Bar.of("admission_tls_p50_ms", statistics.median(medians), "ms", [round(each, 3) for each in medians])


def _asked(port: int, authority: Path, reviews: int, seed: int) -> list[float]:
    """Milliseconds from each review's first byte sent to its answer's last byte read."""
    chance = random.Random(seed)  # noqa: S311  # the same each time, not secret
    connection = _Connection(port, authority)
    taken = []
    for number in range(reviews):
        body = review(number, chance)
        began = time.perf_counter_ns()
        answer = connection.ask(body)
        taken.append((time.perf_counter_ns() - began) / 1e6)
        response = json.loads(answer)["response"]
        assert response["allowed"], response
        assert response["patch"], response
    connection.close()
    return taken


class _Connection(http.client.HTTPSConnection):
    """To the webhook on this computer, by its Service's name."""

    def __init__(self, port: int, authority: Path) -> None:
        from tests.testbed.components import WEBHOOK_HOST

        super().__init__(WEBHOOK_HOST, context=ssl.create_default_context(cafile=str(authority)))
        self._create_connection = lambda _address, *words: socket.create_connection(("127.0.0.1", port), *words)

    def ask(self, body: bytes) -> bytes:
        self.request("POST", "/pods", body, {"Content-Type": "application/json"})
        answer = self.getresponse()
        said = answer.read()
        assert answer.status == 200, said
        return said


def _creation(cluster: Cluster) -> Iterator[Bar]:
    """Pods that the API server makes, dry, with the webhook and, taken in turn, without a label that it is asked for."""
    chance = random.Random(ROUNDS)  # noqa: S311  # the same each time, not secret
    url = f"{cluster.site.server}{PODS.path(NAMESPACE)}?dryRun=All"
    taken: dict[bool, list[float]] = {True: [], False: []}
    with cluster.session() as session:
        for number in range(2 * CREATED):
            is_ours = number % 2 == 0
            pod = json.loads(review(number, chance))["request"]["object"]
            if not is_ours:
                pod["metadata"]["labels"] = {}
            began = time.perf_counter_ns()
            answer = session.post(url, json=pod)
            taken[is_ours].append((time.perf_counter_ns() - began) / 1e6)
            answer.raise_for_status()
            annotations = answer.json()["metadata"].get("annotations", {})
            assert (f"{DOMAIN}/patched" in annotations) == is_ours, answer.text
    for name, is_ours in (("pod_created_with_webhook", True), ("pod_created_without_webhook", False)):
        yield Bar.of(f"{name}_p50_ms", statistics.median(taken[is_ours]), "ms")
        yield Bar.of(f"{name}_p99_ms", quantile(taken[is_ours], 0.99), "ms")


# --------------------------------------------------------------------------------------------------- the controller


def _lags(cluster: Cluster) -> list[float]:
    """Seconds from asking for a pod that fits nowhere until its Event is heard of: half one by one, half at once."""
    heard = _Events(cluster)
    with ThreadPoolExecutor(WAITING // 2) as threads:
        one_by_one = [heard.lag(number) for number in range(WAITING // 2)]
        at_once = list(threads.map(heard.lag, range(WAITING // 2, WAITING)))
    return one_by_one + at_once


class _Events:
    """The controller's Events, watched."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._heard: dict[str, float] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        from requests.exceptions import ChunkedEncodingError

        with suppress(ChunkedEncodingError):  # the cluster's end cuts it
            self._listen()

    def _listen(self) -> None:
        url = f"{self._cluster.site.server}{EVENTS.path(NAMESPACE)}?watch=true"
        with self._cluster.session() as session, session.get(url, stream=True) as stream:
            for line in stream.iter_lines(chunk_size=None):
                event = json.loads(line)["object"]
                if event["reportingController"] == f"{DOMAIN}/controller":
                    with self._changed:
                        self._heard.setdefault(event["regarding"]["name"], time.monotonic())
                        self._changed.notify_all()

    def lag(self, number: int) -> float:
        name = f"waits-{number}"
        with self._cluster.session() as session:
            path = f"{self._cluster.site.server}{PODS.path(NAMESPACE)}"
            began = time.monotonic()
            session.post(path, json=_too_large(name, _MOST_GPUS + 1 + number)).raise_for_status()
        with self._changed:
            assert self._changed.wait_for(lambda: name in self._heard, _EVENT_S), f"nothing is said of {name}"
            return self._heard[name] - began


def _too_large(name: str, gpus: int) -> dict[str, Any]:
    """For more GPUs than a node has; each for another number, so that nodes are looked at anew for each."""
    container = {"name": "main", "image": "none", "resources": {"limits": {NVIDIA_GPU: str(gpus)}}}
    metadata = {"labels": {FUNCTION_LABEL: name}}
    return PODS.body(name, NAMESPACE, metadata=metadata, spec={"containers": [container]})
