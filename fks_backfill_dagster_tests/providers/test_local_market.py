"""The providers against the local market: after any single fault, the result is the truth."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers.base import FetchResult, UnknownSymbol
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import crypto, span

WINDOW = span("2024-12-29", "2025-01-03")
ROW_FAULTS = [
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
FILE_FAULTS = ["wrong_checksum", "corrupt_zip", "archive_404"]
WIRE_FAULTS = ["reset", "truncated", "html", "other_symbol"]


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False)) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> Iterator[LocalMarket]:
    yield running
    running.clear_faults()
    running.clear_outages()
    running.reset_requests()


def good(answer: FetchResult, series: Series, window: TimeRange) -> Candles:
    """The rows that the pipeline would store."""
    rows = Candles.concat([delivery.candles for delivery in answer.deliveries])
    return verify(rows, window, grid_of(series), window.end).good


@pytest.mark.parametrize("timeframe", [Timeframe.M1, Timeframe.M15, Timeframe.H4, Timeframe.W1])
@pytest.mark.parametrize("archives", [True, False])
def test_the_truth(make: Make, market: LocalMarket, timeframe: Timeframe, archives: bool) -> None:
    window = WINDOW if timeframe is Timeframe.M1 else span("2024-11-18", "2025-02-03")
    archive_url = market.archive_url if archives else None
    provider = make("binance", market.binance_url, archive_url=archive_url, requests_per_minute=10**6)
    answer = provider.fetch(crypto(timeframe), window)
    truth = market.truth("binance", "BTC/USDT", timeframe, window)
    assert good(answer, crypto(timeframe), window).equals(truth)
    assert len(truth) > 0
    assert answer.requests == market.requests("binance") + market.requests("archive")


@pytest.mark.parametrize("kind", [*ROW_FAULTS, *WIRE_FAULTS])
def test_one_fault_of_rest(make: Make, market: LocalMarket, kind: str) -> None:
    market.plant_fault("binance", kind, count=1)
    provider = make("binance", market.binance_url, requests_per_minute=10**6)
    answer = provider.fetch(crypto(), WINDOW)
    assert good(answer, crypto(), WINDOW).equals(market.truth("binance", "BTC/USDT", Timeframe.M1, WINDOW))


@pytest.mark.parametrize("kind", [*ROW_FAULTS, "reset", "truncated", "html", *FILE_FAULTS])
def test_a_fault_of_the_archives(make: Make, market: LocalMarket, kind: str) -> None:
    market.plant_fault("archive", kind, count=1)
    provider = make("binance", market.binance_url, archive_url=market.archive_url, requests_per_minute=10**6)
    answer = provider.fetch(crypto(), WINDOW)
    assert good(answer, crypto(), WINDOW).equals(market.truth("binance", "BTC/USDT", Timeframe.M1, WINDOW))


def test_an_outage(make: Make, market: LocalMarket) -> None:
    market.plant_outage("binance", span("2024-12-30T03:00", "2024-12-30T07:30"))
    provider = make("binance", market.binance_url, archive_url=market.archive_url, requests_per_minute=10**6)
    got = good(provider.fetch(crypto(), WINDOW), crypto(), WINDOW)
    assert got.equals(market.truth("binance", "BTC/USDT", Timeframe.M1, WINDOW))
    assert len(got) == 5 * 1440 - 270


def test_listing_and_unknown_symbol(make: Make, market: LocalMarket) -> None:
    provider = make("binance", market.binance_url, requests_per_minute=10**6)
    listed = provider.listed_at(crypto(Timeframe.D1))
    assert listed is not None
    before = TimeRange(listed - 10 * 60_000_000, listed + 10 * 60_000_000)
    assert market.truth("binance", "BTC/USDT", Timeframe.M1, before).ts[0] == listed
    with pytest.raises(UnknownSymbol):
        provider.listed_at(crypto(symbol="NO/SUCH"))


@pytest.mark.parametrize("kind", [None, "html", "truncated", "reset", "nan"])
def test_polygon(make: Make, market: LocalMarket, kind: str | None) -> None:
    if kind:
        market.plant_fault("polygon", kind, count=1)
    provider = make("polygon", market.polygon_url, key="any", requests_per_minute=1000)
    window = span("2024-12-01", "2025-01-20")
    answer = provider.fetch(crypto(), window)
    truth = market.truth("polygon", "BTC/USDT", Timeframe.M1, window)
    assert good(answer, crypto(), window).equals(truth)
    assert answer.requests == market.requests("polygon") == (3 if kind else 2)
