"""Syncs that fail in part or as a whole: unreachable and failing providers, faulty pages and archives.

Each fault of each provider: test_faults.py.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.events import BatchDone, SyncEvent, Warned
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.sync import dry_run, sync
from fks_backfill_dagster.providers.registry import rate_limits, resolve_options
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.rate_limits import SharedCircuit
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.builders import (
    BOTH,
    HOURS,
    MINUTES,
    days,
    holds_the_truth,
    status_of,
)
from fks_backfill_dagster_tests.pipeline.conftest import make_context
from fks_backfill_dagster_tests.store.builders import execute


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
