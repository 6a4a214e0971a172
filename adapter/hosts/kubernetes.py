"""The Kubernetes host: replicas as bare pods, one each, which the fleet of their function starts and stops.

What is desired is a record for each function, a ConfigMap; it owns the function's pods and its Service. Nothing of it is
here: a provider that dies leaves pods that serve nobody worse than before, and the next one takes them back by their
labels. Which pods there are, a watch for each namespace tells; how they are, their status and their entrypoint's log.

Nodes and GPUs are the scheduler's business, with what the pod webhook adds to a pod on its way. Why bare pods: see
docs/adr/0010-functions-are-bare-pods.md.

Rights, in each namespace of functions: pods get list watch create delete; pods/log get; services get create patch.
(The catalog needs more: see `adapter.openfaas.cluster_catalog`.)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.backoff import pause_s
from adapter.cluster.informer import Informer
from adapter.cluster.resources import PODS, SERVICES
from adapter.errors import (
    AdapterError,
    ConfigError,
    Conflict,
    GpuError,
    HandlerError,
    NotFound,
    Overloaded,
    Timeout,
    Unavailable,
)
from adapter.hosts import Deployment, EventSink, Inventory, Keeper, ReplicaState, Traits
from adapter.hosts.background import Background
from adapter.hosts.kubernetes_pods import (
    SELECTOR,
    Owner,
    check_terms,
    new_identity,
    pod_of,
    record_name,
    service_of,
)
from adapter.hosts.kubernetes_replica import KubernetesReplica, accepts
from adapter.hosts.kubernetes_status import Pod, Problem, answers_requests, hindrance_of, problem_of, read_pod
from adapter.hosts.process import check_deployment
from adapter.policy.budget import SPENT_CODE

logger = logging.getLogger(__name__)

_SYNC_LIMIT_S = 10.0
_CONNECT_PAUSE_S = 0.02
"""Between two tries to connect to a container that has begun and does not listen yet: an entrypoint does in 0.1 s."""
_SOONER = 0.95
"""Of a start's time: it is given up before those give up who wait for it, so that they hear why."""
_AT_ONCE_S = 1
"""Grace of a pod that is to go at once. With 0 it would be gone from the API server before it is from its node, and
its GPU given to another too soon."""
_NOBODY = Owner("", "")
_PERHAPS_DONE = frozenset({"api-cut", "api-timed-out", "api-failed"})
"""Errors after which a pod may have been made all the same; for so long its watch is waited for."""
_SEEN_LIMIT_S = 3.0
_FIRST_PAUSE_S, _PAUSE_LIMIT_S = 0.5, 10.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What the desired state says of functions, asked when it is needed.

    `owner_uid`: of the record of ``name.namespace``, empty where there is none. `keeps_snapshots`: whether a namespace
    opted in. `pull_secrets`: which of a deployment's secrets are for pulling its image; raises `ConfigError` for one that
    it may not have.
    """

    owner_uid: Callable[[str], str]
    keeps_snapshots: Callable[[str], bool]
    pull_secrets: Callable[[Deployment], Coroutine[Any, Any, Collection[str]]]


@dataclass
class _Starting:
    """A pod that `start` waits for, from before it is asked for."""

    changed: asyncio.Event = field(default_factory=asyncio.Event)
    pod: Pod | None = None
    restarts: int = 0
    is_gone: bool = False

    @property
    def now(self) -> Pod | None:
        """None where there is none any more."""
        return None if self.is_gone else self.pod

    async def is_seen(self, limit_s: float) -> bool:
        """Whether there is such a pod, as far as the watch has told by then."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.changed.wait(), limit_s)
        return self.pod is not None

    def saw(self, pod: Pod | None) -> None:
        self.is_gone = pod is None and self.pod is not None
        self.pod = pod or self.pod
        self.changed.set()


