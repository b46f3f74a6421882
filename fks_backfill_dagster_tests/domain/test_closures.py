"""Closed dates: all of their candles, and no candle that contains a traded minute."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import cache
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.closures import (
    ClosureChange,
    closed_ranges,
    forex_holidays,
    format_dates,
    parse_dates,
)
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, to_micros
from fks_backfill_dagster_tests.domain.builders import at
from fks_backfill_dagster_tests.examples import examples

NEW_YORK = ZoneInfo("America/New_York")
STOCKS, FOREX, CRYPTO = AssetClass.STOCKS, AssetClass.FOREX, AssetClass.CRYPTO
# New York; Hong Kong with a lunch break; Auckland, whose sessions begin on the day before in UTC; futures
# that trade for 23 hours.
MARKETS = [(STOCKS, "XNYS"), (STOCKS, "XHKG"), (STOCKS, "XNZE"), (STOCKS, "CMES"), (FOREX, ""), (CRYPTO, "")]


def series_of(market: tuple[AssetClass, str], timeframe: Timeframe) -> Series:
    return Series("X", timeframe, market[0], market[1])


@cache
def sessions(calendar: str) -> tuple[np.ndarray, np.ndarray]:
    """Dates and closes of the exchange's sessions, from the calendar library."""
    import exchange_calendars

    schedule = exchange_calendars.get_calendar(calendar, start="2006-01-01", end="2027-12-31").schedule
    closes = schedule["close"].dt.tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)
    return schedule.index.to_numpy().astype("datetime64[D]"), closes


def dates_of(market: tuple[AssetClass, str], minutes: Instants) -> np.ndarray:
    """The date to which each traded minute belongs."""
    asset_class, calendar = market
    if asset_class is CRYPTO:
        return minutes.view("datetime64[us]").astype("datetime64[D]")
    if asset_class is STOCKS:
        dates, closes = sessions(calendar)
        return dates[np.searchsorted(closes, minutes, side="right")]
    walls = [datetime.fromtimestamp(ts / 1e6, UTC).astimezone(NEW_YORK) for ts in minutes.tolist()]
    return np.array([(wall + timedelta(hours=7)).date() for wall in walls], dtype="datetime64[D]")


DATES = st.dates(date(2008, 1, 5), date(2026, 12, 1))
STRETCHES = st.lists(st.tuples(st.integers(0, 20), st.sampled_from([0, 0, 0, 1, 2, 4, 6, 11])), max_size=4)


@settings(max_examples=examples(150))
@given(st.sampled_from(MARKETS), st.sampled_from(list(Timeframe)[1:]), DATES, STRETCHES)
def test_a_candle_is_closed_if_all_its_minutes_are_on_closed_dates(
    market: tuple[AssetClass, str], timeframe: Timeframe, begin: date, stretches: list[tuple[int, int]]
) -> None:
    series = series_of(market, timeframe)
    closed = [
        (begin + timedelta(days=first), begin + timedelta(days=first + more)) for first, more in stretches
    ]
    ranges = closed_ranges(series, closed)
    start = to_micros(datetime(begin.year, begin.month, begin.day, tzinfo=UTC))
    window = TimeRange(start - 10 * MICROS_PER_DAY, start + 50 * MICROS_PER_DAY)
    # Quarters of an hour represent minutes: every edge of trading here lies on one.
    parts = grid_of(series_of(market, Timeframe.M15)).opens(window)
    grid = grid_of(series)
    opens = grid.opens(TimeRange(window.start + 8 * MICROS_PER_DAY, window.end - 8 * MICROS_PER_DAY))
    off = np.zeros(len(parts), dtype=bool)
    dates = dates_of(market, parts)
    for first, last in closed:
        off |= (dates >= np.datetime64(first)) & (dates <= np.datetime64(last))
    if timeframe is Timeframe.M5:
        owners, traded = opens, ~off[np.searchsorted(parts, opens, side="right") - 1]
    else:
        # A part belongs to the last candle that opens at or before it, but a stock's day is named by its date.
        owners = opens
        if market[0] is STOCKS and not timeframe.is_intraday:
            begins = np.searchsorted(parts, grid.closes(grid.at(grid.rank(opens) - 1)))
        else:
            begins = np.searchsorted(parts, opens)
        ends = np.searchsorted(parts, grid.closes(opens))
        traded = np.array([not off[a:b].all() for a, b in zip(begins, ends, strict=True)], dtype=bool)
    assert ranges.contains(owners).tolist() == (~traded).tolist()


