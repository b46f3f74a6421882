"""Replay of stocks and currencies in wire formats whose bar boundaries differ from the files'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, ReplayError, Split
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.replay import load
from fks_backfill_dagster_tests.simulator.test_replay import file_rows
from fks_backfill_dagster_tests.simulator.wire import (
    aggs,
    candles,
    chart,
    of_aggs,
    of_candles,
    of_chart,
    of_series,
    vantage,
    window,
)

pytestmark = pytest.mark.server

SPLITS = (
    Split("AAPL", date(2000, 6, 21), 2),
    Split("AAPL", date(2005, 2, 28), 2),
    Split("AAPL", date(2014, 6, 9), 7),
    Split("AAPL", date(2020, 8, 31), 4),
)
HEAD = "ts,open,high,low,close,volume\n"
# Two sessions in hours, the second a half-day with an hour after its close; the first also in minutes.
HOURS = """\
2015-12-23T14:00:00Z,10,12,9,11,100
2015-12-23T15:00:00Z,11,13,10,12,200
2015-12-23T20:00:00Z,12,12,11,11.5,50
2015-12-24T14:00:00Z,11.5,12,11,12,60
2015-12-24T17:00:00Z,12,14,12,13,70
2015-12-24T18:00:00Z,13,19,13,18,80
"""
MINUTES = """\
2015-12-23T14:10:00Z,9,9,9,9,5
2015-12-23T14:30:00Z,10,12,9,11,100
2015-12-23T15:20:00Z,11,13,11,12,150
2015-12-23T15:45:00Z,12,12,10,12,50
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMarket]:
    directory = tmp_path_factory.mktemp("replay")
    (directory / "equity").mkdir()
    (directory / "equity/GOOG-1h.csv").write_text(HEAD + HOURS)
    (directory / "equity/GOOG-1m.csv").write_text(HEAD + MINUTES)
    (directory / "equity/splits.csv").write_text("symbol,date,new,old\nGOOG,2015-12-24,2,1\n")
    with LocalMarket(MarketConfig(replay=directory, now=instant("2016-01-05"))) as market:
        yield market


DAYS = window("2015-12-23", "2015-12-25")


def polygon(market: LocalMarket, mult: int, unit: str, ticker: str = "GOOG") -> Candles:
    path = f"{ticker}/range/{mult}/{unit}/2015-12-23/2015-12-24"
    return of_aggs(aggs(market, path, limit=50000, adjusted="false").json()["results"])


def test_truth_is_the_file_inside_the_calendar(small: LocalMarket) -> None:
    hours = small.truth("polygon", "GOOG", Timeframe.H1, DAYS)
    assert hours.close.tolist() == [11, 12, 11.5, 12, 13]
    minutes = small.truth("polygon", "GOOG", Timeframe.M1, DAYS)
    assert minutes.volume.tolist() == [100, 150, 50]
    four = small.truth("polygon", "GOOG", Timeframe.H4, DAYS)  # 08:00, 12:00 and 08:00, 12:00 New York
    assert (four.open.tolist(), four.high.tolist()) == ([10, 12, 11.5, 12], [13, 12, 12, 14])
    assert len(small.truth("polygon", "GOOG", Timeframe.M30, DAYS)) == 3


def test_the_coarsest_file_that_fits_is_served(small: LocalMarket) -> None:
    assert polygon(small, 1, "minute").volume.tolist() == [5, 100, 150, 50]
    assert polygon(small, 1, "hour").volume.tolist() == [100, 200, 50, 60, 70, 80]
    hours = of_chart(chart(small, "GOOG", interval="1h", of=DAYS))  # 09:30: only minutes fit
    assert hours.volume.tolist() == [250 * 2, 50 * 2]


