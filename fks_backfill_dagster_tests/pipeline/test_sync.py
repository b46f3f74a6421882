"""sync from end to end: a local market over HTTP, a real database, and the market's truth for comparison."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
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
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, SyncEvent, Warned
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import dry_run, sync
from fks_backfill_dagster.providers.registry import rate_limits, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.queries import SyncStatus
from fks_backfill_dagster.store.rate_limits import SharedCircuit
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.conftest import NOW, make_context
from fks_backfill_dagster_tests.store.builders import execute

MINUTES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
HOURS = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
BOTH = ["binance", "polygon"]


def days(start: str, end: str) -> TimeRange:
    return TimeRange.of(
        datetime.fromisoformat(start).replace(tzinfo=UTC), datetime.fromisoformat(end).replace(tzinfo=UTC)
    )


def holds_the_truth(database: Database, market: LocalMarket, series: Series, window: TimeRange) -> None:
    """The stored candles of `window` are the market's, bit for bit."""
    truth = market.truth("binance", series.symbol, series.timeframe, window)
    assert len(truth) > 0
    assert queries.read_candles(database, series, window).equals(truth)


def status_of(database: Database, series: Series) -> queries.SyncStatus:
    (status,) = queries.sync_status(database, series)
    return status


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


@pytest.mark.parametrize("case", ["first request", "second request"])
def test_a_failed_batch_reports_its_requests(
    context: Context, database: Database, market: LocalMarket, case: str
) -> None:
    sync(context, HOURS, days("2024-01-01", "2024-01-02"), ["binance"])  # its listing is known from here on
    market.reset_requests()
    if case == "second request":
        market.plant_outage("binance", days("2024-01-03T03:00", "2024-01-03T05:00"))
        market.plant_fault("binance", "status", status=500, count=None, nth=2)
    else:
        market.plant_fault("binance", "status", status=500, count=None)
    report = sync(context, HOURS, days("2024-01-02", "2024-01-04"), ["binance"])
    assert (report.failed_batches, len(report.errors)) == (1, 1)
    assert report.requests == market.requests() > 2


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


# Fallback per candle, and the ledger -----------------------------------------------------------------------


def test_the_next_provider_fills_missing_candles(
    context: Context, database: Database, market: LocalMarket
) -> None:
    window = days("2024-01-01", "2024-02-01")
    outage = TimeRange.of(datetime(2024, 1, 10, 3, 17, tzinfo=UTC), datetime(2024, 1, 10, 5, 2, tzinfo=UTC))
    market.plant_outage("binance", outage, "BTC/USDT")
    report = sync(context, MINUTES, window, BOTH)
    assert report.complete
    assert report.providers["polygon"].asked == report.providers["polygon"].delivered == 105
    assert report.providers["binance"].delivered == 31 * 1440 - 105
    market.clear_outages()
    holds_the_truth(database, market, MINUTES, window)
    inside = {origin.provider: origin.candles for origin in queries.origins(database, MINUTES, outage)}
    assert inside == {"polygon": 105}


def test_candles_that_no_provider_has_are_a_gap_with_evidence(
    context: Context, database: Database, market: LocalMarket
) -> None:
    window = days("2024-01-01", "2024-03-01")
    across_batches = TimeRange.of(
        datetime(2024, 1, 31, 22, tzinfo=UTC), datetime(2024, 2, 1, 1, 30, tzinfo=UTC)
    )
    for provider in BOTH:
        market.plant_outage(provider, across_batches)
    report = sync(context, MINUTES, window, BOTH)
    assert (report.missing, report.failed_batches, report.errors) == (210, 0, ())
    assert not report.complete
    (gap,) = queries.ledger_gaps(database, MINUTES, window)
    assert (gap.start, gap.end, gap.missing) == (across_batches.start, across_batches.end, 210)
    assert gap.status is GapStatus.UNAVAILABLE, "all providers have responded, none has it"
    assert gap.next_attempt_at == NOW + MICROS_PER_HOUR
    assert [(item.provider, item.outcome) for item in gap.evidence] == [
        ("binance", "absent"),
        ("polygon", "absent"),
    ]
    status = status_of(database, MINUTES)
    assert (status.status, status.open_gaps) == ("completed", 0)

    market.clear_outages()
    market.reset_requests()
    assert sync(context, MINUTES, window, BOTH).missing == 210
    assert market.requests() == 0, "an unavailable gap is not requested until it is due"
    healed = sync(context, MINUTES, window, BOTH, recheck=True)
    assert (healed.total_candles, healed.missing, healed.complete) == (210, 0, True)
    assert market.requests() <= 2, "only the gap was requested"
    assert queries.ledger_gaps(database, MINUTES, window) == ()
    holds_the_truth(database, market, MINUTES, window)


