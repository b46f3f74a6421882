"""The rule `spike` against a slow reference, on planted spikes, on real candles, and its cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.evaluation import Block, Evaluation
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.spikes import (
    AROUND,
    CONTEXT,
    FLOOR,
    LEAST_RETURNS,
    NEAR,
    K,
    evaluate_spikes,
)
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster_tests.domain.builders import at, read_csv, window
from fks_backfill_dagster_tests.examples import examples

HOURS = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)


def block_of(candles: Candles, series: Series = HOURS) -> Block:
    return Block(candles, grid_of(series), series.timeframe)


def opens(count: int) -> Instants:
    return grid_of(HOURS).opens(window("2024-01-01T00:00Z", "2024-12-31T00:00Z"))[:count]


def calm(count: int = 300, move: float = 0.001) -> Candles:
    """Closes that go up by `move` twice and down again."""
    number = np.arange(count, dtype=np.float64)
    close = 100 * (1 + move * (number % 3))
    opened = 100 * (1 + move * ((number - 1) % 3))
    high, low = np.maximum(opened, close), np.minimum(opened, close)
    return Candles(opens(count), opened, high * 1.0002, low * 0.9998, close, np.ones(count))


def moved(candles: Candles, row: int, price: str, factor: float) -> Candles:
    """One price multiplied; high and low follow where they must."""
    changed = {name: getattr(candles, name).copy() for name in ("open", "high", "low", "close")}
    changed[price][row] *= factor
    changed["high"][row] = max(values[row] for values in changed.values())
    changed["low"][row] = min(values[row] for values in changed.values())
    return replace(candles, **changed)


def flagged(found: Evaluation) -> list[int]:
    return np.flatnonzero(found.flagged).tolist()


# Reference ----------------------------------------------------------------------------------------------


def middle(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return median(known) if known else 0.0


def around(values: list[float], row: int, width: int) -> list[float]:
    return values[max(row - width // 2, 0) : row + width // 2 + 1]


def slowly(block: Block) -> list[tuple[bool, bool]]:
    """The reference: candle by candle, whether it is evaluated and whether it is flagged."""
    candles, joined = block.candles, block.joined().tolist()
    rows = list(zip(*(column.tolist() for column in candles.columns()[1:5]), strict=True))
    close = [row[3] for row in rows]
    moves = [math.nan] + [
        abs(math.log(close[n] / close[n - 1])) if joined[n - 1] else math.nan for n in range(1, len(rows))
    ]
    widths = [math.log(row[1]) - math.log(row[2]) for row in rows]
    found = []
    for n in range(len(rows)):
        known = sum(not math.isnan(value) for value in around(moves, n, AROUND))
        if not 0 < n < len(rows) - 1 or not (joined[n - 1] and joined[n]) or known < LEAST_RETURNS:
            found.append((False, False))
            continue
        into, out = math.log(close[n] / close[n - 1]), math.log(close[n + 1] / close[n])
        before, after = rows[n - 1], rows[n + 1]
        body = [
            max(before[0], before[3]),
            max(after[0], after[3]),
            min(before[0], before[3]),
            min(after[0], after[3]),
        ]
        legs = [
            min(abs(into), abs(out)) if into * out < 0 else 0.0,
            math.log(rows[n][1]) - math.log(max(body[:2])),
            math.log(min(body[2:])) - math.log(rows[n][2]),
        ]
        usual = 1.4826 * max(middle(around(moves, n, AROUND)), middle(around(moves, n, NEAR)))
        wick = max(usual, 1.4826 * middle(around(widths, n, AROUND)))
        limits = [max(K * usual, FLOOR), max(K * wick, FLOOR), max(K * wick, FLOOR)]
        found.append((True, any(leg > limit for leg, limit in zip(legs, limits, strict=True))))
    return found


FACTORS = st.sampled_from([1.0] * 12 + [1.001, 0.999, 1.004, 0.996, 1.006, 0.994, 1.02, 0.98, 1.5, 0.1])


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Any prices, with candles missing in between."""
    count = draw(st.integers(0, 140))
    close = 100 * np.cumprod([draw(FACTORS) for _ in range(count)]) if count else np.empty(0)
    stray = np.array([draw(FACTORS) for _ in range(count)])
    opened = np.concatenate([close[:1], close[:-1]])
    close = close * stray
    high = np.maximum(opened, close) * np.array([max(draw(FACTORS), 1.0) for _ in range(count)])
    low = np.minimum(opened, close) * np.array([min(draw(FACTORS), 1.0) for _ in range(count)])
    absent = draw(st.sets(st.integers(0, max(count - 1, 0)), max_size=4))
    kept = np.array([n for n in range(count) if n not in absent], dtype=np.int64)
    return block_of(Candles(opens(count), opened, high, low, close, np.ones(count)).take(kept))


