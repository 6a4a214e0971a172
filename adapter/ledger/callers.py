"""Who calls the ledger service: a ServiceAccount's token, as the API server judges it (TokenReview).

Any pod can have a token for our audience made for its own account, so what counts is whose it is: agents write, and
only of their own node, which the token names; accounts of our own components' namespace read.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from adapter.cluster.api import Api, Patience
from adapter.cluster.resources import TOKEN_REVIEWS
from adapter.keys import AGENT_ACCOUNT, AGENT_NAMESPACE, SYSTEM_NAMESPACE

AUDIENCE = "gpufn-ledger"
"""Of the tokens that are taken here."""

_NODE_CLAIM = "authentication.kubernetes.io/node-name"
_REMEMBERED_S = 60.0
"""A token that was withdrawn is taken this much longer; one of a deleted pod ends with it."""
_REMEMBERED = 4096
"""Of those that are somebody's, and of those that are nobody's: whoever makes many up drives no caller out."""
_REVIEW = Patience(total_s=10.0, attempts=3)


@dataclass(frozen=True, slots=True)
class Caller:
    """`node` is where the token's pod runs; empty where it is bound to none."""

    namespace: str
    account: str
    node: str = ""

    @property
    def reads(self) -> bool:
        return self.namespace == SYSTEM_NAMESPACE

    @property
    def writes(self) -> bool:
        return (self.namespace, self.account) == (AGENT_NAMESPACE, AGENT_ACCOUNT) and bool(self.node)


class Callers(Protocol):
    async def of(self, token: str) -> Caller | None:
        """None where the token is nobody's. Raises `AdapterError` where that cannot be found out now."""


class ReviewedCallers:
    """Asks the API server, once a minute for each token."""

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._known: dict[bytes, tuple[float, Caller | None]] = {}
        self._unknown: dict[bytes, tuple[float, Caller | None]] = {}

    async def of(self, token: str) -> Caller | None:
        key, now = hashlib.sha256(token.encode(errors="replace")).digest(), self._clock()
        known = self._known.get(key) or self._unknown.get(key)
        if known is not None and now - known[0] < _REMEMBERED_S:
            return known[1]
        spec = {"token": token, "audiences": [AUDIENCE]}
        review = {"apiVersion": TOKEN_REVIEWS.api_version, "kind": TOKEN_REVIEWS.kind, "spec": spec}
        caller = caller_of(await self._api.create(TOKEN_REVIEWS.path(), review, patience=_REVIEW))
        self._known.pop(key, None)
        self._unknown.pop(key, None)
        remembered = self._unknown if caller is None else self._known
        remembered[key] = now, caller
        if len(remembered) > _REMEMBERED:
            del remembered[next(iter(remembered))]
        return caller


def caller_of(review: dict[str, Any]) -> Caller | None:
    """Of a TokenReview that the API server has answered."""
    status = review.get("status") or {}
    if status.get("authenticated") is not True or AUDIENCE not in (status.get("audiences") or ()):
        return None
    user = status.get("user") or {}
    kind, _, rest = str(user.get("username") or "").partition("system:serviceaccount:")
    namespace, _, account = rest.partition(":")
    if kind or not namespace or not account:
        return None
    nodes = (user.get("extra") or {}).get(_NODE_CLAIM) or [""]
    return Caller(namespace, account, str(nodes[0]))
