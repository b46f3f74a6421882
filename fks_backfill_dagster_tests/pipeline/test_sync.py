"""sync from end to end: a local market over HTTP, a real database, and the market's truth for comparison."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, SyncEvent
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import dry_run, sync
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.builders import (
    BOTH,
    HOURS,
    MINUTES,
    days,
    holds_the_truth,
    status_of,
)
from fks_backfill_dagster_tests.pipeline.conftest import NOW, make_context

# Success -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeframe", list(Timeframe))
def test_every_timeframe_is_the_markets_truth(
    context: Context, database: Database, market: LocalMarket, timeframe: Timeframe
) -> None:
    series = Series("ETH/USDT", timeframe, AssetClass.CRYPTO)
    window = days("2024-03-29", "2024-05-05")
    report = sync(context, series, window, ["binance"])
    assert (report.missing, report.failed_batches, report.errors) == (0, 0, ())
    assert report.total_candles == report.expected
    assert report.successful_batches == report.total_batches > 0
    holds_the_truth(database, market, series, window)


def test_a_repeated_sync_requests_and_writes_nothing(
    context: Context, database: Database, market: LocalMarket
) -> None:
    window = days("2024-01-01", "2024-03-01")
    first = sync(context, MINUTES, window, BOTH)
    before = queries.batches(database, MINUTES)
    market.reset_requests()
    second = sync(context, MINUTES, window, BOTH)
    assert (first.total_candles, second.total_candles) == (60 * 1440, 0)
    assert (second.total_batches, second.requests, second.missing) == (0, 0, 0)
    assert market.requests() == 0
    assert queries.batches(database, MINUTES) == before


def test_archives_are_named_with_their_checksum(
    context: Context, database: Database, market: LocalMarket
) -> None:
    sync(context, MINUTES, days("2024-01-01", "2024-03-01"), ["binance"])
    january = queries.batches(database, MINUTES)[-1]
    assert january.provider == "binance"
    assert january.transport == "archive"
    assert january.source.endswith("/monthly/klines/BTCUSDT/1m/BTCUSDT-1m-2024-01.zip")
    assert january.sha256 is not None
    assert len(january.sha256) == 64
    assert january.inserted == 31 * 1440


def test_only_missing_candles_are_fetched(context: Context, database: Database, market: LocalMarket) -> None:
    sync(context, HOURS, days("2024-02-01", "2024-03-01"), ["binance"])
    report = sync(context, HOURS, days("2024-01-01", "2024-04-01"), ["binance"])
    assert report.providers["binance"].asked == 62 * 24
    assert report.total_candles == 62 * 24
    holds_the_truth(database, market, HOURS, days("2024-01-01", "2024-04-01"))


def test_only_closed_candles_are_stored(context: Context, database: Database, market: LocalMarket) -> None:
    last = TimeRange(NOW - 5 * MICROS_PER_HOUR, NOW + 24 * MICROS_PER_HOUR)
    report = sync(context, HOURS, last, ["binance"])
    assert report.window.end == NOW // MICROS_PER_HOUR * MICROS_PER_HOUR
    assert status_of(database, HOURS).newest_data_time == datetime(2024, 6, 15, 11, tzinfo=UTC)
    assert report.missing == 0


def test_a_candle_within_the_grace_is_not_fetched(database: Database, market: LocalMarket) -> None:
    closed = datetime(2024, 6, 15, 12, 0, 3, tzinfo=UTC)
    now = int(closed.timestamp() * 1e6)
    market.set_clock(now)
    context = make_context(database, market.binance_url, now=now)
    sync(context, HOURS, TimeRange(now - 3 * MICROS_PER_HOUR, now), ["binance"])
    assert status_of(database, HOURS).newest_data_time == datetime(2024, 6, 15, 10, tzinfo=UTC)


# Listing, future ------------------------------------------------------------------------------------------


def test_nothing_is_expected_before_listing(database: Database) -> None:
    listed = datetime(2020, 3, 3, 7, 20, tzinfo=UTC)
    config = MarketConfig(limits=False, now=NOW, listed=(("BTCUSDT", int(listed.timestamp() * 1e6)),))
    with LocalMarket(config) as market:
        context = make_context(database, market.binance_url)
        early = sync(context, HOURS, days("2019-01-01", "2020-01-01"), ["binance"])
        assert (early.expected, early.total_batches, early.errors) == (0, 0, ())
        assert "listed at 2020-03-03T07:20:00+00:00" in early.warnings[0]
        assert early.complete
        across = sync(context, HOURS, days("2020-01-01", "2020-03-05"), ["binance"])
        assert across.missing == 0
        assert status_of(database, HOURS).oldest_data_time == listed.replace(minute=0)
        market.reset_requests()
        sync(context, HOURS, days("2020-03-05", "2020-03-06"), ["binance"])
        assert market.requests() == 1, "the listing time is requested once and stored"


def test_a_range_in_the_future_sends_no_request(context: Context, market: LocalMarket) -> None:
    report = sync(context, HOURS, days("2024-07-01", "2024-08-01"), ["binance"])
    assert (report.expected, report.total_batches) == (0, 0)
    assert "no candle of it is closed yet" in report.warnings[0]


# Corrections --------------------------------------------------------------------------------------------


def test_a_refetch_corrects_and_keeps_revisions(database: Database, market: LocalMarket) -> None:
    window = days("2024-01-01", "2024-01-08")
    with LocalMarket(MarketConfig(limits=False, now=NOW, seed=2)) as elsewhere:
        sync(make_context(database, elsewhere.binance_url), HOURS, window, ["binance"])
        wrong = queries.read_candles(database, HOURS, window)
    context = make_context(database, market.binance_url)
    assert sync(context, HOURS, window, ["binance"]).total_candles == 0
    held_then = datetime.now(UTC)
    report = sync(context, HOURS, window, ["binance"], scope=Scope.EVERYTHING)
    assert (report.total_candles, report.complete) == (0, False), "refused, since all candles differ"
    report = sync(context, HOURS, window, ["binance"], scope=Scope.EVERYTHING, force=True)
    assert report.total_candles == 168
    holds_the_truth(database, market, HOURS, window)
    assert queries.read_candles(database, HOURS, window, held_then).equals(wrong)
    again = sync(context, HOURS, window, ["binance"], scope=Scope.EVERYTHING)
    assert (again.total_candles, again.total_batches) == (0, 1)


# Events -----------------------------------------------------------------------------------------------------


def test_events_of_a_sync(context: Context) -> None:
    events: list[SyncEvent] = []
    report = sync(context, HOURS, days("2024-01-01", "2024-04-01"), ["binance"], listen=events.append)
    assert isinstance(events[0], Planned)
    assert events[0].plan.missing == report.expected
    batches = [event for event in events if isinstance(event, BatchDone)]
    assert [b.window.start for b in batches] == [
        days(d, d).start for d in ("2024-01-01", "2024-02-01", "2024-03-01")
    ]
    assert sum(b.candles for b in batches) == report.total_candles


def test_a_dry_run_fetches_nothing(context: Context, database: Database, market: LocalMarket) -> None:
    window = days("2024-01-01", "2024-02-01")
    plan = dry_run(context, HOURS, window, BOTH)
    assert plan.plan.missing == 31 * 24
    assert [name for name, _ in plan.estimates] == BOTH
    assert all(estimate.requests >= 1 for _, estimate in plan.estimates)
    assert market.requests() <= 1, "only the listing time"
    assert queries.stored_series(database) == []


def test_batches_follow_the_settings(database: Database, market: LocalMarket) -> None:
    context = make_context(database, market.binance_url, batch_size_days=1)
    report = sync(context, HOURS, days("2024-01-01", "2024-01-11"), ["binance"])
    assert report.total_batches == report.successful_batches == 10
    assert report.requests == 1, "neighbouring batches share a page"


# Real candles ----------------------------------------------------------------------------------------------


def replayed(database: Database, folder: Path, window: TimeRange) -> SyncReport:
    with LocalMarket(MarketConfig(limits=False, replay=folder)) as market:
        now = int(datetime.now(UTC).timestamp() * 1e6)
        context = make_context(database, market.binance_url, archive_url=market.archive_url, now=now)
        return sync(context, HOURS, window, ["binance"])


def test_real_outages_of_binance_are_the_gaps(database: Database, shared_data: Callable[[str], Path]) -> None:
    file = shared_data("binance/BTCUSDT-1h.csv.gz")
    window = days("2020-11-17", "2021-05-16")
    report = replayed(database, file.parents[1], window)
    assert (report.total_candles, report.expected, report.missing) == (4308, 4320, 12)
    stored = queries.read_candles(database, HOURS, window)
    rows = csv.read_csv(file)
    opens = rows["ts"].cast(pa.timestamp("us", "UTC")).cast("int64").to_numpy()
    inside = opens < window.end
    assert np.array_equal(stored.ts, opens[inside])
    for name in ("open", "high", "low", "close", "volume"):
        assert np.array_equal(getattr(stored, name), rows[name].to_numpy().astype(float)[inside])
    gaps = queries.ledger_gaps(database, HOURS, window)
    outages = [
        ("2020-11-30T06", 1),
        ("2020-12-21T15", 3),
        ("2020-12-25T02", 1),
        ("2021-02-11T04", 1),
        ("2021-03-06T02", 1),
        ("2021-04-20T02", 2),
        ("2021-04-25T05", 3),
    ]
    expected = [
        (start, start + hours * MICROS_PER_HOUR, hours)
        for start, hours in ((days(f"{at}:00", f"{at}:00").start, hours) for at, hours in outages)
    ]
    assert [(gap.start, gap.end, gap.missing) for gap in gaps] == expected
    assert {gap.status for gap in gaps} == {GapStatus.UNAVAILABLE}
    status = status_of(database, HOURS)
    assert (status.status, status.total_candles, status.open_gaps) == ("completed", 4308, 0)
