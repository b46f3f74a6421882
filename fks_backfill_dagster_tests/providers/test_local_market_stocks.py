"""Yahoo and Polygon against the local market, for stocks and currencies: the result is the truth."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers.base import FetchResult, UnknownSymbol
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.splits import Split
from fks_backfill_dagster_tests.domain.builders import read_csv
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import span, us

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"
SPLITS = (Split("AAPL", date(2020, 8, 31), 4),)
NOW = us("2020-09-11T12:00")
ACROSS = span("2020-08-24", "2020-09-10")  # the split, and Labour Day on the 7th
MINUTES = ("1m", "5m", "15m")
APPLE = [  # native timeframes
    *(("yfinance", Timeframe(name)) for name in (*MINUTES, "1d")),
    *(("polygon", Timeframe(name)) for name in (*MINUTES, "30m", "1d")),
]


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=NOW, splits=SPLITS, single_precision=True)) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> Iterator[LocalMarket]:
    yield running
    running.clear_faults()
    running.clear_outages()
    running.set_clock(NOW)
    running.reset_requests()


def provider(make: Make, market: LocalMarket, name: str, now: int = NOW) -> Any:
    url = {"polygon": market.polygon_url, "yfinance": market.yahoo_url}[name]
    return make(name, url, key="any", requests_per_minute=10_000, clock=lambda: now)


def stock(timeframe: Timeframe) -> Series:
    return Series("AAPL", timeframe, AssetClass.STOCKS)


def good(answer: FetchResult, series: Series, window: TimeRange) -> Candles:
    """The rows that the pipeline would store."""
    rows = Candles.concat([delivery.candles for delivery in answer.deliveries])
    return verify(rows, window, grid_of(series), window.end).good


def expected_of(market: LocalMarket, name: str, timeframe: Timeframe) -> Candles:
    """The truth of ACROSS."""
    return market.truth("yahoo" if name == "yfinance" else name, "AAPL", timeframe, ACROSS)


@pytest.mark.parametrize(("name", "timeframe"), APPLE)
def test_apple_across_its_split(make: Make, market: LocalMarket, name: str, timeframe: Timeframe) -> None:
    series = stock(timeframe)
    answer = provider(make, market, name).fetch(series, ACROSS)
    truth = expected_of(market, name, timeframe)
    got = good(answer, series, ACROSS)
    assert np.array_equal(got.ts, truth.ts)
    for price in PRICES:
        assert np.array_equal(getattr(got, price), getattr(truth, price))
    np.testing.assert_allclose(
        got.volume, truth.volume, atol=30, rtol=0
    )  # Yahoo's volumes are whole shares of today


@pytest.mark.parametrize(("name", "timeframe"), APPLE)
@pytest.mark.parametrize("now", ["2020-09-09T15:07:31", "2020-09-09T20:10:00"])
def test_no_forming_candles(
    make: Make, market: LocalMarket, name: str, timeframe: Timeframe, now: str
) -> None:
    market.set_clock(us(now))
    series = stock(timeframe)
    got = good(provider(make, market, name, us(now)).fetch(series, ACROSS), series, ACROSS)
    truth = expected_of(market, name, timeframe)
    assert np.array_equal(got.ts, truth.ts)
    assert len(truth) == 0 or grid_of(series).closes(truth.ts)[-1] <= us(now)
    assert np.array_equal(got.close, truth.close)


@pytest.mark.parametrize("timeframe", [Timeframe(name) for name in (*MINUTES, "30m", "1h")])
@pytest.mark.parametrize("window", [span("2019-12-16", "2020-01-06"), span("2020-03-02", "2020-03-16")])
def test_polygon_currencies(make: Make, market: LocalMarket, timeframe: Timeframe, window: TimeRange) -> None:
    series = Series("EUR/USD", timeframe, AssetClass.FOREX)
    got = good(provider(make, market, "polygon").fetch(series, window), series, window)
    truth = market.truth("polygon", "EUR/USD", timeframe, window)
    assert np.array_equal(got.ts, truth.ts)
    assert len(got) > 0
    for price in PRICES:
        assert np.array_equal(getattr(got, price), getattr(truth, price))
    assert np.isnan(got.volume).all()


@pytest.mark.parametrize("timeframe", [Timeframe.H1, Timeframe.D1])
def test_polygon_crypto(make: Make, market: LocalMarket, timeframe: Timeframe) -> None:
    series, window = Series("BTC/USDT", timeframe, AssetClass.CRYPTO), span("2020-06-01", "2020-07-06")
    got = good(provider(make, market, "polygon").fetch(series, window), series, window)
    truth = market.truth("polygon", "BTC/USDT", timeframe, window)
    assert np.array_equal(got.ts, truth.ts)
    for price in PRICES:
        assert np.array_equal(getattr(got, price), getattr(truth, price))
    np.testing.assert_allclose(got.volume, truth.volume)


@pytest.mark.parametrize("name", ["yfinance", "polygon"])
@pytest.mark.parametrize("kind", ["html", "truncated", "reset", "nan", "unsorted", "duplicated"])
def test_one_fault_changes_no_values(make: Make, market: LocalMarket, name: str, kind: str) -> None:
    theirs = "yahoo" if name == "yfinance" else name
    market.plant_fault(theirs, kind, count=1)
    series = stock(Timeframe.M15)
    answer = provider(make, market, name).fetch(series, ACROSS)
    assert answer.requests == market.requests(theirs)
    got, truth = good(answer, series, ACROSS), market.truth(theirs, "AAPL", Timeframe.M15, ACROSS)
    assert np.isin(got.ts, truth.ts).all()
    rows = np.searchsorted(truth.ts, got.ts)
    assert np.array_equal(got.close, truth.close[rows])
    assert len(got) > 0.9 * len(truth)
    if kind != "nan":
        assert len(got) == len(truth)


def test_yahoo_symbols(make: Make, market: LocalMarket) -> None:
    unknown = Series("NOPE", Timeframe.D1, AssetClass.STOCKS)
    with pytest.raises(UnknownSymbol):
        provider(make, market, "yfinance").fetch(unknown, ACROSS)
    with pytest.raises(UnknownSymbol):
        provider(make, market, "yfinance").listed_at(unknown)
    listed = provider(make, market, "yfinance").listed_at(stock(Timeframe.D1))
    assert listed is not None
    assert listed < ACROSS.start


@pytest.mark.server
@pytest.mark.parametrize("name", ["yfinance", "polygon"])
def test_real_days(make: Make, name: str) -> None:
    """The file's rows of seven years and two splits, as traded."""
    if not SHARED.exists():
        pytest.skip("the real files are only there beside the shared folder")
    window, now, series = span("2014-01-06", "2021-03-01"), us("2021-03-30T21:00"), stock(Timeframe.D1)
    with LocalMarket(MarketConfig(limits=False, replay=SHARED, now=now)) as market:
        theirs = "yahoo" if name == "yfinance" else name
        got = good(provider(make, market, name, now).fetch(series, window), series, window)
        truth = market.truth(theirs, "AAPL", Timeframe.D1, window)
    if name == "yfinance":
        assert got.ts.tolist() == read_csv(SHARED / "equity/AAPL-1d.csv.gz").within(window).ts.tolist()
        assert np.array_equal(got.close, read_csv(SHARED / "equity/AAPL-1d.csv.gz").within(window).close)
    assert np.array_equal(got.ts, truth.ts)
    assert np.array_equal(got.high, truth.high)