@settings(max_examples=examples(60))
@given(st.sampled_from(MARKETS), st.sampled_from(list(Timeframe)), DATES, st.integers(0, 8))
def test_stretches_begin_and_end_with_candles(
    market: tuple[AssetClass, str], timeframe: Timeframe, begin: date, more: int
) -> None:
    series, grid = series_of(market, timeframe), grid_of(series_of(market, timeframe))
    dates = [(begin, begin + timedelta(days=more))]
    ranges = closed_ranges(series, dates)
    assert grid.contains(ranges.starts).all()
    last = grid.at(grid.rank(ranges.ends) - 1)
    assert grid.closes(last).tolist() == ranges.ends.tolist()
    days = [(begin + timedelta(days=n),) * 2 for n in range(more + 1)]
    if timeframe not in (Timeframe.W1, Timeframe.H4):  # one candle of these may contain two days
        each = RangeSet(part for day in days for part in closed_ranges(series, [day]))
        opens = grid.opens(TimeRange(at(f"{begin}T00:00Z"), at(f"{begin}T00:00Z") + 20 * MICROS_PER_DAY))
        assert each.contains(opens).tolist() == ranges.contains(opens).tolist()


def test_a_typhoon_day_in_hong_kong() -> None:
    """8 September 2023: both halves of the session, and the lunch break."""
    of = [(date(2023, 9, 8), date(2023, 9, 8))]
    hong_kong = (STOCKS, "XHKG")
    assert list(closed_ranges(series_of(hong_kong, Timeframe.M1), of)) == [
        TimeRange(at("2023-09-08T01:30Z"), at("2023-09-08T08:00Z"))
    ]
    assert list(closed_ranges(series_of(hong_kong, Timeframe.D1), of)) == [
        TimeRange(at("2023-09-08T00:00Z"), at("2023-09-08T08:00Z"))
    ]
    assert not closed_ranges(series_of(hong_kong, Timeframe.W1), of)
    week = [(date(2023, 9, 4), date(2023, 9, 8))]
    assert len(closed_ranges(series_of(hong_kong, Timeframe.W1), week)) == 1
    assert not closed_ranges(series_of(hong_kong, Timeframe.M1), [(date(2023, 9, 9), date(2023, 9, 10))])


def test_a_closed_forex_day_ends_at_five_in_new_york() -> None:
    of = [(date(2024, 7, 4), date(2024, 7, 4))]
    hours = closed_ranges(series_of((FOREX, ""), Timeframe.H1), of)
    assert list(hours) == [TimeRange(at("2024-07-03T21:00Z"), at("2024-07-04T21:00Z"))]
    # 20:00 to 24:00 UTC contains the end of one day and the start of the next, on either side.
    four = closed_ranges(series_of((FOREX, ""), Timeframe.H4), of)
    assert list(four) == [TimeRange(at("2024-07-04T00:00Z"), at("2024-07-04T20:00Z"))]
    monday = closed_ranges(series_of((FOREX, ""), Timeframe.H4), [(date(2024, 7, 1), date(2024, 7, 1))])
    assert list(monday) == [TimeRange(at("2024-06-30T20:00Z"), at("2024-07-01T20:00Z"))]
    friday = closed_ranges(series_of((FOREX, ""), Timeframe.H4), [(date(2024, 7, 5), date(2024, 7, 5))])
    assert list(friday) == [TimeRange(at("2024-07-05T00:00Z"), at("2024-07-05T21:00Z"))]


