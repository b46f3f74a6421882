"""The gaps of a series in a window: the rows of the ledger, and the tail after the last sync.

Belongs here: which rows of the ledger fall into a window and how they are clipped to it, and the
tail that was not requested yet. Read-only.
Does not belong here: finding gaps among candles (`ledger.gaps`), their states (`store`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_micros
from fks_backfill_dagster.ledger.gaps import GapStatus, close_before
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database


@dataclass(frozen=True, slots=True)
class FoundGap:
    """A gap within the window. `asked` is False for the tail, which was not requested yet and is not in the ledger."""

    row: LedgerGap
    asked: bool = True


def find_gaps(
    database: Database, series: Series, now: int, start: int | None = None, end: int | None = None
) -> tuple[FoundGap, ...]:
    """All unfilled gaps of `[start, end)`, ascending, in every state, clipped to it and recounted.

    Without `start`: from the oldest stored candle. Never beyond the last closed candle. History before or between
    the synced ranges is pending and not included; the range after the end of the coverage is a gap.
    """
    grid = grid_of(series)
    closed_end = grid.closed_end(now - GRACE)
    known = queries.what_is_known(database, series, TimeRange(0, closed_end))
    if not known.synced:
        return ()
    start = _oldest(database, series, known.synced.hull.start) if start is None else start
    end = closed_end if end is None else min(end, closed_end)
    if start >= end:
        return ()
    window = TimeRange(start, end)
    found = [FoundGap(row) for gap in known.gaps if (row := clipped(gap, window, grid)) is not None]
    tail = clipped(LedgerGap(known.synced.hull.end, end, 0, GapStatus.OPEN), window, grid)
    return (*found, *([FoundGap(tail, asked=False)] if tail else []))


def earlier_gaps(database: Database, series: Series, now: int) -> int:
    """How many candles before the oldest stored one were requested and are missing, without no-trade intervals."""
    known = queries.what_is_known(database, series, TimeRange(0, now))
    if not known.synced:
        return 0
    oldest = _oldest(database, series, known.synced.hull.end)
    return sum(
        gap.missing for gap in known.gaps if gap.end <= oldest and gap.status is not GapStatus.NO_TRADE
    )


def clipped(gap: LedgerGap, window: TimeRange, grid: Grid) -> LedgerGap | None:
    """The part of a gap whose candles open in `window`; None if there is none."""
    if gap.missing and window.start <= gap.start and gap.end <= window.end:
        return gap
    start, end = max(gap.start, window.start), min(gap.end, window.end)
    if start >= end or (missing := grid.count(TimeRange(start, end))) == 0:
        return None
    first = grid.next_open(start)
    assert first is not None
    return replace(gap, start=first, end=close_before(grid, end), missing=missing)


def _oldest(database: Database, series: Series, otherwise: int) -> int:
    """The open of the oldest stored candle; `otherwise` if none is stored."""
    oldest = next((s.oldest_data_time for s in queries.sync_status(database, series)), None)
    return otherwise if oldest is None else to_micros(oldest)
