"""Gaps by day: how many of the missing candles of a gap open on each UTC date.

A gap may span nights, weekends and years, and its missing candles do not follow from its length. SQL does not know the
grid, so the counts are computed where the gap is written and stored with it (docs/adr/0028).
"""

from __future__ import annotations

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.ledger.records import LedgerGap


def missing_by_day(gap: LedgerGap, grid: Grid) -> tuple[int, ...]:
    """The number of missing candles of each UTC date, from that of the first open to that of the end of the gap.

    Their sum is `gap.missing`: between its edges every expected candle is missing.
    """
    first, last = gap.start // MICROS_PER_DAY, (gap.end - 1) // MICROS_PER_DAY
    if first == last:
        return (gap.missing,)
    edges = np.arange(first, last + 2, dtype=np.int64) * MICROS_PER_DAY
    edges[0], edges[-1] = gap.start, gap.end
    return tuple(np.diff(grid.rank(edges)).tolist())