@pytest.mark.parametrize("market", MARKETS)
def test_no_dates_close_no_candle(market: tuple[AssetClass, str]) -> None:
    for timeframe in Timeframe:
        assert not closed_ranges(series_of(market, timeframe), [])
        assert not closed_ranges(series_of(market, timeframe), [(date(1960, 1, 1), date(1961, 1, 1))])


@settings(max_examples=examples(200))
@given(st.integers(366 * 24 * 60, 76 * 365 * 24 * 60), st.integers(1, 900))
def test_forex_holidays_are_wall_time_of_new_york(minute: int, days: int) -> None:
    first = minute * 60_000_000
    window = TimeRange(first, first + days * MICROS_PER_DAY)
    found = forex_holidays(window)
    assert all(holiday.intersect(window) for holiday in found)
    hours = np.arange(window.start, window.end, 7 * MICROS_PER_HOUR)
    for hour, inside in zip(hours.tolist(), found.contains(hours).tolist(), strict=True):
        wall = datetime.fromtimestamp(hour / 1e6, UTC).astimezone(NEW_YORK).replace(tzinfo=None)
        moment = (wall.month, wall.day, wall.hour)
        christmas = (12, 24, 17) <= moment < (12, 26, 18)
        assert inside == (christmas or moment >= (12, 31, 17) or moment < (1, 2, 18))
    for holiday in found:
        edges = [
            datetime.fromtimestamp(at / 1e6, UTC).astimezone(NEW_YORK) for at in (holiday.start, holiday.end)
        ]
        assert [f"{edge:%m-%d %H:%M}" for edge in edges] in (
            ["12-24 17:00", "12-26 18:00"],
            ["12-31 17:00", "01-02 18:00"],
        )


def test_the_holidays_of_two_years() -> None:
    """As in the real OANDA hours of 2016 and 2017: five holidays intersect them."""
    window = TimeRange(at("2016-01-01T00:00Z"), at("2018-01-01T00:00Z"))
    assert [f"{datetime.fromtimestamp(h.start / 1e6, UTC):%Y-%m-%d}" for h in forex_holidays(window)] == [
        "2015-12-31",
        "2016-12-24",
        "2016-12-31",
        "2017-12-24",
        "2017-12-31",
    ]
    assert not forex_holidays(TimeRange(at("2016-03-01T00:00Z"), at("2016-11-01T00:00Z")))
    assert not forex_holidays(TimeRange(at("2016-12-25T00:00Z"), at("2016-12-25T00:00Z")))
    assert len(forex_holidays(TimeRange(-(2**60), 2**62))) > 150


def test_dates_as_text() -> None:
    one, stretch = (date(2023, 9, 1),) * 2, (date(2024, 11, 14), date(2024, 11, 15))
    assert format_dates([one, stretch]) == "2023-09-01 2024-11-14/2024-11-15"
    assert parse_dates(format_dates([one, stretch])) == [one, stretch]
    assert (format_dates([]), parse_dates("")) == ("", [])


def test_the_effect_of_other_closed_dates() -> None:
    """Both halves of a day in Hong Kong, but not its week: the other days have trades."""
    first, second = (date(2023, 9, 1),) * 2, (date(2023, 9, 8),) * 2
    hours = series_of((STOCKS, "XHKG"), Timeframe.H1)
    change = ClosureChange.of(hours, [first], [second])
    assert (change.dates, change.withdrawn) == (1, 1)
    days = [TimeRange(at(f"{day}T01:30Z"), at(f"{day}T08:00Z")) for day in ("2023-09-01", "2023-09-08")]
    assert all(change.touched.contains(grid_of(hours).opens(day)).all() for day in days)
    assert list(change.added) == [TimeRange(at("2023-09-08T00:00Z"), at("2023-09-08T08:00Z"))]
    week = ClosureChange.of(series_of((STOCKS, "XHKG"), Timeframe.W1), [], [first, second])
    assert (len(week.touched), len(week.added)) == (0, 2)
    # A longer stretch adds one date and does not change the others.
    grown = ClosureChange.of(hours, [first], [(date(2023, 8, 31), date(2023, 9, 1))])
    assert (grown.dates, grown.withdrawn, len(grown.touched)) == (1, 0, 1)