def test_a_missing_key_skips_the_provider_with_one_warning(database: Database, market: LocalMarket) -> None:
    context = make_context(database, market.binance_url, key=None)
    events: list[SyncEvent] = []
    report = sync(context, HOURS, days("2024-01-01", "2024-03-01"), BOTH, listen=events.append)
    assert report.warnings == ("polygon is skipped: POLYGON_API_KEY is not set",)
    assert [e.message for e in events if isinstance(e, Warned)] == list(report.warnings)
    assert report.complete


def test_filling_gaps_leaves_the_history_between_them_pending(
    context: Context, database: Database, market: LocalMarket
) -> None:
    """Two gaps of one month, and days between them that were never requested."""
    early, late = days("2024-01-01", "2024-01-03"), days("2024-01-20", "2024-01-22")
    for provider in BOTH:
        for window in (early, late):
            market.plant_outage(provider, TimeRange(window.start, window.start + 6 * MICROS_PER_HOUR))
    for window in (early, late):
        sync(context, HOURS, window, BOTH)
    market.clear_outages()
    month = days("2024-01-01", "2024-02-01")
    report = sync(context, HOURS, month, BOTH, scope=Scope.GAPS, recheck=True)
    assert report.total_candles == 12
    known = queries.what_is_known(database, HOURS, month)
    assert (list(known.synced), known.gaps) == ([early, late], ()), "history that was never synced is pending"


# Explained: no-trade, tolerated, out of depth, another market --------------------------------------------


def test_a_short_gap_is_tolerated_once_all_have_responded(
    context: Context, database: Database, market: LocalMarket
) -> None:
    window = days("2024-01-01", "2024-01-02")
    short = TimeRange.of(datetime(2024, 1, 1, 3, tzinfo=UTC), datetime(2024, 1, 1, 3, 5, tzinfo=UTC))
    for provider in BOTH:
        market.plant_outage(provider, short)
    report = sync(context, MINUTES, window, BOTH)
    (gap,) = queries.ledger_gaps(database, MINUTES, window)
    assert (gap.status, gap.missing, gap.next_attempt_at) == (GapStatus.TOLERATED, 5, None)
    assert report.missing == 5, "it still counts as missing"


def test_a_call_limited_to_one_provider_explains_nothing_for_the_others(
    context: Context, database: Database, market: LocalMarket
) -> None:
    window = days("2024-01-01", "2024-01-02")
    outage = TimeRange.of(datetime(2024, 1, 1, 3, tzinfo=UTC), datetime(2024, 1, 1, 4, tzinfo=UTC))
    for provider in BOTH:
        market.plant_outage(provider, outage)
    both = replace(context, priority=lambda series: BOTH)
    sync(both, MINUTES, window, ["binance"])
    (gap,) = queries.ledger_gaps(database, MINUTES, window)
    assert gap.status is GapStatus.OPEN
    sync(both, MINUTES, window, ["polygon"])
    (gap,) = queries.ledger_gaps(database, MINUTES, window)
    assert gap.status is GapStatus.UNAVAILABLE, "now both have responded"


