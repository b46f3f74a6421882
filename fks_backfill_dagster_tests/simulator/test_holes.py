"""Rows that are not there and pages of another symbol, in one answer or in all: on every wire format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.faults import ROWS, Fault, Fields, Kind, mixed, spoil
from fks_backfill_dagster_tests.simulator.wire import (
    aggs,
    archive,
    candles,
    chart,
    klines,
    of_aggs,
    of_candles,
    of_chart,
    of_klines,
    of_ohlc,
    of_series,
    ohlc,
    span,
    unzipped,
    vantage,
    window,
)

MINUTE = MICROS_PER_MINUTE


@dataclass(frozen=True)
class Wire:
    """One answer that holds the stretch `hole`: 40 bars of which the provider has all or most. `other` is a
    symbol of another price."""

    name: str
    ask: Callable[[LocalMarket], requests.Response]
    read: Callable[[requests.Response], Candles]
    hole: TimeRange
    other: str

    def __str__(self) -> str:
        return self.name

    def rows(self, market: LocalMarket) -> Candles:
        answer = self.ask(market)
        assert answer.status_code == 200
        return self.read(answer)


def hole(start: str, step: int) -> TimeRange:
    return TimeRange(instant(start), instant(start) + 40 * step)


DAY, TUESDAY = window("2025-03-18", "2025-03-18T12:00"), window("2025-03-18T13:30", "2025-03-18T20:00")
FILE = "daily/klines/BTCUSDT/1m/BTCUSDT-1m-2025-03-18.zip"
WIRES = [
    Wire(
        "binance",
        lambda market: klines(market, limit=1000, **span(DAY)),
        lambda answer: of_klines(answer.json()),
        hole("2025-03-18T06:00", MINUTE),
        "SOL/USDT",
    ),
    Wire(
        "archive",
        lambda market: archive(market, FILE),
        lambda answer: of_klines(unzipped(answer.content), 1),
        hole("2025-03-18T06:00", MINUTE),
        "SOL/USDT",
    ),
    Wire(
        "polygon",
        lambda market: aggs(market, "AAPL/range/1/minute/2025-03-18/2025-03-18", adjusted="false"),
        lambda answer: of_aggs(answer.json()["results"]),
        hole("2025-03-18T15:00", MINUTE),
        "GOOG",
    ),
    Wire(
        "yahoo",
        lambda market: chart(market, interval="1m", of=TUESDAY),
        of_chart,
        hole("2025-03-18T15:00", MINUTE),
        "GOOG",
    ),
    Wire(
        "alphavantage",
        lambda market: vantage(market, "TIME_SERIES_INTRADAY", interval="1min", month="2025-02"),
        of_series,
        hole("2025-02-18T16:00", MINUTE),
        "GOOG",
    ),
    Wire(
        "oanda",
        lambda market: candles(market, granularity="M1", of=DAY),
        of_candles,
        hole("2025-03-18T06:00", MINUTE),
        "USD/JPY",
    ),
    Wire(
        "coingecko",
        lambda market: ohlc(market, days=30),
        lambda answer: of_ohlc(answer, 0),  # by their close, as the window of a fault means them
        hole("2025-03-01", 4 * MICROS_PER_HOUR),
        "SOL/USDT",
    ),
]


def inside(wire: Wire, rows: Candles) -> np.ndarray:
    found: np.ndarray = (rows.ts >= wire.hole.start) & (rows.ts < wire.hole.end)
    return found


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_rows_that_one_answer_lacks(market: LocalMarket, wire: Wire, kind: str) -> None:
    honest = wire.rows(market)
    hit = inside(wire, honest)
    assert 36 <= hit.sum() <= 40  # some minutes are quiet
    market.plant_fault(wire.name, kind, only=wire.hole)
    first = wire.rows(market)
    assert first.equals(honest.take(~hit))
    market_again(market, wire)
    assert wire.rows(market).equals(honest)


def market_again(market: LocalMarket, wire: Wire) -> None:
    """A file that was hit keeps its fault, as its checksum tells of the same bytes, until it is lifted."""
    if wire.name == "archive":
        market.clear_faults()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_rows_that_every_answer_lacks(market: LocalMarket, wire: Wire) -> None:
    honest = wire.rows(market)
    market.plant_fault(wire.name, "missing", count=None, window=wire.hole)
    for _ in range(3):
        assert wire.rows(market).equals(honest.take(~inside(wire, honest)))
    market.clear_faults()
    assert wire.rows(market).equals(honest)


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("count", [1, None])
def test_a_page_of_another_symbol(market: LocalMarket, wire: Wire, count: int | None) -> None:
    honest = wire.rows(market)
    market.plant_fault(wire.name, "other_symbol", count=count, window=wire.hole, other=wire.other)
    lie = wire.rows(market)
    both, ours, theirs = np.intersect1d(honest.ts, lie.ts, return_indices=True)
    assert len(both) > 0.75 * len(honest), "of either some minutes are quiet"
    assert (np.abs(lie.close[theirs] / honest.close[ours] - 1) > 0.3).all()
    if count == 1:
        market_again(market, wire)
    again = wire.rows(market)
    assert again.equals(honest if count == 1 else lie)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_another_symbol_in_the_middle_of_a_page(market: LocalMarket, wire: Wire) -> None:
    honest = wire.rows(market)
    market.plant_fault(wire.name, "other_symbol", window=wire.hole)
    lie = wire.rows(market)
    market.clear_faults()
    market.plant_fault(wire.name, "other_symbol", only=wire.hole)
    mixture = wire.rows(market)
    hit = inside(wire, mixture)
    assert mixture.take(~hit).equals(honest.take(~inside(wire, honest)))
    assert hit.sum() > 30
    assert np.isin(mixture.ts[hit], lie.ts).all()
    rows = np.searchsorted(lie.ts, mixture.ts[hit])
    assert mixture.take(hit).equals(lie.take(rows))


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire.name != "archive"], ids=str)
def test_the_second_answer_that_holds_the_rows(market: LocalMarket, wire: Wire) -> None:
    honest = wire.rows(market)
    market.plant_fault(wire.name, "missing", nth=2, only=wire.hole)
    counts = [len(wire.rows(market)) for _ in range(4)]
    lost = int(inside(wire, honest).sum())
    assert [len(honest) - count for count in counts] == [0, lost, 0, 0]
    market.clear_faults()
    market.plant_fault(wire.name, "missing", nth=3, count=None, only=wire.hole)
    counts = [len(wire.rows(market)) for _ in range(4)]
    assert [len(honest) - count for count in counts] == [0, 0, lost, lost]


def test_an_answer_without_the_rows_is_none_of_them(market: LocalMarket) -> None:
    """Polygon's first page is asked for with all that follows it; only one page holds the stretch."""
    path = "X:BTCUSD/range/1/minute/2025-03-10/2025-03-14"
    only = window("2025-03-12T14:00", "2025-03-12T14:40")
    honest = pages(market, path)
    assert len(honest) > 5
    market.plant_fault("polygon", "missing", only=only)
    lacking = [len(a) - len(b) for a, b in zip(honest, pages(market, path), strict=True)]
    assert sorted(lacking) == [0] * (len(honest) - 1) + [40]
    assert 0 < lacking.index(40) < len(honest) - 1, "one in the middle"
    assert pages(market, path) == honest


