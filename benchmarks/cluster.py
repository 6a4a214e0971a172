"""gpufn on a real Kubernetes: how `embed` wakes under Knative, bursts at zero, and what fails when a component does.

The cluster is that of the tests (`tests/testbed`): real components on this computer. Requests come from outside, through
the ingress (Knative) or the provider's Service (OpenFaaS). Absolute times are those of a busy small machine: what counts
are ratios within one run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import requests

from adapter.keys import AGENT_NAMESPACE, SYSTEM_NAMESPACE
from adapter.policy.conservation import HOUR_NS
from adapter.policy.leases import CPU_DEVICE
from benchmarks.results_file import Bar, ratio_of_medians
from tests.testbed import functions
from tests.testbed.cluster import Cluster
from tests.testbed.installation import FUNCTIONS, LOGIN, Installation, installed
from tests.testbed.machines import wait_until
from tests.testbed.nodes import two_nodes

if TYPE_CHECKING:
    from benchmarks.__main__ import Options

REPOSITORY = Path(__file__).parents[1]
PLAIN, SNAPSHOTS = "bench-plain", "bench-snapshots"
BURST = 200
TEXT = json.dumps({"texts": ["one short text"]}).encode()
_LIMIT_S = 180.0
_DOWN_S = 20.0
"""How long requests are sent while each component is down."""
_CALLERS = 4
WAKING = "waking"
"""The function that holds a GPU and is woken while a component is down."""
COMPONENTS = ("webhook", "controller", "agent", "ledger")


def run(options: Options) -> Iterator[Bar]:
    with tempfile.TemporaryDirectory(prefix="gpufn-bench-") as folder, Cluster(two_nodes(), knative=True) as cluster:
        load_functions(cluster, Path(folder))
        with installed(cluster, "both") as gpufn:
            knative = Knative(gpufn)
            yield from wakes(knative, max(3, options.runs // 2), options)
            openfaas = OpenFaaS(gpufn)
            yield from bursts(knative, openfaas)
            yield from components_down(knative)


def load_functions(cluster: Cluster, folder: Path) -> None:
    """`embed` over a base image with torch, `echo` over a plain one, on all nodes."""
    for name, packages in (("embed", ["python3-torch"]), ("echo", [])):
        source = REPOSITORY / "functions" / name
        wanted = source / "requirements.txt"
        layout = functions.base_layout(folder / f"base-{name}", *packages)
        asked = wanted.read_text() if wanted.exists() else ""
        cluster.load(functions.function_image(f"dev.local/{name}:1", source, layout, folder, asked))


# Callers -----------------------------------------------------------------------------------------------------


class Knative:
    """Functions as Knative Services, called by their host names through the ingress."""

    def __init__(self, gpufn: Installation) -> None:
        self.gpufn, self.cluster = gpufn, gpufn.cluster
        self.cluster.make_namespace(PLAIN)
        self.cluster.make_namespace(SNAPSHOTS, {"gpufn.dev/snapshots": "enabled"})

    def deploy(
        self, name: str, namespace: str, annotations: Mapping[str, str] = {}, *, image: str = "", gpus: int = 0
    ) -> None:
        container: dict[str, Any] = {"image": f"dev.local/{image or name}:1", "imagePullPolicy": "IfNotPresent"}
        if gpus:
            container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
        template = {
            "metadata": {"annotations": {"gpufn.dev/idle": "6s", **annotations}},
            "spec": {"containers": [container]},
        }
        service = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "spec": {"template": template}}
        self.cluster.apply([{**service, "metadata": {"name": name, "namespace": namespace}}])
        self.cluster.kubectl("-n", namespace, "wait", f"ksvc/{name}", "--for=condition=Ready", "--timeout=120s")

    def pods(self, name: str, namespace: str) -> list[dict[str, Any]]:
        label = f"serving.knative.dev/service={name}"
        found: list[dict[str, Any]] = self.cluster.get("pods", "-n", namespace, "-l", label)["items"]
        return found

    def at_zero(self, name: str, namespace: str) -> None:
        wait_until(f"end of {name}'s last pod", lambda: not self.pods(name, namespace), _LIMIT_S)
        wait_until("the activator in the way", lambda: self._is_behind_activator(name, namespace), _LIMIT_S)

    def _is_behind_activator(self, name: str, namespace: str) -> bool:
        found = self.cluster.get("serverlessservices.networking.internal.knative.dev", "-n", namespace)["items"]
        ours = [item for item in found if item["metadata"]["labels"].get("serving.knative.dev/service") == name]
        return bool(ours) and all(item["spec"]["mode"] == "Proxy" for item in ours)

    def call(self, name: str, namespace: str, body: bytes) -> requests.Response:
        return post(self.cluster.ingress_url, body, {"Host": f"{name}.{namespace}.functions.test"})


class OpenFaaS:
    """Functions of the provider, called through its Service."""

    def __init__(self, gpufn: Installation) -> None:
        self.cluster = gpufn.cluster
        self._url = f"http://{service_address(self.cluster, SYSTEM_NAMESPACE, 'gateway')}:8080"

    def deploy(self, name: str) -> None:
        asked = {"service": name, "image": f"dev.local/{name}:1", "annotations": {"gpufn.dev/idle": "6s"}}
        with _session() as session:
            answer = session.post(f"{self._url}/system/functions", json=asked, auth=LOGIN, timeout=60)
            answer.raise_for_status()

    def pods(self, name: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.cluster.get("pods", "-n", FUNCTIONS, "-l", f"faas_function={name}")["items"]
        return found

    def call(self, name: str, body: bytes) -> requests.Response:
        return post(f"{self._url}/function/{name}", body, {})


def service_address(cluster: Cluster, namespace: str, name: str) -> str:
    address: str = cluster.get("service", "-n", namespace, name)["spec"]["clusterIP"]
    return address


def post(url: str, body: bytes, headers: dict[str, str]) -> requests.Response:
    with _session() as session:
        return session.post(url, data=body, headers={"Content-Type": "application/json", **headers}, timeout=_LIMIT_S)


def _session() -> requests.Session:
    session = requests.Session()
    session.trust_env = False
    return session


# Wakes -------------------------------------------------------------------------------------------------------


def wakes(knative: Knative, runs: int, options: Options) -> Iterator[Bar]:
    """From zero, through ingress and activator, to the first correct byte; in turns, so that both see the same machine."""
    for namespace in (PLAIN, SNAPSHOTS):
        knative.deploy("embed", namespace, {"gpufn.dev/snapshot": "on"})
    right = knative.call("embed", SNAPSHOTS, TEXT).json()
    events = ("-n", SNAPSHOTS, "events.events.k8s.io")
    wait_until("snapshot", lambda: "SnapshotTaken" in knative.cluster.kubectl("get", *events, "-o", "json"), 300)
    took: dict[str, list[float]] = {PLAIN: [], SNAPSHOTS: []}
    for _ in range(runs):
        for namespace, seconds in took.items():
            knative.at_zero("embed", namespace)
            began = time.monotonic()
            answer = knative.call("embed", namespace, TEXT)
            seconds.append(round(time.monotonic() - began, 3))
            if answer.status_code != 200 or not _is_same(answer.json(), right):
                raise SystemExit(f"embed answered wrongly: {answer.status_code} {answer.text[:200]}")
    rungs = {}
    for name, namespace in (("plain", PLAIN), ("restored", SNAPSHOTS)):
        latest = _starts(knative.gpufn, namespace, runs)
        rungs[name] = [record["rung"] for record in latest]
        options.starts[f"knative_embed_{name}"] = latest[0]
    if set(rungs["restored"]) != {"restore"}:
        raise SystemExit(f"not every wake was a restore: {rungs}")
    yield Bar.of("knative_plain_over_restored", ratio_of_medians(took[PLAIN], took[SNAPSHOTS]), "ratio", [took])
    yield Bar.of("knative_restored_s", statistics.median(took[SNAPSHOTS]), "s", took[SNAPSHOTS])
    yield Bar.of("knative_plain_s", statistics.median(took[PLAIN]), "s", took[PLAIN])
    inside = [record["total_ns"] / 1e9 for record in _starts(knative.gpufn, SNAPSHOTS, runs)]
    yield Bar.of("knative_restored_from_pod_s", statistics.median(inside), "s", inside)


def _starts(gpufn: Installation, namespace: str, count: int) -> list[dict[str, Any]]:
    """The last `count` start records, the newest first: agents tell them within a heartbeat."""

    def told() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = gpufn.ledger(f"starts?function=embed&namespace={namespace}")["starts"]
        return found

    wait_until("start records", lambda: len(told()) > count, 60)
    return told()[:count]


def _is_same(one: Any, other: Any) -> bool:
    """Equal but for the last bits: threads add up in another order."""
    flat = [[x for vector in answer["embeddings"] for x in vector] for answer in (one, other)]
    return len(flat[0]) == len(flat[1]) and all(abs(a - b) < 1e-5 for a, b in zip(*flat, strict=True))


# Bursts ------------------------------------------------------------------------------------------------------


def bursts(knative: Knative, openfaas: OpenFaaS) -> Iterator[Bar]:
    """200 requests at once at zero: those not answered rightly, and how many pods it took."""
    knative.deploy("echo", PLAIN, {"gpufn.dev/max": "1", "gpufn.dev/in-flight": "8"})
    knative.at_zero("echo", PLAIN)
    runs = {
        "knative": burst(lambda body: knative.call("echo", PLAIN, body), lambda: knative.pods("echo", PLAIN)),
    }
    openfaas.deploy("echo")
    openfaas.call("echo", b"first")
    wait_until("end of echo's pod", lambda: not openfaas.pods("echo"), _LIMIT_S)
    runs["provider"] = burst(lambda body: openfaas.call("echo", body), lambda: openfaas.pods("echo"))
    yield Bar.of("cluster_held_200_lost", sum(run["lost"] for run in runs.values()), "requests", [runs])
    yield Bar.of("cluster_held_200_pods", max(run["pods"] for run in runs.values()), "pods", [runs])


def burst(call: Callable[[bytes], requests.Response], pods: Callable[[], list[Any]]) -> dict[str, int]:
    bodies = [f"call {number}".encode() for number in range(BURST)]
    ready = threading.Barrier(BURST)

    def one(body: bytes) -> bool:
        ready.wait()
        with contextlib.suppress(requests.RequestException):
            answer = call(body)
            return answer.status_code == 200 and answer.content == body
        return False

    with concurrent.futures.ThreadPoolExecutor(BURST) as pool:
        right = sum(pool.map(one, bodies))
    return {"sent": BURST, "lost": BURST - right, "pods": len(pods())}


# Components --------------------------------------------------------------------------------------------------


@dataclass
class Calls:
    """Requests that go on while something happens, from `_CALLERS` callers."""

    call: Callable[[bytes], requests.Response]
    right: int = 0
    lost: list[str] = field(default_factory=list)

    def __enter__(self) -> Calls:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._go_on) for _ in range(_CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _go_on(self) -> None:
        while not self._stop.is_set():
            try:
                answer = self.call(b"x")
            except requests.RequestException as error:
                self.lost.append(repr(error))
                continue
            if answer.status_code == 200:
                self.right += 1
            else:
                self.lost.append(f"{answer.status_code} {answer.text[:100]}")


def components_down(knative: Knative) -> Iterator[Bar]:
    """Each component away for a while under load: on a replica that runs, and on one that holds a GPU and is woken and
    ended meanwhile. Then lease totals close again."""
    knative.deploy(WAKING, PLAIN, image="echo", gpus=1)
    runs: list[dict[str, Any]] = []
    for component in COMPONENTS:
        knative.at_zero(WAKING, PLAIN)
        with Calls(lambda body: knative.call("echo", PLAIN, body)) as calls, down(knative.gpufn, component):
            woken = [knative.call(WAKING, PLAIN, b"x").status_code]
            time.sleep(_DOWN_S)
            knative.at_zero(WAKING, PLAIN)
            woken.append(knative.call(WAKING, PLAIN, b"x").status_code)
        runs.append({"component": component, "right": calls.right, "lost": len(calls.lost) + sum(w != 200 for w in woken),
                     "why": calls.lost[:3], "woken": woken})  # fmt: skip
    yield Bar.of("component_down_lost", sum(run["lost"] for run in runs), "requests", runs)
    knative.at_zero(WAKING, PLAIN)
    yield Bar.of("lease_residual_s", residual_s(knative.gpufn), "s", held_by(knative.gpufn, WAKING))


@contextlib.contextmanager
def down(gpufn: Installation, component: str) -> Iterator[None]:
    """None of its pods, and none that comes back, until this ends."""
    kubectl = gpufn.cluster.kubectl
    if component == "agent":
        nowhere = {"spec": {"template": {"spec": {"nodeSelector": {"gpufn.dev/nowhere": "true"}}}}}
        kubectl("-n", AGENT_NAMESPACE, "patch", "daemonset", "gpufn-agent", "-p", json.dumps(nowhere))
        gpufn.kill(component)
        yield
        everywhere = {"spec": {"template": {"spec": {"nodeSelector": {"gpufn.dev/nowhere": None}}}}}
        kubectl("-n", AGENT_NAMESPACE, "patch", "daemonset", "gpufn-agent", "-p", json.dumps(everywhere))
        kubectl("-n", AGENT_NAMESPACE, "rollout", "status", "daemonset/gpufn-agent", "--timeout=120s", timeout_s=140)
        return
    replicas = gpufn.cluster.get("deployment", "-n", SYSTEM_NAMESPACE, f"gpufn-{component}")["spec"]["replicas"]
    kubectl("-n", SYSTEM_NAMESPACE, "scale", f"deployment/gpufn-{component}", "--replicas=0")
    gpufn.kill(component)
    yield
    kubectl("-n", SYSTEM_NAMESPACE, "scale", f"deployment/gpufn-{component}", f"--replicas={replicas}")
    kubectl(
        "-n", SYSTEM_NAMESPACE, "rollout", "status", f"deployment/gpufn-{component}", "--timeout=120s", timeout_s=140
    )


def residual_s(gpufn: Installation) -> float:
    """The largest of any device and hour, of what is left when all that is known is taken from its capacity: once all
    that was kept while somebody was down is delivered, or what is left of it after a minute."""
    deadline = time.monotonic() + 60
    while True:
        now_ns = time.time_ns()
        hours = gpufn.ledger(f"capacity?start_ns={now_ns - 3 * HOUR_NS}&end_ns={now_ns}")["hours"]
        if not hours:
            raise SystemExit("the ledger knows of no GPU")
        left_s: float = max(abs(hour["residual_ns"]) for hour in hours) / 1e9
        if left_s == 0 or time.monotonic() > deadline:
            return left_s
        time.sleep(1)


def held_by(gpufn: Installation, function: str) -> list[dict[str, Any]]:
    """When it held which GPU, in seconds since 1970: what the residual is nothing of."""
    now_ns = time.time_ns()
    asked = f"leases?start_ns={now_ns - 3 * HOUR_NS}&end_ns={now_ns}&function={function}&summary=true"
    leases = [lease for lease in gpufn.ledger(asked)["leases"] if lease["device"] != CPU_DEVICE]
    if not leases:
        raise SystemExit(f"the ledger knows of no GPU that {function} held")
    return [
        {"device": lease["device"], "phase": lease["phase"], "from_s": lease["started_at_ns"] / 1e9,
         "to_s": lease["ended_at_ns"] / 1e9}
        for lease in leases
    ]  # fmt: skip
