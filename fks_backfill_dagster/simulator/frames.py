"""Bar boundaries of wire formats: a ruler defines a grid, a frame holds the bars of a range.

In scope: grids other than the project's own (clock hours with pre-market, New York days, bars counted
from the session's open), and aggregation of trades into a frame. The project's own grid is `domain.grid`;
the regular grid of crypto is `bars.Step`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import (
    FIRST_MONDAY,
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_WEEK,
)
from fks_backfill_dagster.simulator.bars import Bars, Step, Units
from fks_backfill_dagster.simulator.sessions import NEW_YORK, stock_sessions, utc, wall


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Bars to be filled: ascending opens and their ends, without overlaps.

    `length` is the nominal length of a bar. `extended`: trades before and after a stock's session are
    included.
    """

    opens: Instants
    ends: Instants
    length: int
    extended: bool = False

    def __len__(self) -> int:
        return len(self.opens)

    def take(self, selector: slice) -> Frame:
        return replace(self, opens=self.opens[selector], ends=self.ends[selector])

    def within(self, window: TimeRange) -> Frame:
        """The bars that open in `window`."""
        return self.take(slice(*np.searchsorted(self.opens, [window.start, window.end]).tolist()))

    def closed(self, now: int) -> Frame:
        return self.take(slice(0, int(np.searchsorted(self.ends, now, side="right"))))

    @property
    def hull(self) -> TimeRange:
        """From the first open to the last end; `[0, 0)` without bars."""
        return TimeRange(int(self.opens[0]), int(self.ends[-1])) if len(self) else TimeRange(0, 0)


class Ruler(Protocol):
    """An unbounded grid."""

    @property
    def length(self) -> int:
        """The nominal length of a bar in microseconds."""
        ...

    def frame(self, window: TimeRange) -> Frame:
        """The bars that open in `window`."""
        ...


def floor(ruler: Ruler, instant: int) -> int:
    """The open of the last bar that opens at or before `instant`."""
    near = ruler.frame(TimeRange(instant - 2 * ruler.length - MICROS_PER_DAY, instant + 1))
    return int(near.opens[-1])


def ceil(ruler: Ruler, instant: int) -> int:
    """The open of the first bar that opens at or after `instant`."""
    near = ruler.frame(TimeRange(instant, instant + 2 * ruler.length + MICROS_PER_DAY))
    return int(near.opens[0])


@dataclass(frozen=True, slots=True)
class EvenRuler:
    """Multiples in UTC."""

    step: Step
    extended: bool = False

    @property
    def length(self) -> int:
        return self.step.length

    def frame(self, window: TimeRange) -> Frame:
        first, past = self.step.ceil(window.start), self.step.ceil(window.end)
        opens = np.arange(first, past, self.step.length, dtype=np.int64)
        return Frame(opens, opens + self.step.length, self.length, self.extended)


@dataclass(frozen=True, slots=True)
class WallRuler:
    """Bars in local time: days that begin at `hour` in `zone`, or parts of such days.

    `length` divides a day. On days of a daylight-saving change the last part is shorter or longer.
    """

    length: int
    zone: str = NEW_YORK
    hour: int = 0
    extended: bool = False

    def frame(self, window: TimeRange) -> Frame:
        day = MICROS_PER_DAY
        first, past = window.start // day - 2, -(-window.end // day) + 2
        dates = np.arange(first * day, past * day, day, dtype=np.int64)
        starts = utc(dates + self.hour * MICROS_PER_HOUR, self.zone)
        parts = np.arange(0, day, self.length, dtype=np.int64)
        opens = (starts[:-1, None] + parts).ravel()
        opens = opens[opens < np.repeat(starts[1:], len(parts))]
        return Frame(opens[:-1], opens[1:], self.length, self.extended).within(window)


@dataclass(frozen=True, slots=True)
class WeekRuler:
    """Weeks that begin on `weekday` (0 is Monday) at `hour` in `zone`."""

    weekday: int
    zone: str = NEW_YORK
    hour: int = 0
    extended: bool = False

    @property
    def length(self) -> int:
        return MICROS_PER_WEEK

    def frame(self, window: TimeRange) -> Frame:
        origin = FIRST_MONDAY + self.weekday * MICROS_PER_DAY
        first = (window.start - origin) // MICROS_PER_WEEK - 1
        past = (window.end - origin) // MICROS_PER_WEEK + 3
        dates = np.arange(first, past, dtype=np.int64) * MICROS_PER_WEEK + origin
        starts = utc(dates + self.hour * MICROS_PER_HOUR, self.zone)
        return Frame(starts[:-1], starts[1:], self.length, self.extended).within(window)


@dataclass(frozen=True, slots=True)
class SessionRuler:
    """Bars counted from the open of each stock session; the last one ends with the session.

    `extended` adds bars counted from the start of the pre-market and from the close.
    """

    length: int
    extended: bool = False

    def frame(self, window: TimeRange) -> Frame:
        around = TimeRange(window.start - MICROS_PER_DAY, window.end + MICROS_PER_DAY)
        of = stock_sessions().within(around)
        if self.extended:
            starts = np.column_stack([of.pre, of.opens, of.closes]).ravel()
            ends = np.column_stack([of.opens, of.closes, of.post]).ravel()
        else:
            starts, ends = of.opens, of.closes
        counts = -((starts - ends) // self.length)
        numbers = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
        opens = np.repeat(starts, counts) + numbers * self.length
        cut = np.minimum(opens + self.length, np.repeat(ends, counts))
        return Frame(opens, cut, self.length, self.extended).within(window)


def of_grid(grid: Grid, length: int, window: TimeRange) -> Frame:
    """The candles of the project's grid that open in `window`."""
    opens = grid.opens(window)
    return Frame(opens, grid.closes(opens), length)


def fill(parts: Bars, frame: Frame) -> Bars:
    """Aggregates the ascending `parts` into bars of `frame`: open first, high max, low min, close last,
    volume sum. A part belongs to the bar in which it opens; bars without parts are omitted."""
    index = np.searchsorted(frame.opens, parts.ts, side="right") - 1
    inside = index >= 0
    inside[inside] = parts.ts[inside] < frame.ends[index[inside]]
    parts, index = parts.take(inside), index[inside]
    if len(parts) == 0:
        return replace(parts, verbatim=None)
    first = np.concatenate([[0], np.flatnonzero(index[1:] != index[:-1]) + 1])
    last = np.concatenate([first[1:] - 1, [len(parts) - 1]])
    total: Units | None = None if parts.volume is None else np.add.reduceat(parts.volume, first)
    return Bars(
        frame.opens[index[first]],
        parts.open[first],
        np.maximum.reduceat(parts.high, first),
        np.minimum.reduceat(parts.low, first),
        parts.close[last],
        total,
        parts.scale,
    )


def local_dates(instants: Instants) -> Instants:
    """The New York dates of `instants`, as 00:00 UTC of that date."""
    return wall(instants, NEW_YORK) // MICROS_PER_DAY * MICROS_PER_DAY