def test_no_trade_intervals_are_explained(context: Context, database: Database, market: LocalMarket) -> None:
    """Polygon omits minutes without trades, single ones, as in a thin market."""
    window = days("2024-01-01", "2024-01-03")
    quiet = [window.start + minute * 60_000_000 for minute in range(100, 2800, 130)]
    for start in quiet:
        market.plant_halt(TimeRange(start, start + 60_000_000), "BTC/USDT")
    report = sync(context, MINUTES, window, ["polygon"])
    gaps = queries.ledger_gaps(database, MINUTES, window)
    assert [(gap.start, gap.missing) for gap in gaps] == [(start, 1) for start in quiet]
    assert {gap.status for gap in gaps} == {GapStatus.NO_TRADE}
    assert (report.missing, report.no_trade, report.complete) == (0, len(quiet), True)


def test_absences_stay_open_while_a_strict_provider_does_not_respond(
    context: Context, database: Database, market: LocalMarket
) -> None:
    """Polygon had an outage, Binance is down: it may have the candles that Polygon omits."""
    window = days("2024-01-01", "2024-01-03")
    outage = TimeRange.of(datetime(2024, 1, 1, 3, tzinfo=UTC), datetime(2024, 1, 1, 4, tzinfo=UTC))
    market.plant_outage("polygon", outage)
    for transport in ("binance", "archive"):
        market.plant_fault(transport, "status", status=503, count=None)
    sync(context, MINUTES, window, BOTH)
    (gap,) = queries.ledger_gaps(database, MINUTES, window)
    assert (gap.status, gap.missing) == (GapStatus.OPEN, 60)
    market.clear_faults()
    assert sync(context, MINUTES, window, BOTH).complete
    holds_the_truth(database, market, MINUTES, window)


def test_an_outage_of_a_strict_provider_is_not_no_trade(
    context: Context, database: Database, market: LocalMarket
) -> None:
    window = days("2024-01-01", "2024-01-03")
    outage = TimeRange.of(datetime(2024, 1, 1, 3, tzinfo=UTC), datetime(2024, 1, 1, 4, tzinfo=UTC))
    for provider in BOTH:
        market.plant_outage(provider, outage)
    sync(context, MINUTES, window, BOTH)
    (gap,) = queries.ledger_gaps(database, MINUTES, window)
    assert gap.status is GapStatus.UNAVAILABLE


def test_a_new_key_reopens_an_unavailable_gap(database: Database, market: LocalMarket) -> None:
    window = days("2024-01-01", "2024-01-03")
    outage = TimeRange.of(datetime(2024, 1, 1, 3, tzinfo=UTC), datetime(2024, 1, 1, 4, tzinfo=UTC))
    market.plant_outage("binance", outage)
    without = make_context(database, market.binance_url, key=None)
    assert sync(without, MINUTES, window, BOTH).missing == 60
    assert sync(without, MINUTES, window, BOTH).requests == 0
    report = sync(make_context(database, market.binance_url), MINUTES, window, BOTH)
    assert (report.complete, report.providers["polygon"].delivered) == (True, 60)


def test_candles_of_another_market_are_not_spliced_in(database: Database) -> None:
    """A fallback that differs by 3 % beside the gap would make a step in the series."""
    window = days("2024-01-01", "2024-01-03")
    outage = TimeRange.of(datetime(2024, 1, 1, 3, tzinfo=UTC), datetime(2024, 1, 1, 4, tzinfo=UTC))
    with LocalMarket(MarketConfig(limits=False, now=NOW, polygon_offset_ppm=30_000)) as market:
        market.plant_outage("binance", outage)
        report = sync(make_context(database, market.binance_url), MINUTES, window, BOTH)
        assert report.missing == 60
        assert report.providers["polygon"].rejected == 60
        assert any("splice" in message for message in report.warnings)
        again = sync(make_context(database, market.binance_url), MINUTES, window, BOTH, recheck=True)
        assert again.missing == 60, "also if the neighbours were stored before"
        (gap,) = queries.ledger_gaps(database, MINUTES, window)
        assert gap.status is GapStatus.UNAVAILABLE
        assert gap.evidence[-1].detail == "it quotes another market"
        with database.begin() as connection:
            reasons = connection.exec_driver_sql("SELECT DISTINCT reason FROM fks.quarantine").scalars().all()
        assert reasons == ["splice"]


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


