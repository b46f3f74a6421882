"""The plausibility check against a slow reference implementation, by kind, and its cost."""

from __future__ import annotations

import math
import time
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.plausibility import AROUND, FACTOR, implausible
from fks_backfill_dagster_tests.examples import examples

Row = tuple[float, float, float, float]


def block(rows: list[Row]) -> Candles:
    open_, high, low, close = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Candles(np.arange(len(rows), dtype=np.int64) * 60, open_, high, low, close, np.ones(len(rows)))


def slowly(rows: list[Row]) -> list[bool]:
    """The reference implementation: the rule, candle by candle."""
    found = []
    for index, row in enumerate(rows):
        around = rows[max(index - AROUND, 0) : index + AROUND + 1]
        middle = median(price for one in around for price in one)
        high, low = row[1], row[2]
        far = high >= FACTOR * middle or low * FACTOR <= middle
        level = high if high >= FACTOR * middle else low
        beside = [rows[at] for at in (index - 1, index + 1) if 0 <= at < len(rows)]
        stays = any(
            all(abs(math.log(price / level)) < abs(math.log(price / middle)) for price in (one[0], one[3]))
            for one in beside
        )
        found.append(len(rows) > 1 and far and not stays)
    return found


LEVELS = st.sampled_from([1.0, 1.0, 1.0, 1.0, 1.25, 40.0, 50.0, 64.0, 100.0, 1000.0, 1 / 64, 1 / 100])


@st.composite
def rows_of(draw: st.DrawFn) -> list[Row]:
    rows = []
    for _ in range(draw(st.integers(0, 40))):
        level = draw(LEVELS)
        opened, closed = (level * draw(st.sampled_from([1.0, 1.0, 1.03, 0.97])) for _ in range(2))
        wick, tail = draw(st.sampled_from([1.0, 1.0, 1.0, 60.0])), draw(st.sampled_from([1.0, 1.0, 1 / 60]))
        rows.append((opened, max(opened, closed) * wick, min(opened, closed) * tail, closed))
    return rows


@settings(max_examples=examples(300))
@given(rows=rows_of())
def test_against_the_slow_reference(rows: list[Row]) -> None:
    assert implausible(block(rows)).tolist() == slowly(rows)


def at(level: float) -> Row:
    return (level, level * 1.01, level * 0.99, level)


CALM = [at(500.0)] * 12


@pytest.mark.parametrize("factor", [50.0, 100.0, 1000.0, 1 / 60, 1 / 100])
@pytest.mark.parametrize("place", [0, 1, 6, 11])
def test_a_single_candle_of_another_level(place: int, factor: float) -> None:
    rows = CALM.copy()
    rows[place] = at(500.0 * factor)
    assert np.flatnonzero(implausible(block(rows))).tolist() == [place]


@pytest.mark.parametrize("place", [0, 3, 10])
def test_a_level_that_stays_for_two_candles(place: int) -> None:
    rows = CALM.copy()
    rows[place : place + 2] = [at(50_000.0)] * 2
    assert not implausible(block(rows)).any()


def test_a_permanent_change_of_level() -> None:
    assert not implausible(block([*CALM, *[at(5.0)] * 12])).any()


@pytest.mark.parametrize("row", [(500.0, 50_000.0, 495.0, 500.0), (500.0, 505.0, 5.0, 500.0)])
def test_a_wick_alone(row: Row) -> None:
    rows = CALM.copy()
    rows[4] = row
    assert np.flatnonzero(implausible(block(rows))).tolist() == [4]


@pytest.mark.parametrize("factor", [0.03, 0.5, 2.0, 20.0, 49.0])
def test_moves_below_the_factor_are_plausible(factor: float) -> None:
    rows = CALM.copy()
    rows[6] = at(500.0 * factor)
    assert not implausible(block(rows)).any()


def test_a_single_candle_is_plausible() -> None:
    assert not implausible(block([])).any()
    assert not implausible(block([at(50_000.0)])).any()


@pytest.mark.parametrize("growth", [1.0, 100.0], ids=["calm", "a century"])
def test_half_a_million_candles(growth: float) -> None:
    """Best time below 50 ms of CPU, also if the whole block spans a factor of 100."""
    count = 500_000
    levels = np.exp(np.linspace(0, np.log(growth), count))
    candles = Candles(np.arange(count), levels, levels * 1.01, levels * 0.99, levels, levels)
    spent = []
    for _ in range(7):
        began = time.thread_time()
        found = implausible(candles)
        spent.append(time.thread_time() - began)
    assert not found.any()
    assert min(spent) < 0.05