class KubernetesHost:
    """See `adapter.hosts.Host`. Namespaces whose pods are seen come with `add_namespace`; `synced` waits for the first.

    `pull_policy` is Kubernetes' own word; empty: its default.
    """

    traits = Traits("kubernetes", parks=False, grants_gpus=False, bounds_replicas=True, outlives_us=True)

    def __init__(self, api: Api, facts: Facts, *, pull_policy: str = "") -> None:
        self._api = api
        self._facts = facts
        self._pull_policy = pull_policy
        self._informers: dict[str, Informer[Pod]] = {}
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._starting: dict[tuple[str, str], _Starting] = {}
        self._replicas: dict[tuple[str, str], KubernetesReplica] = {}
        self._leaving: set[str] = set()  # uids of pods that are to be deleted
        self._keeper: Keeper | None = None
        self._background = Background()
        self._closing = False

    # Which pods there are -----------------------------------------------------------------------

    def add_namespace(self, namespace: str) -> None:
        """See its pods from now on."""
        if namespace in self._informers:
            return
        informer = Informer(self._api, PODS.path(namespace), read_pod, label_selector=SELECTOR)
        informer.on_change(lambda _, old, new: self._changed(old, new))
        self._informers[namespace] = informer
        self._watches[namespace] = asyncio.get_running_loop().create_task(informer.run())

    def drop_namespace(self, namespace: str) -> None:
        """It has gone, with all its pods; nobody will tell of each of them."""
        if self._informers.pop(namespace, None) is None:
            return
        self._watches.pop(namespace).cancel()
        for place, replica in list(self._replicas.items()):
            if place[0] == namespace:
                replica.saw(None)

    async def synced(self) -> None:
        """Until the pods of all namespaces so far are known; of one without rights for us none ever are, and it is waited
        for no longer than that takes to see."""
        waits = [asyncio.ensure_future(informer.synced.wait()) for informer in self._informers.values()]
        if waits:
            _, late = await asyncio.wait(waits, timeout=_SYNC_LIMIT_S)
            for wait in late:
                wait.cancel()

    @property
    def is_current(self) -> bool:
        """Whether what is known of pods is not old."""
        return all(informer.healthy for informer in self._informers.values() if informer.synced.is_set())

    def pods(self, key: str) -> Iterator[Pod]:
        """Those of one function, whoever started them."""
        for informer in self._informers.values():
            yield from (pod for pod in informer.snapshot().values() if pod.key == key)

    def _changed(self, old: Pod | None, new: Pod | None) -> None:
        pod = new or old
        if pod is None:
            return
        place = (pod.namespace, pod.name)
        starting, replica = self._starting.get(place), self._replicas.get(place)
        if old is not None and new is not None and old.uid != new.uid and replica is not None:
            replica.saw(None)  # another one of that name: its end was missed
            replica = None
        if new is None:
            self._leaving.discard(pod.uid)
        if starting is not None:
            starting.saw(new)
        elif replica is not None:
            replica.saw(new)
        elif new is not None:
            self._offer(new)

    # Deployments --------------------------------------------------------------------------------

    async def check(self, deployment: Deployment) -> None:
        """By asking the API server for a replica that is not meant: its own rules, quotas and webhooks answer."""
        check_deployment(deployment)
        check_terms(deployment)
        snapshots = self._facts.keeps_snapshots(deployment.namespace)
        pod = pod_of(
            deployment, new_identity(deployment.name), _NOBODY, snapshots=snapshots, pull_policy=self._pull_policy
        )
        del pod["metadata"]["ownerReferences"]
        try:
            await self._api.create(PODS.path(deployment.namespace), pod, dry_run=True)
        except (ConfigError, Unavailable) as error:
            if isinstance(error, Unavailable) and error.code != "forbidden":
                raise
            if "does not support dry run" in error.why:
                return  # somebody else's webhook: it will say what it has to say at the first start
            raise ConfigError(
                f"Pods of {deployment.key} are refused by the cluster.",
                why=error.why,
                hint="Change what it names; a quota or a policy of the namespace is its administrator's to change.",
                code="pod-refused",
            ) from error

    async def prepare(self, deployment: Deployment) -> None:
        check_deployment(deployment)
        check_terms(deployment)
        owner = self._owner(deployment)
        await self._facts.pull_secrets(deployment)  # told now, and looked at again by each start
        path = SERVICES.path(deployment.namespace, deployment.name)
        try:
            await self._api.apply(path, service_of(deployment, owner))
        except (ConfigError, Conflict) as error:
            raise ConfigError(
                f"The Service of {deployment.key} cannot be made.",
                why=error.why,
                hint="Is there one of that name that is somebody else's? Rename the function, or remove it.",
                code="service-refused",
            ) from error

    def _owner(self, deployment: Deployment) -> Owner:
        uid = self._facts.owner_uid(deployment.key)
        if not uid:
            raise NotFound(f"{deployment.key} is not deployed any more.", code="function-unknown")
        return Owner(record_name(deployment.name), uid)

    # Replicas -----------------------------------------------------------------------------------

    async def start(self, deployment: Deployment, sink: EventSink, devices: tuple[str, ...] = ()) -> KubernetesReplica:
        pull_secrets = await self._facts.pull_secrets(deployment)
        if self._closing:
            raise Unavailable("This host is shutting down.", code="closing")
        identity = new_identity(deployment.name)
        body = pod_of(
            deployment,
            identity,
            self._owner(deployment),
            snapshots=self._facts.keeps_snapshots(deployment.namespace),
            pull_secrets=pull_secrets,
            pull_policy=self._pull_policy,
        )
        place = (deployment.namespace, identity)
        starting = self._starting[place] = _Starting()
        try:
            await self._create(deployment, body, starting)
            await self._come_up(deployment, starting)
        except asyncio.CancelledError:
            raise  # by a provider that ends: the next one finds the pod
        except BaseException:
            if starting.pod is not None:
                self._remove(starting.pod, at_once=False)
            raise
        finally:
            del self._starting[place]
        replica = self._replica(starting, deployment, sink)
        replica.watch()
        replica.saw(starting.now)
        return replica

    async def _create(self, deployment: Deployment, body: dict[str, Any], starting: _Starting) -> None:
        try:
            pod = read_pod(await self._api.create(PODS.path(deployment.namespace), body))
        except ConfigError as error:
            raise ConfigError(f"A pod of {deployment.key} was refused.", why=error.why, code="pod-refused") from error
        except (Unavailable, Timeout) as error:
            if error.code == "forbidden":  # by a quota, a policy or for want of rights
                message, why = f"A pod of {deployment.key} was refused.", " ".join(error.why.split())
                if f"[{SPENT_CODE}]" in why:  # by our webhook, whose words these are
                    raise Overloaded(message, why=why, code=SPENT_CODE) from error
                raise Unavailable(message, why=why, code="pod-refused") from error
            if error.code in _PERHAPS_DONE and await starting.is_seen(_SEEN_LIMIT_S):
                return
            raise  # should it come to be after all, it is taken back
        if starting.pod is None:
            starting.saw(pod)

    async def _come_up(self, deployment: Deployment, starting: _Starting) -> None:
        """Returns once requests can be sent to the pod. Raises what hinders that."""
        ends_at = time.monotonic() + _SOONER * deployment.spec.start_timeout_s
        while (left_s := ends_at - time.monotonic()) > 0:
            starting.changed.clear()
            pod = starting.pod
            assert pod is not None
            if starting.is_gone or pod.is_ending:
                raise Unavailable(f"A pod of {deployment.key} was deleted while it started.", code="pod-deleted")
            problem = problem_of(pod, starting.restarts)
            if problem is not None:
                raise _start_failed(deployment, pod, problem)
            pause_s = left_s
            if answers_requests(pod, holds_requests=deployment.terms.holds_requests):
                if await accepts(pod.ip, pod.port):
                    return
                pause_s = min(left_s, _CONNECT_PAUSE_S)
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(starting.changed.wait(), pause_s)
        assert starting.pod is not None
        raise _took_too_long(deployment, starting.pod)

    def _replica(self, starting: _Starting, deployment: Deployment, sink: EventSink) -> KubernetesReplica:
        pod = starting.pod
        assert pod is not None
        replica = KubernetesReplica(pod, deployment, self._api, self._remove, sink=sink, on_ended=self._ended)
        self._replicas[pod.namespace, pod.name] = replica
        return replica

    def _ended(self, replica: KubernetesReplica) -> None:
        self._replicas.pop((replica.pod.namespace, replica.id), None)

    # Replicas of another life -------------------------------------------------------------------

    def adopt(self, keeper: Keeper, key: str = "") -> None:
        self._keeper = keeper
        for informer in self._informers.values():
            for pod in informer.snapshot().values():
                if key in ("", pod.key):
                    self._offer(pod)

    def _offer(self, pod: Pod) -> None:
        """One that nobody here has started: another provider did, or this one in another life."""
        place = (pod.namespace, pod.name)
        if self._keeper is None or self._closing or place in self._replicas or place in self._starting:
            return
        if pod.is_ending or pod.uid in self._leaving or pod.owner != self._facts.owner_uid(pod.key):
            return  # it goes already, or is collected with the record of a function that was removed
        deployment = self._keeper.deployment_of(pod.key, pod.revision)
        if deployment is None:
            return  # its function comes, or was removed
        if pod.is_ready and problem_of(pod, pod.restarts) is None:
            self._take(_Starting(pod=pod), self._keeper)
        else:
            starting = self._starting[place] = _Starting(pod=pod, restarts=pod.restarts)
            self._background.run(self._bring_up(starting, deployment, self._keeper))

    def _take(self, starting: _Starting, keeper: Keeper) -> None:
        pod = starting.now
        deployment = None if pod is None else keeper.deployment_of(pod.key, pod.revision)
        if pod is None or deployment is None:
            return  # it, or its function, was removed meanwhile
        replica = self._replica(starting, deployment, _nobody)
        if pod.is_ready:
            replica.state = ReplicaState.SERVING
        replica.listen(keeper.take(replica))
        replica.watch(after=time.strftime("%Y-%m-%dT%H:%M:%S.000000000Z", time.gmtime()))

    async def _bring_up(self, starting: _Starting, deployment: Deployment, keeper: Keeper) -> None:
        """One whose start nobody waits for any more; it is of use when it is up, and gone when it never is."""
        pod = starting.pod
        assert pod is not None
        try:
            await self._come_up(deployment, starting)
        except AdapterError as error:
            fields = {"pod": pod.name, "why": error.why or error.message}
            logger.warning("a pod of another life does not come up", extra={"fields": fields})
            if not starting.is_gone:
                self._remove(pod, at_once=False)
        else:
            self._take(starting, keeper)
        finally:
            del self._starting[pod.namespace, pod.name]

    # Removal ------------------------------------------------------------------------------------

    def _remove(self, pod: Pod, at_once: bool) -> None:  # a callback of two values
        self._leaving.add(pod.uid)
        self._background.run(self._delete(pod, _AT_ONCE_S if at_once else None))

    async def _delete(self, pod: Pod, grace_s: int | None) -> None:
        attempt = 0
        while True:
            attempt += 1
            try:
                await self._api.delete(PODS.path(pod.namespace, pod.name), uid=pod.uid, grace_s=grace_s)
            except Conflict:  # that one has gone, and another has its name
                return
            except AdapterError as error:
                fields = {"pod": pod.name, "why": error.why or error.message}
                logger.warning("a pod cannot be deleted yet", extra={"fields": fields})
                await asyncio.sleep(pause_s(attempt, first_s=_FIRST_PAUSE_S, limit_s=_PAUSE_LIMIT_S))
            else:
                return

    # The rest of a host -------------------------------------------------------------------------

    def hindrance(self, key: str) -> str:
        waiting = (starting.pod for starting in self._starting.values() if starting.pod is not None)
        return next((text for pod in waiting if pod.key == key and (text := hindrance_of(pod))), "")

    async def inventory(self) -> Inventory:
        return Inventory(why_not="GPUs of a cluster are its scheduler's: see kubectl get gpunodes.")

    async def remove(self, deployment: Deployment) -> None:
        """What is left of it goes with its record."""

    async def close(self) -> None:
        """Let go of all replicas, which stay."""
        self._closing = True
        for replica in list(self._replicas.values()):
            replica.let_go()
        for watch in self._watches.values():
            watch.cancel()
        self._background.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        await self._background.join()


