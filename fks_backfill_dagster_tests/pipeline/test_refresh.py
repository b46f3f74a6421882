"""The range of a refresh, and when it is due."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.pipeline.refresh import CATCH_UP, is_due, refresh_range, settling, silent_since
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.reaches import Reach

DAILY = Series("BTC/USDT", Timeframe.D1, AssetClass.CRYPTO)
HOURLY = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
STOCK = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)


def due_hours(series: Series, first: str, days: int, synced: str) -> list[int]:
    """The hours after `first` at which an hourly tick finds the series due, if each refresh succeeds."""
    end, grid, due = instant(synced), grid_of(series), []
    for hour in range(24 * days):
        now = instant(first) + hour * MICROS_PER_HOUR + MICROS_PER_HOUR // 20
        if is_due(Reach(end), grid, now):
            due.append(hour)
            end = refresh_range(Reach(end), grid, series.timeframe, 0, now).end
    return due


def test_a_daily_series_is_due_once_a_day() -> None:
    assert due_hours(DAILY, "2024-03-01", 3, "2024-03-01") == [24, 48]


def test_an_hourly_series_is_due_every_hour() -> None:
    assert due_hours(HOURLY, "2024-03-01", 1, "2024-03-01") == list(range(1, 24))


def test_a_stock_is_not_due_while_its_exchange_is_closed() -> None:
    # Friday 2024-03-01 to Sunday; the session is 14:30 to 21:00 UTC, its first bar opens at 14:00.
    assert due_hours(STOCK, "2024-03-01", 3, "2024-02-29T21:00") == [15, 16, 17, 18, 19, 20, 21]


def test_a_series_synced_within_a_weekend_is_not_due_before_monday() -> None:
    assert due_hours(STOCK, "2024-03-02", 2, "2024-03-01T21:30") == []


def test_a_series_that_was_never_synced_is_due_from_the_given_start() -> None:
    now, start = instant("2024-03-10T12:30"), instant("2024-02-01")
    assert is_due(None, grid_of(HOURLY), now)
    assert refresh_range(None, grid_of(HOURLY), Timeframe.H1, start, now) == TimeRange(
        start, instant("2024-03-10T12:00")
    )


@pytest.mark.parametrize(
    ("timeframe", "expected"), [(Timeframe.M1, MICROS_PER_HOUR), (Timeframe.D1, 3 * MICROS_PER_DAY)]
)
def test_a_refresh_overlaps_the_last_one_for_late_candles(timeframe: Timeframe, expected: int) -> None:
    series = Series("BTC/USDT", timeframe, AssetClass.CRYPTO)
    now, synced = instant("2024-03-10T12:30"), instant("2024-03-10")
    found = refresh_range(Reach(synced), grid_of(series), timeframe, 0, now)
    assert (found.start, settling(timeframe)) == (synced - expected, expected)


def test_a_refresh_catches_up_months_but_not_years() -> None:
    now, start = instant("2024-03-10T12:30"), instant("2024-02-01")
    grid = grid_of(HOURLY)
    for downtime, begin in ((100 * MICROS_PER_DAY, None), (CATCH_UP + MICROS_PER_DAY, start)):
        found = refresh_range(Reach(now - downtime), grid, Timeframe.H1, start, now)
        assert found.start == (now - downtime - settling(Timeframe.H1) if begin is None else begin)


def silence(days: float) -> Reach:
    """The reach of an hourly series that was synced up to 2024-03-10, with the last candle `days` before."""
    end = instant("2024-03-10")
    since = end - int(days * MICROS_PER_DAY)
    return Reach(end, since, since)


@pytest.mark.parametrize(
    ("lacking", "expected"),
    [
        (None, MICROS_PER_HOUR * 3),  # the allowance for late publication
        (MICROS_PER_HOUR, MICROS_PER_HOUR * 3),
        (5 * MICROS_PER_DAY, 5 * MICROS_PER_DAY),
        (8 * MICROS_PER_DAY, MICROS_PER_HOUR * 3),
    ],
)
def test_missing_candles_at_the_end_belong_to_a_refresh(lacking: int | None, expected: int) -> None:
    end, now = instant("2024-03-10"), instant("2024-03-10T03:30")
    reach = Reach(end, None if lacking is None else end - lacking)
    assert refresh_range(reach, grid_of(HOURLY), Timeframe.H1, 0, now).start == end - expected


@pytest.mark.parametrize(
    ("days", "wait"), [(0.5, 0), (7, 0), (7.5, 7.5), (20, 20), (30, 30), (31, 30), (900, 30)]
)
def test_a_silent_series_is_due_after_its_silence_has_doubled_or_a_month(days: float, wait: float) -> None:
    reach, grid = silence(days), grid_of(HOURLY)
    assert (silent_since(reach) is None) == (wait == 0)
    due = reach.synced_end + max(int(wait * MICROS_PER_DAY), MICROS_PER_HOUR + MICROS_PER_HOUR // 60)
    assert is_due(reach, grid, due)
    assert not is_due(reach, grid, due - MICROS_PER_HOUR)


def test_nothing_is_due_from_the_end_on() -> None:
    now, end = instant("2024-03-10T12:30"), instant("2024-03-01T05:00")
    grid = grid_of(HOURLY)
    assert not is_due(Reach(end), grid, now, end)
    assert not is_due(Reach(end + MICROS_PER_DAY), grid, now, end)
    assert is_due(Reach(end - MICROS_PER_HOUR), grid, now, end), "the last candle is still to come"
    assert is_due(Reach(now - MICROS_PER_DAY), grid, now, now + MICROS_PER_DAY), "it has not ended yet"
