"""What the pods of a node mean for its meter: who holds what since when, who lets go, who drains.

Decides on values and tells the meter; the clocks are passed in. Level-triggered: each round looks at all there is, so
that what a round missed the next one finds. Times of Kubernetes are on the calendar of a node, which may be stepped: they
are taken as so long ago, and never as longer ago than the last round could have seen.

A container that is started again by the kubelet has kept its GPU meanwhile: a lease lasts from its container's first start
until the pod is over, deleted, or ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapter.agent.kubelet import Allocation
from adapter.agent.meter import UNKNOWN_DEVICE, Key, Meter
from adapter.agent.pods import Pod
from adapter.cluster.intent import Intent
from adapter.cluster.inventory import is_gpu
from adapter.policy.leases import CPU_DEVICE, Holder
from adapter.records import LeasePhase


@dataclass(frozen=True, slots=True)
class Now:
    """One instant on both clocks of a node."""

    boot_ns: int
    wall_ns: int

    def on_boot(self, wall_ns: int) -> int:
        """The instant of a calendar time that is not in the future."""
        return self.boot_ns - max(0, self.wall_ns - wall_ns)


def observe(
    meter: Meter,
    pods: Mapping[str, Pod],
    intents: Mapping[str, Intent],
    allocation: Allocation | None,
    models: Mapping[str, str],
    now: Now,
) -> None:
    """One round. `pods` and `intents` by UID; what is in `pods` alone is no function's. `models`: of the devices there are.

    `allocation` is None where the kubelet does not say: who has held goes on, and who comes waits for a later round.
    """
    held = {uuid for _, _, uuid in meter.held()} - {CPU_DEVICE, UNKNOWN_DEVICE}
    meter.present({**dict.fromkeys(held, ""), **models}, now.boot_ns)
    for uid in intents:
        if pods[uid].deleted_at_ns:
            meter.move(uid, LeasePhase.DRAINING, now.on_boot(pods[uid].deleted_at_ns))
    for key in meter.held():
        _let_go(meter, key, pods.get(key[0]), now)
    if allocation is not None:
        for uid, intent in intents.items():
            _take(meter, pods[uid], intent, allocation, models, now)
    if allocation is not None:
        meter.others(_others(pods, intents, allocation), now.boot_ns)


def still_there(pods: Mapping[str, Pod], allocation: Allocation, held: Iterable[Key]) -> dict[str, Pod]:
    """Of pods that the API server had when it was heard last, those that the kubelet does not contradict: one that held
    a GPU and has none any more is gone."""
    there = {(namespace, name) for namespace, name, _ in allocation.devices}
    with_gpus = {uid for uid, _, device in held if device not in (CPU_DEVICE, UNKNOWN_DEVICE)}
    return {uid: pod for uid, pod in pods.items() if uid not in with_gpus or (pod.namespace, pod.name) in there}


def wants_gpu(pod: Pod, container: str) -> int:
    """How many GPU units the container's limits ask for."""
    for item in pod.body["spec"].get("containers") or ():
        if item.get("name") == container:
            limits = (item.get("resources") or {}).get("limits") or {}
            return sum(int(n) for name, n in limits.items() if is_gpu(name) and str(n).isdecimal())
    return 0


def _let_go(meter: Meter, key: Key, pod: Pod | None, now: Now) -> None:
    _, name, _ = key
    container = None if pod is None else pod.container(name)
    if pod is None:
        meter.release(key, now.boot_ns)
    elif container is not None and container.finished_at_ns and (pod.is_over or pod.deleted_at_ns):
        meter.release(key, now.on_boot(container.finished_at_ns))
    elif pod.is_over:
        meter.release(key, now.boot_ns)


def _take(meter: Meter, pod: Pod, intent: Intent, allocation: Allocation, models: Mapping[str, str], now: Now) -> None:
    main = pod.body["spec"]["containers"][intent.container]["name"]
    for container in pod.containers:
        is_over = container.finished_at_ns and (pod.is_over or pod.deleted_at_ns)
        was_told = now.on_boot(container.finished_at_ns) <= meter.told_ns or meter.knows(pod.uid, container.name)
        if not container.started_at_ns or (is_over and was_told):
            continue
        devices = dict(allocation.devices.get((pod.namespace, pod.name, container.name), {}))
        if not devices and container.name == main:
            if any(key[:2] == (pod.uid, main) and key[2] != UNKNOWN_DEVICE for key in meter.held()):
                continue  # of what it has the kubelet says nothing now
            count = wants_gpu(pod, main)
            devices = {UNKNOWN_DEVICE: float(count)} if count else {CPU_DEVICE: 1.0}
        unknown = pod.uid, container.name, UNKNOWN_DEVICE
        since_ns = now.on_boot(container.started_at_ns)
        if devices and UNKNOWN_DEVICE not in devices and meter.holds(unknown):  # the kubelet says it now
            meter.release(unknown, now.boot_ns)
            since_ns = now.boot_ns
        for device, share in devices.items():
            key = pod.uid, container.name, device
            if not meter.holds(key):
                holder = _holder(meter, pod, intent, device, share, models.get(device, ""))
                meter.hold(key, holder, LeasePhase.RESTORING, since_ns)
                if is_over:
                    meter.release(key, now.on_boot(container.finished_at_ns))


def _holder(meter: Meter, pod: Pod, intent: Intent, device: str, share: float, model: str) -> Holder:
    return Holder(
        function=intent.function,
        namespace=intent.namespace,
        revision=intent.revision,
        replica=pod.replica,
        tenant=intent.tenant,
        price_class=intent.spec.price_class,
        device=device,
        share=share,
        gpu_model=model,
        node=meter.node,
    )


def _others(pods: Mapping[str, Pod], intents: Mapping[str, Intent], allocation: Allocation) -> dict[str, float]:
    """What containers of other pods hold of each device; also of pods that nobody has told us of yet."""
    functions = {(pods[uid].namespace, pods[uid].name) for uid in intents}
    shares: dict[str, float] = {}
    for (namespace, name, _), devices in allocation.devices.items():
        if (namespace, name) not in functions:
            for device, share in devices.items():
                shares[device] = shares.get(device, 0.0) + share
    return shares
