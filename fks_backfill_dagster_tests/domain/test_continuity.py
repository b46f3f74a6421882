"""Jumps at the edges of responses."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import contradict, doubtful, foreign

HOUR = 3_600_000_000


def candles(opens: list[float], closes: list[float]) -> Candles:
    first, last = np.array(opens), np.array(closes)
    ts = np.arange(len(first), dtype=np.int64) * HOUR
    return Candles(ts, first, np.maximum(first, last), np.minimum(first, last), last, np.ones(len(first)))


@given(
    st.floats(0.1, 10).filter(lambda ratio: abs(np.log(ratio)) > 0.2),
    st.integers(3, 60),
    st.sets(st.integers(1, 59)),
)
def test_usual_steps_between_candles_are_no_jumps(ratio: float, n: int, borders: set[int]) -> None:
    """Each candle closes at `ratio` times its open, and the next one has the same open."""
    block = candles([100.0] * n, [100.0 * ratio] * n)
    seams = np.array(sorted(at for at in borders if at < n), dtype=np.int64) * HOUR
    assert not doubtful(block, seams).any()
    assert not foreign(block, seams).any()


@pytest.mark.parametrize("factor", [0.3, 0.8, 1.25, 40.0])
def test_another_level_is_seen_in_steady_candles(factor: float) -> None:
    prices = [100.0] * 30
    prices[10:20] = [100.0 * factor] * 10
    block, seams = candles(prices, prices), np.array([10, 20], dtype=np.int64) * HOUR
    assert np.flatnonzero(foreign(block, seams)).tolist() == list(range(10, 20))
    assert np.flatnonzero(doubtful(block.take(slice(0, 20)), seams)).tolist() == list(range(10))
    assert not foreign(block, seams + HOUR).any()  # a move beside the edges is the market's


def test_responses_contradict_only_in_common_candles() -> None:
    block = candles([100.0] * 20, [100.0] * 20)
    other = candles([130.0] * 20, [130.0] * 20)
    head, tail = slice(0, 12), slice(10, 20)
    assert contradict(block.take(head), block.take(tail), 0.01) is False
    assert contradict(block.take(head), other.take(tail), 0.01) is True
    assert contradict(block.take(head), other.take(slice(12, 20)), 0.01) is None
    assert contradict(Candles.empty(), block, 0.01) is None
    corrected = candles([100.0] * 20, [130.0] * 20)  # close and high, not open and low
    assert contradict(block, corrected, 0.01) is False
