"""Which part of a series a refresh asks for, and whether there is anything to ask.

A refresh is a sync like any other; what makes it one is its range, which begins where the last sync
ended. So a 1d series is due once a day and a series without trade today is not due at all, whatever
the pace at which somebody looks.

Does not belong here: when one looks (orchestration), which gaps are asked for again later (gaps).
"""

from __future__ import annotations

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_SECOND, Timeframe
from fks_backfill_dagster.pipeline.plan import GRACE

CATCH_UP = 366 * MICROS_PER_DAY
"""Who was away for longer comes back with the range's own start; the rest of the history is a backfill's."""

_SETTLING_CANDLES = 3
_SETTLING_LEAST = 3600 * MICROS_PER_SECOND


def settling(timeframe: Timeframe) -> int:
    """How long before the end of what was synced a refresh asks again for candles that were absent.

    Providers publish late now and then. Candles that are stored are not asked for again.
    """
    return max(_SETTLING_CANDLES * timeframe.micros, _SETTLING_LEAST)


def is_due(synced_end: int | None, grid: Grid, now: int) -> bool:
    """Whether a candle has closed since; a series that was never synced is due."""
    if synced_end is None:
        return True
    end = grid.closed_end(now - GRACE)
    return end > synced_end and grid.count(TimeRange(synced_end, end)) > 0


def refresh_range(
    synced_end: int | None, grid: Grid, timeframe: Timeframe, start: int, now: int
) -> TimeRange:
    """What a refresh at `now` covers: since the last sync, or from `start` where that is no answer.

    It reaches to the next candle that is not closed yet, so over a weekend beyond `now`.
    """
    end = grid.closed_end(now - GRACE)
    away = synced_end is None or synced_end < now - CATCH_UP
    begin = start if away or synced_end is None else synced_end - settling(timeframe)
    return TimeRange(min(begin, end), end)
