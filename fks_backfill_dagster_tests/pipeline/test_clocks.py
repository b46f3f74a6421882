"""A provider with another clock: closed candles do not count as absent because of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    MICROS_PER_SECOND,
    Timeframe,
)
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.conftest import NOW
from fks_backfill_dagster_tests.pipeline.test_faults import Case, context_of

MINUTES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
# 2024-06-14 is a Friday; the hour before the market's clock, and one of a session.
LAST_HOUR = TimeRange(NOW - NOW % MICROS_PER_MINUTE - MICROS_PER_HOUR, NOW - NOW % MICROS_PER_MINUTE)
YEAR = 365 * MICROS_PER_DAY

CASES = [
    Case("binance", "binance", MINUTES, LAST_HOUR),
    Case("polygon", "polygon", MINUTES, LAST_HOUR),
    Case(
        "polygon",
        "polygon",
        replace(MINUTES, timeframe=Timeframe.H4),
        TimeRange(NOW - 2 * MICROS_PER_DAY, NOW),
    ),
]


@pytest.mark.parametrize("case", CASES[:2], ids=str)
@pytest.mark.parametrize("seconds", [20, 100])
def test_candles_that_are_not_closed_there_yet_are_requested_again(
    database: Database, market: LocalMarket, case: Case, seconds: int
) -> None:
    """The market's last candles are not closed by its clock; they are neither absent nor tolerated."""
    market.set_clock(NOW - 56 * MICROS_PER_SECOND - seconds * MICROS_PER_SECOND)
    context = replace(context_of(database, market, case), priority=lambda _: (case.provider,))
    late = 1 + (seconds - 1) // 60
    report = sync(context, MINUTES, LAST_HOUR, [case.provider])
    (gap,) = [g for g in queries.ledger_gaps(database, MINUTES, LAST_HOUR) if g.end == LAST_HOUR.end]
    assert (gap.missing, gap.status) == (late, GapStatus.OPEN)
    (evidence,) = gap.evidence
    assert evidence.outcome == "error"
    assert f"this machine's 2024-06-15T12:34:56+00:00, {56 + seconds} seconds later" in evidence.detail or (
        "2 minutes later" in evidence.detail
    )
    assert any("requested again later: its clock shows" in warning for warning in report.warnings)
    market.set_clock(NOW)
    again = sync(context, MINUTES, LAST_HOUR, [case.provider])
    assert again.missing == 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.provider}-{case.series.timeframe}")
@pytest.mark.parametrize("apart", [-10 * MICROS_PER_MINUTE, -3 * YEAR, 10 * MICROS_PER_MINUTE, 3 * YEAR])
def test_clocks_that_are_far_apart_decide_nothing(
    database: Database, market: LocalMarket, case: Case, apart: int
) -> None:
    if case.series.timeframe is Timeframe.H4 and abs(apart) < YEAR:
        pytest.skip("all of its candles were closed ten minutes ago")
    market.set_clock(NOW + apart)
    context = replace(context_of(database, market, case), priority=lambda _: (case.provider,))
    report = sync(context, case.series, case.window, [case.provider])
    assert (report.stored, report.failed_batches) == (0, report.total_batches)
    (error,) = report.errors
    assert "its clock shows 20" in error
    assert "this machine's 2024-06-15T12:34:56+00:00" in error
    assert "correct the clock of this machine, or request a range that ends before both" in error
    (gap,) = queries.ledger_gaps(database, case.series, case.window)
    assert (gap.status, gap.missing) == (GapStatus.OPEN, report.expected)
    market.set_clock(NOW)
    assert sync(context, case.series, case.window, [case.provider]).complete


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.provider}-{case.series.timeframe}")
@pytest.mark.parametrize("apart", [-30 * MICROS_PER_DAY, 30 * MICROS_PER_DAY])
def test_a_range_before_both_clocks_does_not_depend_on_them(
    database: Database, market: LocalMarket, case: Case, apart: int
) -> None:
    """For example of a simulated market with another time."""
    market.set_clock(NOW + apart)
    window = TimeRange(case.window.start - 60 * MICROS_PER_DAY, case.window.end - 60 * MICROS_PER_DAY)
    context = context_of(database, market, case)
    report = sync(context, case.series, window, [case.provider])
    assert (report.complete, report.warnings) == (True, ())
    assert report.stored == report.expected > 0
