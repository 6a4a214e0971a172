"""Starts of one function that failed: until when no other is tried, and what those hear meanwhile who wait for one."""

from __future__ import annotations

from adapter.errors import AdapterError, ConfigError, Conflict, HandlerError, NotFound
from adapter.hosts import Deployment

BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
"""After failed starts in a row: no request wakes the function meanwhile."""


class Setbacks:
    """`error` is the last start's, until a replica serves; none is tried before `retry_at_s`. The clock is passed in:
    any monotonic one, in seconds."""

    def __init__(self) -> None:
        self.error: AdapterError | None = None
        self.retry_at_s = 0.0
        self._in_a_row = 0

    def holds(self, now_s: float) -> bool:
        """No start is to be tried now."""
        return now_s < self.retry_at_s

    def add(self, error: AdapterError, now_s: float) -> bool:
        """One more; false where it is no reason to wait: killed from outside, most likely, and tried once more at once."""
        self._in_a_row += 1
        if error.code == "replica-died" and self._in_a_row == 1:
            return False
        self.error = error
        self.retry_at_s = now_s + BACKOFF_S[min(self._in_a_row, len(BACKOFF_S)) - 1]
        return True

    def served(self) -> None:
        """A replica came up."""
        self._in_a_row, self.error = 0, None

    def retry(self) -> None:
        """Somebody asks for it: try at once."""
        self.retry_at_s = 0.0

    def forget(self) -> None:
        """What starts from now on is something else."""
        self.served()
        self.retry()

    def for_caller(self, deployment: Deployment, now_s: float) -> AdapterError:
        """Why there is no replica, and when the next may be there. Only where there is an `error`."""
        assert self.error is not None
        return for_caller(self.error, deployment, retry_after_s=max(0.0, self.retry_at_s - now_s))


def for_caller(error: AdapterError, deployment: Deployment, *, retry_after_s: float | None = None) -> AdapterError:
    """A copy for one caller, whose request is not at fault, and whom names of secrets, files and settings do not
    concern: what the deployer has to mend is a 503 that says so."""
    wait_s = error.retry_after_s if retry_after_s is None else retry_after_s
    if isinstance(error, ConfigError | Conflict | NotFound):
        hint = f"Whoever deployed it sees why: faas-cli describe {deployment.name}"
        message = f"{deployment.key} cannot be started."
        return HandlerError(message, hint=hint, code=error.code, retry_after_s=wait_s)
    return type(error)(error.message, why=error.why, hint=error.hint, code=error.code, retry_after_s=wait_s)
