"""Reconciliation of the missing candles by day: those recorded with each gap against those that follow from the grid.

Independent of `days`, with which the writer computes them: here in ranks, as in `reconcile`, whose result it extends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.ledger.reconcile import Difference, Kind, SeriesAudit
from fks_backfill_dagster.ledger.records import LedgerGap

ByDay = Mapping[int, Sequence[int] | None]
"""By the start of a gap its missing candles on each UTC date; None where none are recorded."""


def with_days(found: SeriesAudit, gaps: Sequence[LedgerGap], by_day: ByDay, grid: Grid) -> SeriesAudit:
    """The audit, with the gaps whose counts by day are wrong; they are written again with those that `reconcile` has
    found wrong. `gaps`: the recorded unfilled rows."""
    replaced = set(found.removed)
    wrong = [gap for gap in gaps if gap.start not in replaced and not _is_right(gap, by_day[gap.start], grid)]
    if not wrong:
        return found
    differences = [_difference(gap, by_day[gap.start]) for gap in wrong]
    return replace(
        found,
        differences=tuple(
            sorted((*found.differences, *differences), key=lambda d: (d.start is not None, d.start or 0))
        ),
        removed=(*found.removed, *(gap.start for gap in wrong)),
        added=tuple(sorted((*found.added, *wrong), key=lambda gap: gap.start)),
    )


def _is_right(gap: LedgerGap, recorded: Sequence[int] | None, grid: Grid) -> bool:
    if recorded is None:
        return False
    first, last = gap.start // MICROS_PER_DAY, (gap.end - 1) // MICROS_PER_DAY
    if first == last:
        return list(recorded) == [gap.missing]
    low, high = grid.rank(np.array([gap.start, gap.end], dtype=np.int64))
    midnights = np.arange(first, last + 2, dtype=np.int64) * MICROS_PER_DAY
    counts = np.diff(np.clip(grid.rank(midnights), low, high))
    return np.array_equal(counts, np.array(recorded, dtype=np.int64))


def _difference(gap: LedgerGap, recorded: Sequence[int] | None) -> Difference:
    name = f"the {gap.status} gap"
    text = (
        f"{name} does not record its missing candles by day"
        if recorded is None
        else f"{name} records its missing candles on the wrong days"
    )
    total = None if recorded is None else sum(recorded)
    return Difference(Kind.GAP_DAYS, gap.start, gap.end, total, gap.missing, text)