def test_one_page_in_the_middle_is_another_symbols(market: LocalMarket) -> None:
    path = "X:BTCUSD/range/1/minute/2025-03-10/2025-03-14"
    honest = pages(market, path)
    market.plant_fault("polygon", "other_symbol", window=window("2025-03-12T14:00", "2025-03-12T14:01"))
    found = pages(market, path)
    changed = [page for page, other in zip(found, honest, strict=True) if page != other]
    assert len(changed) == 1
    assert len(changed[0]) == 1000
    assert max(row["c"] for row in changed[0]) < min(row["c"] for row in honest[0]) / 2


def pages(market: LocalMarket, path: str) -> list[list[dict[str, float]]]:
    found, page = [], aggs(market, path, limit=1000).json()
    while True:
        found.append(page["results"])
        if "next_url" not in page:
            return found
        page = requests.get(page["next_url"], headers={"Authorization": "Bearer any"}, timeout=10).json()


def test_faults_without_rows_go_by_the_time_asked_for(market: LocalMarket) -> None:
    market.plant_fault("binance", "status", window=window("2025-03-18T06:00", "2025-03-18T07:00"), nth=2)
    late = klines(market, **span(window("2025-03-18T07:00", "2025-03-18T08:00")))
    assert late.status_code == 200
    assert [klines(market, limit=1000, **span(DAY)).status_code for _ in range(3)] == [200, 500, 200]


@pytest.mark.parametrize("kind", sorted(ROWS - {Kind.OTHER_SYMBOL}))
def test_nothing_but_the_stretch_is_changed(kind: Kind) -> None:
    rows = [[minute * 60_000, 1.0, 3.0, 1.0, 2.0] for minute in range(100)]
    only = TimeRange(14 * 60_000_000, 24 * 60_000_000)
    fault = Fault(1, "binance", kind, only=only, window=TimeRange(0, 2**62))
    spoilt = spoil(fault, rows, Fields(0, 1, 2, 3, False), 1000)
    assert spoilt[:14] == rows[:14]
    assert spoilt[-76:] == rows[24:]
    assert spoilt[14:-76] != rows[14:24]
    left = {Kind.EMPTY: 0, Kind.MISSING: 0, Kind.SHORT: 5, Kind.DUPLICATED: 20}
    assert len(spoilt) == 90 + left.get(kind, 10)


def test_mixed_rows_are_those_that_the_other_symbol_has() -> None:
    honest, other = [[ts, "ours"] for ts in (1, 2, 3, 4)], [[ts, "theirs"] for ts in (1, 3, 9)]
    fields, only = Fields(0, 1, 1, 1, True), TimeRange(2000, 4000)
    assert mixed(honest, other, fields, 1000, only) == [[1, "ours"], [3, "theirs"], [4, "ours"]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "status", "rows_start": "2025-03-18"}, "for faults of rows, and status is none"),
        ({"kind": "missing", "other": "ETH/USDT"}, "other is for the fault other_symbol, not for missing"),
        ({"kind": "other_symbol", "other": "AAPL"}, "binance does not know 'AAPL'"),
        ({"kind": "missing", "nth": 0}, "counts from 1"),
        ({"kind": "missing", "nth": "second"}, "nth of a fault is a number"),
        ({"kind": "missing", "rows_start": "tomorrow"}, "tomorrow"),
    ],
)
def test_a_wrong_stretch_is_refused(market: LocalMarket, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        market.post("/sim/faults", provider="binance", **options)
