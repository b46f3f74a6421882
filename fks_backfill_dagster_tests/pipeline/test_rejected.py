"""Rows that break a rule in every response: only their gap is explained by them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe, iso
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.fill import fill_gaps
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.test_faults import Case, context_of, days, quarantined

DAY = days("2024-06-11", "2024-06-12")
OUTAGE = days("2024-06-11T02:00", "2024-06-11T10:00")
ROWS = days("2024-06-11T10:00", "2024-06-11T16:00")
CRYPTO = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
CASES = [
    Case("binance", "binance", CRYPTO, DAY),
    Case("polygon", "polygon", CRYPTO, DAY),
    Case("polygon", "polygon", replace(CRYPTO, timeframe=Timeframe.H4), days("2024-06-03", "2024-06-13")),
]
NAMES = [f"{case.provider}-{case.series.timeframe}" for case in CASES]


def planted(market: LocalMarket, case: Case, kind: str, window: TimeRange) -> None:
    market.plant_fault(
        case.market,
        kind,
        count=None,
        rows=10_000,
        rows_start=iso(window.start),
        rows_end=iso(window.end),
    )


def context_with(database: Database, market: LocalMarket, case: Case) -> Context:
    return replace(context_of(database, market, case), priority=lambda _: (case.provider,))


def gaps(database: Database, case: Case) -> list[tuple[str, str, int, str]]:
    return [
        (iso(gap.start)[11:16], iso(gap.end)[11:16], gap.missing, gap.status.value)
        for gap in ledger(database, case)
    ]


def ledger(database: Database, case: Case) -> list[LedgerGap]:
    found = queries.ledger_gaps(database, case.series, case.window)
    return [gap for gap in found if gap.status is not GapStatus.NO_TRADE]


@pytest.mark.parametrize("case", CASES[:2], ids=NAMES[:2])
def test_rows_off_the_minute_beside_an_outage(database: Database, market: LocalMarket, case: Case) -> None:
    """As at Binance on 2018-02-09: an outage, then hours of minutes that begin seven seconds late."""
    market.plant_outage(case.market, OUTAGE)
    planted(market, case, "off_grid", ROWS)
    context = context_with(database, market, case)
    report = sync(context, case.series, DAY, [case.provider])
    first = [("02:00", "10:00", 480, "unavailable"), ("10:00", "16:00", 360, "open")]
    assert gaps(database, case) == first
    assert quarantined(database) == {"off_grid": 360}
    fill_gaps(context, case.series, [case.provider])
    assert gaps(database, case) == [(*gap[:3], "unavailable") for gap in first]
    assert quarantined(database) == {"off_grid": 360}, "each row once"
    (_, late) = ledger(database, case)
    (evidence,) = late.evidence
    assert (evidence.outcome, evidence.repeated) == ("absent", True)
    assert "rows quarantined, the same as before" in evidence.detail
    assert late.next_attempt_at is not None, "it is retried with back-off"
    assert report.missing == 840


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_changed_rows_explain_no_gap(database: Database, market: LocalMarket, case: Case) -> None:
    """A garbled response is temporary."""
    context = context_with(database, market, case)
    for kind in ("negative", "high_below_low"):
        planted(market, case, kind, ROWS)
        sync(context, case.series, case.window, [case.provider], recheck=True)
        assert {gap.status for gap in ledger(database, case)} == {GapStatus.OPEN}
        market.clear_faults()
    assert sync(context, case.series, case.window, [case.provider], recheck=True).missing == 0


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_short_gap_with_rows_is_not_tolerated(database: Database, market: LocalMarket, case: Case) -> None:
    """It is requested again with back-off: the rows may be corrected later."""
    context = replace(context_with(database, market, case), max_gap_minutes=10_000)
    planted(market, case, "negative", TimeRange(ROWS.start, ROWS.start + 2 * MICROS_PER_MINUTE))
    for status in (GapStatus.OPEN, GapStatus.UNAVAILABLE, GapStatus.UNAVAILABLE):
        sync(context, case.series, case.window, [case.provider], recheck=True)
        assert {gap.status for gap in ledger(database, case)} == {status}
    market.clear_faults()
    assert sync(context, case.series, case.window, [case.provider], recheck=True).missing == 0


def test_an_interval_with_rejected_rows_is_not_no_trade(database: Database, market: LocalMarket) -> None:
    """The row of one provider is invalid; another one, which omits intervals without trades, does not have it."""
    apple = Series("AAPL", Timeframe.M1, AssetClass.STOCKS)
    polygon, yahoo = Case("polygon", "polygon", apple, DAY), Case("yfinance", "yahoo", apple, DAY)
    quiet = market.truth("polygon", "AAPL", Timeframe.M1, DAY).ts
    minute = TimeRange(int(quiet[100]), int(quiet[100]) + MICROS_PER_MINUTE)
    market.plant_outage("yahoo", minute)
    planted(market, polygon, "negative", minute)
    context = context_of(database, market, polygon, yahoo)
    both = replace(context, priority=lambda _: ("polygon", "yfinance"))
    for expected in (GapStatus.OPEN, GapStatus.UNAVAILABLE, GapStatus.UNAVAILABLE):
        sync(both, apple, DAY, ["polygon", "yfinance"], recheck=True)
        found = queries.ledger_gaps(database, apple, DAY)
        (gap,) = [gap for gap in found if gap.start <= minute.start < gap.end]
        assert gap.status is expected
        assert gap.rejected() == {"polygon"}
