"""No false success: glitches, pages of another symbol, refetches, implausible candles, for every provider.

Stored candles equal the market's truth; a candle that is not stored is a gap, a row in the quarantine, or a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.test_faults import Case, accounted_for, context_of, hits, quarantined

BITCOIN, ETHER = "BTC/USDT", "ETH/USDT"


@dataclass(frozen=True)
class Long:
    """A series over several responses of a provider. `hole`: 40 candles in the middle of one of them.
    `other`: a symbol of another price."""

    case: Case
    hole: TimeRange
    other: str

    def __str__(self) -> str:
        return f"{self.case.provider}-{self.case.series.timeframe}"


def long(
    provider: str, market: str, series: Series, window: tuple[str, str], hole: tuple[str, str], other: str
) -> Long:
    return Long(Case(provider, market, series, days(*window)), days(*hole), other)


def crypto(timeframe: str) -> Series:
    return Series(BITCOIN, Timeframe(timeframe), AssetClass.CRYPTO)


def stock(timeframe: str) -> Series:
    return Series("AAPL", Timeframe(timeframe), AssetClass.STOCKS)


def forex(timeframe: str) -> Series:
    return Series("EUR/USD", Timeframe(timeframe), AssetClass.FOREX)


LONG = [
    long(
        "binance",
        "binance",
        crypto("1h"),
        ("2024-01-01", "2024-06-01"),
        ("2024-03-10", "2024-03-11T16:00"),
        "SOL/USDT",
    ),
    long(
        "polygon",
        "polygon",
        crypto("15m"),
        ("2024-02-01", "2024-06-01"),
        ("2024-03-10", "2024-03-10T10:00"),
        "SOL/USDT",
    ),
    long(
        "polygon",
        "polygon",
        stock("5m"),
        ("2023-11-01", "2024-06-01"),
        ("2024-03-12T14:00", "2024-03-12T17:20"),
        "GOOG",
    ),
    long(
        "polygon",
        "polygon",
        forex("15m"),
        ("2024-02-01", "2024-06-01"),
        ("2024-03-13", "2024-03-13T10:00"),
        "USD/JPY",
    ),
    long(
        "yfinance",
        "yahoo",
        stock("1m"),
        ("2024-05-20", "2024-06-14"),
        ("2024-06-05T14:00", "2024-06-05T14:40"),
        "GOOG",
    ),
    long(
        "alphavantage",
        "alphavantage",
        stock("15m"),
        ("2024-02-01", "2024-06-01"),
        ("2024-03-12T13:30", "2024-03-13T17:00"),
        "GOOG",
    ),
    long(
        "oanda",
        "oanda",
        forex("15m"),
        ("2024-01-01", "2024-06-01"),
        ("2024-03-13", "2024-03-13T10:00"),
        "USD/JPY",
    ),
]


def truth_of(market: LocalMarket, case: Case) -> Candles:
    return market.truth(case.market, case.series.symbol, case.series.timeframe, case.window)


def synced(context: Context, case: Case, *others: str, **options: object) -> SyncReport:
    return sync(context, case.series, case.window, [case.provider, *others], **options)  # type: ignore[arg-type]


# Missing rows of a response ---------------------------------------------------------------------------------


@pytest.mark.parametrize("long", LONG, ids=str)
def test_forty_rows_missing_in_one_response_are_requested_again(
    database: Database, market: LocalMarket, long: Long
) -> None:
    case, truth = long.case, truth_of(market, long.case)
    market.plant_fault(case.market, "empty", only=long.hole)
    report = synced(context_of(database, market, case), case)
    assert hits(market) == 1
    assert accounted_for(database, case, truth, report).equals(truth)


@pytest.mark.parametrize("long", LONG, ids=str)
def test_forty_rows_missing_in_all_responses_are_a_gap(
    database: Database, market: LocalMarket, long: Long
) -> None:
    """It is not no-trade: there are trades all around."""
    case, truth = long.case, truth_of(market, long.case)
    market.plant_fault(case.market, "empty", count=None, only=long.hole)
    report = synced(context_of(database, market, case), case)
    lacking = (truth.ts >= long.hole.start) & (truth.ts < long.hole.end)
    assert 30 <= lacking.sum() <= 41
    assert accounted_for(database, case, truth, report).equals(truth.take(~lacking))
    gaps = queries.ledger_gaps(database, case.series, long.hole)
    traded = truth.ts[lacking]
    explained = [gap for gap in gaps if gap.status is GapStatus.NO_TRADE]
    assert not any(gap.start <= ts < gap.end for gap in explained for ts in traded.tolist())
    assert report.missing >= lacking.sum()
    assert not report.complete


# A page of another symbol -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("long", "nth"), thinned(LONG, [1, 2, 3], every=3))
def test_a_response_of_another_symbol_is_never_stored(
    database: Database, market: LocalMarket, long: Long, nth: int
) -> None:
    case, truth = long.case, truth_of(market, long.case)
    market.plant_fault(case.market, "other_symbol", nth=nth, other=long.other)
    report = synced(context_of(database, market, case), case)
    assert hits(market) == 1
    stored = accounted_for(database, case, truth, report)
    assert len(stored) == len(truth) or not report.complete
    if nth == 2:  # in the middle: it is detected, and the second request repairs it
        assert stored.equals(truth)


@pytest.mark.parametrize("long", LONG, ids=str)
def test_a_first_response_of_another_symbol_is_never_stored(
    database: Database, market: LocalMarket, long: Long
) -> None:
    """It is at the start of the range, so that only its end has a jump."""
    case, truth = long.case, truth_of(market, long.case)
    grid = grid_of(case.series)
    first = grid.next_open(case.window.start)
    assert first is not None
    market.plant_fault(case.market, "other_symbol", window=TimeRange(first, first + 1), other=long.other)
    report = synced(context_of(database, market, case), case)
    assert hits(market) == 1
    stored = accounted_for(database, case, truth, report)
    assert len(stored) == len(truth) or not report.complete


@pytest.mark.parametrize("long", LONG, ids=str)
def test_persistent_responses_of_another_symbol_are_never_stored(
    database: Database, market: LocalMarket, long: Long
) -> None:
    """All responses that intersect the middle of the range are of another symbol."""
    case, truth = long.case, truth_of(market, long.case)
    market.plant_fault(case.market, "other_symbol", count=None, window=long.hole, other=long.other)
    report = synced(context_of(database, market, case), case)
    assert hits(market) >= 1
    stored = accounted_for(database, case, truth, report)
    assert len(stored) < len(truth)
    assert not report.complete
    market.clear_faults()
    healed = synced(context_of(database, market, case), case, recheck=True)
    assert accounted_for(database, case, truth, healed).equals(truth)


# Refetches --------------------------------------------------------------------------------------------------

REFETCHED = [
    (long, second)
    for long, second in (
        (LONG[0], Case("polygon", "polygon", LONG[0].case.series, LONG[0].case.window)),
        (LONG[1], Case("binance", "binance", LONG[1].case.series, LONG[1].case.window)),
        (LONG[2], Case("alphavantage", "alphavantage", LONG[2].case.series, LONG[2].case.window)),
        (LONG[3], Case("oanda", "oanda", LONG[3].case.series, LONG[3].case.window)),
        (LONG[5], Case("polygon", "polygon", LONG[5].case.series, LONG[5].case.window)),
        (LONG[6], Case("polygon", "polygon", LONG[6].case.series, LONG[6].case.window)),
    )
]


@pytest.mark.parametrize(
    ("long", "second", "with_second"),
    [
        pytest.param(
            long,
            second,
            with_second,
            marks=[pytest.mark.slow] if with_second and long is not LONG[0] else [],
            id=f"{long}-{second}-{'second' if with_second else 'alone'}",
        )
        for long, second in REFETCHED
        for with_second in (False, True)
    ],
)
def test_a_refetch_from_another_symbol_changes_nothing(
    database: Database, market: LocalMarket, long: Long, second: Case, with_second: bool
) -> None:
    case, truth = long.case, truth_of(market, long.case)
    synced(context_of(database, market, case), case)
    market.plant_fault(case.market, "other_symbol", count=None, other=long.other)
    others = [second] if with_second else []
    report = synced(
        context_of(database, market, case, *others),
        case,
        *(o.provider for o in others),
        scope=Scope.EVERYTHING,
    )
    assert queries.read_candles(database, case.series, case.window).equals(truth)
    assert (report.total_candles, report.complete) == (0, False)
    assert any("--force" in error for error in report.errors)


def test_a_forced_refetch_writes_differing_candles(database: Database, market: LocalMarket) -> None:
    case = LONG[0].case
    synced(context_of(database, market, case), case)
    market.plant_fault(case.market, "other_symbol", count=None, other=ETHER)
    report = synced(context_of(database, market, case), case, scope=Scope.EVERYTHING, force=True)
    other = market.truth("binance", ETHER, Timeframe.H1, case.window)
    assert queries.read_candles(database, case.series, case.window).equals(other)
    assert (report.total_candles, report.errors) == (len(other), ())


def test_new_values_that_a_second_provider_confirms_are_written(
    database: Database, market: LocalMarket
) -> None:
    """The stored candles are of another symbol; the refetch writes the candles that both providers have."""
    case, second = REFETCHED[0][0].case, REFETCHED[0][1]
    market.plant_fault("binance", "other_symbol", count=None, other=ETHER)
    synced(context_of(database, market, case), case)
    market.clear_faults()
    report = synced(context_of(database, market, case, second), case, "polygon", scope=Scope.EVERYTHING)
    truth = truth_of(market, case)
    assert queries.read_candles(database, case.series, case.window).equals(truth)
    assert (report.total_candles, report.errors) == (len(truth), ())


def test_a_small_correction_needs_no_second_provider(database: Database, market: LocalMarket) -> None:
    """Of less than five per cent of the candles."""
    case, truth = LONG[0].case, truth_of(market, LONG[0].case)
    market.plant_fault(
        "binance", "other_symbol", count=None, only=days("2024-03-10", "2024-03-11"), other=ETHER
    )
    context = context_of(database, market, case)
    sync(context, case.series, case.window, ["binance"])
    market.clear_faults()
    synced(context, case, scope=Scope.EVERYTHING)
    assert queries.read_candles(database, case.series, case.window).equals(truth)


def test_a_small_wrong_correction_contradicts_the_stored_candles_beside_it(
    database: Database, market: LocalMarket
) -> None:
    """Twelve candles of another symbol are less than five per cent: the stored neighbours reveal them."""
    case, small = LONG[0].case, days("2024-03-10", "2024-03-10T12:00")
    synced(context_of(database, market, case), case)
    held = queries.read_candles(database, case.series, case.window)
    market.plant_fault("binance", "other_symbol", count=None, other="SOL/USDT")
    report = sync(context_of(database, market, case), case.series, small, ["binance"], scope=Scope.EVERYTHING)
    assert "--force" in " ".join(report.errors)
    assert queries.read_candles(database, case.series, case.window).equals(held)


def test_a_refetch_without_rows_keeps_stored_candles_and_warns(
    database: Database, market: LocalMarket
) -> None:
    case = Case("binance", "binance", crypto("1h"), days("2024-03-01", "2024-04-01"))
    synced(context_of(database, market, case), case)
    held = queries.read_candles(database, case.series, case.window)
    market.plant_fault("binance", "empty", count=None)
    report = synced(context_of(database, market, case), case, scope=Scope.EVERYTHING)
    assert queries.read_candles(database, case.series, case.window).equals(held)
    assert "were not returned by their provider, and are kept" in " ".join(report.warnings)


GONE = days("2024-03-10", "2024-03-10T03:00")


@pytest.mark.parametrize("provider", ["binance", "polygon"])
def test_a_candle_that_its_provider_no_longer_returns_becomes_a_gap(
    database: Database, market: LocalMarket, provider: str
) -> None:
    case = Case(provider, provider, crypto("1h"), days("2024-03-01", "2024-04-01"))
    context, truth = context_of(database, market, case), truth_of(market, case)
    synced(context, case)
    held = queries.read_candles(database, case.series, case.window)
    market.plant_fault(provider, "empty", count=None, only=GONE)
    report = synced(context, case, scope=Scope.EVERYTHING)
    assert report.withdrawn == 3
    (gap,) = queries.ledger_gaps(database, case.series, case.window)
    assert (gap.start, gap.end, gap.status) == (GONE.start, GONE.end, GapStatus.UNAVAILABLE)
    gone = (held.ts >= GONE.start) & (held.ts < GONE.end)
    assert accounted_for(database, case, truth, report).equals(held.take(~gone))
    corrections = queries.batches(database, case.series)
    assert [(one.transport, one.updated) for one in corrections[:1]] == [("withdrawal", 3)]


def test_a_candle_that_another_provider_has_stays(database: Database, market: LocalMarket) -> None:
    case = Case("polygon", "polygon", crypto("1h"), days("2024-03-01", "2024-04-01"))
    second = Case("binance", "binance", case.series, case.window)
    synced(context_of(database, market, case), case)
    held = queries.read_candles(database, case.series, case.window)
    market.plant_fault("polygon", "empty", count=None, only=GONE)
    report = synced(context_of(database, market, case, second), case, "binance", scope=Scope.EVERYTHING)
    assert report.withdrawn == 0
    assert queries.read_candles(database, case.series, case.window).equals(held)
    assert {one.provider for one in queries.origins(database, case.series, case.window)} == {"polygon"}


@pytest.mark.parametrize("second_has_it", [True, False])
def test_a_call_that_is_limited_to_one_provider_removes_nothing(
    database: Database, market: LocalMarket, second_has_it: bool
) -> None:
    """Another eligible provider that was not requested may have the candle."""
    case = Case("polygon", "polygon", crypto("1h"), days("2024-03-01", "2024-04-01"))
    second = Case("binance", "binance", case.series, case.window)
    context = replace(
        context_of(database, market, case, second), priority=lambda series: ("polygon", "binance")
    )
    synced(context, case)
    held = queries.read_candles(database, case.series, case.window)
    market.plant_fault("polygon", "empty", count=None, only=GONE)
    if not second_has_it:
        market.plant_fault("binance", "empty", count=None, only=GONE)
    limited = sync(context, case.series, case.window, ["polygon"], scope=Scope.EVERYTHING)
    assert limited.withdrawn == 0
    assert queries.read_candles(database, case.series, case.window).equals(held)
    whole = synced(context, case, "binance", scope=Scope.EVERYTHING)
    assert whole.withdrawn == (0 if second_has_it else 3)


@pytest.mark.parametrize("state", [GapStatus.NO_TRADE, GapStatus.UNAVAILABLE])
def test_a_refetch_requests_absent_candles_from_other_providers(
    database: Database, market: LocalMarket, state: GapStatus
) -> None:
    """Also no-trade intervals by the first provider's responses, and unavailable candles."""
    case = Case("polygon", "polygon", crypto("1m"), days("2024-03-01", "2024-03-03"))
    second = Case("binance", "binance", case.series, case.window)
    length = 1 if state is GapStatus.NO_TRADE else 30
    holes = [case.window.start + 60_000_000 * minute for minute in range(100, 2800, 150)]
    for start in holes:
        market.plant_outage("polygon", TimeRange(start, start + length * 60_000_000))
    synced(context_of(database, market, case), case)
    gaps = queries.ledger_gaps(database, case.series, case.window)
    assert {(gap.status, gap.missing) for gap in gaps} == {(state, length)}
    market.clear_outages()
    truth = truth_of(market, Case("binance", "binance", case.series, case.window))
    for start in holes:
        market.plant_outage("polygon", TimeRange(start, start + length * 60_000_000))
    context = replace(context_of(database, market, case, second), priority=lambda series: ("polygon",))
    report = synced(context, case, "binance", scope=Scope.EVERYTHING)
    assert report.providers["binance"].delivered == len(holes) * length
    assert np.array_equal(queries.read_candles(database, case.series, case.window).ts, truth.ts)
    assert report.complete


def test_candles_of_another_provider_stay_in_a_refetch(database: Database, market: LocalMarket) -> None:
    case = Case("binance", "binance", crypto("1h"), days("2024-03-01", "2024-04-01"))
    second = Case("polygon", "polygon", case.series, case.window)
    market.plant_outage("binance", GONE)
    context = context_of(database, market, case, second)
    synced(context, case, "polygon")
    held = queries.read_candles(database, case.series, case.window)
    report = synced(context, case, "polygon", scope=Scope.EVERYTHING)
    assert (report.withdrawn, report.total_candles) == (0, 0)
    assert queries.read_candles(database, case.series, case.window).equals(held)


def test_the_reasons_in_the_quarantine(database: Database, market: LocalMarket) -> None:
    long = LONG[0]
    market.plant_fault("binance", "other_symbol", count=None, window=long.hole, other=long.other)
    synced(context_of(database, market, long.case), long.case)
    assert set(quarantined(database)) <= {"wrong_symbol", "splice"}
