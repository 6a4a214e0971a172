"""Events on the objects that people look at: once for what goes on, not once for each time it is found.

Kubernetes forgets events after an hour; what still goes on then is said again.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adapter.cluster.api import Api
from adapter.cluster.resources import EVENTS
from adapter.errors import NotFound

_SAID_AGAIN_S = 300.0
_MESSAGE_LIMIT = 1024
"""The API server's."""
_REMEMBERED = 4096


@dataclass(slots=True)
class _Said:
    name: str
    count: int
    at: float


class EventRecorder:
    """Events by `component`, a word, written through `api`."""

    def __init__(self, api: Api, component: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._component, self._clock = api, f"gpufn.dev/{component}", clock
        self._instance = socket.gethostname()[:128]
        self._said: OrderedDict[tuple[str, str, str], _Said] = OrderedDict()
        self._saying: set[tuple[str, str, str]] = set()

    async def say(self, about: Mapping[str, Any], reason: str, message: str, *, is_warning: bool = True) -> None:
        """`reason` is a word in CamelCase. `about`: an object reference (``apiVersion, kind, namespace, name, uid``).

        The same again is counted on the same Event, at most every few minutes; who finds it while it is being said
        need not say it.
        """
        message = message if len(message) <= _MESSAGE_LIMIT else message[: _MESSAGE_LIMIT - 1] + "…"
        key = str(about.get("uid") or about["name"]), reason, message
        said = self._said.get(key)
        if key in self._saying or (said is not None and self._clock() - said.at < _SAID_AGAIN_S):
            return
        self._saying.add(key)
        try:
            if said is None or not await self._count(about, said):
                said = await self._create(about, reason, message, is_warning=is_warning)
        finally:
            self._saying.remove(key)
        said.at = self._clock()
        self._said[key] = said
        self._said.move_to_end(key)
        if len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    async def _count(self, about: Mapping[str, Any], said: _Said) -> bool:
        """False where the Event is not there any more."""
        series = {"count": said.count + 1, "lastObservedTime": _now()}
        try:
            await self._api.patch(EVENTS.path(_namespace(about), said.name), {"series": series})
        except NotFound:
            return False
        said.count += 1
        return True

    async def _create(self, about: Mapping[str, Any], reason: str, message: str, *, is_warning: bool) -> _Said:
        namespace = _namespace(about)
        unique = hashlib.blake2b(f"{reason}{message}{time.time_ns()}".encode(), digest_size=8).hexdigest()
        name = f"{about['name'][:200].rstrip('-.')}.{unique}"
        body = EVENTS.body(
            name,
            namespace,
            regarding=dict(about),
            reason=reason,
            action=reason,
            note=message,
            type="Warning" if is_warning else "Normal",
            eventTime=_now(),
            reportingController=self._component,
            reportingInstance=self._instance,
        )
        await self._api.create(EVENTS.path(namespace), body)
        return _Said(name, 1, self._clock())


def reference_to(value: Mapping[str, Any], api_version: str = "v1", kind: str = "Pod") -> dict[str, str]:
    """What an Event names an object by; its own ``apiVersion`` and ``kind`` are not in lists."""
    metadata = value["metadata"]
    found = {
        "apiVersion": api_version,
        "kind": kind,
        "namespace": metadata.get("namespace", ""),
        "name": metadata["name"],
        "uid": metadata.get("uid", ""),
    }
    return {name: text for name, text in found.items() if text}


def _namespace(about: Mapping[str, Any]) -> str:
    """Events on what has no namespace are kept in this one."""
    return str(about.get("namespace") or "default")


def _now() -> str:
    return dt.datetime.now(dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
