"""The range that a refresh requests of one series, and whether a tick requests it.

The schedule that requests a refresh and the op that runs it use the same rule.
"""

from __future__ import annotations

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.refresh import is_due, quiet_until, refresh_range
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.store.reaches import Reach


def is_wanted(series: Series, reach: Reach | None, catalog: Catalog, now: int, *, daily: bool) -> bool:
    """Whether a tick refreshes the series; a `daily` tick refreshes all that have not ended."""
    end, grid = catalog.end_of(series), grid_of(series)
    if end is None or now < end:
        return daily or is_due(reach, grid, now, end)
    return is_due(reach, grid, now, end) and grid.count(requested_range(series, reach, catalog, now)) > 0


def requested_range(series: Series, reach: Reach | None, catalog: Catalog, now: int) -> TimeRange:
    """From the end of the last sync; without a sync, the current partition and the previous one.

    Empty for a series that delivers no candles, until it is due: the daily tick materializes it, with the missing
    candles in the metadata, without a request.
    """
    if now < (quiet_until(reach) or now):
        return TimeRange(now, now)
    start = max(Grain.of(series.timeframe).start(now, -1), catalog.start_of(series))
    return catalog.kept(series, refresh_range(reach, grid_of(series), series.timeframe, start, now))
