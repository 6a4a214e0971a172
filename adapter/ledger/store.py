"""The ledger: append-only rows of lease intervals and start records.

SQLAlchemy Core over SQLite (WAL, synchronous FULL: what is acknowledged is on the disk) on one machine,
or PostgreSQL in a cluster. Rows have deterministic ids, so that a delivery that is repeated counts once, in
whatever order deliveries come; nothing is ever updated.
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from sys import intern
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from adapter.errors import LedgerError
from adapter.ledger.schema import DEVICES, LEASES, STARTS, migrate
from adapter.policy.activity import Run
from adapter.policy.leases import CPU_DEVICE
from adapter.records import DeviceInterval, LeaseInterval, LeasePhase, StartRecord

logger = logging.getLogger(__name__)

FILE_NAME = "ledger.sqlite"

LOCK_TIMEOUT_S = 10.0
"""A writer waits this long for another one. Ours write in milliseconds: longer means that somebody hangs."""

_WAL_SWITCH_S = 5.0

_COLUMNS = tuple(column.name for column in LEASES.columns)
_READS = {"reads": True}
_ROWS_AT_ONCE = 1000
"""Of a read that is streamed: so many are in memory."""


def ledger_url(state: Path) -> str:
    """The URL of a state folder's own ledger."""
    return f"sqlite:///{state.absolute() / FILE_NAME}"


