"""Real databases for tests: the embedded server, or TimescaleDB where FKS_TEST_TIMESCALE_URL names one."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.store.database import Database

TIMESCALE_URL = os.environ.get("FKS_TEST_TIMESCALE_URL")

needs_timescale = pytest.mark.skipif(
    TIMESCALE_URL is None, reason="FKS_TEST_TIMESCALE_URL is not set: no TimescaleDB to test against"
)


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """A server on which databases can be created: TimescaleDB if given, else one embedded server for all workers."""
    if TIMESCALE_URL is not None:
        yield TIMESCALE_URL
        return
    server = EmbeddedPostgres(Path(os.environ["FKS_TEST_HOME"]))
    yield server.start()
    server.release()


@pytest.fixture(scope="session")
def template(server_url: str) -> Iterator[str | None]:
    """A database with the schema, as a template; TimescaleDB's cannot be copied while its workers are connected."""
    if TIMESCALE_URL is not None:
        yield None
        return
    with scratch_database(server_url, None) as url:
        database = Database(url)
        database.upgrade()
        database.dispose()
        yield str(sa.make_url(url).database)


@pytest.fixture
def database_url(server_url: str, template: str | None) -> Iterator[str]:
    """A fresh database with the schema `fks`; libpq URL."""
    with scratch_database(server_url, template) as url:
        if template is None:
            database = Database(url)
            database.upgrade()
            database.dispose()
        yield url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.dispose()


@pytest.fixture
def empty_database_url(server_url: str) -> Iterator[str]:
    """A fresh database without any schema."""
    with scratch_database(server_url, None) as url:
        yield url


class scratch_database:
    """Creates a database on the server, and drops it at the end even with open connections.

    A template is copied file by file: PostgreSQL's default copies through the WAL, and thousands of copies would
    fill the memory that may hold the test server.
    """

    def __init__(self, server_url: str, template: str | None) -> None:
        self._server_url, self._template = server_url, template
        self._name = f"fks_test_{uuid.uuid4().hex[:12]}"

    def __enter__(self) -> str:
        origin = f' TEMPLATE "{self._template}" STRATEGY FILE_COPY' if self._template else ""
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{self._name}"{origin}')
        url = sa.make_url(self._server_url).set(database=self._name)
        return url.render_as_string(hide_password=False)

    def __exit__(self, *_: object) -> None:
        with psycopg.connect(self._server_url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{self._name}" WITH (FORCE)')
