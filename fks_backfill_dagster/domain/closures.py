"""Dates without trading, as instants: the closed dates of the settings, and the holidays of forex.

Belongs here: the mapping from dates to the expected candles that lie on them, and the text form of dates.
Does not belong here: which dates are closed (`settings`), the state of candles that are absent then (`ledger`).

A candle lies on closed dates if every part of it does: a week with one closed day has trades on the others,
and a 4h candle that contains the end of a closed forex day contains the start of the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from zoneinfo import ZoneInfo

import numpy as np

from fks_backfill_dagster.domain.grid import FIRST_DATE, LAST_DATE, Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    FIRST_MONDAY,
    MICROS_PER_DAY,
    MICROS_PER_WEEK,
    Timeframe,
    to_datetime,
)

Dates = Sequence[tuple[date, date]]
"""First and last (inclusive) of each stretch."""

_NEW_YORK = ZoneInfo("America/New_York")
_HOLIDAYS = (((12, 24), (12, 26)), ((12, 31), (1, 2)))
_BEGINS, _ENDS = 17, 18  # o'clock in New York
_CALENDARS = TimeRange(*(int(np.datetime64(day, "us").astype(np.int64)) for day in (FIRST_DATE, LAST_DATE)))
"""The range that calendars cover."""


def market_closures(series: Series, dates: Iterable[tuple[date, date]], window: TimeRange) -> RangeSet:
    """Where the market of a series was closed within `window` although candles are expected: on `dates`, and on
    the holidays of forex."""
    found = closed_ranges(series, dates)
    return found | forex_holidays(window) if series.asset_class is AssetClass.FOREX else found


def closed_ranges(series: Series, dates: Iterable[tuple[date, date]]) -> RangeSet:
    """The ranges of the expected candles that have no trade if nothing was traded on `dates` (first and last,
    inclusive), each from the open of a candle to the close of one. Consecutive days with nothing expected in
    between may be one range.

    A date is that of a session for stocks, of the trading day that ends at 17:00 New York for forex, of
    the UTC day for crypto. A date without one (a Saturday) closes nothing. Dates before 1970 and after 2049
    are ignored. Raises ValueError for a calendar that is unknown or cannot be built.
    """
    days = _midnights(dates)
    match series.asset_class:
        case AssetClass.CRYPTO:
            opens, closes = days, days + MICROS_PER_DAY
        case AssetClass.STOCKS:
            daily = grid_of(series.at(Timeframe.D1))
            opens = days[daily.contains(days)]
            closes = daily.closes(opens)
        case AssetClass.FOREX:
            daily = grid_of(series.at(Timeframe.D1))
            opens = daily.at(daily.rank(days) - 1)  # the last one that opens before the date begins in UTC
            opens = opens[opens > days - MICROS_PER_DAY // 2]
            closes = daily.closes(opens)
    if not len(opens):
        return RangeSet()
    if series.timeframe is Timeframe.D1:
        return RangeSet.from_arrays(opens, closes)
    if series.timeframe is Timeframe.W1:
        return _weeks(series, opens)
    if series.asset_class is AssetClass.STOCKS:
        opens = _closes_before(daily, opens)
    return _candles_within(series, RangeSet.from_arrays(opens, closes))


def forex_holidays(window: TimeRange) -> RangeSet:
    """Christmas and the turn of the year, whole, where they intersect `window`: 24 December 17:00 to
    26 December 18:00, and 31 December 17:00 to 2 January 18:00, New York. From 1970 to 2049."""
    known = window.intersect(_CALENDARS)
    if not known:
        return RangeSet()
    holidays = (
        TimeRange.of(
            datetime(year, *first, _BEGINS, tzinfo=_NEW_YORK),
            datetime(year + (last < first), *last, _ENDS, tzinfo=_NEW_YORK),
        )
        for year in range(to_datetime(known.start).year - 1, to_datetime(known.end).year + 1)
        for first, last in _HOLIDAYS
    )
    return RangeSet(holiday for holiday in holidays if holiday.intersect(known))


@dataclass(frozen=True, slots=True)
class ClosureChange:
    """How the closed dates of a series differ from the earlier ones.

    `touched`: the ranges in which candles became closed, or expected again, as a whole. `added`: the trading days
    that became closed, whole, independent of the series' candles. `dates`, `withdrawn`: the number of added and
    withdrawn dates.
    """

    touched: RangeSet
    added: RangeSet
    dates: int
    withdrawn: int

    @classmethod
    def of(cls, series: Series, before: Dates, present: Dates) -> ClosureChange:
        old, new = closed_ranges(series, before), closed_ranges(series, present)
        was, now = _midnights(before), _midnights(present)
        fresh, gone = np.setdiff1d(now, was), np.setdiff1d(was, now)
        days = [(day, day) for day in fresh.astype("datetime64[us]").astype("datetime64[D]").tolist()]
        added = closed_ranges(series.at(Timeframe.D1), days)
        return cls((old - new) | (new - old), added, len(fresh), len(gone))


def format_dates(dates: Dates) -> str:
    """Dates as text, such as `2023-09-01 2024-11-14/2024-11-15`; equal dates give equal text."""
    return " ".join(str(first) if first == last else f"{first}/{last}" for first, last in dates)


def parse_dates(text: str) -> Dates:
    """The inverse of `format_dates`."""
    ends = (part.partition("/") for part in text.split())
    return [(date.fromisoformat(first), date.fromisoformat(last or first)) for first, _, last in ends]


def _midnights(dates: Iterable[tuple[date, date]]) -> Instants:
    """Every date at 00:00 UTC, ascending, once."""
    stretches = [
        np.arange(
            np.datetime64(max(str(first), FIRST_DATE)),
            np.datetime64(min(str(last), LAST_DATE)) + 1,
        )
        for first, last in dates
    ]
    if not stretches:
        return np.empty(0, dtype=np.int64)
    return np.unique(np.concatenate(stretches)).astype("datetime64[us]").view(np.int64)


def _weeks(series: Series, days: Instants) -> RangeSet:
    """The weeks whose expected days all open at one of `days`."""
    weekly, daily = grid_of(series), grid_of(series.at(Timeframe.D1))
    if series.asset_class is AssetClass.FOREX:
        opens = weekly.at(weekly.rank(days + 1) - 1)
    else:
        opens = days - (days - FIRST_MONDAY) % MICROS_PER_WEEK
    weeks, closed = np.unique(opens, return_counts=True)
    expected = daily.rank(weeks + MICROS_PER_WEEK) - daily.rank(weeks)
    weeks = weeks[(closed == expected) & weekly.contains(weeks)]
    return RangeSet.from_arrays(weeks, weekly.closes(weeks))


def _closes_before(daily: Grid, sessions: Instants) -> Instants:
    """The close of the session before each of `sessions`: the first bar of a session may open before the session,
    and before its date begins in UTC."""
    ranks = daily.rank(sessions)
    closes = daily.closes(daily.at(np.maximum(ranks - 1, 0)))
    return np.where(ranks > 0, closes, sessions - MICROS_PER_DAY)


def _candles_within(series: Series, closed: RangeSet) -> RangeSet:
    """The intraday candles whose trading hours all lie in `closed`, which consists of whole days.

    A candle that an end of `closed` cuts is excluded: it contains trades of the next day. A candle that a start
    cuts opens before it and contains trades of the day before, except in the first candle of a forex week.
    """
    grid = grid_of(series)
    first, past = grid.rank(closed.starts), grid.rank(closed.ends)
    past = past - (grid.closes(grid.at(past - 1)) > closed.ends)
    if series.asset_class is AssetClass.FOREX:
        weekly = grid_of(series.at(Timeframe.W1))
        early = grid.closes(grid.at(first - 1)) > closed.starts
        first = first - (early & weekly.contains(closed.starts))
    some = first < past
    return RangeSet.from_arrays(grid.at(first[some]), grid.closes(grid.at(past[some] - 1)))
