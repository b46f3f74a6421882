from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster_tests.domain.builders import candles

NAN = float("nan")
ROWS = st.lists(st.tuples(st.integers(0, 9), *[st.sampled_from([1.0, 2.0, NAN])] * 5), max_size=12)


def rows_of(block: Candles) -> list[tuple[float, ...]]:
    return list(zip(*(column.tolist() for column in block.columns()), strict=True))


@given(ROWS)
def test_sorted_is_ascending_and_stable(rows: list[tuple[float, ...]]) -> None:
    expected = candles(*sorted(rows, key=lambda row: row[0]))
    assert candles(*rows).sorted().equals(expected)


@given(ROWS, st.integers(0, 9), st.integers(0, 9))
def test_within(rows: list[tuple[float, ...]], a: int, b: int) -> None:
    start, end = min(a, b), max(a, b)
    block = candles(*rows).sorted()
    assert block.within(TimeRange(start, end)).equals(
        candles(*(row for row in rows_of(block) if start <= row[0] < end))
    )


@given(st.lists(ROWS, max_size=4))
def test_concat(parts: list[list[tuple[float, ...]]]) -> None:
    whole = Candles.concat([candles(*rows) for rows in parts])
    assert whole.equals(candles(*(row for rows in parts for row in rows)))
    assert len(whole) == sum(map(len, parts))


def test_equals_takes_nan_for_nan_and_nothing_else() -> None:
    block = candles((1, 1, 1, 1, 1, NAN))
    assert block.equals(candles((1, 1, 1, 1, 1, NAN)))
    assert not block.equals(candles((1, 1, 1, 1, 1, 0)))
    assert not block.equals(candles((2, 1, 1, 1, 1, NAN)))
    assert not block.equals(Candles.empty())


def test_empty_has_the_types_of_a_block() -> None:
    assert [column.dtype for column in Candles.empty().columns()] == [np.int64] + [np.float64] * 5


def test_within_makes_views() -> None:
    block = candles(*((n, 1, 1, 1, 1, 1) for n in range(5)))
    part = block.within(TimeRange(1, 3))
    assert all(np.shares_memory(a, b) for a, b in zip(part.columns(), block.columns(), strict=True))