# Failures --------------------------------------------------------------------------------------------------


def test_an_unreachable_market(database: Database) -> None:
    context = make_context(database, "http://127.0.0.1:9/binance")
    window = days("2024-01-01", "2024-06-01")
    began = time.monotonic()
    report = sync(context, HOURS, window, ["binance"])
    assert time.monotonic() - began < 30, "without the retries of every batch"
    assert (report.failed_batches, report.total_batches) == (5, 5)
    assert report.missing == report.expected == 152 * 24
    assert len(report.errors) >= 1
    assert "binance" in report.errors[0]
    status = status_of(database, HOURS)
    assert status.status == "error"
    assert status.error_message is not None
    assert "binance" in status.error_message
    (gap,) = queries.ledger_gaps(database, HOURS, window)
    assert gap.missing == 152 * 24
    assert gap.evidence[0].outcome == "error"


def test_nothing_is_missing_after_the_market_has_recovered(
    database: Database, market: LocalMarket, context: Context
) -> None:
    window = days("2024-01-01", "2024-04-01")
    sync(make_context(database, "http://127.0.0.1:9/binance"), HOURS, window, ["binance"])
    report = sync(context, HOURS, window, ["binance"])
    assert report.complete
    assert status_of(database, HOURS).status == "completed"
    holds_the_truth(database, market, HOURS, window)


def test_a_sync_with_all_candles_stored_is_a_success(
    database: Database, market: LocalMarket, context: Context
) -> None:
    """After a failure, or a kill -9 between the last batch and the end: all candles are stored."""
    january = days("2024-01-01", "2024-02-01")
    sync(context, HOURS, january, ["binance"])
    sync(
        make_context(database, "http://127.0.0.1:9/binance"),
        HOURS,
        days("2024-03-01", "2024-04-01"),
        BOTH[:1],
    )
    assert status_of(database, HOURS).status == "error"
    market.reset_requests()
    assert sync(context, HOURS, january, ["binance"]).complete
    assert market.requests() == 0
    assert status_of(database, HOURS).status == "completed"
    assert status_of(database, HOURS).error_message is None


def test_without_a_provider_the_error_has_the_reason(database: Database, market: LocalMarket) -> None:
    context = make_context(database, market.binance_url, key=None)
    report = sync(context, HOURS, days("2024-01-01", "2024-02-01"), ["polygon"])
    assert report.errors == ("polygon is skipped: POLYGON_API_KEY is not set",)
    assert report.failed_batches == report.total_batches == 1


def test_a_dry_run_warns_about_an_unreachable_market(database: Database) -> None:
    context = make_context(database, "http://127.0.0.1:9/binance")
    found = dry_run(context, HOURS, days("2024-01-01", "2024-02-01"), ["binance"])
    (warning,) = found.warnings
    assert "correct providers.binance.base_url" in warning


def test_a_failing_month_does_not_affect_its_neighbours(database: Database, market: LocalMarket) -> None:
    market.plant_fault(
        "binance", "status", count=None, status=500, start="2024-02-02T00:00:00", end="2024-02-27T00:00:00"
    )
    context = make_context(database, market.binance_url, batch_size_days=30)
    events: list[SyncEvent] = []
    window = days("2024-01-01", "2024-04-01")
    report = sync(context, MINUTES, window, ["binance"], listen=events.append)
    assert (report.successful_batches, report.failed_batches) == (2, 1)
    failed = [e for e in events if isinstance(e, BatchDone) and e.error]
    assert [e.window for e in failed] == [days("2024-02-01", "2024-03-01")]
    for month in (days("2024-01-01", "2024-02-01"), days("2024-03-01", "2024-04-01")):
        holds_the_truth(database, market, MINUTES, month)
    market.clear_faults()
    again = sync(context, MINUTES, window, ["binance"])
    assert again.complete
    assert again.providers["binance"].asked == 29 * 1440, "only the failed month was requested again"