def test_half_hours_aggregate_to_the_files_hours(small: LocalMarket) -> None:
    halves = polygon(small, 30, "minute")
    hours = halves.ts // MICROS_PER_HOUR
    truth = small.truth("polygon", "GOOG", Timeframe.H1, DAYS)
    for ts, *row in zip(*(column.tolist() for column in truth.columns()), strict=True):
        part = halves.take(hours == ts // MICROS_PER_HOUR)
        made = [part.open[0], part.high.max(), part.low.min(), part.close[-1], part.volume.sum()]
        assert made == row
        assert len(part) == (1 if ts % (24 * MICROS_PER_HOUR) == 14 * MICROS_PER_HOUR else 2)


def test_an_hour_after_the_close_is_post_market(small: LocalMarket) -> None:
    after = instant("2015-12-24T18:00")
    assert polygon(small, 1, "hour").ts[-1] == after
    grid = grid_of(Series("GOOG", Timeframe.H1, AssetClass.STOCKS))
    assert not grid.contains(np.array([after]))[0]
    days = of_series(vantage(small, "TIME_SERIES_DAILY", symbol="GOOG"))
    assert days.high.tolist() == [13, 14]


def test_splits_of_the_directory(small: LocalMarket) -> None:
    days = of_chart(chart(small, "GOOG", interval="1d", of=DAYS, events="split"))
    assert days.open.tolist() == [5, 11.5]
    assert days.volume.tolist() == [700, 130]


def test_outages_remove_the_rows_that_they_overlap(small: LocalMarket) -> None:
    small.plant_outage("polygon", window("2015-12-23T15:00", "2015-12-23T16:00"), "GOOG")
    small.plant_outage("polygon", window("2015-12-23T20:00", "2015-12-23T20:59"), "GOOG")
    assert polygon(small, 1, "hour").volume.tolist() == [100, 60, 70, 80]
    assert small.truth("polygon", "GOOG", Timeframe.H1, DAYS).volume.tolist() == [100, 60, 70]
    assert polygon(small, 1, "day").volume.tolist() == [130]
    assert small.truth("polygon", "GOOG", Timeframe.D1, DAYS).volume.tolist() == [130]
    assert small.truth("yahoo", "GOOG", Timeframe.D1, DAYS).volume.tolist() == [350, 130]
    small.clear_outages()


def test_halts_remove_the_rows_that_they_cover(small: LocalMarket) -> None:
    small.plant_halt(window("2015-12-23T15:00", "2015-12-23T16:00"), "GOOG", provider="polygon")
    small.plant_halt(window("2015-12-23T20:00", "2015-12-23T20:59"), "GOOG")
    assert polygon(small, 1, "hour").volume.tolist() == [100, 50, 60, 70, 80]
    assert small.truth("polygon", "GOOG", Timeframe.H1, DAYS).volume.tolist() == [100, 50, 60, 70]
    assert polygon(small, 1, "day").volume.tolist() == [150, 130]
    small.clear_outages()


def test_providers_of_each_venue(small: LocalMarket) -> None:
    assert aggs(small, "AAPL/range/1/hour/2015-12-23/2015-12-24").json()["resultsCount"] == 0
    assert chart(small, "AAPL", interval="1d", of=DAYS).status_code == 404
    assert "Error Message" in vantage(small, "TIME_SERIES_DAILY", symbol="AAPL").json()
    assert candles(small, granularity="H1").status_code == 400
    text = requests.get(small.url, timeout=10).text
    assert text.count("GOOG") == 3


@pytest.mark.parametrize("text", ["symbol,date\nAAPL,2014-06-09\n", "symbol,date,new,old\nAAPL,soon,7,1\n"])
def test_an_error_names_the_invalid_splits_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "equity").mkdir()
    (tmp_path / "equity/AAPL-1h.csv").write_text(HEAD + HOURS)
    (tmp_path / "equity/splits.csv").write_text(text)
    with pytest.raises(ReplayError, match=r"splits\.csv needs the columns symbol,date,new,old"):
        load(tmp_path)


@pytest.fixture(scope="module")
def real(shared_data: Callable[[str], Path]) -> Iterator[LocalMarket]:
    directory = shared_data("equity/AAPL-1h.csv.gz").parents[1]
    with LocalMarket(MarketConfig(replay=directory, splits=SPLITS, now=instant("2021-04-01"))) as market:
        yield market


def in_file(path: Path, series: Series, within: TimeRange) -> Candles:
    """The rows of a file on the series' grid."""
    table = [[float(cell or "nan") for cell in row] for row in file_rows(path)]
    columns = np.array(table).T
    whole = Candles(columns[0].astype(np.int64) * 1000, *columns[1:])
    return whole.take(grid_of(series).contains(whole.ts)).within(within)


