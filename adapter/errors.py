"""Every error gpufn raises on purpose.

    AdapterError
    ├─ ConfigError         a file, annotation, flag or variable that cannot be used       exit 3  http 400
    ├─ HandlerError        the user's code: missing, failed to load, answered wrongly     exit 1  http 503
    ├─ SnapshotError       a snapshot that is missing, damaged, foreign or cannot be made exit 1  http 503
    │  ├─ SnapshotMismatch    made for another identity (code, machine, versions)
    │  └─ SnapshotCorrupt     its files are not what was published
    ├─ NotFound            function, secret, snapshot                                     exit 4  http 404
    ├─ Conflict            exists already, or someone else holds it                       exit 5  http 409
    ├─ Unavailable         a peer that does not answer, or refuses                        exit 6  http 502
    ├─ Overloaded          a bound was reached; `retry_after_s` says when to come back    exit 6  http 429
    ├─ Timeout             waited for as long as was allowed                              exit 7  http 504
    ├─ GpuError            no GPU that can be used, or one that refuses or failed         exit 8  http 503
    ├─ LedgerError         the ledger cannot be read or written                           exit 1  http 500
    └─ StorageError        another file of the state folder cannot be read or written     exit 1  http 507

An error says what happened (`message`), why (`why`) and what to do (`hint`): the command line prints
these as three lines, HTTP answers carry them as JSON. `code` is stable: search for it.
"""

from __future__ import annotations

from typing import ClassVar


class AdapterError(Exception):
    """Base of all. `code` names the case, `facts` holds values worth logging (never secrets)."""

    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500
    default_code: ClassVar[str] = "failed"

    def __init__(
        self,
        message: str,
        *,
        why: str = "",
        hint: str = "",
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.why = why
        self.hint = hint
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s

    def to_text(self) -> str:
        """``✗ message  [code]``, then why and hint, indented; empty parts are left out."""
        return "\n".join([f"✗ {self.message}  [{self.code}]", *(f"  {part}" for part in (self.why, self.hint) if part)])

    def to_json(self) -> dict[str, object]:
        """The body of an HTTP error: ``{"error": {"code", "message", "why", "hint"}}``."""
        return {"error": {"code": self.code, "message": self.message, "why": self.why, "hint": self.hint}}


class ConfigError(AdapterError):
    exit_code = 3
    http_status = 400
    default_code = "bad-configuration"


class HandlerError(AdapterError):
    http_status = 503
    default_code = "handler-failed"


class SnapshotError(AdapterError):
    http_status = 503
    default_code = "snapshot-failed"


class SnapshotMismatch(SnapshotError):
    default_code = "snapshot-mismatch"


class SnapshotCorrupt(SnapshotError):
    default_code = "snapshot-corrupt"


class NotFound(AdapterError):
    exit_code = 4
    http_status = 404
    default_code = "not-found"


class Conflict(AdapterError):
    exit_code = 5
    http_status = 409
    default_code = "conflict"


class Unavailable(AdapterError):
    exit_code = 6
    http_status = 502
    default_code = "unavailable"


class Overloaded(AdapterError):
    exit_code = 6
    http_status = 429
    default_code = "overloaded"


class Timeout(AdapterError):
    exit_code = 7
    http_status = 504
    default_code = "timed-out"


class GpuError(AdapterError):
    exit_code = 8
    http_status = 503
    default_code = "gpu-failed"


class LedgerError(AdapterError):
    default_code = "ledger-failed"


class StorageError(AdapterError):
    http_status = 507
    default_code = "storage-failed"
