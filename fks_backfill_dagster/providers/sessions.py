"""The trading session of a stock's daily bar, from its stamp.

Belongs here: stamps of daily bars in the exchange's zone, matched with the sessions of the calendar.
Does not belong here: the calendar itself (`domain.grid`), stamps of intraday bars.

A bar is never moved to a session that its stamp does not identify. A bar that fits no session stays off the grid: it
is quarantined, and the session's candle is visibly missing.
"""

from __future__ import annotations

from zoneinfo import ZoneInfo

import numpy as np

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)

# In this period before midnight a stamp may mean the next day: stamps of Sao Paulo were an hour early for years.
_EVENING = 2 * MICROS_PER_HOUR
# In this period after the close a stamp still means the day: auctions, delayed quotes. 00:00 UTC, the stamp of a
# date at other sources, is three hours after the close of New York or Sao Paulo.
_AFTER_CLOSE = 2 * MICROS_PER_HOUR


def session_dates(
    stamps: Instants, series: Series, zone: ZoneInfo, last_trade: int | None = None
) -> Instants:
    """The date (00:00 UTC) of the session of each daily bar of `series`, or an instant off the grid.

    In this order:
    1. A stamp inside a session belongs to it, also if the session began on the previous evening.
    2. A stamp in the evening (from 22:00 local time) belongs to the session of the next date, if there is one and
       the session of its own date, if any, is over.
    3. Any other stamp belongs to the session of its local date, up to two hours after the close. A stamp equal to
       `last_trade`, the time of the last trade, belongs to it at any time.
    """
    days, minutes = grid_of(series), grid_of(series.at(Timeframe.M1))
    local = wall_clock(stamps, zone)
    own = local - local % MICROS_PER_DAY
    following = own + MICROS_PER_DAY
    has_own = days.contains(own)
    closed_for = np.where(has_own, stamps - days.closes(own), 0)  # negative: the session is not over

    inside = minutes.contains(stamps - stamps % MICROS_PER_MINUTE)
    evening = (following - local <= _EVENING) & (stamps != last_trade)
    over = ~has_own | (closed_for >= 0)
    is_following = over & (inside | evening) & days.contains(following)
    is_own = has_own & ~is_following & ~(over & evening)
    is_own &= (closed_for <= _AFTER_CLOSE) | (stamps == last_trade)
    return np.select([is_following, is_own], [following, own], off_grid(stamps, series))


def midnight_dates(stamps: Instants, series: Series, zone: ZoneInfo) -> Instants:
    """Like `session_dates`, for a provider that stamps days at local midnight only."""
    local = wall_clock(stamps, zone)
    named = (local % MICROS_PER_DAY == 0) & grid_of(series).contains(local)
    return np.where(named, local, off_grid(stamps, series))


def off_grid(stamps: Instants, series: Series) -> Instants:
    """The stamps of bars that fit no session: unchanged, unless they would be read as a date.

    On our grid, 00:00 UTC is the stamp of a day. A bar that has this stamp by accident is moved by a microsecond.
    """
    return stamps + grid_of(series).on_clock(stamps).astype(np.int64)


def wall_clock(instants: Instants, zone: ZoneInfo) -> Instants:
    """The local time of each instant, as if it were UTC."""
    import pandas as pd

    local = pd.DatetimeIndex(instants.view("datetime64[us]")).tz_localize("UTC").tz_convert(zone)
    return local.tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)
