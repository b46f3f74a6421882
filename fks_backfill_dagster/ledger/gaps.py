"""The arithmetic of gaps: which expected candles are absent, and how they are grouped.

Belongs here: set difference, grouping, the states of a gap.
Does not belong here: the cause of a gap, its retries, its storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants


class GapStatus(StrEnum):
    """The states of a gap. `no_trade`, `unavailable` and `tolerated` are explained gaps."""

    OPEN = "open"
    FILLED = "filled"
    NO_TRADE = "no_trade"  # a complete response omits the interval, with candles on both sides
    UNAVAILABLE = "unavailable"  # every eligible provider has responded, none has it
    TOLERATED = "tolerated"  # as unavailable, and short enough to be tolerated


GIVEN_UP = (GapStatus.UNAVAILABLE, GapStatus.TOLERATED)
"""Every eligible provider has responded, and none has it; the two differ in length only."""
MISSING = (GapStatus.OPEN, *GIVEN_UP)


@dataclass(frozen=True, order=True, slots=True)
class Gap:
    """A run of absent candles that are neighbours in the grid.

    `start` is the open of the first, `end` the close of the last, `missing` their number. A gap may span
    a night or a weekend, so `missing` does not follow from its length.
    """

    start: int
    end: int
    missing: int

    @property
    def duration(self) -> int:
        """From the first open to the last close, closed hours included; microseconds."""
        return self.end - self.start


def close_before(grid: Grid, instant: int) -> int:
    """The close of the last expected candle that opens before an instant, which must exist."""
    last = grid.previous_open(instant)
    assert last is not None
    return int(grid.closes(np.array([last]))[0])


def missing_of(expected: Instants, present: Instants) -> Instants:
    """The elements of `expected` that are not in `present`; both ascending and unique, as is the result."""
    return np.setdiff1d(expected, present, assume_unique=True)


def find_gaps(missing: Instants, grid: Grid) -> tuple[Gap, ...]:
    """Groups missing opens into gaps. `missing` are expected opens of `grid`, ascending and unique."""
    if len(missing) == 0:
        return ()
    jumps = np.diff(grid.rank(missing)) != 1
    first = np.flatnonzero(np.concatenate([[True], jumps]))
    last = np.flatnonzero(np.concatenate([jumps, [True]]))
    columns = (missing[first], grid.closes(missing[last]), last - first + 1)
    return tuple(Gap(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
