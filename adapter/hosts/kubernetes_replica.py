"""A replica in a pod: its state as the API server's watch and its entrypoint's events in the pod's log tell it, and its end.

The log is the function's too, so that whatever is printed there may look like an event: an event is taken where this
replica's own state has a place for it, and what it says of others is not.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence

from adapter.cluster.api import Api
from adapter.hosts import Deployment, EventSink, ReplicaState
from adapter.hosts.background import Background
from adapter.hosts.followed import FollowedReplica
from adapter.hosts.kubernetes_log import follow
from adapter.hosts.kubernetes_pods import drain_s
from adapter.hosts.kubernetes_status import Pod, Problem, container_ended, problem_of
from adapter.hosts.replica_log import ReplicaLog
from adapter.records import Event, EventName

_READY_GRACE_S = 2.0
"""A replica that is ready has served for a moment, and said so; one whose words do not reach us is taken at its probe's."""
_REACHABLE_LIMIT_S = 3.0
_EVENT_START = b'{"event"'
_EVENT_LIMIT_BYTES = 2**16
_CODE = re.compile(r"[a-z0-9-]{1,40}")

Remove = Callable[[Pod, bool], None]
"""Has a pod deleted, at once or with its own grace time, however long the API server is away."""


class _KeptByKubelet(ReplicaLog):
    """The log of a pod: nobody here keeps it."""

    def __init__(self) -> None:
        """Nothing to write to."""

    def close(self) -> None: ...

    async def flush(self) -> None: ...


