"""Coarse candles derived from fine ones: 4h from 1h, a week from its days.

Belongs here: which parts a candle has, and how they are aggregated.
Does not belong here: which timeframe a provider's candles are derived from (its capabilities), how parts are
requested and verified (`pipeline.fetch.request`), which absent part is a no-trade interval (`ledger.no_trade`).

A part belongs to the first candle that closes after the part opens. "Opens at or after the candle's own
open" would be wrong: a stock day is named by its date at 00:00 UTC, and in Sydney the session begins an
hour before that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_WEEK

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Derived:
    """The derived candles of a window; arrays of one element per expected candle.

    opens: their opens. expected: how many parts each has, no-trade parts included. present: parts that
    were given. no_trade: absent parts that are no-trade intervals. made: whether the candle was derived.
    """

    candles: Candles
    opens: Instants
    expected: Instants
    present: Instants
    no_trade: Instants

    @property
    def made(self) -> NDArray[np.bool_]:
        made: NDArray[np.bool_] = (self.present > 0) & (self.present + self.no_trade == self.expected)
        return made

    @property
    def partial(self) -> NDArray[np.bool_]:
        """Whether some parts were given and others are missing."""
        some: NDArray[np.bool_] = (self.present > 0) & (self.present + self.no_trade < self.expected)
        return some


def derive(
    parts: Candles, fine: Grid, coarse: Grid, window: TimeRange, no_trade: Instants = _NONE
) -> Derived:
    """The candles of `coarse` that open in `window`, derived from `parts`.

    `parts`: verified candles of `fine`, ascending and unique. `no_trade`: expected opens of `fine` without
    trades, ascending. A candle is derived only if every expected part is given or in `no_trade`, and at
    least one is given. One volume of NaN makes the sum NaN.

    Raises ValueError if `fine` does not divide `coarse`, that is, if a part extends into the next candle.
    """
    opens = coarse.opens(window)
    if len(opens) == 0:
        return Derived(Candles.empty(), _NONE, _NONE, _NONE, _NONE)
    closes = coarse.closes(opens)
    span = parts_span(coarse, window)
    parts = parts.within(span)
    owner = np.searchsorted(closes, parts.ts, side="right")
    if (fine.closes(parts.ts) > closes[owner]).any():
        raise ValueError("the parts extend over the edges of the candles: one grid does not divide the other")
    inside = no_trade[(no_trade >= span.start) & (no_trade < span.end)]
    without_trades = inside[~np.isin(inside, parts.ts)]
    present = np.bincount(owner, minlength=len(opens))
    absent = np.bincount(np.searchsorted(closes, without_trades, side="right"), minlength=len(opens))
    expected = np.diff(np.searchsorted(fine.opens(span), closes), prepend=0)
    found = Derived(Candles.empty(), opens, expected, present, absent)
    return Derived(_merged(parts, present, opens).take(found.made), opens, expected, present, absent)


def divides(fine: Grid, coarse: Grid, window: TimeRange) -> bool:
    """Whether every part of the candles that open in `window` lies within one of them; False if there is no part."""
    opens = coarse.opens(window)
    parts = fine.opens(parts_span(coarse, window))
    if len(parts) == 0:
        return False
    closes = coarse.closes(opens)
    owner = np.searchsorted(closes, parts, side="right")
    return bool((fine.closes(parts) <= closes[owner]).all())


def owners(opens: Instants, coarse: Grid, parts: Instants) -> Instants:
    """The open of the candle that each part belongs to; `opens`: the candidates, ascending."""
    if len(opens) == 0:
        return parts
    index = np.searchsorted(coarse.closes(opens), parts, side="right")
    return opens[np.minimum(index, len(opens) - 1)]


def parts_span(coarse: Grid, window: TimeRange) -> TimeRange:
    """The range of the parts of the candles that open in `window`; empty if none opens there."""
    opens = coarse.opens(window)
    if len(opens) == 0:
        return TimeRange(window.start, window.start)
    first, end = int(opens[0]), int(coarse.closes(opens[-1:])[0])
    # From the close of the candle before it, at most a day before: no session begins earlier than that.
    earliest = first - MICROS_PER_DAY
    before = coarse.opens(TimeRange(first - 2 * MICROS_PER_WEEK, first))
    return TimeRange(max(int(coarse.closes(before[-1:])[0]), earliest) if len(before) else earliest, end)


def _merged(parts: Candles, present: Instants, opens: Instants) -> Candles:
    """A candle for each of `opens`, from its next `present` parts; NaN where it has none."""
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
    return Candles(opens, *columns)
