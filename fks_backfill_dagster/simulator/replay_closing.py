"""Replayed stocks and currencies: files of several timeframes for wire formats with other bar boundaries.

A row of a file aggregates the trades of its interval, so it can be served only in a bar that contains the whole
interval. A file is exact if all of its rows fit; the coarsest exact file is used, because it reaches furthest
back.

No real provider serves the project's hours of stocks: clients derive them from bars that end with the session
(CUTS). For these bars a row of a coarser file becomes trades in its first and in its last minute: one share at
the open, the others at the end. A client that aggregates such bars obtains the file's row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator.bars import Bars, Units
from fks_backfill_dagster.simulator.closing import truth_frame
from fks_backfill_dagster.simulator.frames import Frame, fill
from fks_backfill_dagster.simulator.sessions import stock_sessions

CUTS: Mapping[str, frozenset[int]] = {"polygon": frozenset({30 * MICROS_PER_MINUTE})}
"""The lengths of bars from which clients derive a stock's hours and days, for providers that omit bars
without trades: with other providers a missing half hour makes the hour unavailable."""


@dataclass(frozen=True, slots=True, eq=False)
class Traded:
    """A file's rows, with `ts` at the start of trading in each row, and its end."""

    timeframe: Timeframe
    rows: Bars
    ends: Instants

    @classmethod
    def of(cls, rows: Bars, timeframe: Timeframe, asset_class: AssetClass) -> Traded:
        starts, ends = rows.ts, rows.ts + timeframe.micros
        grid = grid_of(Series("", timeframe, asset_class))
        expected = grid.contains(rows.ts)
        if bool(expected.any()):
            ends = np.where(expected, grid.closes(rows.ts), ends)
        if asset_class is AssetClass.STOCKS:
            sessions = stock_sessions()
            if timeframe.is_intraday:
                index = np.searchsorted(sessions.closes, starts, side="right")
            else:
                index = np.searchsorted(sessions.dates, starts)
            starts = np.where(expected, np.maximum(starts, sessions.opens[index]), starts)
        return cls(timeframe, replace(rows, ts=starts, verbatim=None), ends)

    def within(self, window: TimeRange) -> Traded:
        """The rows whose trading interval overlaps `window`."""
        first = int(np.searchsorted(self.ends, window.start, side="right"))
        rows = slice(first, int(np.searchsorted(self.rows.ts, window.end)))
        return Traded(self.timeframe, self.rows.take(rows), self.ends[rows])

    def fits(self, frame: Frame) -> bool:
        """Whether there are rows and each ends within the bar in which it begins."""
        index = np.searchsorted(frame.opens, self.rows.ts, side="right") - 1
        inside = index >= 0
        inside[inside] = self.rows.ts[inside] < frame.ends[index[inside]]
        return bool(inside.any()) and not bool((self.ends[inside] > frame.ends[index[inside]]).any())

    def at_both_ends(self) -> Traded:
        """Each row as two: one unit of its volume at the open, the remainder at its end."""
        rows, ends = self.rows, self.ends
        first = None if rows.volume is None else np.minimum(rows.volume, 1)
        remainder = None if rows.volume is None or first is None else rows.volume - first
        last = ends - MICROS_PER_MINUTE
        both = Bars(
            _interleaved(rows.ts, last),
            _interleaved(rows.open, rows.open),
            _interleaved(rows.open, rows.high),
            _interleaved(rows.open, rows.low),
            _interleaved(rows.open, rows.close),
            None if first is None or remainder is None else _interleaved(first, remainder),
            rows.scale,
        )
        return Traded(self.timeframe, both, np.repeat(ends, 2))

    def without(self, halts: RangeSet) -> Bars:
        """The rows except those that a halt covers completely."""
        if not halts:
            return self.rows
        index = np.searchsorted(halts.starts, self.rows.ts, side="right") - 1
        return self.rows.take(~((index >= 0) & (self.ends <= halts.ends[index])))


def _interleaved(first: Units, second: Units) -> Units:
    return np.column_stack([first, second]).ravel()


@dataclass(frozen=True, slots=True)
class ReplayClosing:
    """The files of one provider and asset class. `cuts` as in CUTS."""

    asset_class: AssetClass
    files: Mapping[str, Mapping[Timeframe, Traded]]
    cuts: frozenset[int] = frozenset()

    def has_symbol(self, symbol: str) -> bool:
        return symbol in self.files

    def symbols(self) -> tuple[str, ...]:
        return tuple(self.files)

    def listing(self, symbol: str) -> TimeRange:
        files = self.files[symbol].values()
        return TimeRange(min(int(f.rows.ts[0]) for f in files), max(int(f.ends[-1]) for f in files))

    def bars(self, symbol: str, frame: Frame, now: int, halts: RangeSet) -> Bars:
        """As in `ClosingMarket`; rows are indivisible: a halt removes only rows that it covers completely."""
        return self._filled(symbol, frame, now, halts, frame.length in self.cuts)

    def truth(self, symbol: str, timeframe: Timeframe, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        # A stock's days and weeks are stamped 00:00 UTC of their date, before trading starts.
        listing = self.listing(symbol)
        known = TimeRange(listing.start - Timeframe.W1.micros, listing.end)
        frame = truth_frame(self.asset_class, timeframe, window.intersect(known), now)
        return self._filled(symbol, frame, now, halts, cut=False)

    def _filled(self, symbol: str, frame: Frame, now: int, halts: RangeSet, cut: bool) -> Bars:
        files = self.files[symbol]
        hull = frame.hull
        span = TimeRange(hull.start, max(hull.start, min(hull.end, now + 1)))
        here = [files[timeframe].within(span) for timeframe in sorted(files, key=lambda t: -t.micros)]
        coarser = [file for file in here if file.timeframe.micros > frame.length and len(file.rows)]
        if cut and coarser:
            chosen = coarser[-1].at_both_ends()
        else:
            nothing = here[-1].within(TimeRange(0, 0))
            chosen = next((file for file in here if file.fits(frame)), nothing)
        rows = chosen.without(halts)
        if self.asset_class is AssetClass.STOCKS and not frame.extended:
            rows = rows.take(stock_sessions().regular(rows.ts))
        return fill(rows, frame)
