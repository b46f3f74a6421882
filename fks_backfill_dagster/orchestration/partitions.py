"""Dagster's definitions of partitions, one per grain.

Each partition of a run costs two Dagster events of 15 to 30 ms in PostgreSQL, so a partition should hold thousands
of candles.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from functools import cache

from dagster import TimeWindowPartitionsDefinition

from fks_backfill_dagster.domain.partitions import KEY_FORMAT, Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime

_CRON = {Grain.MONTH: "0 0 1 * *", Grain.YEAR: "0 0 1 1 *"}


def partitions_for(timeframe: Timeframe, begin: int) -> TimeWindowPartitionsDefinition:
    """The partitions of a timeframe: from the one that contains `begin` to the current one."""
    grain = Grain.of(timeframe)
    return _partitions(_CRON[grain], to_datetime(grain.start(begin)))


@cache
def _partitions(cron: str, start: datetime) -> TimeWindowPartitionsDefinition:
    # One object per grain: Dagster compares definitions by value thousands of times, but checks identity first.
    # The start is rounded down because Dagster begins with the first whole window after it.
    return TimeWindowPartitionsDefinition(
        start=start, cron_schedule=cron, fmt=KEY_FORMAT, timezone="UTC", end_offset=1
    )


def windows_of(partitions: TimeWindowPartitionsDefinition, keys: Iterable[str]) -> dict[str, TimeRange]:
    """The window of each key, in the order given."""
    windows = ((key, partitions.time_window_for_partition_key(key)) for key in keys)
    return {key: TimeRange.of(window.start, window.end) for key, window in windows}
