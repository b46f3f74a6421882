"""Stamps of daily bars: their session, in any zone, and that no bar is moved by a day silently."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import Reason, verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)
from fks_backfill_dagster.providers.sessions import midnight_dates, session_dates
from fks_backfill_dagster_tests.providers.scripted import span, us

EXCHANGES = {
    "BVMF": "America/Sao_Paulo",
    "XNYS": "America/New_York",
    "XLON": "Europe/London",
    "XTKS": "Asia/Tokyo",
    "XHKG": "Asia/Hong_Kong",
    "XASX": "Australia/Sydney",
    "XNZE": "Pacific/Auckland",
}
# Both changes of daylight saving time where it exists, half-days, Christmas.
YEAR = span("2018-01-01", "2019-01-15")


def days_of(calendar: str) -> Series:
    return Series("X", Timeframe.D1, AssetClass.STOCKS, calendar)


def dates_of(calendar: str) -> np.ndarray:
    return grid_of(days_of(calendar)).opens(YEAR)


def local(dates: np.ndarray, clock: str, zone: str, days: int = 0) -> np.ndarray:
    """The instant of a wall clock time on each date, `days` later; a skipped hour moves forward."""
    wall = pd.DatetimeIndex((dates + days * MICROS_PER_DAY).view("datetime64[us]")) + pd.Timedelta(
        f"{clock}:00"
    )
    zoned = wall.tz_localize(zone, nonexistent="shift_forward", ambiguous=np.ones(len(wall), dtype=bool))
    return zoned.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)


@pytest.mark.parametrize(("calendar", "zone"), EXCHANGES.items())
class TestEveryZone:
    @pytest.mark.parametrize(
        ("clock", "before"),
        [("00:00", 0), ("01:00", 0), ("09:30", 0), ("12:15", 0), ("23:00", -1), ("22:00", -1), ("23:59", -1)],
    )
    def test_every_session_of_a_year(self, calendar: str, zone: str, clock: str, before: int) -> None:
        dates = dates_of(calendar)
        stamps = local(dates, clock, zone, before)
        assert np.array_equal(session_dates(stamps, days_of(calendar), ZoneInfo(zone)), dates)

    def test_opens_and_closes_of_sessions(self, calendar: str, zone: str) -> None:
        dates, minutes = dates_of(calendar), grid_of(Series("X", Timeframe.M1, AssetClass.STOCKS, calendar))
        every = minutes.opens(TimeRange(int(dates[0]) - MICROS_PER_DAY, int(dates[-1]) + 2 * MICROS_PER_DAY))
        closes = grid_of(days_of(calendar)).closes(dates)
        last = every[np.searchsorted(every, closes) - 1]
        first = np.concatenate([every[:1], every[1:][np.diff(every) > 3 * MICROS_PER_HOUR]])
        for stamps in (first[: len(dates)], last, last + MICROS_PER_MINUTE + 2_000_000):
            moved = session_dates(stamps, days_of(calendar), ZoneInfo(zone))
            assert np.array_equal(moved, dates[: len(moved)])

    def test_the_evening_before_a_day_without_session_fits_none(self, calendar: str, zone: str) -> None:
        dates = dates_of(calendar)
        fridays = dates[(dates // MICROS_PER_DAY + 3) % 7 == 4]
        stamps = local(fridays, "23:00", zone)
        moved = session_dates(stamps, days_of(calendar), ZoneInfo(zone))
        assert not grid_of(days_of(calendar)).on_clock(moved).any()
        assert np.array_equal(moved, stamps)

    def test_utc_midnight_is_a_date_only_if_it_lies_in_it(self, calendar: str, zone: str) -> None:
        """West of Greenwich it is the previous evening, hours after the close: the day is ambiguous."""
        dates = dates_of(calendar)
        moved = session_dates(dates, days_of(calendar), ZoneInfo(zone))
        west = zone.startswith("America")
        known = np.isin(moved, dates)
        assert np.array_equal(moved[known], dates[known])
        assert known.all() or (west and not grid_of(days_of(calendar)).on_clock(moved[~known]).any())

    def test_bars_off_the_grid_are_quarantined(self, calendar: str, zone: str) -> None:
        """Rows at 00:00 UTC of a day without a session would be dropped, so that stamp is not kept."""
        grid = grid_of(days_of(calendar))
        sundays = dates_of(calendar)[:1] - dates_of(calendar)[:1] % (7 * MICROS_PER_DAY) + 3 * MICROS_PER_DAY
        moved = session_dates(sundays, days_of(calendar), ZoneInfo(zone))
        rows = Candles(moved, *np.full((5, len(moved)), 2.0))
        verdict = verify(rows, TimeRange(0, us("2030-01-01")), grid, us("2030-01-01"))
        assert [part.reason for part in verdict.rejected] == [Reason.OFF_GRID]


@given(st.sampled_from(list(EXCHANGES)), st.integers(YEAR.start // 1000, YEAR.end // 1000))
def test_no_bar_is_moved_by_a_day(calendar: str, millis: int) -> None:
    """For any stamp: the session is that of its local date, from 22:00 of the next one, or it is off the grid."""
    zone, series = ZoneInfo(EXCHANGES[calendar]), days_of(calendar)
    stamp = np.array([millis * 1000])
    (moved,) = session_dates(stamp, series, zone)
    wall = pd.Timestamp(int(stamp[0]), unit="us", tz="UTC").tz_convert(zone).tz_localize(None)
    own = int(wall.normalize().value // 1000)
    if grid_of(series).contains(np.array([moved]))[0]:
        assert moved == own or (moved == own + MICROS_PER_DAY and wall.hour >= 22)
    else:
        assert 0 <= moved - stamp[0] <= 1


class TestLastTrade:
    def test_a_last_trade_late_at_night_belongs_to_its_day(self) -> None:
        """An exchange with trading after hours: the newest bar is stamped with its last trade."""
        stamps, zone = np.array([us("2018-03-06T04:30")]), ZoneInfo("America/New_York")  # Monday 23:30
        assert session_dates(stamps, days_of("XNYS"), zone).tolist() == [us("2018-03-06")]
        assert session_dates(stamps, days_of("XNYS"), zone, int(stamps[0])).tolist() == [us("2018-03-05")]

    def test_sessions_that_begin_on_the_evening_before(self) -> None:
        series, zone = days_of("us_futures"), ZoneInfo("America/New_York")
        stamps = np.array([us("2018-03-04T23:30"), us("2018-03-05T15:00"), us("2018-03-05T23:30")])
        assert session_dates(stamps, series, zone).tolist() == [us("2018-03-05")] * 2 + [us("2018-03-06")]


class TestMidnight:
    zone = ZoneInfo("America/New_York")

    def test_only_midnight_is_a_date(self) -> None:
        dates = dates_of("XNYS")
        at_midnight = local(dates, "00:00", "America/New_York")
        assert np.array_equal(midnight_dates(at_midnight, days_of("XNYS"), self.zone), dates)
        for clock, days in [("23:00", -1), ("01:00", 0), ("09:30", 0), ("20:00", -1), ("19:00", -1)]:
            stamps = local(dates, clock, "America/New_York", days)
            moved = midnight_dates(stamps, days_of("XNYS"), self.zone)
            assert not grid_of(days_of("XNYS")).on_clock(moved).any(), clock
            assert np.isin(moved - stamps, [0, 1]).all()

    def test_a_holiday_is_not_a_date(self) -> None:
        stamps = local(np.array([us("2018-12-25"), us("2018-03-04")]), "00:00", "America/New_York")
        assert np.array_equal(midnight_dates(stamps, days_of("XNYS"), self.zone), stamps)