@pytest.mark.parametrize(
    ("provider", "name", "series"),
    [
        ("polygon", "equity/AAPL-1h", Series("AAPL", Timeframe.H1, AssetClass.STOCKS)),
        ("yahoo", "equity/AAPL-1d", Series("AAPL", Timeframe.D1, AssetClass.STOCKS)),
        ("alphavantage", "equity/AAPL-1m", Series("AAPL", Timeframe.M1, AssetClass.STOCKS)),
        ("polygon", "equity/GOOG-1m", Series("GOOG", Timeframe.M1, AssetClass.STOCKS)),
        ("oanda", "forex/EURUSD-1h", Series("EUR/USD", Timeframe.H1, AssetClass.FOREX)),
        ("polygon", "forex/EURUSD-1m", Series("EUR/USD", Timeframe.M1, AssetClass.FOREX)),
    ],
)
def test_the_truth_of_a_real_file_is_the_file(
    real: LocalMarket, shared_data: Callable[[str], Path], provider: str, name: str, series: Series
) -> None:
    whole = TimeRange(0, instant("2021-04-01"))
    expected = in_file(shared_data(f"{name}.csv.gz"), series, whole)
    assert real.truth(provider, series.symbol, series.timeframe, whole).equals(expected)
    assert len(expected) > 700


def test_real_days_adjusted_and_as_traded(real: LocalMarket, shared_data: Callable[[str], Path]) -> None:
    series = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)
    whole = TimeRange(0, instant("2021-04-01"))
    expected = in_file(shared_data("equity/AAPL-1d.csv.gz"), series, whole)
    assert of_series(vantage(real, "TIME_SERIES_DAILY")).equals(expected)
    answer = chart(real, interval="1d", period1=0, period2=whole.end // 1_000_000, events="div,splits")
    assert list(answer.json()["chart"]["result"][0]["events"]["splits"]) == [
        str(instant(text) // 1_000_000)
        for text in ("2000-06-21T13:30", "2005-02-28T14:30", "2014-06-09T13:30", "2020-08-31T13:30")
    ]
    ratio = np.ones(len(expected))
    for split in SPLITS:
        ratio[expected.ts < instant(str(split.day))] *= split.new
    served = of_chart(answer)
    assert served.close == pytest.approx(expected.close / ratio, rel=1e-7)
    assert served.volume.tolist() == (expected.volume * ratio).tolist()
    assert ratio[0] == 112


def test_real_half_hours_aggregate_to_the_real_hours(real: LocalMarket) -> None:
    requested = window("2013-08-19", "2013-08-24")
    page = aggs(real, "AAPL/range/30/minute/2013-08-19/2013-08-23", limit=50000, adjusted="false").json()
    halves = of_aggs(page["results"])
    truth = real.truth("polygon", "AAPL", Timeframe.H1, requested)
    hours = halves.ts // MICROS_PER_HOUR * MICROS_PER_HOUR
    assert np.unique(hours).tolist() == truth.ts.tolist()
    first = np.searchsorted(hours, truth.ts)
    assert np.maximum.reduceat(halves.high, first).tolist() == truth.high.tolist()
    assert np.add.reduceat(halves.volume, first).tolist() == truth.volume.tolist()
    missing = set(grid_of(Series("AAPL", Timeframe.H1, AssetClass.STOCKS)).opens(requested).tolist())
    missing -= set(truth.ts.tolist())
    assert missing == {instant("2013-08-22T17:00"), instant("2013-08-22T18:00")}


def test_real_currency_hours(real: LocalMarket) -> None:
    requested = window("2016-12-05", "2016-12-20")  # the hole begins on the 9th
    served = of_candles(candles(real, granularity="H1", of=requested))
    truth = real.truth("oanda", "EUR/USD", Timeframe.H1, requested)
    assert served.equals(truth)
    assert np.diff(truth.ts).max() > 5 * 24 * MICROS_PER_HOUR
    pair = real.truth("polygon", "C:EURUSD", Timeframe.D1, requested)
    assert pair.equals(real.truth("oanda", "EUR_USD", Timeframe.D1, requested))
