"""Freshness: how far a series lags behind its market, and how much lag is allowed.

Belongs here: the polling interval of each timeframe, the allowed lag, the verdict. Lag is counted in closed
candles of the grid, so that a night, a weekend or a holiday is no lag.

Does not belong here: which absent candles are quiet (`ledger`), the lookup of the newest candle (`store`),
alerting.
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
"""Minutes between two ticks of a timeframe's refresh. A tick requests providers only if the database shows that
candles have closed, so an hourly tick is cheap from 4h up and finds the close of every exchange."""


def polling_interval(timeframe: Timeframe) -> int:
    """The time between two ticks of a timeframe's refresh, in microseconds."""
    return POLLING_MINUTES[timeframe] * MICROS_PER_MINUTE


class Verdict(StrEnum):
    """`late` is a warning, `stale` an error; `pending` is a series without a candle and without a sync."""

    FRESH = "fresh"
    PENDING = "pending"
    LATE = "late"
    STALE = "stale"


@dataclass(frozen=True, slots=True)
class Thresholds:
    """The numbers of closed candles beyond the allowed lag from which a series is late (`warn`) and stale (`error`)."""

    warn: int = 3
    error: int = 10


@dataclass(frozen=True, slots=True)
class Freshness:
    """The lag of one series, in closed candles.

    `newest` is the open of its newest candle, None if it has none. `lag` is the number of closed candles after
    it, without the quiet ones; None if the series was never synced. `allowed` of them may still be missing.
    `ended`: no newer candle is expected, and the series was synced up to its end.
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
        """The number of missing candles beyond the allowed lag."""
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

    `newest` is the open of its newest candle. `synced` extends from the first to the last instant that was ever
    synced; None: the series was never synced. `delay` is the polling interval plus the provider's publication
    delay, in microseconds: a candle that closed within it may still be missing. `quiet_tail` of the candles after
    the newest one are no lag, since nothing traded in them by the ledger. From `end` on nothing is expected: once
    the series was synced up to there it cannot become stale, and a candle that is missing before is a gap.
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
    # A series without any candle has no margin: no provider is known to have it.
    margin = 0 if newest is None else thresholds.warn
    if ended or lag <= allowed + margin:
        return Freshness(Verdict.FRESH, newest, lag, allowed, ended)
    verdict = Verdict.STALE if lag > allowed + thresholds.error else Verdict.LATE
    return Freshness(verdict, newest, lag, allowed)


RECENT = MICROS_PER_DAY
RECENT_CANDLES = 3


def recent_start(grid: Grid, now: int) -> int:
    """The instant from which candles are recent at `now`, which is already reduced by the grace.

    The day before the close of the last closed candle, or the last three candles if that is longer: on a
    Sunday the session of Friday is still recent.
    """
    first = max(int(grid.rank(np.array([grid.closed_end(now)]))[0]) - RECENT_CANDLES, 0)
    opens = grid.at(np.arange(first, first + RECENT_CANDLES))
    return min(int(opens[0]), int(grid.closes(opens[-1:])[0]) - RECENT)


def _count(grid: Grid, start: int, end: int) -> int:
    return grid.count(TimeRange(start, end)) if start < end else 0