def test_a_refusal_of_one_month_does_not_affect_its_neighbours(
    database: Database, market: LocalMarket
) -> None:
    """A permanent error may concern one range only, for example today's data at Polygon."""
    market.plant_fault(
        "binance", "status", count=None, status=403, start="2024-02-02T00:00:00", end="2024-02-27T00:00:00"
    )
    window = days("2024-01-01", "2024-05-01")
    report = sync(make_context(database, market.binance_url), HOURS, window, ["binance"])
    assert (report.successful_batches, report.failed_batches) == (3, 1)
    assert report.missing == 29 * 24
    holds_the_truth(database, market, HOURS, days("2024-03-01", "2024-05-01"))


def test_every_failed_batch_has_an_error(database: Database) -> None:
    events: list[SyncEvent] = []
    context = make_context(database, "http://127.0.0.1:9/binance")
    sync(context, HOURS, days("2024-01-01", "2024-06-01"), ["binance"], listen=events.append)
    errors = [event.error for event in events if isinstance(event, BatchDone)]
    assert len(errors) == 5
    assert all(error and error.startswith("binance: ") for error in errors)


@pytest.mark.parametrize("priority", [["binance"], BOTH], ids="+".join)
@pytest.mark.parametrize("is_listing_known", [True, False])
def test_a_symbol_that_no_provider_knows_any_more_is_explained(
    context: Context, database: Database, market: LocalMarket, priority: list[str], is_listing_known: bool
) -> None:
    """Providers remove delisted symbols. Without an explanation every later sync would fail."""
    context = replace(context, priority=lambda series: priority)
    assert sync(context, HOURS, days("2024-01-01", "2024-01-02"), priority).complete
    if not is_listing_known:
        execute(database, "DELETE FROM fks.listing")
    gone = replace(HOURS, provider_symbols=(("binance", "NOPEUSDT"), ("polygon", "X:NOPEUSD")))
    report = sync(context, gone, days("2024-01-01", "2024-01-03"), priority)
    assert (report.missing, report.total_batches) == (24, 1)
    (gap,) = queries.ledger_gaps(database, HOURS, days("2024-01-01", "2024-01-04"))
    assert (gap.status, gap.missing) == (GapStatus.UNAVAILABLE, 24)
    assert {item.provider for item in gap.evidence} == set(priority)
    assert gap.evidence[0].outcome == "refused"
    market.reset_requests()
    again = sync(context, gone, days("2024-01-01", "2024-01-03"), priority)
    assert (again.total_batches, again.errors) == (0, ())
    assert market.requests() <= 1, "at most the listing time"


@pytest.mark.parametrize("archives", [True, False])
def test_another_symbols_candles_beside_stored_ones_are_no_continuation(
    database: Database, market: LocalMarket, archives: bool
) -> None:
    context = make_context(database, market.binance_url, archive_url=market.archive_url if archives else None)
    assert sync(context, HOURS, days("2024-01-01", "2024-02-01"), ["binance"]).complete
    for provider in ("binance", "archive"):
        market.plant_fault(provider, "other_symbol", count=None)
    report = sync(context, HOURS, days("2024-02-01", "2024-02-10"), ["binance"])
    assert report.missing == 9 * 24
    assert any("quotes another market" in warning for warning in report.warnings)
    market.clear_faults()
    healed = sync(context, HOURS, days("2024-02-01", "2024-02-10"), ["binance"], recheck=True)
    assert healed.complete
    holds_the_truth(database, market, HOURS, days("2024-01-01", "2024-02-10"))


