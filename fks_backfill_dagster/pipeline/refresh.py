"""Refresh: the range that a refresh requests, and whether it is due.

A refresh is a sync whose range begins at the end of the last sync. So a 1d series is due once a day, and a
series without trading today is not due at all, independent of the polling interval.

A delisted symbol has no newer candles, and providers do not report a delisting. Once no provider has had a candle
for SILENT_AFTER, the series is requested again only when the silence has doubled since the last request (at most
LONGEST_WAIT later): so the number of requests grows with the logarithm of time, the gap stays visible, and a symbol
that is listed again is found.

Does not belong here: the schedule (`orchestration`), retries of gaps (`ledger`).
"""

from __future__ import annotations

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_SECOND, Timeframe
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.store.reaches import Reach

CATCH_UP = 366 * MICROS_PER_DAY
"""After a longer downtime a refresh begins at the `start` given to `refresh_range`; a backfill fetches the rest."""

SILENT_AFTER = 7 * MICROS_PER_DAY
LONGEST_WAIT = 30 * MICROS_PER_DAY

_SETTLING_CANDLES = 3
_SETTLING_LEAST = 3600 * MICROS_PER_SECOND


def settling(timeframe: Timeframe) -> int:
    """The time before the end of the coverage for which a refresh requests absent candles again.

    Providers occasionally publish late. Stored candles are not requested again.
    """
    return max(_SETTLING_CANDLES * timeframe.micros, _SETTLING_LEAST)


def silent_since(reach: Reach | None) -> int | None:
    """The open from which no provider has a candle, if that is too long to be a delay; else None."""
    if reach is None or reach.absent_since is None:
        return None
    return reach.absent_since if reach.synced_end - reach.absent_since > SILENT_AFTER else None


def quiet_until(reach: Reach | None) -> int | None:
    """The time until which a silent series is not requested; None for one that is not silent."""
    since = silent_since(reach)
    if reach is None or since is None:
        return None
    return reach.synced_end + min(reach.synced_end - since, LONGEST_WAIT)


def is_due(reach: Reach | None, grid: Grid, now: int, end: int | None = None) -> bool:
    """Whether a candle has closed since the last sync; a series that was never synced is due.

    From `end` on none is expected. A silent series is not due before `quiet_until`.
    """
    if reach is None:
        return True
    if now < (quiet_until(reach) or now):
        return False
    closed = grid.closed_end(now - GRACE)
    last = closed if end is None else min(closed, end)
    return last > reach.synced_end and grid.count(TimeRange(reach.synced_end, last)) > 0


def refresh_range(reach: Reach | None, grid: Grid, timeframe: Timeframe, start: int, now: int) -> TimeRange:
    """The range of a refresh at `now`: from the end of the last sync, or from `start` if there is none in CATCH_UP.

    It includes candles that are missing at the end of the coverage, so that an ongoing outage stays one gap, until
    the outage is older than SILENT_AFTER and too long to be requested each time. It extends to the next candle that
    is not closed yet, so over a weekend beyond `now`.
    """
    end = grid.closed_end(now - GRACE)
    if reach is None or reach.synced_end < now - CATCH_UP:
        return TimeRange(min(start, end), end)
    begin = reach.synced_end - settling(timeframe)
    if reach.lacking_since is not None and reach.synced_end - reach.lacking_since <= SILENT_AFTER:
        begin = min(begin, reach.lacking_since)
    return TimeRange(min(begin, end), end)
