"""Several providers for one series: fallback per candle, evidence, explained absences."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.events import SyncEvent, Warned
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.sync import sync
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