@pytest.mark.parametrize(
    ("status", "explained"),
    [(400, False), (401, False), (403, True), (451, False)],  # 403: the plan does not cover it
)
def test_errors_that_the_operator_corrects_explain_no_gap(
    context: Context, database: Database, market: LocalMarket, status: int, explained: bool
) -> None:
    window = days("2024-01-01", "2024-01-02")
    market.plant_fault("polygon", "status", count=None, status=status)
    market.plant_outage("binance", window)
    report = sync(replace(context, priority=lambda series: BOTH), HOURS, window, BOTH)
    assert report.missing == 24
    (gap,) = queries.ledger_gaps(database, HOURS, window)
    assert gap.status is (GapStatus.UNAVAILABLE if explained else GapStatus.OPEN)
    assert gap.evidence[-1].outcome == ("refused" if explained else "error")


def test_an_unknown_symbol_leaves_no_trace(context: Context, database: Database) -> None:
    series = Series("NOPE/USDT", Timeframe.H1, AssetClass.CRYPTO)
    report = sync(context, series, days("2024-01-01", "2024-02-01"), ["binance"])
    assert report.failed_batches == report.total_batches == 1
    (error,) = report.errors
    assert "NOPE" in error
    assert queries.stored_series(database) == []


def test_one_provider_that_does_not_know_the_symbol_is_a_warning(
    context: Context, database: Database
) -> None:
    """Polygon responds with 200 and no rows to an unknown symbol."""
    series = Series("NOPE/USDT", Timeframe.H1, AssetClass.CRYPTO)
    events: list[SyncEvent] = []
    report = sync(context, series, days("2024-01-01", "2024-02-01"), BOTH, listen=events.append)
    assert not report.complete
    (warning,) = [event.message for event in events if isinstance(event, Warned)]
    assert "NOPE" in warning
    assert report.warnings == (warning,)


def test_an_error_is_a_warning_if_another_provider_delivers(database: Database, market: LocalMarket) -> None:
    market.plant_fault("binance", "html", count=None)
    context = make_context(database, market.binance_url)
    window = days("2024-01-01", "2024-01-03")
    report = sync(context, HOURS, window, BOTH)
    assert report.complete
    assert report.errors == ()
    assert any("binance" in message for message in report.warnings)
    assert report.providers["polygon"].delivered == 48
    holds_the_truth(database, market, HOURS, window)


# Every kind of fault in a page of REST. Stored candles are correct; missing ones are accounted for.
PAGE_FAULTS = [
    "status",
    "reset",
    "truncated",
    "html",
    "empty",
    "short",
    "missing",
    "duplicated",
    "unsorted",
    "off_grid",
    "nan",
    "negative",
    "high_below_low",
    "other_symbol",
]


@pytest.mark.parametrize(("kind", "times"), thinned(PAGE_FAULTS, [1, None], every=2))
def test_a_faulty_page_is_never_stored(
    database: Database, market: LocalMarket, kind: str, times: int | None
) -> None:
    window = days("2024-01-01", "2024-01-05")
    sync(make_context(database, market.binance_url), MINUTES, days("2023-12-31", "2024-01-01"), ["binance"])
    market.plant_fault("binance", kind, count=times, start="2024-01-02T00:00:00", end="2024-01-02T12:00:00")
    report = sync(make_context(database, market.binance_url), MINUTES, window, ["binance"])
    stored = queries.read_candles(database, MINUTES, window)
    truth = market.truth("binance", "BTC/USDT", Timeframe.M1, window)
    kept = np.isin(truth.ts, stored.ts)
    assert stored.equals(truth.take(kept)), "stored candles equal the truth"
    ledger = sum(gap.missing for gap in queries.ledger_gaps(database, MINUTES, window))
    assert report.missing == ledger == len(truth) - len(stored), "missing candles are in the ledger"
    assert report.complete == (report.missing == 0)
    market.clear_faults()
    assert sync(
        make_context(database, market.binance_url), MINUTES, window, ["binance"], recheck=True
    ).complete
    holds_the_truth(database, market, MINUTES, window)


ARCHIVE_FAULTS = [
    "wrong_checksum",
    "corrupt_zip",
    "archive_404",
    "missing",
    "off_grid",
    "nan",
    "status",
    "html",
]


