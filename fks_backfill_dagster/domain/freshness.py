"""How far a series lags behind its market, and when that is too far.

Belongs here: the polling interval of each timeframe, the allowed lag, the verdict. Everything is counted in
closed candles of the grid, so that a night, a weekend or a holiday is no lag.

Does not belong here: which absent candles are quiet (the ledger decides that), where the newest candle is
looked up (`store`), who is alerted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe

POLLING_MINUTES = {
    Timeframe.M1: 15,
    Timeframe.M5: 15,
    Timeframe.M15: 15,
    Timeframe.M30: 30,
    Timeframe.H1: 60,
    Timeframe.H4: 60,
    Timeframe.D1: 60,
    Timeframe.W1: 60,
}
"""Minutes between two ticks of a timeframe's refresh. A tick queries the database for candles that have
closed, and providers only then: from 4h up an hour costs next to nothing, and finds the close of every
exchange."""


def polling_interval(timeframe: Timeframe) -> int:
    """Microseconds."""
    return POLLING_MINUTES[timeframe] * MICROS_PER_MINUTE


class Verdict(StrEnum):
    """`late` is a warning, `stale` an error; `pending` is a series without a candle or a sync."""

    FRESH = "fresh"
    PENDING = "pending"
    LATE = "late"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """So many closed candles beyond the allowed lag make a series late, and so many stale."""

    warn: int = 3
    error: int = 10


@dataclass(frozen=True, slots=True)
class Freshness:
    """The lag of one series, in closed candles.

    `newest` is the open of its newest candle, None where it has none. `lag` are the closed candles that it
    lacks since then, the quiet ones taken out; None where nothing was ever synced. `allowed` of them need not be
    there yet. `ended`: nothing newer will come, and it was synced up to its end.
    """

    verdict: Verdict
    newest: int | None
    lag: int | None
    allowed: int
    ended: bool = False

    @property
    def fresh(self) -> bool:
        return self.verdict is Verdict.FRESH

    @property
    def overdue(self) -> int:
        """Candles that should be there and are not, nor are known to be quiet."""
        return max(0, (self.lag or 0) - self.allowed)


def assess(
    grid: Grid,
    newest: int | None,
    synced: TimeRange | None,
    now: int,
    *,
    delay: int,
    quiet_tail: int = 0,
    end: int | None = None,
    thresholds: Thresholds = Thresholds(),
) -> Freshness:
    """The freshness of a series at `now`, which is already reduced by the grace.

    `newest` is the open of its newest candle. `synced` reaches from the first to the last instant that was ever
    synced; None: nothing was. `delay` is the polling interval and the provider's publication delay, in
    microseconds: what closed within it may still be missing. `quiet_tail` of the candles after the newest one
    are no lag, since nothing traded in them as far as the ledger knows. From `end` on nothing is expected: once
    the series was synced up to there it cannot become stale, and what is missing before is a gap.
    """
    closed, due = grid.closed_end(now), grid.closed_end(now - delay)
    has_ended = end is not None and end <= closed
    if end is not None:
        closed, due = min(closed, end), min(due, end)
    allowed = _count(grid, due, closed)
    if newest is None and synced is None:
        return Freshness(Verdict.PENDING, None, None, allowed)
    first = newest + 1 if newest is not None else synced.start if synced else closed
    behind = _count(grid, first, closed)
    lag = behind - min(max(quiet_tail, 0), behind)
    ended = has_ended and synced is not None and not _count(grid, synced.end, closed)
    # A series without any candle has no margin: nothing shows that a provider has it at all.
    margin = 0 if newest is None else thresholds.warn
    if ended or lag <= allowed + margin:
        return Freshness(Verdict.FRESH, newest, lag, allowed, ended)
    verdict = Verdict.STALE if lag > allowed + thresholds.error else Verdict.LATE
    return Freshness(verdict, newest, lag, allowed)


RECENT = MICROS_PER_DAY
RECENT_CANDLES = 3


def recent_start(grid: Grid, now: int) -> int:
    """From when on a candle is recent at `now`, which is already reduced by the grace.

    The day before the close of the last closed candle, or its three last candles where that is longer: on a
    Sunday the session of Friday is still recent.
    """
    first = max(int(grid.rank(np.array([grid.closed_end(now)]))[0]) - RECENT_CANDLES, 0)
    opens = grid.at(np.arange(first, first + RECENT_CANDLES))
    return min(int(opens[0]), int(grid.closes(opens[-1:])[0]) - RECENT)


def _count(grid: Grid, start: int, end: int) -> int:
    return grid.count(TimeRange(start, end)) if start < end else 0