@settings(max_examples=examples(200))
@given(block=blocks())
def test_against_the_slow_reference(block: Block) -> None:
    found = evaluate_spikes(block)
    assert list(zip(found.evaluated.tolist(), found.flagged.tolist(), strict=True)) == slowly(block)
    for row in np.flatnonzero(found.flagged).tolist():
        assert found.strength[row] > 1
        assert found.detail(row)["factor"] == pytest.approx(K * found.strength[row], abs=0.05)


@settings(max_examples=examples(60))
@given(block=blocks(), first=st.integers(0, 140), length=st.integers(1, 40))
def test_a_result_depends_on_the_context_only(block: Block, first: int, length: int) -> None:
    """Candles are evaluated alike whatever lies beyond CONTEXT of them."""
    whole = evaluate_spikes(block)
    low = max(first - CONTEXT, 0)
    part = evaluate_spikes(block_of(block.candles.take(slice(low, first + length + CONTEXT))))
    inside = slice(first, first + length)
    moved_to = slice(first - low, first - low + length)
    for name in ("evaluated", "flagged", "strength"):
        np.testing.assert_array_equal(getattr(part, name)[moved_to], getattr(whole, name)[inside])


# Cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("price", "factor"),
    [("open", 1.05), ("open", 0.95), ("close", 1.05), ("close", 0.95), ("high", 1.05), ("low", 0.95)],
)
def test_every_price_is_evaluated(price: str, factor: float) -> None:
    found = evaluate_spikes(block_of(moved(calm(), 150, price, factor)))
    assert flagged(found) == [150]
    detail = found.detail(150)
    assert detail["price"] in ({"close", "high", "low"} if price == "close" else {"high", "low"})
    assert 4 < float(str(detail["leg_pct"])) < 6


def test_the_floor() -> None:
    """In a market that does not move, a spike of less than half a percent is none."""
    still = calm(move=0.0)
    assert flagged(evaluate_spikes(block_of(moved(still, 150, "close", 1.004)))) == []
    assert flagged(evaluate_spikes(block_of(moved(still, 150, "close", 1.006)))) == [150]


def test_a_move_that_stays_is_no_spike() -> None:
    rows = calm()
    step = np.where(np.arange(300) >= 150, 1.3, 1.0)
    stays = replace(rows, **{name: getattr(rows, name) * step for name in ("open", "high", "low", "close")})
    assert flagged(evaluate_spikes(block_of(stays))) == []


def test_an_hour_of_large_moves_is_its_own_scale() -> None:
    """Ten candles that move by 3 %: the one that goes out and back among them is not ten times as large."""
    rows = calm()
    wild = rows.close.copy()
    wild[145:156] = 100 * (1 + 0.03 * (np.arange(11) % 2))
    candles = replace(rows, close=wild, high=np.maximum(rows.high, wild), low=np.minimum(rows.low, wild))
    assert flagged(evaluate_spikes(block_of(candles))) == []


@pytest.mark.parametrize("absent", [149, 151])
def test_a_missing_neighbour_is_not_replaced_by_the_next_candle(absent: int) -> None:
    rows = moved(calm(), 150, "close", 1.3)
    found = evaluate_spikes(block_of(rows.take(np.arange(300) != absent)))
    assert flagged(found) == []
    assert found.evaluated.sum() == 299 - 2 - 2


def test_closed_hours_are_no_neighbours() -> None:
    """A price that goes out overnight and back the next night; within the day nothing returns."""
    stocks = Series("AAPL", Timeframe.H4, AssetClass.STOCKS)
    ts = grid_of(stocks).opens(window("2023-01-01T00:00Z", "2024-01-01T00:00Z"))
    days = np.unique(ts // 86_400_000_000, return_inverse=True)[1]
    close = np.where(days == 100, 130.0, 100.0) * (1 + 0.001 * (np.arange(len(ts)) % 2))
    candles = Candles(ts, close, close * 1.0001, close * 0.9999, close, np.ones(len(ts)))
    assert flagged(evaluate_spikes(block_of(candles, stocks))) == []


def test_days_are_neighbours_over_a_weekend() -> None:
    stocks = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)
    ts = grid_of(stocks).opens(window("2023-01-01T00:00Z", "2024-03-08T00:00Z"))[:290]
    monday = int(np.searchsorted(ts, at("2023-10-02T00:00Z")))
    candles = replace(calm(len(ts)), ts=ts)
    found = evaluate_spikes(block_of(moved(candles, monday, "close", 1.2), stocks))
    assert flagged(found) == [monday]
    assert found.evaluated.sum() == len(ts) - 2


