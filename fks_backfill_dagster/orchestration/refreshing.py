"""What a refresh asks for of one series: said alike by the schedule that requests it and the op that does it."""

from __future__ import annotations

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.orchestration.names import start_before
from fks_backfill_dagster.pipeline.refresh import refresh_range
from fks_backfill_dagster.settings import Settings

REFRESH = "fks/refresh"
"""The tag of a refresh, its value the timeframe: tells the op that it is one."""


def asked_range(series: Series, synced_end: int | None, settings: Settings, now: int) -> TimeRange:
    """From the last sync on; of a series without one, the running partition and the one before."""
    start = max(start_before(series.timeframe, now), settings.start_of(series))
    found = refresh_range(synced_end, grid_of(series), series.timeframe, start, now)
    return TimeRange(min(max(found.start, settings.start_of(series)), found.end), found.end)
