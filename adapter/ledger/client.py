"""The ledger service as its readers see it: the same questions as a ledger on this machine, over any transport.

Standard library only. Whoever has a way to the service (the CLI through the API server, a controller with its token)
gives a function that gets a path with parameters and returns the JSON of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

from adapter.errors import Unavailable
from adapter.policy.activity import Activity
from adapter.policy.conservation import Conservation, DeviceHour, Finding, FindingKind
from adapter.records import LeaseInterval, LeasePhase, Rung, StartRecord

_T = TypeVar("_T")

Get = Callable[[str, Mapping[str, str]], Any]
"""``get(path, parameters)``: the JSON of a 200. What else comes it raises."""

LEASES, STARTS, ACTIVITY, CAPACITY = "/v1/leases", "/v1/starts", "/v1/activity", "/v1/capacity"


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


class RemoteLedger:
    """Every method raises what `get` does, and `Unavailable` where an answer is not this service's."""

    def __init__(self, get: Get) -> None:
        self._get = get

    def starts(
        self, function: str | None = None, namespace: str | None = None, limit: int | None = 100, since_ns: int = 0
    ) -> list[StartRecord]:
        return read_starts(self._get(STARTS, starts_query(function, namespace, limit, since_ns)))

    def intervals(self, start_ns: int, end_ns: int, function: str | None = None) -> list[LeaseInterval]:
        return read_leases(self._get(LEASES, range_query(start_ns, end_ns, function=function)))

    def summary(self, start_ns: int, end_ns: int) -> list[LeaseInterval]:
        return read_leases(self._get(LEASES, range_query(start_ns, end_ns, summary="true")))

    def capacity(self, start_ns: int, end_ns: int) -> Conservation:
        return read_capacity(self._get(CAPACITY, range_query(start_ns, end_ns)))

    def activity(self, since_ns: int) -> list[Activity]:
        return read_activity(self._get(ACTIVITY, {"since_ns": str(since_ns)}))


def range_query(start_ns: int, end_ns: int, **more: str | None) -> dict[str, str]:
    """Parameters of a range, with those of `more` that are not None."""
    query = {"start_ns": str(start_ns), "end_ns": str(end_ns)}
    return query | {name: value for name, value in more.items() if value is not None}


def starts_query(function: str | None, namespace: str | None, limit: int | None, since_ns: int) -> dict[str, str]:
    named = {"function": function, "namespace": namespace, "limit": None if limit is None else str(limit)}
    return {"since_ns": str(since_ns)} | {name: value for name, value in named.items() if value is not None}


def read_starts(answer: Any) -> list[StartRecord]:
    return _read(lambda: [StartRecord.from_json(record) for record in answer["starts"]])


def read_leases(answer: Any) -> list[LeaseInterval]:
    return _read(
        lambda: [LeaseInterval(**{**lease, "phase": LeasePhase(lease["phase"])}) for lease in answer["leases"]]
    )


def read_activity(answer: Any) -> list[Activity]:
    return _read(
        lambda: [
            Activity(
                function=each["function"],
                namespace=each["namespace"],
                busy=tuple((start_ns, end_ns) for start_ns, end_ns in each["busy"]),
                wakes_s={Rung(rung): tuple(seconds) for rung, seconds in each["wakes_s"].items()},
            )
            for each in answer["functions"]
        ]
    )


def read_capacity(answer: Any) -> Conservation:
    return _read(
        lambda: Conservation(
            tuple(
                DeviceHour(**{**hour, "tenants_ns": tuple(sorted(hour["tenants_ns"].items()))})
                for hour in answer["hours"]
            ),
            tuple(
                Finding(**{**each, "kind": FindingKind(each["kind"]), "replicas": tuple(each["replicas"])})
                for each in answer["findings"]
            ),
        )
    )


def _read(read: Callable[[], _T]) -> _T:
    try:
        return read()
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        raise Unavailable(
            "The ledger's answer cannot be read.",
            why=f"{exc!r}"[:200],
            hint="Use the gpufn of the cluster's version.",
            code="ledger-answer",
        ) from exc