@pytest.mark.parametrize("count", [0, 1, 2, LEAST_RETURNS])
def test_too_few_candles_are_not_evaluated(count: int) -> None:
    found = evaluate_spikes(block_of(moved(calm(), 150, "close", 1.3).take(slice(148, 148 + count))))
    assert not found.evaluated.any()
    assert not found.flagged.any()


# Real candles -------------------------------------------------------------------------------------------

REAL = {
    "binance/BTCUSDT-1h": ("crypto", "1h"),
    "bitstamp/BTCUSD-1d": ("crypto", "1d"),
    "coinbase/BTCUSD-1d": ("crypto", "1d"),
    "coinbase/BTCUSD-1m": ("crypto", "1m"),
    "equity/AAPL-1d": ("stocks", "1d"),
    "equity/AAPL-1h": ("stocks", "1h"),
    "equity/AAPL-1m": ("stocks", "1m"),
    "equity/GOOG-1m": ("stocks", "1m"),
    "forex/EURUSD-1h": ("forex", "1h"),
    "forex/EURUSD-1m": ("forex", "1m"),
}

# Lows of a cent to a few dollars where Apple and Bitcoin traded far above: bad prints of the sources.
BAD_PRINTS = {
    ("coinbase/BTCUSD-1d", "2017-04-15T00:00Z"),
    ("equity/AAPL-1d", "2009-09-21T00:00Z"),
    ("equity/AAPL-1d", "2010-08-31T00:00Z"),
    ("equity/AAPL-1d", "2011-01-03T00:00Z"),
    ("equity/AAPL-1h", "2010-08-31T18:00Z"),
    ("equity/AAPL-1h", "2011-01-03T18:00Z"),
}


def real(shared_data: Callable[[str], Path], name: str) -> Block:
    asset_class, timeframe = REAL[name]
    series = Series(name, Timeframe(timeframe), AssetClass(asset_class))
    candles = read_csv(shared_data(f"{name}.csv.gz"))
    return block_of(candles.take(grid_of(series).contains(candles.ts)), series)


def test_real_candles(shared_data: Callable[[str], Path]) -> None:
    """At most one close of 100,000, and one candle of 10,000 by any price; the known bad prints are among these."""
    found = {}
    for name in REAL:
        block = real(shared_data, name)
        found[name] = block, evaluate_spikes(block)
    candles = sum(len(block.candles) for block, _ in found.values())
    evaluated = sum(int(one.evaluated.sum()) for _, one in found.values())
    assert candles == 158_505
    assert evaluated > 0.9 * candles
    spikes = {
        (name, int(block.candles.ts[row])): one.detail(row)
        for name, (block, one) in found.items()
        for row in np.flatnonzero(one.flagged).tolist()
    }
    assert sum(detail["price"] == "close" for detail in spikes.values()) <= evaluated // 100_000
    assert len(spikes) <= evaluated // 10_000
    assert {(name, at(moment)) for name, moment in BAD_PRINTS} <= set(spikes)


# Recall at K = 10 of one close in 160 that is moved, as docs/measurements.md has it.
RECALL = [
    ("coinbase/BTCUSD-1m", 0.02, 0.85),
    ("forex/EURUSD-1m", 0.02, 0.97),
    ("equity/AAPL-1h", 0.10, 0.60),
    ("forex/EURUSD-1h", 0.05, 0.97),
]


@pytest.mark.parametrize(("name", "share", "least"), RECALL)
def test_planted_spikes_among_real_candles(
    shared_data: Callable[[str], Path], name: str, share: float, least: float
) -> None:
    block = real(shared_data, name)
    candles = block.candles
    rows = np.flatnonzero(evaluate_spikes(block).evaluated)[80::160]
    close = candles.close.copy()
    close[rows] *= np.where(np.arange(len(rows)) % 2, 1 + share, 1 - share)
    planted = replace(
        candles, close=close, high=np.maximum(candles.high, close), low=np.minimum(candles.low, close)
    )
    assert evaluate_spikes(replace(block, candles=planted)).flagged[rows].mean() >= least


def test_half_a_million_candles() -> None:
    """Columns, not candles: a Python loop over them would take seconds of CPU, even on an idle machine."""
    count = 500_000
    levels = 100 * (1 + 0.001 * (np.arange(count, dtype=np.float64) % 3))
    ts = grid_of(HOURS).opens(window("1970-01-01T00:00Z", "2035-01-01T00:00Z"))[:count]
    block = block_of(Candles(ts, levels, levels * 1.0001, levels * 0.9999, levels, levels))
    spent = []
    for _ in range(5):
        began = time.thread_time()
        found = evaluate_spikes(block)
        spent.append(time.thread_time() - began)
    assert found.evaluated.sum() == count - 2
    assert not found.flagged.any()
    assert min(spent) < 1.0
