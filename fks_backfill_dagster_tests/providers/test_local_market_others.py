"""OANDA, Alpha Vantage and CoinGecko against the local market: the result is the truth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.providers.base import FetchResult, NotEntitled, RateLimited, UnknownSymbol
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster_tests.domain.builders import read_csv
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import span, us

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
NOW = us("2024-11-20T12:07")
SYMBOLS = {
    "oanda": ("EUR/USD", AssetClass.FOREX),
    "alphavantage": ("AAPL", AssetClass.STOCKS),
    "coingecko": ("BTC/USD", AssetClass.CRYPTO),
}
# Across the end of daylight saving time; for CoinGecko the days that a demo key covers.
AUTUMN, MONTH = span("2024-10-27", "2024-11-10"), TimeRange(NOW - 30 * MICROS_PER_DAY, NOW)
EVERYTHING = [  # that is native
    *(("oanda", timeframe) for timeframe in Timeframe),
    *(("alphavantage", Timeframe(name)) for name in ("1m", "5m", "15m", "30m", "1d")),
    *(("coingecko", Timeframe(name)) for name in ("30m", "4h")),
]
FAULTS = ["html", "truncated", "reset"]


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=NOW)) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> Iterator[LocalMarket]:
    yield running
    running.clear_faults()
    running.clear_outages()
    running.set_clock(NOW)
    running.reset_requests()


def provider(make: Make, market: LocalMarket, name: str, now: int = NOW, key: str = "any") -> Any:
    return make(name, f"{market.url}/{name}", key=key, requests_per_minute=10**6, clock=lambda: now)


def series_of(name: str, timeframe: Timeframe) -> Series:
    symbol, asset_class = SYMBOLS[name]
    return Series(symbol, timeframe, asset_class)


def window_of(name: str, timeframe: Timeframe) -> TimeRange:
    if name != "coingecko":
        return AUTUMN
    grid = grid_of(series_of(name, timeframe))
    start = NOW - MICROS_PER_DAY if timeframe.minutes <= 60 else MONTH.start
    return TimeRange(int(grid.opens(TimeRange(start, NOW))[0]), grid.closed_end(NOW))


def good(answer: FetchResult, series: Series, window: TimeRange) -> Candles:
    """The rows that the pipeline would store."""
    rows = Candles.concat([delivery.candles for delivery in answer.deliveries])
    return verify(rows, window, grid_of(series), window.end).good


def without_volume(name: str, candles: Candles) -> Candles:
    """The candles as the provider returns them."""
    if name == "alphavantage":
        return candles
    return Candles(*candles.columns()[:5], np.full(len(candles), np.nan))


@pytest.mark.parametrize(("name", "timeframe"), EVERYTHING)
def test_the_truth(make: Make, market: LocalMarket, name: str, timeframe: Timeframe) -> None:
    series, window = series_of(name, timeframe), window_of(name, timeframe)
    answer = provider(make, market, name).fetch(series, window)
    truth = market.truth(name, series.symbol, timeframe, window)
    got = good(answer, series, window)
    assert np.array_equal(got.ts, truth.ts)
    for price in PRICES:
        assert np.array_equal(getattr(got, price), getattr(truth, price))
    volume = truth.volume if name == "alphavantage" else np.full(len(truth), np.nan)
    assert np.allclose(got.volume, volume, rtol=1e-12, equal_nan=True), "sums differ in the last digit"
    assert len(truth) > 1
    assert answer.requests == market.requests(name)


@pytest.mark.parametrize("name", list(SYMBOLS))
@pytest.mark.parametrize("kind", FAULTS)
def test_one_fault(make: Make, market: LocalMarket, name: str, kind: str) -> None:
    market.plant_fault(name, kind, count=1)
    timeframe = Timeframe.M30
    series, window = series_of(name, timeframe), window_of(name, timeframe)
    got = good(provider(make, market, name).fetch(series, window), series, window)
    assert got.equals(without_volume(name, market.truth(name, series.symbol, timeframe, window)))
    assert len(got) > 1


@pytest.mark.parametrize(
    "kind", ["empty", "short", "missing", "nan", "negative", "high_below_low", "off_grid"]
)
def test_rows_missing_once_at_oanda_are_requested_again(make: Make, market: LocalMarket, kind: str) -> None:
    market.plant_fault("oanda", kind, count=1)
    series = series_of("oanda", Timeframe.H1)
    got = good(provider(make, market, "oanda").fetch(series, AUTUMN), series, AUTUMN)
    assert got.equals(without_volume("oanda", market.truth("oanda", "EUR/USD", Timeframe.H1, AUTUMN)))


@pytest.mark.parametrize("name", list(SYMBOLS))
def test_unknown_symbols(make: Make, market: LocalMarket, name: str) -> None:
    symbol = {"oanda": "EUR/XXX", "alphavantage": "NOSUCH1", "coingecko": "NOSUCH/USD"}[name]
    unknown = Series(symbol, Timeframe.M30, SYMBOLS[name][1])
    with pytest.raises(UnknownSymbol):
        provider(make, market, name).fetch(unknown, window_of(name, Timeframe.M30))


def test_listing_of_a_pair(make: Make, market: LocalMarket) -> None:
    listed = provider(make, market, "oanda").listed_at(series_of("oanda", Timeframe.M1))
    day = market.truth("oanda", "EUR/USD", Timeframe.D1, TimeRange(listed, listed + 10 * MICROS_PER_DAY))
    assert int(day.ts[0]) == listed


@pytest.mark.server
def test_a_free_key_of_alpha_vantage(make: Make) -> None:
    config = MarketConfig(now=NOW, alphavantage_per_day=25, alphavantage_per_second=1000)
    with LocalMarket(config) as market:
        free = provider(make, market, "alphavantage", key="free-key")
        days = series_of("alphavantage", Timeframe.D1)
        got = good(free.fetch(days, AUTUMN), days, AUTUMN)
        assert got.equals(market.truth("alphavantage", "AAPL", Timeframe.D1, AUTUMN))
        with pytest.raises(NotEntitled, match="premium"):
            free.fetch(series_of("alphavantage", Timeframe.M30), AUTUMN)
        while market.requests("alphavantage") < 25:
            free.fetch(days, AUTUMN)
        with pytest.raises(RateLimited) as caught:
            free.fetch(days, AUTUMN)
        assert "free-key" not in str(caught.value)
        assert caught.value.retry_after == pytest.approx(16 * 3600 + 53 * 60, abs=5)  # midnight in New York


@pytest.mark.server
@pytest.mark.skipif(not SHARED.is_dir(), reason="the recorded candles are not beside the checkout")
def test_euro_hours_as_recorded(make: Make) -> None:
    """Two recorded years of OANDA, with holes: the result is exactly the file."""
    window, now = span("2016-01-03T22:00", "2017-12-29T22:00"), us("2019-01-05")
    with LocalMarket(MarketConfig(limits=False, replay=SHARED, now=now)) as market:
        series = series_of("oanda", Timeframe.H1)
        answer = provider(make, market, "oanda", now).fetch(series, window)
    file = read_csv(SHARED / "forex/EURUSD-1h.csv.gz").within(window)
    got = good(answer, series, window)
    assert np.array_equal(got.ts, file.ts)
    for price in PRICES:
        assert np.array_equal(getattr(got, price), getattr(file, price))
    assert len(got) > 12_000