def _nobody(_replica: object, _event: object) -> None:
    """Hears what a replica says before it has a keeper."""


def _start_failed(deployment: Deployment, pod: Pod, problem: Problem) -> AdapterError:
    if problem.code in ("replica-died", "disrupted", "evicted", "pod-ended"):
        return Unavailable(f"A replica of {deployment.key} ended.", why=f"It {problem.reason}.", code=problem.code)
    return HandlerError(
        f"{deployment.key} cannot be started.",
        why=f"Its replica {problem.reason}.",
        hint=f"See its pod: kubectl -n {pod.namespace} describe pod {pod.name}",
        code=problem.code,
    )


def _took_too_long(deployment: Deployment, pod: Pod) -> AdapterError:
    limit_s = deployment.spec.start_timeout_s
    if pod.no_room:
        kind = GpuError if deployment.spec.gpus else Unavailable
        return kind(
            f"No node had room for {deployment.key} within {limit_s:g} s.",
            why=pod.no_room,
            hint=f"See which nodes there are and why not: gpufn explain {deployment.key}",
            code="no-node",
        )
    waits = hindrance_of(pod) or (
        f"it does not answer at {pod.ip}" if pod.is_running else f"its container waits: {pod.waiting or pod.phase}"
    )
    return Timeout(
        f"A replica of {deployment.key} did not come up within {limit_s:g} s.",
        why=f"{waits[:1].upper()}{waits[1:]}.",
        hint=f"See its pod: kubectl -n {pod.namespace} describe pod {pod.name}",
        code="start-timeout",
    )
