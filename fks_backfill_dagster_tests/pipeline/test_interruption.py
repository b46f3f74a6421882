"""A sync that is killed, interrupted, or runs twice at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.pipeline.events import BatchDone, SyncEvent
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.queries import SyncStatus
from fks_backfill_dagster_tests.pipeline.builders import (
    HOURS,
    MINUTES,
    days,
    holds_the_truth,
    status_of,
)
from fks_backfill_dagster_tests.pipeline.conftest import make_context

_BACKFILL = """
import sys
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.builders import MINUTES
from fks_backfill_dagster_tests.pipeline.conftest import make_context
database_url, market_url, start, end = sys.argv[1:]
context = make_context(Database(database_url), market_url + "/binance", archive_url=market_url + "/archive")
report = sync(context, MINUTES, TimeRange(int(start), int(end)), ["binance"],
              listen=lambda event: print(type(event).__name__, flush=True))
assert report.complete, report
"""


def start_backfill(database_url: str, market: LocalMarket, window: TimeRange) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _BACKFILL, database_url, market.url, str(window.start), str(window.end)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )


def test_kill_9_in_the_middle_then_the_same_command(
    database: Database, database_url: str, market: LocalMarket
) -> None:
    window = days("2023-01-01", "2024-01-01")
    process = start_backfill(database_url, market, window)
    assert process.stdout is not None
    for line in process.stdout:
        committed = queries.batches(database, MINUTES)
        if line.strip() == "BatchDone" and len(committed) >= 3:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = queries.batches(database, MINUTES)
    assert 3 <= len(before) < 12, "it was killed in the middle"
    assert status_of(database, MINUTES).status == "syncing", "the lease has not expired yet"
    done = sum(batch.inserted for batch in before)

    market.reset_requests()
    context = make_context(database, market.binance_url, archive_url=market.archive_url)
    report = sync(context, MINUTES, window, ["binance"])
    assert report.complete
    assert report.total_candles == 365 * 1440 - done
    assert report.providers["binance"].asked == 365 * 1440 - done, "no committed candle was requested again"
    archives_left = 12 - len(before)
    assert market.requests("archive") <= 2 * archives_left
    holds_the_truth(database, market, MINUTES, window)


def test_two_processes_at_once(database: Database, database_url: str, market: LocalMarket) -> None:
    window = days("2023-06-01", "2024-01-01")
    processes = [start_backfill(database_url, market, window) for _ in range(2)]
    for process in processes:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    holds_the_truth(database, market, MINUTES, window)
    status = status_of(database, MINUTES)
    assert (status.status, status.total_candles, status.open_gaps) == ("completed", 214 * 1440, 0)
    assert queries.ledger_gaps(database, MINUTES, window) == ()


def test_the_status_is_syncing_while_it_works(database: Database, market: LocalMarket) -> None:
    context = make_context(database, market.binance_url)
    seen: set[str] = set()

    def look(event: SyncEvent) -> None:
        if isinstance(event, BatchDone):
            seen.add(status_of(database, HOURS).status)

    sync(context, HOURS, days("2024-01-01", "2024-03-01"), ["binance"], listen=look)
    assert seen == {"syncing"}
    assert status_of(database, HOURS).status == "completed"


def interrupt(event: SyncEvent) -> None:
    if isinstance(event, BatchDone):
        raise KeyboardInterrupt


def test_an_interrupted_sync_keeps_what_was_committed(database: Database, market: LocalMarket) -> None:
    context = make_context(database, market.binance_url)
    with pytest.raises(KeyboardInterrupt):
        sync(context, MINUTES, days("2024-01-01", "2024-06-01"), ["binance"], listen=interrupt)
    status = status_of(database, MINUTES)
    assert (status.status, status.error_message, status.last_sync_time) == ("pending", None, None)
    assert status.total_candles == 31 * 1440
    fetchers = [thread for thread in threading.enumerate() if thread.name.startswith("fetch")]
    for thread in fetchers:
        thread.join(timeout=30)
        assert not thread.is_alive(), "no fetcher continues"


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_interruption_leaves_the_status_as_it_was(
    database: Database, market: LocalMarket, wrapped: bool
) -> None:
    """Also if the database or a provider raises its own error for it."""

    def raise_wrapped(event: SyncEvent) -> None:
        if isinstance(event, BatchDone):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as cause:
                raise StoreError("the connection is lost") from cause

    context = make_context(database, market.binance_url)
    listener = raise_wrapped if wrapped else interrupt
    error = StoreError if wrapped else KeyboardInterrupt
    assert sync(context, HOURS, days("2024-01-01", "2024-01-02"), ["binance"]).complete
    before = status_of(database, HOURS)
    with pytest.raises(error):
        sync(context, HOURS, days("2024-01-02", "2024-04-01"), ["binance"], listen=listener)
    after = status_of(database, HOURS)
    assert (after.status, after.error_message, after.last_sync_time) == (
        "completed",
        None,
        before.last_sync_time,
    )
    assert after.total_candles > before.total_candles
    # The error of an earlier sync stays, too.
    market.plant_fault("binance", "status", count=None, status=503, seconds=0)
    broken = make_context(database, market.binance_url, budget=0.1)
    sync(broken, HOURS, days("2024-05-01", "2024-05-02"), ["binance"])
    failed = status_of(database, HOURS)
    assert failed.status == "error"
    market.clear_faults()
    with pytest.raises(error):
        sync(context, HOURS, days("2024-05-01", "2024-06-01"), ["binance"], listen=listener)
    assert unmoved(status_of(database, HOURS)) == unmoved(failed)


def unmoved(status: SyncStatus) -> SyncStatus:
    """Without what each commit changes."""
    return replace(status, total_candles=0, newest_data_time=None, open_gaps=0)


def test_an_error_that_is_no_interruption_is_recorded(database: Database, market: LocalMarket) -> None:
    def fail(event: SyncEvent) -> None:
        if isinstance(event, BatchDone):
            raise StoreError("the disk is full")

    context = make_context(database, market.binance_url)
    with pytest.raises(StoreError):
        sync(context, HOURS, days("2024-01-01", "2024-04-01"), ["binance"], listen=fail)
    status = status_of(database, HOURS)
    assert (status.status, status.error_message) == ("error", "the disk is full")
