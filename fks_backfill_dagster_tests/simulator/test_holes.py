"""Missing rows and pages of another symbol, in one response or in all, on every wire format."""

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
from fks_backfill_dagster.simulator.faults import ROWS, Fault, Fields, Kind, apply_fault, mixed
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
    """One request whose response contains the range `hole`: 40 bars, of which the provider has all or most.
    `other` is a symbol with a different price."""

    name: str
    request: Callable[[LocalMarket], requests.Response]
    read: Callable[[requests.Response], Candles]
    hole: TimeRange
    other: str

    def __str__(self) -> str:
        return self.name

    def rows(self, market: LocalMarket) -> Candles:
        answer = self.request(market)
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
        lambda answer: of_ohlc(answer, 0),  # by close time, as in the window of a fault
        hole("2025-03-01", 4 * MICROS_PER_HOUR),
        "SOL/USDT",
    ),
]


def inside(wire: Wire, rows: Candles) -> np.ndarray:
    found: np.ndarray = (rows.ts >= wire.hole.start) & (rows.ts < wire.hole.end)
    return found


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_rows_missing_in_one_response(market: LocalMarket, wire: Wire, kind: str) -> None:
    original = wire.rows(market)
    hit = inside(wire, original)
    assert 36 <= hit.sum() <= 40  # some minutes have no trades
    market.plant_fault(wire.name, kind, only=wire.hole)
    first = wire.rows(market)
    assert first.equals(original.take(~hit))
    lift_file_faults(market, wire)
    assert wire.rows(market).equals(original)


def lift_file_faults(market: LocalMarket, wire: Wire) -> None:
    """A file keeps its fault until it is lifted, to stay consistent with its checksum."""
    if wire.name == "archive":
        market.clear_faults()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_rows_missing_in_every_response(market: LocalMarket, wire: Wire) -> None:
    original = wire.rows(market)
    market.plant_fault(wire.name, "missing", count=None, window=wire.hole)
    for _ in range(3):
        assert wire.rows(market).equals(original.take(~inside(wire, original)))
    market.clear_faults()
    assert wire.rows(market).equals(original)


@pytest.mark.parametrize("wire", WIRES, ids=str)
@pytest.mark.parametrize("count", [1, None])
def test_a_page_of_another_symbol(market: LocalMarket, wire: Wire, count: int | None) -> None:
    original = wire.rows(market)
    market.plant_fault(wire.name, "other_symbol", count=count, window=wire.hole, other=wire.other)
    faulty = wire.rows(market)
    both, expected, found = np.intersect1d(original.ts, faulty.ts, return_indices=True)
    assert len(both) > 0.75 * len(original), "both have some minutes without trades"
    assert (np.abs(faulty.close[found] / original.close[expected] - 1) > 0.3).all()
    if count == 1:
        lift_file_faults(market, wire)
    again = wire.rows(market)
    assert again.equals(original if count == 1 else faulty)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_another_symbol_in_the_middle_of_a_page(market: LocalMarket, wire: Wire) -> None:
    original = wire.rows(market)
    market.plant_fault(wire.name, "other_symbol", window=wire.hole)
    other = wire.rows(market)
    market.clear_faults()
    market.plant_fault(wire.name, "other_symbol", only=wire.hole)
    mixture = wire.rows(market)
    hit = inside(wire, mixture)
    assert mixture.take(~hit).equals(original.take(~inside(wire, original)))
    assert hit.sum() > 30
    assert np.isin(mixture.ts[hit], other.ts).all()
    rows = np.searchsorted(other.ts, mixture.ts[hit])
    assert mixture.take(hit).equals(other.take(rows))


@pytest.mark.parametrize("wire", [wire for wire in WIRES if wire.name != "archive"], ids=str)
def test_nth_counts_responses_with_the_rows(market: LocalMarket, wire: Wire) -> None:
    original = wire.rows(market)
    market.plant_fault(wire.name, "missing", nth=2, only=wire.hole)
    counts = [len(wire.rows(market)) for _ in range(4)]
    lost = int(inside(wire, original).sum())
    assert [len(original) - count for count in counts] == [0, lost, 0, 0]
    market.clear_faults()
    market.plant_fault(wire.name, "missing", nth=3, count=None, only=wire.hole)
    counts = [len(wire.rows(market)) for _ in range(4)]
    assert [len(original) - count for count in counts] == [0, 0, lost, lost]


