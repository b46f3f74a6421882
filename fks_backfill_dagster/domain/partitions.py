"""Names of series and ranges in Dagster: asset keys, and the partitions of a grain.

A series is the asset `ohlcv / SYMBOL / TIMEFRAME`; the key of a partition is its first day.
Does not belong here: Dagster's partition definitions (`orchestration.partitions`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros

KEY_PREFIX = "ohlcv"
KEY_FORMAT = "%Y-%m-%d"

AssetPath = tuple[str, ...]


def asset_path(series: Series) -> AssetPath:
    """The parts of the series' asset key."""
    symbol, timeframe = series.key
    return (KEY_PREFIX, identifier(symbol), timeframe)


class Grain(StrEnum):
    """The length of partitions, UTC: months below 1h, years from 1h up. The value is its name in SQL (`date_trunc`).

    Instants are microseconds.
    """

    MONTH = "month"
    YEAR = "year"

    @classmethod
    def of(cls, timeframe: Timeframe) -> Grain:
        return cls.MONTH if timeframe.micros < Timeframe.H1.micros else cls.YEAR

    def start(self, moment: int, offset: int = 0) -> int:
        """The start of the partition that contains `moment`; `offset` 1: of the next one, -1: of the previous one."""
        day = to_datetime(moment)
        if self is Grain.YEAR:
            return to_micros(datetime(day.year + offset, 1, 1, tzinfo=UTC))
        year, month = divmod(day.year * 12 + day.month - 1 + offset, 12)
        return to_micros(datetime(year, month + 1, 1, tzinfo=UTC))

    def key(self, moment: int) -> str:
        """The key of the partition that contains `moment`."""
        return f"{to_datetime(self.start(moment)):{KEY_FORMAT}}"

    def keys(self, window: TimeRange) -> list[str]:
        """The keys of all partitions that intersect `window`, which is not empty."""
        keys, start = [], self.start(window.start)
        while start < window.end:
            keys.append(self.key(start))
            start = self.start(start, 1)
        return keys

    def window(self, key: str) -> TimeRange:
        """The time range of the partition of that key."""
        start = to_micros(datetime.strptime(key, KEY_FORMAT).replace(tzinfo=UTC))
        return TimeRange(start, self.start(start, 1))
