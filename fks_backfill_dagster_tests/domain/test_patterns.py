"""Each planted error is recognised by its pattern, on random walks of different volatility."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.patterns import (
    Classification,
    Pattern,
    classify,
    factor_name,
    rank_correlation,
)
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)
from fks_backfill_dagster_tests.domain.builders import changed, random_walk

TOLERANCE = 0.01
SEEDS = st.integers(0, 2**32 - 1)
STEPS = st.sampled_from([Timeframe.M1, Timeframe.M15, Timeframe.H1, Timeframe.H4, Timeframe.D1])
VOLATILITY = st.floats(0.002, 0.05)


def noisy(candles: Candles, seed: int, size: float = 0.0005) -> Candles:
    """The same market at another venue: each price differs a little, high and low stay the extremes."""
    draw = np.random.default_rng(seed + 1).normal(0, size, (4, len(candles)))
    opened, high, low, close = (
        column * np.exp(noise) for column, noise in zip(candles.columns()[1:5], draw, strict=True)
    )
    top, bottom = np.maximum.reduce([opened, high, low, close]), np.minimum.reduce([opened, high, low, close])
    return Candles(candles.ts, opened, top, bottom, close, candles.volume)


def times(candles: Candles, factor: float | NDArray[np.float64]) -> Candles:
    ts, opened, high, low, close, volume = candles.columns()
    return Candles(ts, opened * factor, high * factor, low * factor, close * factor, volume)


def later(candles: Candles, micros: int) -> Candles:
    return Candles(candles.ts + micros, *candles.columns()[1:])


def found(stored: Candles, other: Candles, timeframe: Timeframe = Timeframe.H1) -> Classification:
    classified = classify(stored, other, TOLERANCE, timeframe.micros)
    assert classified is not None
    return classified


@given(seed=SEEDS, timeframe=STEPS, volatility=VOLATILITY)
def test_the_same_market_at_two_venues_shows_no_pattern(
    seed: int, timeframe: Timeframe, volatility: float
) -> None:
    mine = random_walk(seed, 300, step=timeframe.micros, volatility=volatility)
    assert classify(mine, noisy(mine, seed), TOLERANCE, timeframe.micros) is None


FACTORS = [100.0, 0.01, 1000.0, 0.001, 7.0, 1 / 7, 4.0, 0.5, 1.5, 20.0, 1.37]


@given(
    seed=SEEDS,
    timeframe=STEPS,
    volatility=VOLATILITY,
    factor=st.sampled_from(FACTORS),
    from_row=st.integers(0, 290),
)
def test_a_constant_factor(
    seed: int, timeframe: Timeframe, volatility: float, factor: float, from_row: int
) -> None:
    """Over the whole range, or before a split only."""
    mine = random_walk(seed, 300, step=timeframe.micros, volatility=volatility)
    other = noisy(mine, seed)
    stored = Candles.concat(
        [times(mine.take(slice(0, 300 - from_row)), factor), mine.take(slice(300 - from_row, 300))]
    )
    classified = found(stored, other, timeframe)
    assert classified.pattern is Pattern.FACTOR
    assert classified.factor == pytest.approx(factor, rel=0.005)


@given(
    seed=SEEDS,
    rows=st.sets(st.integers(0, 299), min_size=1, max_size=60),
    side=st.sampled_from(["high", "low"]),
)
def test_a_wick(seed: int, rows: set[int], side: str) -> None:
    mine = random_walk(seed, 300)
    column = getattr(mine, side).copy()
    column[sorted(rows)] *= 1.08 if side == "high" else 0.92
    assert found(changed(mine, **{side: column}), noisy(mine, seed)).pattern is Pattern.WICK


@given(seed=SEEDS, timeframe=STEPS, bars=st.sampled_from([-1, 1]), volatility=st.floats(0.01, 0.05))
def test_an_offset_by_a_bar(seed: int, timeframe: Timeframe, bars: int, volatility: float) -> None:
    mine = random_walk(seed, 400, step=timeframe.micros, volatility=volatility)
    stored = later(mine, bars * timeframe.micros)
    assert found(stored, noisy(mine, seed), timeframe) == Classification(Pattern.BAR_OFFSET, bars=bars)


@given(
    seed=SEEDS,
    timeframe=st.sampled_from([Timeframe.M5, Timeframe.M15, Timeframe.H1]),
    hours=st.integers(-12, 14).filter(lambda hours: abs(hours) > 1),
)
def test_an_offset_by_a_zone(seed: int, timeframe: Timeframe, hours: int) -> None:
    mine = random_walk(seed, 800, step=timeframe.micros, volatility=0.02)
    stored = later(mine, hours * MICROS_PER_HOUR)
    bars = hours * MICROS_PER_HOUR // timeframe.micros
    expected = Classification(Pattern.ZONE_OFFSET, bars=bars, hours=hours)
    assert found(stored, noisy(mine, seed), timeframe) == expected


@given(seed=SEEDS, timeframe=STEPS, volatility=VOLATILITY, level=st.sampled_from([0.01, 0.06, 30.0, 900.0]))
def test_another_symbol(seed: int, timeframe: Timeframe, volatility: float, level: float) -> None:
    stored = random_walk(seed, 300, step=timeframe.micros, volatility=volatility)
    other = times(random_walk(seed + 77, 300, step=timeframe.micros, volatility=volatility), level)
    ratio = stored.close / other.close
    classified = found(stored, other, timeframe)
    # Two calm symbols keep one ratio for the whole range: their candles are those of one symbol times a factor.
    calm = np.abs(np.log(ratio / np.median(ratio))).max() <= 2 * TOLERANCE
    assert classified.pattern is Pattern.OTHER_SYMBOL or (calm and classified.pattern is Pattern.FACTOR)


@given(seed=SEEDS, volatility=st.floats(0.005, 0.05), level=st.sampled_from([-0.03, -0.02, 0.02, 0.03]))
def test_the_basis_of_two_quote_currencies(seed: int, volatility: float, level: float) -> None:
    """A premium that changes slowly, and at times is within the tolerance."""
    mine = random_walk(seed, 500, volatility=volatility)
    premium = np.exp(level * (1 + 0.3 * np.sin(np.linspace(0, 9, 500))))
    stored = times(mine, premium)
    classified = found(stored, noisy(mine, seed))
    assert classified.pattern is Pattern.QUOTE_BASIS
    assert classified.factor == pytest.approx(np.exp(level), abs=0.01)


@given(
    seed=SEEDS,
    rows=st.lists(st.integers(0, 99), min_size=3, max_size=20, unique=True),
)
def test_single_candles(seed: int, rows: list[int]) -> None:
    """Beyond one another in size and direction, and none beside another."""
    mine = random_walk(seed, 300)
    column = mine.close.copy()
    column[[3 * row for row in rows]] *= 1 + np.linspace(-0.4, 0.6, len(rows))[np.argsort(rows)] + 0.013
    assert found(changed(mine, close=column), noisy(mine, seed)).pattern is Pattern.SCATTERED


def test_a_stuck_series_is_no_other_symbol() -> None:
    """Identical candles have no returns to compare."""
    mine = random_walk(5, 300, volatility=0.05)
    level = mine.close[:1].repeat(300)
    stuck = Candles(mine.ts, level, level, level, level, mine.volume)
    assert found(stuck, mine).pattern is Pattern.SCATTERED


@pytest.mark.parametrize(
    ("factor", "name"),
    [
        (100, "100"),
        (1000.4, "1,000"),
        (0.01, "1/100"),
        (7, "7"),
        (1 / 7, "1/7"),
        (1.5, "3/2"),
        (1.37, "1.37"),
    ],
)
def test_names_of_factors(factor: float, name: str) -> None:
    assert factor_name(factor) == name


@pytest.mark.parametrize(
    ("classified", "text"),
    [
        (Classification(Pattern.FACTOR, factor=100.0), "stored prices are 100 times the others"),
        (Classification(Pattern.BAR_OFFSET, bars=1), "stored candles are 1 bar late"),
        (Classification(Pattern.ZONE_OFFSET, bars=-5, hours=-5), "stored candles are 5 h early"),
        (Classification(Pattern.WICK), "only high or low differ"),
    ],
)
def test_texts(classified: Classification, text: str) -> None:
    assert str(classified) == text


def test_rank_correlation() -> None:
    rising = np.arange(50.0)
    assert rank_correlation(rising, rising**3) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    assert rank_correlation(rising, np.ones(50)) is None
    spiked = rising.copy()
    spiked[25] = 1e9
    assert rank_correlation(rising, spiked) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("minutes", [1, 60, 1440])
def test_the_cost_is_that_of_some_shifts(minutes: int) -> None:
    """Twice as many candles as are classified: the shifts of the rest are not computed."""
    step = minutes * MICROS_PER_MINUTE
    mine = random_walk(1, 40_000, step=step)
    other = random_walk(2, 40_000, step=step)
    assert found(mine, other, Timeframe.M1 if step < MICROS_PER_DAY else Timeframe.D1) is not None
