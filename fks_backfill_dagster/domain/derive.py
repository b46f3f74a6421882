"""Coarse candles out of fine ones: 4h from 1h, a day from its session's minutes.

Belongs here: which parts a candle has, and how they become one.
Does not belong here: which finer timeframe a provider takes, or how it is asked for.

A part belongs to the first candle that closes after the part opens. That holds where "opens at or
after the candle's own open" does not: a stock day is named by its date at 00:00 UTC, and in Sydney
the session begins an hour before that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_WEEK


def derive(parts: Candles, fine: Grid, coarse: Grid, window: TimeRange, *, quiet_ok: bool) -> Candles:
    """The candles of `coarse` that open in `window`, made of `parts`, which are candles of `fine`.

    `parts` may come in any order; those outside the session are passed over. A candle is made when all
    its expected parts are there. With `quiet_ok`, for a source that leaves out the intervals without a
    trade, one part is enough, if what is absent lies between two parts that are there: so give the
    parts of a candle more on either side. Either way a candle that is still forming is not made, as
    long as no part is given before it has closed. One volume of NaN makes the sum NaN.

    A part that `quality` would reject makes all four prices of its candle NaN, so that the candle is
    rejected in its turn: left out silently, it would pass for a quiet interval.

    Raises ValueError when `fine` does not divide `coarse`: when a part reaches into the next candle.
    """
    opens = coarse.opens(window)
    if len(opens) == 0:
        return Candles.empty()
    closes = coarse.closes(opens)
    span = parts_span(coarse, window)
    verdict = verify(parts, span, fine, span.end)
    good = verdict.good
    owner = np.searchsorted(closes, good.ts, side="right")
    if (fine.closes(good.ts) > closes[owner]).any():
        raise ValueError("the parts reach over the edges of the candles: one grid does not divide the other")

    spoilt = np.zeros(len(opens), dtype=bool)
    for rejected in verdict.rejected:
        spoilt[np.searchsorted(closes, rejected.candles.ts, side="right")] = True
    present = np.bincount(owner, minlength=len(opens))
    wanted = fine.opens(span)
    ends = np.searchsorted(wanted, closes)
    expected = np.diff(ends, prepend=0)
    enough = present == expected
    if quiet_ok and len(good):
        given = parts.ts[fine.contains(parts.ts)]
        enough |= (given.min() <= wanted[ends - expected]) & (given.max() >= wanted[ends - 1])
    enough &= present > 0
    return _merged(good, present, opens, spoilt).take(enough | spoilt)


def parts_span(coarse: Grid, window: TimeRange) -> TimeRange:
    """Where the parts of the candles that open in `window` lie; empty when none opens there."""
    opens = coarse.opens(window)
    if len(opens) == 0:
        return TimeRange(window.start, window.start)
    first, end = int(opens[0]), int(coarse.closes(opens[-1:])[0])
    # From the close of the candle before it, or from a day before: no session begins earlier than that.
    earliest = first - MICROS_PER_DAY
    before = coarse.opens(TimeRange(first - 2 * MICROS_PER_WEEK, first))
    return TimeRange(max(int(coarse.closes(before[-1:])[0]), earliest) if len(before) else earliest, end)


def _merged(parts: Candles, present: Instants, opens: Instants, spoilt: NDArray[np.bool_]) -> Candles:
    """A candle for each of `opens`, of its next `present` parts; NaN where it has none or is spoilt."""
    filled = present > 0
    first = (np.cumsum(present) - present)[filled]
    last = first + present[filled] - 1
    columns = np.full((5, len(opens)), np.nan)
    if len(first):
        columns[0, filled] = parts.open[first]
        columns[1, filled] = np.maximum.reduceat(parts.high, first)
        columns[2, filled] = np.minimum.reduceat(parts.low, first)
        columns[3, filled] = parts.close[last]
        columns[4, filled] = np.add.reduceat(parts.volume, first)
    columns[:4, spoilt] = np.nan
    return Candles(opens, *columns)
