"""One start of a replica, from its first instruction to its first answer, and the record of it."""

from __future__ import annotations

import time
from collections.abc import Iterable

from adapter.errors import AdapterError
from adapter.records import Phase, PhaseName, Rung, SkippedRung, StartRecord
from adapter.replica import ReplicaSettings
from adapter.runtime.ladder import Step


class Start:
    """Collects phases on the monotonic clock; `record` turns them into offsets.

    Phases of a rung that failed stay: they are part of the wall time that a caller waited.
    """

    def __init__(
        self, settings: ReplicaSettings, began_ns: int, steps: Iterable[Step], skipped: list[SkippedRung]
    ) -> None:
        self._settings = settings
        self._began_ns = began_ns
        self._began_at_ns = time.time_ns() - (time.monotonic_ns() - began_ns)
        self._phases: list[tuple[PhaseName, int, int]] = []
        self._steps = list(steps)
        self.skipped = skipped
        self.step: Step | None = None
        self.launched_ns = began_ns
        self.last_error: AdapterError | None = None
        self.held = 0

    @property
    def rung(self) -> Rung:
        return self.step.rung if self.step else Rung.LOAD

    def next_step(self) -> Step | None:
        """The next rung to try, or None when all have failed."""
        self.step = self._steps.pop(0) if self._steps else None
        return self.step

    def launched(self) -> None:
        """The current rung's process was just asked for: what came before was ours."""
        now = time.monotonic_ns()
        self.add(PhaseName.BOOT, self._end_ns(), now)
        self.launched_ns = now

    def failed(self, error: AdapterError) -> None:
        """The current rung did not work."""
        self.last_error = error
        self.skipped.append(SkippedRung(self.rung, error.code, f"{error.message} {error.why}".strip()))
        name = PhaseName.RESTORE if self.rung in (Rung.RESTORE, Rung.RESUME) else PhaseName.LOAD
        self.add(name, self._end_ns(), time.monotonic_ns())

    def add(self, name: PhaseName, start_ns: int, end_ns: int) -> None:
        start_ns, end_ns = max(start_ns, self._began_ns), max(end_ns, start_ns, self._began_ns)
        if self._phases and self._phases[-1][0] is name and self._phases[-1][2] == start_ns:
            start_ns = self._phases.pop()[1]  # goes on: one phase, one row
        self._phases.append((name, start_ns, end_ns))

    def reported(self, name: PhaseName, start_ns: int, end_ns: int) -> None:
        """A phase that the model process timed; its interpreter's own start, before the import, is `boot`."""
        if self.rung is Rung.RESTORE:  # its monotonic clock may go on from the dump: only differences count
            now = time.monotonic_ns()
            start_ns, end_ns = now - (end_ns - start_ns), now
        if name is PhaseName.IMPORT:
            self.add(PhaseName.BOOT, self._end_ns(), start_ns)
        self.add(name, start_ns, end_ns)

    def woke(self) -> None:
        """The process left its snapshot point: restored (or thawed) if it had been there before."""
        if self.rung in (Rung.RESTORE, Rung.RESUME):
            self.add(PhaseName.RESTORE, self.launched_ns, time.monotonic_ns())

    def handed_over(self) -> None:
        """It takes requests."""
        self.add(PhaseName.HANDOVER, self._end_ns(), time.monotonic_ns())

    def answered(self) -> None:
        """The first request is answered."""
        self.add(PhaseName.FIRST_RESPONSE, self._end_ns(), time.monotonic_ns())

    def _end_ns(self) -> int:
        return max((end for _, _, end in self._phases), default=self._began_ns)

    def record(self, error: AdapterError | None = None) -> StartRecord:
        settings = self._settings
        return StartRecord(
            function=settings.function,
            namespace=settings.namespace,
            revision=settings.revision,
            replica=settings.replica,
            rung=self.rung,
            started_at_ns=self._began_at_ns,
            total_ns=self._end_ns() - self._began_ns,
            phases=tuple(Phase(n, start - self._began_ns, end - self._began_ns) for n, start, end in self._phases),
            skipped=tuple(self.skipped),
            held_requests=self.held,
            error=f"{error.message} {error.why}".strip() if error else "",
        )
