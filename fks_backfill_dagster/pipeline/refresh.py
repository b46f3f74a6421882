"""Which part of a series a refresh asks for, and whether there is anything to ask.

A refresh is a sync like any other; what makes it one is its range, which begins where the last sync
ended. So a 1d series is due once a day and a series without trade today is not due at all, whatever
the pace at which somebody looks.

A symbol that was delisted has no newer candles, and nobody says so. Once nobody has had a candle for
SILENT_AFTER, the series is asked for again only when the silence is twice as long as at the last look
(at most LONGEST_WAIT later): so the requests grow like the logarithm of time, its gap stays visible, and
a symbol that comes back is found.

Does not belong here: when one looks (orchestration), which gaps are asked for again later (gaps).
"""

from __future__ import annotations

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_SECOND, Timeframe
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.store.reaches import Reach

CATCH_UP = 366 * MICROS_PER_DAY
"""Who was away for longer comes back with the range's own start; the rest of the history is a backfill's."""

SILENT_AFTER = 7 * MICROS_PER_DAY
LONGEST_WAIT = 30 * MICROS_PER_DAY

_SETTLING_CANDLES = 3
_SETTLING_LEAST = 3600 * MICROS_PER_SECOND


def settling(timeframe: Timeframe) -> int:
    """How long before the end of what was synced a refresh asks again for candles that were absent.

    Providers publish late now and then. Candles that are stored are not asked for again.
    """
    return max(_SETTLING_CANDLES * timeframe.micros, _SETTLING_LEAST)


def silent_since(reach: Reach | None) -> int | None:
    """From which open on nobody has a candle, where that is long enough to be no delay; else None."""
    if reach is None or reach.absent_since is None:
        return None
    return reach.absent_since if reach.synced_end - reach.absent_since > SILENT_AFTER else None


def quiet_until(reach: Reach | None) -> int | None:
    """Until when a silent series is not asked for; None for one that is not silent."""
    since = silent_since(reach)
    if reach is None or since is None:
        return None
    return reach.synced_end + min(reach.synced_end - since, LONGEST_WAIT)


def is_due(reach: Reach | None, grid: Grid, now: int, end: int | None = None) -> bool:
    """Whether a candle has closed since the last sync; a series that was never synced is due.

    From `end` on none is expected. A silent series is not due before it is `quiet_until`.
    """
    if reach is None:
        return True
    if now < (quiet_until(reach) or now):
        return False
    closed = grid.closed_end(now - GRACE)
    last = closed if end is None else min(closed, end)
    return last > reach.synced_end and grid.count(TimeRange(reach.synced_end, last)) > 0


def refresh_range(reach: Reach | None, grid: Grid, timeframe: Timeframe, start: int, now: int) -> TimeRange:
    """What a refresh at `now` covers: since the last sync, or from `start` where that is no answer.

    What is missing at its end belongs to it, so that an outage which goes on stays one gap, until it is
    older than SILENT_AFTER: then it would be much to ask for. It reaches to the next candle that is not
    closed yet, so over a weekend beyond `now`.
    """
    end = grid.closed_end(now - GRACE)
    if reach is None or reach.synced_end < now - CATCH_UP:
        return TimeRange(min(start, end), end)
    begin = reach.synced_end - settling(timeframe)
    if reach.lacking_since is not None and reach.synced_end - reach.lacking_since <= SILENT_AFTER:
        begin = min(begin, reach.lacking_since)
    return TimeRange(min(begin, end), end)