@pytest.mark.parametrize("kind", ARCHIVE_FAULTS)
def test_a_bad_archive_is_skipped(
    context: Context, database: Database, market: LocalMarket, kind: str
) -> None:
    window = days("2024-01-01", "2024-02-01")
    market.plant_fault("archive", kind, count=None, path="/monthly/")
    report = sync(context, MINUTES, window, ["binance"])
    assert report.complete
    holds_the_truth(database, market, MINUTES, window)


# Kill, interrupt, twice at once --------------------------------------------------------------------------

_BACKFILL = """
import sys
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.conftest import make_context
from fks_backfill_dagster_tests.pipeline.test_sync import MINUTES
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


# A range without a candle ------------------------------------------------------------------------------------


def test_a_sync_without_any_candle_has_failed(context: Context, market: LocalMarket) -> None:
    window = days("2024-03-01", "2024-03-03")
    market.plant_outage("binance", window)
    market.plant_outage("polygon", window)

    def state() -> tuple[str, str | None]:
        status = status_of(context.database, HOURS)
        return status.status, status.error_message

    report = sync(context, HOURS, window, BOTH)
    assert (report.missing, report.failed_batches) == (48, 0)
    assert state() == ("error", "no provider has any of 48 candles")
    sync(context, HOURS, window, BOTH)  # without a request, since no gap is due: there is still no candle
    assert state() == ("error", "no provider has any of 48 candles")
    sync(context, HOURS, days("2024-02-28", "2024-03-03"), BOTH)
    assert state() == ("completed", None)
    # Its gap is explained: a fruitless request of it alone does not change the status.
    sync(context, HOURS, window, BOTH, scope=Scope.GAPS, recheck=True)
    assert state() == ("completed", None)
    sync(context, HOURS, days("2024-03-02", "2024-03-02"), BOTH)  # an empty range
    assert state() == ("completed", None)
    one = days("2024-03-01T05:00", "2024-03-01T06:00")
    sync(context, HOURS, one, BOTH, recheck=True)
    assert state() == ("error", "no provider has any of 1 candle")
    market.clear_outages()
    assert sync(context, HOURS, one, BOTH, recheck=True).complete
    assert state() == ("completed", None)


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


# The circuit -----------------------------------------------------------------------------------------------


def test_the_circuit_opens_for_all_processes_after_repeated_failures(
    database: Database, market: LocalMarket
) -> None:
    options = {"binance": resolve_options("binance", base_url="http://127.0.0.1:9/binance")}
    circuit = SharedCircuit(database, rate_limits(options))
    broken = replace(make_context(database, "http://127.0.0.1:9/binance"), circuit=circuit)
    warnings: list[str] = []

    def collect(event: SyncEvent) -> None:
        if isinstance(event, Warned):
            warnings.append(event.message)

    for _ in range(3):
        sync(broken, HOURS, days("2024-01-01", "2024-04-01"), ["binance"], recheck=True, listen=collect)
    opened = [message for message in warnings if "not requested for 60 s" in message]
    assert len(opened) == 1, "reported once, by the sync in which it happened"
    assert opened[0].startswith("binance: not requested for 60 s: failed 5 times in a row")
    market.reset_requests()
    healed = replace(make_context(database, market.binance_url, batch_size_days=2), circuit=circuit)
    scheduled = sync(healed, HOURS, days("2024-01-01", "2024-04-01"), ["binance"])
    assert "not requested for another" in scheduled.errors[0]
    assert len(scheduled.errors) == 1, "the same text for all spans"
    assert market.requests() <= 1, "the listing time at most"
    warnings.clear()
    manual = sync(healed, HOURS, days("2024-01-01", "2024-04-01"), ["binance"], recheck=True, listen=collect)
    assert manual.complete, "a manual request ignores the cool-down"
    assert circuit.closed_for("binance") is None
    assert warnings == ["binance: it responds again; its cool-down has ended"]
