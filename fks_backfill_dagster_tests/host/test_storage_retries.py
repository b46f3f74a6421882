"""A temporarily unavailable database: retries of Dagster's storage and of runs.

With a real server that is stopped and started. The retries of connections (`sessions`) are disabled, so that callers
see the loss. With the servers of `up`: test_kills.py.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, DagsterRun
from dagster._core.storage.tags import RETRY_ON_ASSET_OR_OP_FAILURE_TAG

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.host import storage_retries
from fks_backfill_dagster.host.storage import DatabaseStorage, dagster_place
from fks_backfill_dagster.orchestration import assets
from fks_backfill_dagster.orchestration.assets import Outcome, Task, materialize_with_retries
from fks_backfill_dagster.orchestration.retrying import retried, wait_until_available
from fks_backfill_dagster.orchestration.run_log import Lines
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store import sessions
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import DatabaseUnavailable, StoreError, UnsuitableServer
from fks_backfill_dagster.store.queries import batches, read_candles
from fks_backfill_dagster_tests.odd_servers import Cluster, folder_for_servers, until
from fks_backfill_dagster_tests.orchestration.conftest import settings_of
from fks_backfill_dagster_tests.pipeline.conftest import make_context

YEARS = TimeRange(instant("2022-01-01"), instant("2024-01-01"))


# Retried errors


def test_a_call_is_retried_until_the_database_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_retries, "_PAUSE_SECONDS", 0.0)
    results: list[Exception | int] = [DatabaseUnavailable("away"), DatabaseUnavailable("away"), 7]

    def call(number: int, *, more: int) -> int:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return result + number + more

    assert storage_retries.with_retries(call)(1, more=2) == 10
    assert results == []


@pytest.mark.parametrize(
    "error",
    [
        UnsuitableServer("permanently unsuitable"),
        StoreError("a statement that is wrong"),
        ValueError("a value"),
        sa.exc.IntegrityError("INSERT", None, sqlite3.IntegrityError("a duplicate")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_is_raised_immediately(error: Exception) -> None:
    made = 0

    def call() -> None:
        nonlocal made
        made += 1
        raise error

    with pytest.raises(type(error)):
        storage_retries.with_retries(call)()
    assert made == 1


def test_retries_are_limited_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_retries, "AWAY_SECONDS", -1.0)

    def call() -> None:
        raise DatabaseUnavailable("away")

    with pytest.raises(DatabaseUnavailable):
        storage_retries.with_retries(call)()


# With a server that is stopped and started


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(sessions, "PATIENCE_SECONDS", 0.0)
    with folder_for_servers() as folder:
        made = Cluster.make(folder / "a").start().ready()
        yield made
        made.stop()


@pytest.mark.server
def test_calls_of_dagsters_storage_are_retried(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    storage = DatabaseStorage(dagster_place(cluster.url), makes_tables=True)
    storage.run_storage.set_cursor_values({"key": "before"})
    cluster.stop()
    with ThreadPoolExecutor(2) as pool, caplog.at_level(logging.WARNING, "dagster.storage"):
        writing = pool.submit(storage.run_storage.set_cursor_values, {"key": "after"})
        reading = pool.submit(storage.event_log_storage.get_maximum_record_id)
        until(lambda: {"set_cursor_values", "get_maximum_record_id"} <= retried_calls(caplog))
        assert not writing.done()
        assert not reading.done()
        cluster.start()
        writing.result(60)
        reading.result(60)
    assert storage.run_storage.get_cursor_values({"key"}) == {"key": "after"}


def retried_calls(caplog: pytest.LogCaptureFixture) -> set[str]:
    found = [record.getMessage() for record in caplog.records if record.name == "dagster.storage"]
    return {text.removeprefix("The database is unavailable, ").split(" ")[0] for text in found}


@pytest.mark.server
def test_waiting_for_a_database(cluster: Cluster) -> None:
    database = Database(cluster.url)
    database.upgrade()
    assert wait_until_available(database)
    cluster.stop()
    assert not wait_until_available(database, seconds=0)
    with ThreadPoolExecutor(1) as pool:
        waited = pool.submit(wait_until_available, database)
        cluster.start()
        assert waited.result(60)
    database.dispose()


@pytest.mark.parametrize(
    ("error", "tags"),
    [
        (DatabaseUnavailable("away"), {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "true"}),
        (StoreError("a series that changed"), {}),
        (ValueError("a fault"), {}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_is_retried_only_after_a_loss_of_the_database(
    error: Exception, tags: dict[str, str], tmp_path: Path
) -> None:
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        run = instance.add_run(DagsterRun(job_name="ohlcv_months"))
        with pytest.raises(type(error)), retried(SimpleNamespace(instance=instance, run=run)):
            raise error
        stored = instance.get_run_by_id(run.run_id)
        assert stored is not None
        assert stored.tags == tags


@pytest.mark.server
def test_a_series_continues_where_it_lost_the_database(cluster: Cluster) -> None:
    lines, written = Lines(), Written()
    with LocalMarket(MarketConfig(limits=False, latency=0.2)) as market:
        database = Database(cluster.url)
        database.upgrade()
        context = make_context(database, market.binance_url)
        with ThreadPoolExecutor(1) as pool:
            running: Future[Outcome] = pool.submit(materialize_with_retries, context, hours(), lines, False)
            until(lambda: bool(batches(database)) or running.done())
            assert not running.done()
            cluster.stop()
            until(lambda: not wait_until_available(database, seconds=0))
            cluster.start()
            outcome = running.result(120)
        found = read_candles(database, hours().series, YEARS)
        truth = market.truth("binance", "BTCUSDT", Timeframe.H1, YEARS)
        database.dispose()
    lines.write(written)
    assert not outcome.failed
    assert any("lost the database" in text for text in written.warnings)
    assert all((ours == theirs).all() for ours, theirs in zip(found.columns(), truth.columns(), strict=True))


def test_a_series_gives_up_when_the_database_is_lost_too_often(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = 0

    def fail(*_: object) -> Outcome:
        nonlocal lost
        lost += 1
        raise DatabaseUnavailable("away")

    monkeypatch.setattr(assets, "materialize_series", fail)
    monkeypatch.setattr(assets, "wait_until_available", lambda database: True)
    nowhere = Context(Database("postgresql://127.0.0.1:1/none"), {}, lambda: 0)
    with pytest.raises(DatabaseUnavailable):
        materialize_with_retries(nowhere, hours(), Lines(), False)
    assert lost == assets.MOST_LOSSES + 1


class Written:
    """A log that records its warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def info(self, text: str) -> None:
        pass

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def hours() -> Task:
    catalog = Catalog(settings_of("BTC/USDT", start="2022-01-01", frames=[Timeframe.H1]))
    windows = {f"{year}-01-01": year_of(year) for year in (2022, 2023)}
    return Task(catalog.find_series("BTC/USDT", "1h"), windows, catalog, "run")


def year_of(year: int) -> TimeRange:
    return TimeRange(instant(f"{year}-01-01"), instant(f"{year + 1}-01-01"))