def test_a_response_without_the_rows_does_not_match(market: LocalMarket) -> None:
    """The requested span of Polygon's first page includes all following pages; only one contains the range."""
    path = "X:BTCUSD/range/1/minute/2025-03-10/2025-03-14"
    only = window("2025-03-12T14:00", "2025-03-12T14:40")
    original = pages(market, path)
    assert len(original) > 5
    market.plant_fault("polygon", "missing", only=only)
    missing = [len(a) - len(b) for a, b in zip(original, pages(market, path), strict=True)]
    assert sorted(missing) == [0] * (len(original) - 1) + [40]
    assert 0 < missing.index(40) < len(original) - 1, "a page in the middle"
    assert pages(market, path) == original


def test_one_page_in_the_middle_of_another_symbol(market: LocalMarket) -> None:
    path = "X:BTCUSD/range/1/minute/2025-03-10/2025-03-14"
    original = pages(market, path)
    market.plant_fault("polygon", "other_symbol", window=window("2025-03-12T14:00", "2025-03-12T14:01"))
    found = pages(market, path)
    changed = [page for page, other in zip(found, original, strict=True) if page != other]
    assert len(changed) == 1
    assert len(changed[0]) == 1000
    assert max(row["c"] for row in changed[0]) < min(row["c"] for row in original[0]) / 2


def pages(market: LocalMarket, path: str) -> list[list[dict[str, float]]]:
    found, page = [], aggs(market, path, limit=1000).json()
    while True:
        found.append(page["results"])
        if "next_url" not in page:
            return found
        page = requests.get(page["next_url"], headers={"Authorization": "Bearer any"}, timeout=10).json()


def test_transport_faults_match_by_requested_span(market: LocalMarket) -> None:
    market.plant_fault("binance", "status", window=window("2025-03-18T06:00", "2025-03-18T07:00"), nth=2)
    late = klines(market, **span(window("2025-03-18T07:00", "2025-03-18T08:00")))
    assert late.status_code == 200
    assert [klines(market, limit=1000, **span(DAY)).status_code for _ in range(3)] == [200, 500, 200]


@pytest.mark.parametrize("kind", sorted(ROWS - {Kind.OTHER_SYMBOL}))
def test_only_the_range_is_changed(kind: Kind) -> None:
    rows = [[minute * 60_000, 1.0, 3.0, 1.0, 2.0] for minute in range(100)]
    only = TimeRange(14 * 60_000_000, 24 * 60_000_000)
    fault = Fault(1, "binance", kind, only=only, window=TimeRange(0, 2**62))
    faulty = apply_fault(fault, rows, Fields(0, 1, 2, 3, False), 1000)
    assert faulty[:14] == rows[:14]
    assert faulty[-76:] == rows[24:]
    assert faulty[14:-76] != rows[14:24]
    left = {Kind.EMPTY: 0, Kind.MISSING: 0, Kind.SHORT: 5, Kind.DUPLICATED: 20}
    assert len(faulty) == 90 + left.get(kind, 10)


def test_mixed_rows_exist_in_the_other_symbol() -> None:
    original, other = [[ts, "original"] for ts in (1, 2, 3, 4)], [[ts, "other"] for ts in (1, 3, 9)]
    fields, only = Fields(0, 1, 1, 1, True), TimeRange(2000, 4000)
    assert mixed(original, other, fields, 1000, only) == [[1, "original"], [3, "other"], [4, "original"]]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "status", "rows_start": "2025-03-18"}, "apply to row faults only, not to status"),
        (
            {"kind": "missing", "other": "ETH/USDT"},
            "other applies to the fault other_symbol only, not to missing",
        ),
        ({"kind": "other_symbol", "other": "AAPL"}, "binance has no symbol 'AAPL'"),
        ({"kind": "missing", "nth": 0}, "nth of a fault must be at least 1"),
        ({"kind": "missing", "nth": "second"}, "nth of a fault must be a number"),
        ({"kind": "missing", "rows_start": "tomorrow"}, "tomorrow"),
    ],
)
def test_an_invalid_range_is_rejected(market: LocalMarket, options: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        market.post("/sim/faults", provider="binance", **options)
