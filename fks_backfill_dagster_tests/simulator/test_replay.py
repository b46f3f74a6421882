"""Replay of real candles in the providers' wire formats."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, ReplayError
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.replay import load
from fks_backfill_dagster_tests.simulator.wire import (
    aggs,
    archive,
    klines,
    of_aggs,
    of_klines,
    span,
    unzipped,
    window,
)

pytestmark = pytest.mark.server

SMALL = Path(__file__).resolve().parents[1] / "data/replay"
HEAD = "ts,open,high,low,close,volume\n"


def file_rows(path: Path) -> list[list[str]]:
    """[open in ms, o, h, l, c, v] as text, read from the file."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt") as file:
        return [[str(instant(ts) // 1000), *rest] for ts, *rest in list(csv.reader(file))[1:]]


@pytest.fixture(scope="module")
def market() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(replay=SMALL, limits=False)) as market:
        yield market


def test_texts_are_served_unchanged(market: LocalMarket) -> None:
    rows = klines(market, interval="1h", limit=1000).json()
    assert [[str(row[0]), *row[1:6]] for row in rows] == file_rows(SMALL / "binance/BTCUSDT-1h.csv")


def test_the_real_outage_is_omitted(market: LocalMarket) -> None:
    rows = klines(market, interval="1h", limit=1000).json()
    opens = np.array([row[0] for row in rows]) * 1000
    grid = np.arange(opens[0], opens[-1] + 1, MICROS_PER_HOUR)
    missing = np.setdiff1d(grid, opens).tolist()
    assert missing == [
        instant(text)
        for text in ("2020-11-30T06:00", "2020-12-02T15:00", "2020-12-02T16:00", "2020-12-02T17:00")
    ]


def test_coarser_timeframes_aggregate_and_finer_ones_are_empty(market: LocalMarket) -> None:
    hours = of_klines(klines(market, interval="1h", limit=1000).json())
    days = klines(market, interval="1d").json()
    first = hours.within(window("2020-11-30", "2020-12-01"))
    assert float(days[0][2]) == first.high.max()
    assert float(days[0][3]) == first.low.min()
    assert float(days[0][5]) == pytest.approx(first.volume.sum(), rel=1e-12)
    assert len(days) == 5
    assert klines(market, interval="15m").json() == []


def test_archives_exist_for_whole_periods_in_the_file(market: LocalMarket) -> None:
    day = archive(market, "daily/klines/BTCUSDT/1h/BTCUSDT-1h-2020-12-02.zip")
    assert len(unzipped(day.content)) == 21
    assert archive(market, "daily/klines/BTCUSDT/1h/BTCUSDT-1h-2020-12-04.zip").status_code == 404
    assert archive(market, "monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2020-12.zip").status_code == 404


def test_other_venues_are_served_as_polygon(market: LocalMarket) -> None:
    path = "X:BTCUSD/range/15/minute/2020-11-30/2020-12-01"
    page = aggs(market, path).json()
    rows = file_rows(SMALL / "coinbase/BTCUSD-15m.csv")
    served = of_aggs(page["results"])
    assert served.equals(
        market.truth("polygon", "BTC/USDT", Timeframe.M15, window("2020-11-30", "2020-12-01"))
    )
    assert served.close.tolist() == [float(row[4]) for row in rows]
    assert aggs(market, path.replace("BTC", "ETH")).json()["resultsCount"] == 0


def test_symbols_without_a_file_are_unknown(market: LocalMarket) -> None:
    assert klines(market, symbol="ETHUSDT", interval="1h").json()["code"] == -1121


def test_truth_is_a_file_that_can_be_replayed(market: LocalMarket, tmp_path: Path) -> None:
    text = requests.get(f"{market.url}/sim/truth/binance/BTC/USDT/1h", timeout=10).text
    assert text == (SMALL / "binance/BTCUSDT-1h.csv").read_text()
    (tmp_path / "binance").mkdir()
    (tmp_path / "binance/BTCUSDT-1h.csv").write_text(text)
    again = (
        load(tmp_path).crypto["binance"].truth("BTCUSDT", Timeframe.H1, window("2020-01-01", "2021-01-01"))
    )
    assert again.equals(market.truth("binance", "BTCUSDT", Timeframe.H1, window("2020-01-01", "2021-01-01")))


def test_planted_outages_work_on_files_too(market: LocalMarket) -> None:
    market.plant_outage("binance", window("2020-12-01T03:30", "2020-12-01T06:00"))
    requested = window("2020-12-01", "2020-12-02")
    rows = klines(market, interval="1h", **span(requested)).json()
    assert [row[0] * 1000 for row in rows[2:4]] == [instant("2020-12-01T02:00"), instant("2020-12-01T06:00")]
    assert of_klines(rows).equals(market.truth("binance", "BTCUSDT", Timeframe.H1, requested))
    market.clear_outages()
    assert len(klines(market, interval="1h", **span(requested)).json()) == 24
    # Rows are indivisible: a halt removes those that it covers completely; days aggregate the others.
    market.plant_halt(window("2020-12-01T03:30", "2020-12-01T06:00"))
    rows = klines(market, interval="1h", **span(requested)).json()
    assert [row[0] * 1000 for row in rows[3:5]] == [instant("2020-12-01T03:00"), instant("2020-12-01T06:00")]
    (day,) = klines(market, interval="1d", **span(requested)).json()
    assert float(day[5]) == pytest.approx(sum(float(row[5]) for row in rows))
    market.clear_outages()


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("BTCUSDT.csv", HEAD, "the name must be"),
        ("BTCUSDT-7h.csv", HEAD, "the name must be"),
        ("BTCUSDT-1h.csv", HEAD, "has no rows"),
        ("BTCUSDT-1h.csv", "time,price\n1,2\n", "cannot be read"),
        ("BTCUSDT-1h.csv", HEAD + "yesterday,1,1,1,1,1\n", "ts must be UTC"),
        ("BTCUSDT-1h.csv", HEAD + "2024-01-01T00:30:00Z,1,1,1,1,1\n", "not on the 1h grid"),
        ("BTCUSDT-1h.csv", HEAD + "2024-01-01T00:00:00Z,1,1,1,1,1\n" * 2, "without duplicates"),
        ("BTCUSDT-1h.csv", HEAD + "2024-01-01T00:00:00Z,1,x,1,1,1\n", "row 1: high is 'x'"),
        ("BTCUSDT-1h.csv", HEAD + "2024-01-01T00:00:00Z,1,1,-1,1,1\n", "row 1: low is '-1'"),
        ("BTCUSDT-1h.csv", HEAD + "2024-01-01T00:00:00Z,1,1,1,1,12345678901234567\n", "more digits"),
    ],
)
def test_an_error_names_the_invalid_file(tmp_path: Path, name: str, text: str, sentence: str) -> None:
    (tmp_path / "binance").mkdir()
    (tmp_path / "binance" / name).write_text(text)
    with pytest.raises(ReplayError, match=sentence) as caught, LocalMarket(MarketConfig(replay=tmp_path)):
        pass
    assert str(tmp_path) in str(caught.value)


