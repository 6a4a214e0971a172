"""What is PostgreSQL's alone."""

import uuid

import sqlalchemy as sa

from adapter.ledger.store import Ledger


def test_a_database_that_names_no_encoding_is_one_too(postgres_url):
    """As initdb makes it where no locale is set. Without an encoding of ours, texts would come as bytes."""
    server = sa.make_url(postgres_url).set(drivername="postgresql+psycopg")
    name = f"gpufn_test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        words = "ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
        connection.exec_driver_sql(f"CREATE DATABASE {name} {words}")
    try:
        ledger = Ledger.open(server.set(database=name).render_as_string(hide_password=False))
        assert ledger.starts() == []
        ledger.close()
    finally:
        with engine.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
        engine.dispose()
