"""Every database that a ledger can live in."""

import uuid

import pytest
import sqlalchemy as sa

from adapter.ledger.store import Ledger
from tests.postgres import postgres_url

__all__ = ["postgres_url"]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """An empty database."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'ledger.sqlite'}"
        return
    server = sa.make_url(request.getfixturevalue("postgres_url"))
    name = f"gpufn_test_{uuid.uuid4().hex}"
    engine = sa.create_engine(server.set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
    query = {"options": f"-csearch_path={name}"}
    yield server.update_query_dict(query).render_as_string(hide_password=False)
    with engine.begin() as connection:
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
    engine.dispose()


@pytest.fixture
def ledger(url):
    ledger = Ledger.open(url)
    yield ledger
    ledger.close()