def test_an_error_names_the_invalid_directory(tmp_path: Path) -> None:
    with pytest.raises(ReplayError, match="not a directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(ReplayError, match="contains no file"):
        load(tmp_path)


def test_the_real_binance_file(shared_data: Callable[[str], Path]) -> None:
    path = shared_data("binance/BTCUSDT-1h.csv.gz")
    expected = file_rows(path)
    with LocalMarket(MarketConfig(replay=path.parents[1], limits=False)) as market:
        rows: list[list[Any]] = []
        start = int(expected[0][0])
        while page := klines(market, interval="1h", startTime=start, limit=1000).json():
            rows, start = rows + page, page[-1][0] + 1
        assert [[str(row[0]), *row[1:6]] for row in rows] == expected
        january = archive(market, "monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2021-01.zip")
        inside = window("2021-01-01", "2021-02-01")
        ours = [row for row in expected if inside.contains(int(row[0]) * 1000)]
        assert [row[:6] for row in unzipped(january.content)] == ours
        assert archive(market, "monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2020-11.zip").status_code == 404
        requested = window("2016-10-07", "2016-10-08")
        coinbase = aggs(market, "X:BTCUSD/range/1/minute/2016-10-07/2016-10-07").json()["results"]
        assert of_aggs(coinbase).equals(market.truth("polygon", "BTC/USDT", Timeframe.M1, requested))
        assert 1400 <= len(coinbase) <= 1420


def test_exponents_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "binance").mkdir()
    lines = "2024-01-01T00:00:00Z,1,1.5,1,1,6.45e-06\n2024-01-01T01:00:00Z,1,1,0.5,1,2\n"
    (tmp_path / "binance/ABCUSDT-1h.csv").write_text(HEAD + lines)
    served = load(tmp_path).crypto["binance"]
    hours = served.truth("ABCUSDT", Timeframe.H1, window("2024-01-01", "2024-01-02"))
    days = served.truth("ABCUSDT", Timeframe.D1, window("2024-01-01", "2024-01-02"))
    assert hours.volume.tolist() == [6.45e-06, 2.0]
    assert (days.volume[0], days.high[0], days.low[0]) == (2.00000645, 1.5, 0.5)
