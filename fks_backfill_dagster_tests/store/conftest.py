"""Databases and series for the tests of this layer."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.postgres import (
    database,
    database_url,
    empty_database_url,
    scratch_database,
    server_url,
    template,
)
from fks_backfill_dagster_tests.store.builders import Shelf

__all__ = ["database", "database_url", "empty_database_url", "server_url", "template"]


@pytest.fixture(scope="session")
def shared(server_url: str, template: str | None) -> Iterator[Database]:
    """One database for all tests that use only a fresh series."""
    with scratch_database(server_url, template) as url:
        opened = Database(url)
        opened.upgrade()
        yield opened
        opened.dispose()


@pytest.fixture
def hours(shared: Database) -> Shelf:
    """A crypto series of 1h for one test."""
    return Shelf.of(shared, fresh("1h"))


@pytest.fixture
def minutes(shared: Database) -> Shelf:
    """A crypto series of 1m for one test."""
    return Shelf.of(shared, fresh("1m"))


def fresh(timeframe: str) -> Series:
    return Series(f"{uuid.uuid4().hex[:12].upper()}/USDT", Timeframe(timeframe), AssetClass.CRYPTO)