class KubernetesReplica(FollowedReplica):
    """See `adapter.hosts.Replica`. `on_ended` is called once, before the last event."""

    def __init__(
        self,
        pod: Pod,
        deployment: Deployment,
        api: Api,
        remove: Remove,
        *,
        sink: EventSink,
        on_ended: Callable[[KubernetesReplica], None],
    ) -> None:
        super().__init__(pod.name, deployment, pod.port, _KeptByKubelet(), sink)
        self.host = f"[{pod.ip}]" if ":" in pod.ip else pod.ip
        self.pod = pod
        self._api = api
        self._remove = remove
        self._on_ended = on_ended
        self._restarts = pod.restarts
        self._background = Background(replica=self.id)
        self._ready_timer: asyncio.TimerHandle | None = None
        self._start_is_open = False  # a start record may come
        self._asked = False  # by us, to end

    def watch(self, *, after: str = "") -> None:
        """Follow its log, from its beginning or after a time (RFC 3339)."""
        if self.state is ReplicaState.STARTING:
            self.be_patient()
        self._background.run(self._follow(after))

    def listen(self, sink: EventSink) -> None:
        """From now on its events go there."""
        self._sink = sink

    def let_go(self) -> None:
        """Hear no more of it; it stays."""
        self._background.cancel()
        for timer in (self._patience, self._ready_timer):
            if timer is not None:
                timer.cancel()

    # What a host asks ---------------------------------------------------------------------------

    def park(self) -> None:
        """A parked pod would hold its GPU all the same."""

    def resume(self, devices: Sequence[str]) -> None:
        """None is ever parked."""

    async def stop(self, grace_s: float) -> None:
        await super().stop(max(grace_s, drain_s(self.deployment)))

    def kill(self) -> None:
        self._asked = True
        if self.state is not ReplicaState.GONE:
            self._remove(self.pod, True)

    def _command(self, line: bytes) -> None:
        """STOP, the only one that has a meaning here: its kubelet passes it on as SIGTERM."""
        self._asked = True
        self._remove(self.pod, False)

    def _why_unkillable(self) -> tuple[str, str]:
        where = f" on the node {self.pod.node}" if self.pod.node else ""
        return f"Its pod{where}", f"See what it waits for: kubectl -n {self.pod.namespace} describe pod {self.id}"

    # What the cluster says of it ----------------------------------------------------------------

    def saw(self, pod: Pod | None) -> None:
        """Its pod as it is now; None: there is none any more."""
        if self.state is ReplicaState.GONE:
            return
        if pod is None:
            self._end(self._farewell())
            return
        self.pod = pod
        problem = None if self._asked else problem_of(pod, self._restarts)
        if problem is not None:
            self._remove(pod, False)  # a kubelet would start its container again
            self._end(problem)
        elif pod.is_ending and self.state is not ReplicaState.STOPPING:
            self.state = ReplicaState.STOPPING
            self._tell(
                Event(EventName.LEAVING, time.time_ns(), {"reason": pod.disrupted or "its pod is being deleted"})
            )
        elif pod.is_ready and self.state is ReplicaState.STARTING and self._ready_timer is None:
            self._ready_timer = asyncio.get_running_loop().call_later(_READY_GRACE_S, self._is_ready)
        elif not pod.is_ready and pod.is_running and self.state is ReplicaState.SERVING:
            self._background.run(self._look_whether_reachable())

    def _is_ready(self) -> None:
        self._ready_timer = None
        if self.pod.is_ready and self.state is ReplicaState.STARTING:
            self._take(Event(EventName.SERVING, time.time_ns(), {"rung": ""}))

    async def _look_whether_reachable(self) -> None:
        """A node that is lost takes its pods' readiness with it, and minutes later its pods."""
        if (
            not await accepts(self.pod.ip, self.pod.port)
            and self.state is ReplicaState.SERVING
            and not self.pod.is_ready
        ):
            self._remove(self.pod, False)
            self._end(Problem("unreachable", f"cannot be reached on the node {self.pod.node}"))

    def _farewell(self) -> Problem:
        """How it ended, of what was last seen of it."""
        pod = self.pod
        if pod.ended is not None and (self._asked or not pod.disrupted):
            return container_ended(pod)
        if self._asked:
            return Problem("", "drained", 0)
        return problem_of(pod, self._restarts) or Problem("pod-deleted", "was deleted by somebody else")

    def _end(self, problem: Problem) -> None:
        self._on_ended(self)
        self.let_go()
        self._is_gone()
        said = {"code": problem.code} if problem.code and problem.exit_code != 0 else {}
        self._tell_end(problem.exit_code, {"reason": problem.reason, **said})

    # What it says itself ------------------------------------------------------------------------

    async def _follow(self, after: str) -> None:
        async for _, line in follow(self._api, self.pod.namespace, self.id, self.deployment.name, after=after):
            event = event_in(line)
            if event is not None and self.admits(event):
                self._take(event)

    def admits(self, event: Event) -> bool:
        """Whether this replica, as it is, can have said so."""
        name, state = event.name, self.state
        if name is EventName.SERVING and state is ReplicaState.STARTING:
            self._start_is_open = True
            return True
        if name is EventName.STARTED:
            is_ours = self._start_is_open and self._is_own_record(event.fields.get("record"))
            self._start_is_open = self._start_is_open and not is_ours
            return is_ours
        if name is EventName.FAILED:
            return state is ReplicaState.STARTING and self._is_own_record(event.fields.get("record"))
        if name is EventName.MODEL_EXITED:
            return state in (ReplicaState.STARTING, ReplicaState.SERVING)
        return name in (EventName.LISTENING, EventName.SNAPSHOT)

    def _is_own_record(self, record: object) -> bool:
        if not isinstance(record, Mapping):
            return False
        deployment = self.deployment
        who = tuple(record.get(name) for name in ("function", "namespace", "revision", "replica"))
        if who != (deployment.name, deployment.namespace, deployment.revision, self.id):
            return False
        try:
            return all(_CODE.fullmatch(one["code"]) for one in record["skipped"])  # they become labels of metrics
        except (KeyError, TypeError):
            return False


def event_in(line: bytes) -> Event | None:
    """What an entrypoint says between the lines that a function prints."""
    if not line.startswith(_EVENT_START) or len(line) > _EVENT_LIMIT_BYTES:
        return None
    try:
        return Event.from_line(line)
    except ValueError:
        return None


async def accepts(ip: str, port: int) -> bool:
    """Whether somebody listens there."""
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(ip, port), _REACHABLE_LIMIT_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
