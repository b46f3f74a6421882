"""Each fault by each provider that can have it: what is stored is true, what is not is accounted for.

Binance has its own, finer cases in test_sync.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import PRICES
from fks_backfill_dagster.domain.gaps import GapStatus
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.sync import Context, sync
from fks_backfill_dagster.providers.http import ProcessLimiter, RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store import reading
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.conftest import NOW


def days(start: str, end: str) -> TimeRange:
    return TimeRange.of(
        datetime.fromisoformat(start).replace(tzinfo=UTC), datetime.fromisoformat(end).replace(tzinfo=UTC)
    )


@dataclass(frozen=True)
class Case:
    """A series that a provider serves; `market` is what the local market calls the provider."""

    provider: str
    market: str
    series: Series
    window: TimeRange

    def __str__(self) -> str:
        return f"{self.provider}-{self.series.asset_class}"


BITCOIN = Series("BTC/USDT", Timeframe.M5, AssetClass.CRYPTO)
APPLE = Series("AAPL", Timeframe.M15, AssetClass.STOCKS)
EURO = Series("EUR/USD", Timeframe.M15, AssetClass.FOREX)
WEEK = days("2024-06-10", "2024-06-13")

CASES = [
    Case("polygon", "polygon", BITCOIN, WEEK),
    Case("polygon", "polygon", APPLE, WEEK),
    Case("yfinance", "yahoo", APPLE, WEEK),
    Case("alphavantage", "alphavantage", APPLE, WEEK),
    Case("oanda", "oanda", EURO, WEEK),
    Case(
        "coingecko",
        "coingecko",
        Series("BTC/USDT", Timeframe.H4, AssetClass.CRYPTO),
        days("2024-06-01", "2024-06-11"),
    ),
]
FAULTS = [
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
]


@pytest.fixture(scope="module")
def market() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=NOW)) as running:
        yield running


def context_of(database: Database, market: LocalMarket, case: Case, *, key: str = "premium") -> Context:
    options = resolve_options(
        case.provider,
        base_url=f"{market.url}/{case.market}",
        key=key,
        retry_budget_seconds=0.3,
        longest_wait_seconds=0.3,
        timeout_seconds=5,
    )
    provider = build(case.provider, options, RequestPool(5), ProcessLimiter({}), lambda: NOW)
    return Context(database, {case.provider: provider}, lambda: NOW)


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_fault_is_never_stored_and_never_hidden(
    database: Database, market: LocalMarket, case: Case, kind: str
) -> None:
    truth = market.truth(case.market, case.series.symbol, case.series.timeframe, case.window)
    assert len(truth) > 20
    market.plant_fault(case.market, kind, count=None)
    try:
        report = sync(context_of(database, market, case), case.series, case.window, [case.provider])
    finally:
        market.clear_faults()
    stored = reading.read_candles(database, case.series, case.window)
    kept = truth.take(np.isin(truth.ts, stored.ts))
    assert np.array_equal(stored.ts, kept.ts)
    for name in PRICES:
        assert np.array_equal(getattr(stored, name), getattr(kept, name)), "what is stored is the truth"
    gaps = reading.ledger_gaps(database, case.series, case.window)
    absent = report.expected - len(stored)
    assert sum(gap.missing for gap in gaps) == absent, "what is not stored is in the ledger"
    assert all(gap.evidence for gap in gaps), "with what was said"
    if report.failed_batches:
        assert report.errors
        assert not report.complete
    healed = sync(context_of(database, market, case), case.series, case.window, [case.provider], recheck=True)
    assert healed.failed_batches == 0
    after = reading.read_candles(database, case.series, case.window)
    assert len(after) >= len(stored)


def test_what_lies_beyond_the_depth_of_all_is_explained_without_a_request(
    database: Database, market: LocalMarket
) -> None:
    case = Case("yfinance", "yahoo", APPLE, days("2023-06-12", "2023-06-15"))
    context = context_of(database, market, case)
    sync(context, APPLE, WEEK, ["yfinance"])  # the listing time is known from here on
    market.reset_requests()
    report = sync(context, APPLE, case.window, ["yfinance"])
    assert market.requests() == 0
    assert report.errors == ("yfinance: all of it lies beyond its depth",)
    (gap,) = reading.ledger_gaps(database, APPLE, case.window)
    assert (gap.status, gap.missing) == (GapStatus.UNAVAILABLE, report.expected)


def test_a_free_key_brings_what_it_covers_however_much_older_was_asked_first(
    database: Database, market: LocalMarket
) -> None:
    """Alpha Vantage gives a free key the last 100 days; the batches of four years come before them."""
    case = Case(
        "alphavantage",
        "alphavantage",
        replace(APPLE, timeframe=Timeframe.D1),
        days("2020-06-01", "2024-06-15"),
    )
    context = replace(context_of(database, market, case, key="free"), batch_size_days=100)
    market.reset_requests()
    report = sync(context, case.series, case.window, ["alphavantage"])
    truth = market.truth("alphavantage", "AAPL", Timeframe.D1, case.window)
    stored = reading.read_candles(database, case.series, case.window)
    assert stored.equals(truth.take(slice(-100, None)))
    assert report.failed_batches == 0
    assert any("the last 100 days only" in warning for warning in report.warnings)
    assert market.requests() == 2, "the history was refused, the last days were given"
    gaps = reading.ledger_gaps(database, case.series, case.window)
    assert sum(gap.missing for gap in gaps) == report.missing == report.expected - 100
    assert all("the last 100 days only" in gap.evidence[0].detail for gap in gaps)
