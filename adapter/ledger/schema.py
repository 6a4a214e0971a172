"""The ledger's tables, and the ordered steps by which a database of any age becomes the present one.

A step, once released, never changes: it is SQL that SQLite and PostgreSQL both read. The tables below it are
what queries are made of; a test holds the two together. `schema_version` has one row for each step taken.
"""

from __future__ import annotations

import sqlalchemy as sa

from adapter.errors import LedgerError

metadata = sa.MetaData()

LEASES = sa.Table(
    "lease_intervals",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    *(
        sa.Column(name, sa.Text, nullable=False)
        for name in ("function", "namespace", "revision", "replica", "tenant", "price_class", "device")
    ),
    sa.Column("share", sa.Double, nullable=False),
    sa.Column("phase", sa.Text, nullable=False),
    sa.Column("started_at_ns", sa.BigInteger, nullable=False),
    sa.Column("ended_at_ns", sa.BigInteger, nullable=False),
    sa.Column("gpu_model", sa.Text, nullable=False),
    sa.Column("node", sa.Text, nullable=False),
)
STARTS = sa.Table(
    "starts",
    metadata,
    sa.Column("replica", sa.Text, primary_key=True),
    sa.Column("started_at_ns", sa.BigInteger, primary_key=True),
    sa.Column("function", sa.Text, nullable=False),
    sa.Column("namespace", sa.Text, nullable=False),
    sa.Column("record", sa.Text, nullable=False),  # JSON: `adapter.records.StartRecord.to_json`
)
DEVICES = sa.Table(
    "device_intervals",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    *(sa.Column(name, sa.Text, nullable=False) for name in ("node", "device", "model")),
    *(
        sa.Column(name, sa.BigInteger, nullable=False)
        for name in ("started_at_ns", "ended_at_ns", "held_ns", "others_ns")
    ),
)

STEPS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE lease_intervals (
            id TEXT PRIMARY KEY,
            function TEXT NOT NULL, namespace TEXT NOT NULL, revision TEXT NOT NULL, replica TEXT NOT NULL,
            tenant TEXT NOT NULL, price_class TEXT NOT NULL, device TEXT NOT NULL,
            share DOUBLE PRECISION NOT NULL, phase TEXT NOT NULL,
            started_at_ns BIGINT NOT NULL, ended_at_ns BIGINT NOT NULL,
            CHECK (ended_at_ns > started_at_ns)
        )
        """,
        "CREATE INDEX lease_intervals_by_end ON lease_intervals (ended_at_ns)",
        """
        CREATE TABLE starts (
            replica TEXT NOT NULL, started_at_ns BIGINT NOT NULL,
            function TEXT NOT NULL, namespace TEXT NOT NULL, record TEXT NOT NULL,
            PRIMARY KEY (replica, started_at_ns)
        )
        """,
        "CREATE INDEX starts_by_time ON starts (started_at_ns)",
    ),
    ("ALTER TABLE lease_intervals ADD COLUMN gpu_model TEXT NOT NULL DEFAULT ''",),
    (
        "ALTER TABLE lease_intervals ADD COLUMN node TEXT NOT NULL DEFAULT ''",
        """
        CREATE TABLE device_intervals (
            id TEXT PRIMARY KEY,
            node TEXT NOT NULL, device TEXT NOT NULL, model TEXT NOT NULL,
            started_at_ns BIGINT NOT NULL, ended_at_ns BIGINT NOT NULL,
            held_ns BIGINT NOT NULL, others_ns BIGINT NOT NULL,
            CHECK (ended_at_ns > started_at_ns)
        )
        """,
        "CREATE INDEX device_intervals_by_end ON device_intervals (ended_at_ns)",
    ),
)

VERSION = len(STEPS)

_LOCK = 0x67707566  # any number, the same for all: whoever holds it brings the database up to date


def migrate(connection: sa.Connection) -> None:
    """Take the steps that are missing, all or none of them; the caller's transaction must exclude other writers.

    Raises `LedgerError` when a newer gpufn has been here.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    connection.exec_driver_sql("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY)")
    found = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar() or 0
    if found > VERSION:
        raise LedgerError(
            f"The ledger has schema {found}, this gpufn knows {VERSION}.",
            why="A newer gpufn has written it.",
            hint="Use that version, or another state folder.",
            code="ledger-too-new",
        )
    for version, step in enumerate(STEPS[found:], start=found + 1):
        for statement in step:
            connection.exec_driver_sql(statement)
        connection.execute(sa.text("INSERT INTO schema_version VALUES (:version)"), {"version": version})
