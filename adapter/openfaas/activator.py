"""Requests that wait for a place in a replica: first come, first served, none lost and no place lost.

Knows nothing of replicas: a place is whatever `give` hands over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

from adapter.errors import AdapterError

Place = TypeVar("Place")


class Waiters(Generic[Place]):
    """A queue of callers. `on_unclaimed` gets back a place whose caller went away at the last moment."""

    def __init__(self, on_unclaimed: Callable[[Place], None]) -> None:
        self._tickets: dict[asyncio.Future[Place], None] = {}  # a dict, so that leaving costs the same anywhere
        self._on_unclaimed = on_unclaimed

    def __len__(self) -> int:
        return len(self._tickets)

    def enter(self) -> asyncio.Future[Place]:
        """A ticket at the end of the queue; it must be claimed."""
        ticket: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        self._tickets[ticket] = None
        return ticket

    async def claim(self, ticket: asyncio.Future[Place], limit_s: float) -> Place:
        """The place, once it is this ticket's turn. Raises `asyncio.TimeoutError`, or what `fail` says."""
        timer = asyncio.get_running_loop().call_later(limit_s, _expire, ticket)
        try:
            return await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
                self._on_unclaimed(ticket.result())
            raise
        finally:
            timer.cancel()
            self._tickets.pop(ticket, None)

    def give(self, place: Place) -> bool:
        """Hand `place` to whoever has waited longest; false when nobody waits."""
        while self._tickets:
            ticket = next(iter(self._tickets))
            del self._tickets[ticket]
            if not ticket.done():
                ticket.set_result(place)
                return True
        return False

    def fail(self, make_error: Callable[[], AdapterError]) -> None:
        """Send everybody away, each with an error of his own: tracebacks would pile up in a shared one."""
        tickets, self._tickets = self._tickets, {}
        for ticket in tickets:
            if not ticket.done():
                ticket.set_exception(make_error())


def _expire(ticket: asyncio.Future[Place]) -> None:
    if not ticket.done():
        ticket.set_exception(asyncio.TimeoutError())
