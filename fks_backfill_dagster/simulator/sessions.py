"""Trading hours of markets that close, and local time: the basis of bar boundaries in wire formats.

In scope: the sessions of the New York stock exchange with pre- and post-market, from the domain's grid, and
the conversion between local time and UTC. Out of scope: bars.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import FIRST_DATE, LAST_DATE, grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe

NEW_YORK = "America/New_York"

_PRE_MARKET = 4 * MICROS_PER_HOUR  # 04:00 New York
_POST_MARKET = 4 * MICROS_PER_HOUR  # to 20:00, on half-days to 17:00


@dataclass(frozen=True, slots=True, eq=False)
class Sessions:
    """One element per session: `dates` (00:00 UTC of its date), then the instants of the start of the
    pre-market, the open, the close, and the end of the post-market."""

    dates: Instants
    pre: Instants
    opens: Instants
    closes: Instants
    post: Instants

    def within(self, window: TimeRange) -> Sessions:
        """The sessions that have any trading in `window`."""
        kept = slice(*np.searchsorted(self.post, [window.start + 1, window.end]).tolist())
        return self._take(slice(kept.start, kept.stop + 1)).starting_before(window.end)

    def starting_before(self, instant: int) -> Sessions:
        return self._take(slice(0, int(np.searchsorted(self.pre, instant))))

    def _take(self, rows: slice) -> Sessions:
        return Sessions(
            self.dates[rows], self.pre[rows], self.opens[rows], self.closes[rows], self.post[rows]
        )

    def trading(self, instants: Instants) -> NDArray[np.bool_]:
        """Whether the market is open, pre- and post-market included."""
        return _inside(instants, self.pre, self.post)

    def regular(self, instants: Instants) -> NDArray[np.bool_]:
        return _inside(instants, self.opens, self.closes)

    def hours(self, *, extended: bool) -> RangeSet:
        """The trading hours of all sessions, with or without pre- and post-market."""
        if extended:
            return RangeSet.from_arrays(self.pre, self.post)
        return RangeSet.from_arrays(self.opens, self.closes)


def _inside(instants: Instants, starts: Instants, ends: Instants) -> NDArray[np.bool_]:
    index = np.searchsorted(starts, instants, side="right") - 1
    found: NDArray[np.bool_] = (index >= 0) & (instants < ends[index])
    return found


@cache
def stock_sessions() -> Sessions:
    """All sessions of the domain's calendar. Cached: building them takes half a second."""
    days = grid_of(Series("", Timeframe.D1, AssetClass.STOCKS))
    quarters = grid_of(Series("", Timeframe.M15, AssetClass.STOCKS))
    whole = TimeRange(*(int(np.datetime64(day, "us").astype(np.int64)) for day in (FIRST_DATE, LAST_DATE)))
    dates = days.opens(whole)
    # Every session opened on a quarter of an hour, so the first 15m bar of the day opens with it.
    bars = quarters.opens(TimeRange(whole.start, whole.end + 24 * MICROS_PER_HOUR))
    closes = days.closes(dates)
    return Sessions(
        dates,
        utc(dates + _PRE_MARKET, NEW_YORK),
        bars[np.searchsorted(bars, dates)],
        closes,
        closes + _POST_MARKET,
    )


@cache
def trading_hours(asset_class: AssetClass, extended: bool) -> RangeSet | None:
    """The trading hours of a market; None: always open. `extended` adds a stock's pre- and post-market."""
    if asset_class is AssetClass.CRYPTO:
        return None
    if asset_class is AssetClass.STOCKS:
        return stock_sessions().hours(extended=extended)
    weeks = grid_of(Series("", Timeframe.W1, AssetClass.FOREX))
    opens = weeks.opens(
        TimeRange(*(int(np.datetime64(day, "us").astype(np.int64)) for day in (FIRST_DATE, LAST_DATE)))
    )
    return RangeSet.from_arrays(opens, weeks.closes(opens))


def utc(walls: Instants, zone: str) -> Instants:
    """Converts the local times `walls` of `zone` (microseconds as if UTC) to UTC.

    An ambiguous time is the first one; a skipped time is the end of the skipped hour.
    """
    naive = pd.DatetimeIndex(walls.view("datetime64[us]"))
    twice = np.ones(len(walls), dtype=np.bool_)
    aware = naive.tz_localize(ZoneInfo(zone), ambiguous=twice, nonexistent="shift_forward")
    return aware.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)


def wall(instants: Instants, zone: str) -> Instants:
    """Converts UTC `instants` to local times of `zone`, in microseconds as if UTC."""
    there = pd.DatetimeIndex(instants.view("datetime64[us]")).tz_localize("UTC").tz_convert(ZoneInfo(zone))
    return there.tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)
