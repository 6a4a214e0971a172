"""The ledger: append-only rows of lease intervals and start records.

SQLAlchemy Core over SQLite (WAL, synchronous FULL: what is acknowledged is on the disk) on one machine,
or PostgreSQL in a cluster. Rows have deterministic ids, so that a delivery that is repeated counts once;
nothing is ever updated. Schema changes are ordered steps; their number is in the database.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from adapter.errors import LedgerError
from adapter.records import LeaseInterval, LeasePhase, StartRecord

logger = logging.getLogger(__name__)

FILE_NAME = "ledger.sqlite"
SCHEMA_VERSION = 1

_metadata = sa.MetaData()
_version = sa.Table("schema_version", _metadata, sa.Column("version", sa.Integer, primary_key=True))
_leases = sa.Table(
    "lease_intervals",
    _metadata,
    sa.Column("id", sa.String(200), primary_key=True),
    *(
        sa.Column(name, sa.String(128), nullable=False)
        for name in ("function", "namespace", "revision", "replica", "tenant", "price_class", "device")
    ),
    sa.Column("share", sa.Float, nullable=False),
    sa.Column("phase", sa.String(16), nullable=False),
    sa.Column("started_at_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_at_ns", sa.BigInteger, nullable=False, index=True),
    sa.CheckConstraint("ended_at_ns > started_at_ns", name="interval_is_positive"),
)
_starts = sa.Table(
    "starts",
    _metadata,
    sa.Column("replica", sa.String(128), primary_key=True),
    sa.Column("started_at_ns", sa.BigInteger, primary_key=True, index=True),
    sa.Column("function", sa.String(128), nullable=False),
    sa.Column("namespace", sa.String(128), nullable=False),
    sa.Column("record", sa.Text, nullable=False),
)


def ledger_url(state: Path) -> str:
    """The URL of a state folder's own ledger."""
    return f"sqlite:///{state / FILE_NAME}"


class Ledger:
    """One open ledger; its methods may be called from any thread. Every one may raise `LedgerError`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, url: str) -> Ledger:
        """Open, and create or bring up to date what is there."""
        engine = sa.create_engine(url, connect_args={"timeout": 10} if url.startswith("sqlite") else {})
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _set_pragmas)
        with _translated(url):
            _metadata.create_all(engine)
            with engine.begin() as connection:
                found = connection.execute(sa.select(sa.func.max(_version.c.version))).scalar()
                if found is None:
                    connection.execute(_version.insert().values(version=SCHEMA_VERSION))
                elif found > SCHEMA_VERSION:
                    raise LedgerError(
                        f"The ledger has schema {found}, this gpufn knows {SCHEMA_VERSION}.",
                        why="A newer gpufn has written it.",
                        hint="Use that version, or another state folder.",
                        code="ledger-too-new",
                    )
        return cls(engine)

    def add_start(self, record: StartRecord) -> None:
        """Append a start; one that is there already (replica and instant) is left as it is."""
        row = {
            "replica": record.replica,
            "started_at_ns": record.started_at_ns,
            "function": record.function,
            "namespace": record.namespace,
            "record": json.dumps(record.to_json()),
        }
        self._append(_starts, [row])

    def add_intervals(self, intervals: Iterable[LeaseInterval]) -> int:
        """Append intervals; returns how many were new. One whose id is there with other values is logged."""
        rows = [
            {name: getattr(interval, name) for name in LeaseInterval.__slots__} | {"phase": interval.phase.value}
            for interval in intervals
        ]
        return self._append(_leases, rows)

    def _append(self, table: sa.Table, rows: list[dict[str, Any]]) -> int:
        if not rows:
            return 0
        insert = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[self._engine.dialect.name]
        new = 0
        with _translated(str(self._engine.url)), self._engine.begin() as connection:
            for row in rows:
                done = connection.execute(insert(table).values(row).on_conflict_do_nothing())
                new += done.rowcount
                if not done.rowcount and table is _leases:
                    self._compare(connection, row)
        return new

    def _compare(self, connection: sa.Connection, row: dict[str, Any]) -> None:
        there = connection.execute(_leases.select().where(_leases.c.id == row["id"])).mappings().one()
        if dict(there) != row:
            logger.error(
                "an interval came again with other values; the first one stays", extra={"fields": {"id": row["id"]}}
            )

    def starts(
        self, function: str | None = None, namespace: str | None = None, limit: int | None = 100, since_ns: int = 0
    ) -> list[StartRecord]:
        """Newest first."""
        query = sa.select(_starts.c.record).where(_starts.c.started_at_ns >= since_ns)
        for column, value in ((_starts.c.function, function), (_starts.c.namespace, namespace)):
            query = query if value is None else query.where(column == value)
        query = query.order_by(_starts.c.started_at_ns.desc()).limit(limit)
        with _translated(str(self._engine.url)), self._engine.connect() as connection:
            return [StartRecord.from_json(json.loads(text)) for text in connection.execute(query).scalars()]

    def intervals(self, start_ns: int, end_ns: int, function: str | None = None) -> list[LeaseInterval]:
        """Those that overlap the range, in order of their start."""
        query = _leases.select().where(_leases.c.ended_at_ns > start_ns, _leases.c.started_at_ns < end_ns)
        if function is not None:
            query = query.where(_leases.c.function == function)
        with _translated(str(self._engine.url)), self._engine.connect() as connection:
            rows = connection.execute(query.order_by(_leases.c.started_at_ns, _leases.c.id)).mappings()
            return [LeaseInterval(**{**row, "phase": LeasePhase(row["phase"])}) for row in rows]

    def close(self) -> None:
        self._engine.dispose()


def _set_pragmas(connection: Any, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


@contextmanager
def _translated(url: str) -> Iterator[None]:
    """The database library's errors as ours."""
    try:
        yield
    except sa.exc.SQLAlchemyError as exc:
        cause = getattr(exc, "orig", None) or exc
        raise LedgerError(
            "The ledger cannot be used.",
            why=f"{sa.engine.make_url(url).render_as_string(hide_password=True)}: {cause}.",
            hint=_hint(str(cause)),
        ) from exc


def _hint(cause: str) -> str:
    hints: tuple[tuple[str, str], ...] = (
        ("locked", "Another process writes to it: try again."),
        ("full", "Make room on its disk."),
        ("not a database", "The file is damaged: move it away, and gpufn begins a new one."),
        ("malformed", "The file is damaged: move it away, and gpufn begins a new one."),
        ("unable to open", "Check the folder and its owner."),
    )
    return next((hint for word, hint in hints if word in cause), "")
