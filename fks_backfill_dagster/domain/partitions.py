"""Names of series and ranges in Dagster: asset keys and partition keys.

A series is the asset `ohlcv / SYMBOL / TIMEFRAME`; the key of a partition is its first day.
Does not belong here: Dagster's partition definitions (`orchestration.partitions`).
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros

KEY_PREFIX = "ohlcv"
KEY_FORMAT = "%Y-%m-%d"

AssetPath = tuple[str, ...]


def asset_path(series: Series) -> AssetPath:
    """The parts of the series' asset key."""
    return (KEY_PREFIX, identifier(series.symbol), series.timeframe.value)


def is_monthly(timeframe: Timeframe) -> bool:
    """Whether the partitions of this timeframe are months; otherwise they are years."""
    return timeframe.micros < Timeframe.H1.micros


def key_at(timeframe: Timeframe, moment: int) -> str:
    """The key of the partition that contains `moment`."""
    return f"{to_datetime(moment):{'%Y-%m-01' if is_monthly(timeframe) else '%Y-01-01'}}"


def keys_of(timeframe: Timeframe, window: TimeRange) -> list[str]:
    """The keys of all partitions that intersect `window`, which is not empty."""
    day, last = to_datetime(window.start).replace(day=1), key_at(timeframe, window.end - 1)
    keys = [key_at(timeframe, window.start)]
    while keys[-1] < last:
        day = (day + timedelta(days=31)).replace(day=1)
        key = key_at(timeframe, to_micros(day))
        if key != keys[-1]:
            keys.append(key)
    return keys


def keys_before_start(timeframe: Timeframe, begin: int, start: int) -> tuple[str, ...]:
    """The keys of the partitions, from the one that contains `begin` on, that lie wholly before `start`."""
    if start <= begin:
        return ()
    own = key_at(timeframe, start)
    return tuple(key for key in keys_of(timeframe, TimeRange(begin, start)) if key < own)


def window_of(timeframe: Timeframe, key: str) -> TimeRange:
    """The time range of the partition of that key."""
    day = datetime.strptime(key, KEY_FORMAT).replace(tzinfo=UTC)
    if is_monthly(timeframe):
        return TimeRange(to_micros(day), to_micros((day + timedelta(days=31)).replace(day=1)))
    return TimeRange(to_micros(day), to_micros(day.replace(year=day.year + 1)))


def start_before(timeframe: Timeframe, moment: int) -> int:
    """The start of the partition before that of `moment`."""
    day = to_datetime(moment).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    if not is_monthly(timeframe):
        return to_micros(day.replace(year=day.year - 1, month=1))
    return to_micros((day - timedelta(days=1)).replace(day=1))
