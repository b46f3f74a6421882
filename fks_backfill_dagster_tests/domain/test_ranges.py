"""RangeSet against Python sets of small integers."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange, among

LIMIT = 30
RANGES = st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)).map(lambda p: TimeRange(min(p), max(p)))
LISTS = st.lists(RANGES, max_size=6)


def points(ranges: RangeSet | list[TimeRange]) -> set[int]:
    return {n for r in ranges for n in range(r.start, r.end)}


def assert_normal(ranges: RangeSet) -> None:
    """Sorted, not empty, neither overlapping nor touching."""
    assert ranges.starts.dtype == ranges.ends.dtype == np.int64
    assert (ranges.starts < ranges.ends).all()
    assert (ranges.starts[1:] > ranges.ends[:-1]).all()


@given(LISTS)
def test_holds_the_same_instants(ranges: list[TimeRange]) -> None:
    made = RangeSet(ranges)
    assert_normal(made)
    assert points(made) == points(ranges)
    assert bool(made) == bool(points(ranges))
    starts, ends = (np.array([getattr(r, edge) for r in ranges], dtype=np.int64) for edge in ("start", "end"))
    assert RangeSet.from_arrays(starts, ends) == made
    assert hash(RangeSet(reversed(ranges))) == hash(made)


@given(LISTS, LISTS)
def test_set_operations(a: list[TimeRange], b: list[TimeRange]) -> None:
    for made, expected in (
        (RangeSet(a) | RangeSet(b), points(a) | points(b)),
        (RangeSet(a) & RangeSet(b), points(a) & points(b)),
        (RangeSet(a) - RangeSet(b), points(a) - points(b)),
    ):
        assert_normal(made)
        assert points(made) == expected
    assert (RangeSet(a) == RangeSet(b)) == (points(a) == points(b))


@given(LISTS, RANGES)
def test_complement(ranges: list[TimeRange], within: TimeRange) -> None:
    made = RangeSet(ranges).complement(within)
    assert_normal(made)
    assert points(made) == points([within]) - points(ranges)


@given(LISTS)
def test_contains_and_hull(ranges: list[TimeRange]) -> None:
    made = RangeSet(ranges)
    instants = np.arange(-1, LIMIT + 2, dtype=np.int64)
    assert set(instants[made.contains(instants)].tolist()) == points(ranges)
    inside = points(ranges)
    assert made.hull == (TimeRange(min(inside), max(inside) + 1) if inside else TimeRange(0, 0))


@given(LISTS, st.integers(0, 6))
def test_merge_closer_than(ranges: list[TimeRange], distance: int) -> None:
    made = RangeSet(ranges).merge_closer_than(distance)
    inside = sorted(points(ranges))
    bridged = {n for a, b in pairwise(inside) if b - a - 1 <= distance for n in range(a, b)}
    assert points(made) == bridged | set(inside)


@given(RANGES, RANGES)
def test_intersect(a: TimeRange, b: TimeRange) -> None:
    assert points([a.intersect(b)]) == points([a]) & points([b])


@given(RANGES, st.integers(-1, LIMIT + 1))
def test_range_contains(a: TimeRange, instant: int) -> None:
    assert a.contains(instant) == (instant in points([a]))
    assert a.duration == len(points([a]))
    assert bool(a) == bool(points([a]))


INSTANTS = st.lists(st.integers(-1, LIMIT + 1))


@given(INSTANTS, INSTANTS)
def test_among(some: list[int], others: list[int]) -> None:
    found = among(np.array(some, dtype=np.int64), np.array(others, dtype=np.int64))
    assert found.tolist() == [instant in others for instant in some]


def test_end_before_start_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2024-01-02.* after its end .*2024-01-01"):
        TimeRange.of(datetime(2024, 1, 2, tzinfo=UTC), datetime(2024, 1, 1, tzinfo=UTC))
