"""What a cluster has of one kind of object, kept current by list and watch.

Only what a projection makes of each object stays in memory. Whatever goes wrong on the way (a watch that ends, falls
silent, is cut or too old; a server that restarts) costs delay and never correctness: the worst case is a new list.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from adapter.cluster.api import PAGE_ITEMS, Api
from adapter.cluster.backoff import a_little_less, pause_s
from adapter.cluster.calls import GONE
from adapter.errors import AdapterError, Unavailable

logger = logging.getLogger(__name__)

T = TypeVar("T")
Handler = Callable[[str, "T | None", "T | None"], None]

STALE_S = 120.0
"""A cache that has heard nothing for so long is not to be trusted."""
_AT_ONCE_S = 1.0
"""A server that ends watches sooner than this and says nothing in them would be asked in a circle."""
_TRUSTED_ATTEMPTS = 4
"""A server that was restored from a backup may wait for a version that will not come: after so many, list anew."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How an informer's times go. Each is shortened by a random tenth, so that informers part.

    `silence_s`: a watch without an event or a bookmark for so long is dead; bookmarks come once a minute. `absent_s`: how often is looked for an
    optional kind that is not there.
    """

    watch_s: float = 300.0
    silence_s: float = 90.0
    resync_s: float = 600.0
    first_pause_s: float = 0.5
    pause_limit_s: float = 30.0
    absent_s: float = 60.0


USUAL = Rhythm()


def key_of(value: Mapping[str, Any]) -> str:
    """``namespace/name``, or ``name`` of what has no namespace."""
    metadata = value["metadata"]
    namespace = metadata.get("namespace")
    return f"{namespace}/{metadata['name']}" if namespace else str(metadata["name"])


class Informer(Generic[T]):
    """A cache of what `project` makes of the objects below `path`; of those of which it makes None, nothing.

    `run` it in a task. Handlers are called with ``(key, old, new)`` in the order of what happened, None for what is
    not there; with ``old`` equal to ``new`` too, for every object that a list finds unchanged: at the latest every
    `Rhythm.resync_s`, so that what a handler missed has another chance. They must not block.
    """

    def __init__(
        self,
        api: Api,
        path: str,
        project: Callable[[dict[str, Any]], T | None],
        *,
        label_selector: str = "",
        field_selector: str = "",
        page_items: int = PAGE_ITEMS,
        optional: bool = False,
        rhythm: Rhythm = USUAL,
    ) -> None:
        """`optional`: where there is no such kind, or we may not see it, there are none; looked for now and then."""
        self.path = path
        self.synced = asyncio.Event()
        """Set when the first list is in the cache."""
        self.lists = self.failures = 0
        self._api, self._project = api, project
        self._label_selector, self._field_selector = label_selector, field_selector
        self._page_items = page_items
        self._optional, self._rhythm = optional, rhythm
        self._handlers: list[Handler[T]] = []
        self._values: dict[str, T] = {}
        self._snapshot: Mapping[str, T] | None = None
        self._heard_at = self._listed_at = time.monotonic()
        self._told = 0
        """Lists, events and bookmarks so far."""
        self._version = ""
        """From which to watch; empty: list first."""

    def on_change(self, handler: Handler[T]) -> None:
        """To be said before `run`."""
        self._handlers.append(handler)

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str) -> T | None:
        return self._values.get(key)

    def snapshot(self) -> Mapping[str, T]:
        """All that there is, by key; it stays as it is when the cache changes."""
        if self._snapshot is None:
            self._snapshot = MappingProxyType(dict(self._values))
        return self._snapshot

    @property
    def silent_s(self) -> float:
        """Seconds since the API server last said anything: a list, an event, a bookmark, or that it will."""
        return time.monotonic() - self._heard_at

    @property
    def healthy(self) -> bool:
        """It has synced, and has heard of the API server lately."""
        return self.synced.is_set() and self.silent_s < STALE_S

    async def run(self) -> None:
        """Until it is cancelled."""
        attempt = 0
        while True:
            told = self._told
            try:
                if not self._version:
                    await self._list()
                await self._watch()
                attempt = 0
                continue
            except AdapterError as exc:
                if self._optional and not self._version and exc.code in {"not-found", "forbidden"}:
                    self._none()
                    await asyncio.sleep(a_little_less(self._rhythm.absent_s))
                    continue
                self._failed(exc)
            except Exception as exc:  # nothing may end the cache of a component that goes on
                logger.exception("an informer failed", extra={"fields": {"path": self.path}})
                self._failed(exc)
            attempt = 1 if self._told > told else attempt + 1
            if attempt > _TRUSTED_ATTEMPTS:
                self._version = ""
            rhythm = self._rhythm
            await asyncio.sleep(pause_s(attempt, first_s=rhythm.first_pause_s, limit_s=rhythm.pause_limit_s))

    def _failed(self, exc: Exception) -> None:
        """After whatever does not say that the version is still good, it is forgotten: the next round lists."""
        self.failures += 1
        code = exc.code if isinstance(exc, AdapterError) else "failed"
        if code not in {"api-timed-out", "api-cut", "api-unreachable", "api-overloaded", "api-failed"}:
            self._version = ""
        log = logger.info if code in {GONE, "api-timed-out", "api-cut"} else logger.warning
        log("a watch was interrupted", extra={"fields": {"path": self.path, "code": code, "why": str(exc)}})

    async def _list(self) -> None:
        def keyed(value: dict[str, Any]) -> tuple[str, T] | None:
            made = self._made(value)
            return None if made is None else (key_of(value), made)

        listing = await self._api.list(
            self.path,
            keyed,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            page_items=self._page_items,
        )
        self.lists += 1
        self._take(dict(listing.items))
        self._version = listing.resource_version

    def _none(self) -> None:
        if not self.synced.is_set() or self._values:
            logger.info("there are none of a kind, or none that may be seen", extra={"fields": {"path": self.path}})
        self._take({})

    def _take(self, found: dict[str, T]) -> None:
        self._hear()
        self._told += 1
        self._listed_at = self._heard_at
        for key in [key for key in self._values if key not in found]:
            self._set(key, None)
        for key, value in found.items():
            self._set(key, value)
        self.synced.set()

    async def _watch(self) -> None:
        """Until the server ends it, or it is time for a list."""
        left_s = self._listed_at + a_little_less(self._rhythm.resync_s) - time.monotonic()
        if left_s <= 0:
            self._version = ""
            return
        watch = self._api.watch(
            self.path,
            self._version,
            timeout_s=min(left_s, a_little_less(self._rhythm.watch_s)),
            silence_s=self._rhythm.silence_s,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            on_open=self._hear,
        )
        told, ends_early_at = self._told, time.monotonic() + _AT_ONCE_S
        async with aclosing(watch) as events:
            async for kind, value in events:
                version = value["metadata"]["resourceVersion"]
                self._hear()
                self._told += 1
                if kind in {"ADDED", "MODIFIED"}:
                    self._set(key_of(value), self._made(value))
                elif kind == "DELETED":
                    self._set(key_of(value), None)
                self._version = version
        if self._told == told and time.monotonic() < ends_early_at:
            raise Unavailable("A watch ended at once, without a word.", code="api-cut")

    def _hear(self) -> None:
        self._heard_at = time.monotonic()

    def _made(self, value: dict[str, Any]) -> T | None:
        """An object that cannot be read is none, and does not hide the others."""
        try:
            return self._project(value)
        except Exception:  # boundary: whatever our code makes of what others wrote
            logger.exception("an object could not be read", extra={"fields": {"path": self.path, "key": key_of(value)}})
            return None

    def _set(self, key: str, new: T | None) -> None:
        old = self._values.get(key)
        if old is None and new is None:
            return
        if new is None:
            del self._values[key]
        else:
            self._values[key] = new
        if old != new:
            self._snapshot = None
        for handler in self._handlers:
            try:
                handler(key, old, new)
            except Exception:  # boundary: one handler's defect must cost neither the watch nor the others
                logger.exception("a handler failed", extra={"fields": {"path": self.path, "key": key}})
