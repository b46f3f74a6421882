"""The sample of a range: the same each time, spread, within the range, with the special candles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.sampling import MOST_MOVES, SPREAD, Moves, sample_of, unit_of
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster_tests.domain.builders import changed, random_walk

HOURS = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
NONE = np.empty(0, dtype=np.int64)

STARTS = st.integers(0, 20_000).map(lambda hours: hours * MICROS_PER_HOUR)
LENGTHS = st.integers(1, 30_000).map(lambda hours: hours * MICROS_PER_HOUR)
SHARES = st.one_of(st.none(), st.floats(0.001, 1.0))


def length(ranges: RangeSet) -> int:
    return int((ranges.ends - ranges.starts).sum())


@given(start=STARTS, duration=LENGTHS, share=SHARES, timeframe=st.sampled_from(Timeframe))
def test_a_sample_is_repeatable_and_within_its_range(
    start: int, duration: int, share: float | None, timeframe: Timeframe
) -> None:
    series, window = HOURS.at(timeframe), TimeRange(start, start + duration)
    sample = sample_of(series, window, share, NONE)
    assert sample == sample_of(series, window, share, NONE)
    assert sample
    assert not sample - RangeSet([window])
    unit = unit_of(timeframe)
    units = -(-window.end // unit) - window.start // unit
    count = min(units, SPREAD if share is None else int(np.ceil(share * units)))
    assert length(sample) <= count * unit
    assert (sample == RangeSet([window])) is (count == units)


@given(start=STARTS, days=st.integers(13, 1000))
def test_a_sample_is_spread(start: int, days: int) -> None:
    """Each twelfth of the range has a day in it."""
    window = TimeRange(start, start + days * MICROS_PER_DAY)
    sample = sample_of(HOURS, window, None, NONE)
    left_out = sample.complement(window)
    assert (left_out.ends - left_out.starts).max() <= 2 * (days / SPREAD + 2) * MICROS_PER_DAY


def test_the_range_and_the_series_choose_the_days() -> None:
    window = TimeRange(0, 3_000 * MICROS_PER_DAY)
    other = TimeRange(0, 3_001 * MICROS_PER_DAY)
    sample = sample_of(HOURS, window, None, NONE)
    assert sample != sample_of(HOURS, other, None, NONE)
    assert sample != sample_of(HOURS.at(Timeframe.M1), window, None, NONE)


@given(day=st.integers(0, 999))
def test_special_candles_are_in_the_sample_with_their_day(day: int) -> None:
    window = TimeRange(0, 1_000 * MICROS_PER_DAY)
    special = np.array([day * MICROS_PER_DAY + 5, 2_000 * MICROS_PER_DAY], dtype=np.int64)
    sample = sample_of(HOURS, window, 0.001, special)
    assert sample.contains(np.array([day * MICROS_PER_DAY, (day + 1) * MICROS_PER_DAY - 1])).all()
    assert length(sample) <= 2 * MICROS_PER_DAY


def test_an_empty_range_has_an_empty_sample() -> None:
    assert not sample_of(HOURS, TimeRange(5, 5), None, NONE)


@given(seed=st.integers(0, 2**32 - 1), parts=st.integers(1, 7), row=st.integers(1, 399))
def test_the_largest_moves_of_parts_are_those_of_the_whole(seed: int, parts: int, row: int) -> None:
    walk = random_walk(seed, 400)
    low = walk.low.copy()
    low[row] *= 0.2  # a wick alone
    walk = changed(walk, low=low)
    whole, moves = Moves.none().after(walk), Moves.none()
    for block in np.array_split(np.arange(400), parts):
        moves = moves.after(walk.take(block))
    assert moves.ts.tolist() == whole.ts.tolist()
    assert len(whole.ts) == MOST_MOVES
    assert whole.ts[0] == walk.ts[row]
    assert whole.size[0] >= -np.log(0.2) - 0.2


def test_the_first_candle_has_no_move() -> None:
    assert len(Moves.none().after(random_walk(1, 1)).ts) == 0


@pytest.mark.parametrize(
    ("timeframe", "days"), [(Timeframe.M1, 1), (Timeframe.H4, 1), (Timeframe.D1, 28), (Timeframe.W1, 196)]
)
def test_units(timeframe: Timeframe, days: int) -> None:
    assert unit_of(timeframe) == days * MICROS_PER_DAY