class Ledger:
    """One open ledger; its methods may be called from any thread. Every one may raise `LedgerError`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._url = engine.url.render_as_string(hide_password=True)
        self._insert = sqlite.insert if engine.dialect.name == "sqlite" else postgresql.insert

    @classmethod
    def open(cls, url: str, *, lock_timeout_s: float = LOCK_TIMEOUT_S) -> Ledger:
        """Open, and create or bring up to date what is there. `url`: ``sqlite:///FILE`` or ``postgresql://…``."""
        with _translated(url):
            engine = _engine(url, lock_timeout_s)
            try:
                with engine.begin() as connection:
                    migrate(connection)
            except BaseException:
                engine.dispose()
                raise
        return cls(engine)

    def close(self) -> None:
        self._engine.dispose()

    def add_start(self, record: StartRecord) -> None:
        """Append a start; one that is there already (same replica and instant) is left as it is."""
        self.add([], [record], [])

    def add_intervals(self, intervals: Iterable[LeaseInterval]) -> int:
        """Append intervals, all or none; returns how many were new.

        One whose id is there with other values, or that does not end after it starts, is kept out and logged:
        it must not hold up the rest.
        """
        return self.add(intervals, [], [])

    def add(
        self, intervals: Iterable[LeaseInterval], starts: Iterable[StartRecord], devices: Iterable[DeviceInterval]
    ) -> int:
        """Append all of them or none, as `add_intervals` and `add_start` do; returns how many were new."""
        batches = (
            (LEASES, _sound([{**{name: getattr(i, name) for name in _COLUMNS}, "phase": i.phase.value} for i in intervals])),
            (STARTS, [_start_row(record) for record in starts]),
            (DEVICES, _sound([asdict(device) for device in devices])),
        )  # fmt: skip
        if not any(rows for _, rows in batches):
            return 0
        with self._begin() as connection:
            return sum(self._append(connection, table, rows) for table, rows in batches)

    def _append(self, connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> int:
        """How many were new. (Two that send the same row to PostgreSQL at one instant both count it.)"""
        first, *_ = keys = list(table.primary_key)
        there: dict[tuple[Any, ...], dict[str, Any]] = {}
        for part in _parts([row[first.name] for row in rows]):
            found = connection.execute(table.select().where(first.in_(part))).mappings()
            there |= {tuple(row[key.name] for key in keys): dict(row) for row in found}
        new = []
        for row in rows:
            key = tuple(row[column.name] for column in keys)
            if key not in there:
                there[key] = row
                new.append(row)
            elif there[key] != row:
                logger.error("a row came again with other values: the first one stays", extra={"fields": {"key": key}})
        if new:
            connection.execute(self._insert(table).on_conflict_do_nothing(), new)
        return len(new)

    def starts(
        self, function: str | None = None, namespace: str | None = None, limit: int | None = 100, since_ns: int = 0
    ) -> list[StartRecord]:
        """Newest first, `limit` at most."""
        return list(self.each_start(function, namespace, limit, since_ns))

    def each_start(
        self, function: str | None = None, namespace: str | None = None, limit: int | None = None, since_ns: int = 0
    ) -> Iterator[StartRecord]:
        """As `starts`; few are in memory at once."""
        query = sa.select(STARTS.c.record).where(STARTS.c.started_at_ns >= since_ns)
        for column, value in ((STARTS.c.function, function), (STARTS.c.namespace, namespace)):
            query = query if value is None else query.where(column == value)
        query = query.order_by(STARTS.c.started_at_ns.desc(), STARTS.c.replica).limit(limit)
        query = query.execution_options(yield_per=_ROWS_AT_ONCE)
        with self._read() as connection, connection.execute(query) as rows:
            for text in rows.scalars():
                if (record := _start_record(text)) is not None:
                    yield record

    def intervals(
        self,
        start_ns: int,
        end_ns: int,
        function: str | None = None,
        *,
        namespace: str | None = None,
        phase: LeasePhase | None = None,
        on_gpus: bool = False,
        limit: int | None = None,
    ) -> list[LeaseInterval]:
        """Those that overlap ``[start_ns, end_ns)``, in order of their start; the first `limit` of them."""
        query = LEASES.select().where(LEASES.c.ended_at_ns > start_ns, LEASES.c.started_at_ns < end_ns)
        chosen = (
            (LEASES.c.function, function),
            (LEASES.c.namespace, namespace),
            (LEASES.c.phase, phase and phase.value),
        )
        for column, value in chosen:
            query = query if value is None else query.where(column == value)
        if on_gpus:
            query = query.where(LEASES.c.device != CPU_DEVICE)
        query = query.order_by(LEASES.c.started_at_ns, LEASES.c.id).limit(limit)
        query = query.execution_options(yield_per=_ROWS_AT_ONCE)
        with self._read() as connection, connection.execute(query) as rows:
            return [_lease(row._mapping) for row in rows]  # noqa: SLF001

    def runs(self, start_ns: int, end_ns: int) -> Iterator[Run]:
        """When replicas ran in ``[start_ns, end_ns)``, in order of their start; few are in memory at once."""
        columns = (LEASES.c.namespace, LEASES.c.function, LEASES.c.started_at_ns, LEASES.c.ended_at_ns)
        query = sa.select(*columns).where(
            LEASES.c.phase == LeasePhase.RUNNING.value,
            LEASES.c.ended_at_ns > start_ns,
            LEASES.c.started_at_ns < end_ns,
        )
        query = query.order_by(LEASES.c.started_at_ns, LEASES.c.id).execution_options(yield_per=_ROWS_AT_ONCE)
        with self._read() as connection, connection.execute(query) as rows:
            for row in rows:
                yield Run(*row)

    def summary(self, start_ns: int, end_ns: int) -> list[LeaseInterval]:
        """The time held in ``[start_ns, end_ns)`` in few rows: of each replica and phase one interval without an
        id, as long as all its parts in the range, and laid at the range's start, where it has room: the
        intervals of one replica never overlap. Reports of it are reports of the intervals.
        """
        facts = [column for column in LEASES.columns if column.name not in ("id", "started_at_ns", "ended_at_ns")]
        first = sa.case((LEASES.c.started_at_ns > start_ns, LEASES.c.started_at_ns), else_=start_ns)
        last = sa.case((LEASES.c.ended_at_ns < end_ns, LEASES.c.ended_at_ns), else_=end_ns)
        query = sa.select(*facts, sa.cast(sa.func.sum(last - first), sa.BigInteger)).group_by(*facts).order_by(*facts)
        query = query.where(LEASES.c.ended_at_ns > start_ns, LEASES.c.started_at_ns < end_ns)
        names = [column.name for column in facts]
        found = []
        with self._read() as connection:
            for *values, held_ns in connection.execute(query):
                row = dict(zip(names, values, strict=True))
                row["phase"] = LeasePhase(row["phase"])
                found.append(LeaseInterval(id="", started_at_ns=start_ns, ended_at_ns=start_ns + held_ns, **row))
        return found

    def devices(self, start_ns: int, end_ns: int) -> list[DeviceInterval]:
        """Of GPUs on nodes, those that overlap ``[start_ns, end_ns)``, in order of their start."""
        query = DEVICES.select().where(DEVICES.c.ended_at_ns > start_ns, DEVICES.c.started_at_ns < end_ns)
        with self._read() as connection:
            rows = connection.execute(query.order_by(DEVICES.c.started_at_ns, DEVICES.c.id)).all()
        return [DeviceInterval(**row._mapping) for row in rows]  # noqa: SLF001

    def ping(self) -> None:
        """Ask the database for an answer."""
        with self._read() as connection:
            connection.execute(sa.select(1))

    @contextmanager
    def _begin(self) -> Iterator[sa.Connection]:
        with _translated(self._url), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        with _translated(self._url), self._engine.connect() as connection:
            yield connection.execution_options(**_READS)


def _sound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those with a length; each of the others is logged."""
    for row in rows:
        if row["ended_at_ns"] <= row["started_at_ns"]:
            logger.error("an interval without length is kept out", extra={"fields": {"id": row["id"]}})
    return [row for row in rows if row["ended_at_ns"] > row["started_at_ns"]]


def _lease(row: Mapping[Any, Any]) -> LeaseInterval:
    """Of texts that many rows have, as all but ids are, one is kept."""
    facts: dict[str, Any] = {name: intern(value) if isinstance(value, str) else value for name, value in row.items()}
    return LeaseInterval(**{**facts, "phase": LeasePhase(facts["phase"])})


def _start_row(record: StartRecord) -> dict[str, Any]:
    return {
        "replica": record.replica,
        "started_at_ns": record.started_at_ns,
        "function": record.function,
        "namespace": record.namespace,
        "record": json.dumps(record.to_json(), sort_keys=True),
    }


def _parts(values: list[Any]) -> Iterator[list[Any]]:
    """As many at a time as any database takes in one statement."""
    for at in range(0, len(values), 500):
        yield values[at : at + 500]


def _start_record(text: str) -> StartRecord | None:
    """None, and a line in the log, for one that another version wrote: the others are still worth showing."""
    try:
        return StartRecord.from_json(json.loads(text))
    except ValueError as exc:
        logger.warning("a start record cannot be read", extra={"fields": {"why": str(exc)}})
        return None


def _engine(url: str, lock_timeout_s: float) -> sa.Engine:
    parsed = sa.make_url(url)
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")  # psycopg 3, whatever SQLAlchemy's version prefers
    if parsed.get_backend_name() == "postgresql":
        # Ours: a database that names none (SQL_ASCII) would give texts as bytes.
        return sa.create_engine(parsed, pool_pre_ping=True, connect_args={"client_encoding": "utf8"})
    if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise LedgerError(
            "The ledger cannot be kept there.",
            why=f"{parsed.render_as_string()} is neither a SQLite file nor PostgreSQL.",
            hint="Write sqlite:///FILE or postgresql://USER@HOST/DATABASE.",
            code="ledger-url",
        )
    _make_private(Path(str(parsed.database)))
    engine = sa.create_engine(parsed, connect_args={"timeout": lock_timeout_s, "isolation_level": None})
    sa.event.listen(engine, "connect", _set_pragmas)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(path: Path) -> None:
    """The file is ours alone from its first byte; SQLite gives its neighbours (-wal, -shm) the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    _switch_to_wal(cursor)
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _switch_to_wal(cursor: Any) -> None:
    """The first switch of a new file answers "locked" at once where several try it, whatever the busy timeout."""
    deadline = time.monotonic() + _WAL_SWITCH_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as exc:
            if "locked" not in str(exc) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _begin_sqlite(connection: sa.Connection) -> None:
    """The driver would begin late or not at all: writers take the lock first, so that none finds itself outrun."""
    reads = connection.get_execution_options().get("reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """The database's errors as ours, without its password."""
    try:
        yield
    except ModuleNotFoundError as exc:
        raise LedgerError(
            "The ledger's database needs a driver.",
            why=f"The package {exc.name} is not installed.",
            hint="Install it with: pip install 'psycopg[binary]'",
            code="ledger-driver",
        ) from exc
    except (sa.exc.SQLAlchemyError, OSError) as exc:
        cause = getattr(exc, "orig", None) or exc
        why = exc.strerror if isinstance(exc, OSError) else " ".join(str(cause).split())
        raise LedgerError("The ledger cannot be used.", why=f"{_shown(url)}: {why}.", hint=_hint(str(why))) from exc


def _shown(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return "its address"


_HINTS = (
    ("locked", "Another process holds it: see who with fuser, or try again."),
    ("full", "Make room on its disk."),
    ("No space", "Make room on its disk."),
    ("not a database", "The file is damaged: move it away, and gpufn begins a new one."),
    ("malformed", "The file is damaged: move it away, and gpufn begins a new one."),
    ("unable to open", "Check the folder and its owner."),
    ("readonly", "Check the file and its owner."),
    ("read-only", "Put the state folder where it can be written: --state, or GPUFN_HOME."),
    ("denied", "Check the folder and its owner."),
    ("could not parse", "Write sqlite:///FILE or postgresql://USER@HOST/DATABASE."),
    ("connection", "Check that the database runs and lets this machine in."),
)


def _hint(why: str) -> str:
    return next((hint for word, hint in _HINTS if word.lower() in why.lower()), "")
