"""The ledger service as its readers see it: the same questions as a ledger on this machine, over any transport.

Standard library only. A question is a value, for whoever has a way to the service: the CLI through the API server, with
`RemoteLedger`; components of the cluster with their tokens, with `adapter.ledger.connection`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from adapter.errors import Unavailable
from adapter.policy.activity import Activity
from adapter.policy.conservation import Conservation, DeviceHour, Finding, FindingKind
from adapter.records import LeaseInterval, LeasePhase, Rung, StartRecord

T = TypeVar("T")

Get = Callable[[str, Mapping[str, str]], Any]
"""``get(path, parameters)``: the JSON of a 200. What else comes it raises."""


class Reader(Protocol):
    """What `adapter.ledger.store.Ledger` and `RemoteLedger` both answer."""

    def starts(
        self, function: str | None = None, namespace: str | None = None, limit: int | None = 100, since_ns: int = 0
    ) -> list[StartRecord]:
        """Newest first, `limit` at most."""

    def intervals(self, start_ns: int, end_ns: int, function: str | None = None) -> list[LeaseInterval]:
        """Those that overlap ``[start_ns, end_ns)``, in order of their start."""

    def summary(self, start_ns: int, end_ns: int) -> list[LeaseInterval]:
        """The same time in few rows: see `Ledger.summary`."""


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """What to get, with which parameters, and what the JSON of the answer means: whoever asks, and by whatever way."""

    path: str
    query: Mapping[str, str]
    meaning: Callable[[Any], T]

    def read(self, answer: Any) -> T:
        """Raises `Unavailable` where it is not this service's."""
        try:
            return self.meaning(answer)
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise Unavailable(
                "The ledger's answer cannot be read.",
                why=f"{exc!r}"[:200],
                hint="Use the gpufn of the cluster's version.",
                code="ledger-answer",
            ) from exc


def starts(
    function: str | None = None, namespace: str | None = None, limit: int | None = 100, since_ns: int = 0
) -> Question[list[StartRecord]]:
    query = _said(since_ns=since_ns, function=function, namespace=namespace, limit=limit)
    return Question("/v1/starts", query, lambda answer: [StartRecord.from_json(record) for record in answer["starts"]])


def intervals(start_ns: int, end_ns: int, function: str | None = None) -> Question[list[LeaseInterval]]:
    return Question("/v1/leases", _said(start_ns=start_ns, end_ns=end_ns, function=function), _leases)


def summary(start_ns: int, end_ns: int) -> Question[list[LeaseInterval]]:
    return Question("/v1/leases", _said(start_ns=start_ns, end_ns=end_ns, summary="true"), _leases)


def held(start_ns: int, end_ns: int) -> Question[dict[str, float]]:
    """GPU-seconds by ``name.namespace``."""
    return Question("/v1/held", _said(start_ns=start_ns, end_ns=end_ns), _held)


def activity(since_ns: int) -> Question[list[Activity]]:
    return Question("/v1/activity", _said(since_ns=since_ns), _activities)


def capacity(start_ns: int, end_ns: int) -> Question[Conservation]:
    return Question("/v1/capacity", _said(start_ns=start_ns, end_ns=end_ns), _conservation)


class RemoteLedger:
    """Every method raises what `get` does, and `Unavailable` where an answer is not this service's."""

    def __init__(self, get: Get) -> None:
        self._get = get

    def starts(
        self, function: str | None = None, namespace: str | None = None, limit: int | None = 100, since_ns: int = 0
    ) -> list[StartRecord]:
        return self._ask(starts(function, namespace, limit, since_ns))

    def intervals(self, start_ns: int, end_ns: int, function: str | None = None) -> list[LeaseInterval]:
        return self._ask(intervals(start_ns, end_ns, function))

    def summary(self, start_ns: int, end_ns: int) -> list[LeaseInterval]:
        return self._ask(summary(start_ns, end_ns))

    def held(self, start_ns: int, end_ns: int) -> dict[str, float]:
        return self._ask(held(start_ns, end_ns))

    def capacity(self, start_ns: int, end_ns: int) -> Conservation:
        return self._ask(capacity(start_ns, end_ns))

    def activity(self, since_ns: int) -> list[Activity]:
        return self._ask(activity(since_ns))

    def _ask(self, question: Question[T]) -> T:
        return question.read(self._get(question.path, question.query))


def _said(**parameters: object) -> dict[str, str]:
    return {name: str(value) for name, value in parameters.items() if value is not None}


def _leases(answer: Any) -> list[LeaseInterval]:
    return [LeaseInterval(**{**lease, "phase": LeasePhase(lease["phase"])}) for lease in answer["leases"]]


def _held(answer: Any) -> dict[str, float]:
    return {str(name): float(gpu_s) for name, gpu_s in answer["gpu_seconds"].items()}


def _activities(answer: Any) -> list[Activity]:
    return [
        Activity(
            function=each["function"],
            namespace=each["namespace"],
            busy=tuple((start_ns, end_ns) for start_ns, end_ns in each["busy"]),
            wakes_s={Rung(rung): tuple(seconds) for rung, seconds in each["wakes_s"].items()},
        )
        for each in answer["functions"]
    ]


def _conservation(answer: Any) -> Conservation:
    return Conservation(
        tuple(
            DeviceHour(**{**hour, "tenants_ns": tuple(sorted(hour["tenants_ns"].items()))}) for hour in answer["hours"]
        ),
        tuple(
            Finding(**{**each, "kind": FindingKind(each["kind"]), "replicas": tuple(each["replicas"])})
            for each in answer["findings"]
        ),
    )
