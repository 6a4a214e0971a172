"""Which revision of a function is the one that runs, and how far the next one is.

    preparing ─▶ current                                the first revision
    current + next preparing ─▶ next ready ─▶ current   a later one: the old one runs until the new one can

A revision that fails leaves the one before in place. Only values here; `adapter.openfaas.fleet` acts.
"""

from __future__ import annotations

from adapter.errors import AdapterError
from adapter.hosts import Deployment

_PREPARING = "its environment is being built"


class Rollout:
    """The revisions of one function: the current one, and at most one that is to follow."""

    def __init__(self, deployment: Deployment) -> None:
        self._current = deployment
        self._next: Deployment | None = None
        self._next_is_ready = False
        self._failure: AdapterError | None = None
        self.preparing = _PREPARING
        """Why nothing can be started yet, or empty."""
        self.broken: AdapterError | None = None
        """Why nothing can ever be started, until the next deploy."""

    @property
    def is_ready(self) -> bool:
        """The next revision may take over."""
        return self._next is not None and self._next_is_ready

    @property
    def status(self) -> str:
        """For people: ``preparing: …``, ``failed: …``, or empty when all is well."""
        if self.preparing:
            return f"preparing: {self.preparing}"
        if self._next is not None:
            what = "its first replica starts" if self._next_is_ready else _PREPARING
            return f"preparing: revision {self._next.revision}: {what}"
        failure = self.broken or self._failure
        return f"failed: {failure.message} {failure.why}".strip() if failure is not None else ""

    @property
    def latest(self) -> Deployment:
        """The revision that was deployed last and has not failed."""
        return self._current if self._next is None else self._next

    def wants(self, deployment: Deployment) -> bool:
        """Whether replicas of it are of use, now or soon."""
        return deployment is self._current or deployment is self._next

    def begin(self, deployment: Deployment) -> bool:
        """A new revision was deployed; true when it takes the place of one that never ran."""
        self._failure = None
        if self.preparing or self.broken is not None:
            self._current, self.preparing, self.broken = deployment, _PREPARING, None
            return True
        self._next, self._next_is_ready = deployment, False
        return False

    def prepared(self, deployment: Deployment, problem: AdapterError | None) -> bool:
        """What became of the preparation; false when nobody cares any more."""
        if deployment is self._current and self.preparing:
            self.preparing, self.broken = "", problem
        elif deployment is self._next and problem is not None:
            self.fail(deployment, problem)
        elif deployment is self._next:
            self._next_is_ready = True
        else:
            return False
        return True

    def fail(self, deployment: Deployment, error: AdapterError) -> bool:
        """True when it was the next revision that failed: the current one stays."""
        if deployment is not self._next:
            return False
        self._next, self._next_is_ready, self._failure = None, False, error
        return True

    def switch(self) -> Deployment:
        """The next revision becomes the current one."""
        assert self._next is not None
        self._current, self._next, self._next_is_ready = self._next, None, False
        return self._current
