"""A gap within a window: the clipped row against a slow reference implementation."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.pipeline.gaps import clipped

FROM = 1_704_067_200_000_000  # 2024-01-01
SERIES = [
    Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO),
    Series("AAPL", Timeframe.H1, AssetClass.STOCKS),
    Series("AAPL", Timeframe.D1, AssetClass.STOCKS),
    Series("EUR/USD", Timeframe.H4, AssetClass.FOREX),
    Series("EUR/USD", Timeframe.W1, AssetClass.FOREX),
]
moments = st.integers(0, 200 * 24 * 60).map(lambda minute: FROM + minute * MICROS_PER_MINUTE)


def gap_over(grid: Grid, start: int, end: int) -> LedgerGap | None:
    """The gap in which all candles of a window are missing."""
    opens = grid.opens(TimeRange(start, end))
    if not len(opens):
        return None
    return LedgerGap(int(opens[0]), int(grid.closes(opens[-1:])[0]), len(opens), GapStatus.OPEN, attempts=3)


@pytest.mark.parametrize("series", SERIES, ids=str)
@settings(deadline=None)  # the first example loads the calendar
@given(edges=st.tuples(moments, moments, moments, moments))
def test_the_part_of_a_gap_in_a_window(series: Series, edges: tuple[int, int, int, int]) -> None:
    grid = grid_of(series)
    a, b = sorted(edges[:2])
    start, end = sorted(edges[2:])
    gap = gap_over(grid, a, b)
    if gap is not None:
        expected = gap_over(grid, max(a, start), max(min(b, end), max(a, start)))
        assert clipped(gap, TimeRange(start, end), grid) == expected
