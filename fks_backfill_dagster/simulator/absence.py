"""Which rows are missing because of a provider's outages.

In scope: the rule, over opens and ends. Out of scope: the planted outages (`state`) and minutes without
trades (the markets omit them).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.ranges import Instants, RangeSet
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE


def missing_rows(
    opens: Instants, ends: Instants, outage: RangeSet, hours: RangeSet | None
) -> NDArray[np.bool_]:
    """For each row `[open, end)` whether `outage` removes it.

    A row is removed if it contains a trading minute that opens in the outage, or only minutes of the outage.
    `hours` are the trading hours that apply to these rows, None for a market that never closes: an overnight
    outage does not affect a stock's day. Minutes without trades count as well: a provider without data of a
    minute cannot distinguish it from one with trades.
    """
    minutes = RangeSet.from_arrays(_ceil(outage.starts), _ceil(outage.ends))
    traded = minutes if hours is None else minutes & hours
    return _overlap(opens, ends, traded) | _within(opens, ends, minutes)


def _ceil(instants: Instants) -> Instants:
    return -(-instants // MICROS_PER_MINUTE) * MICROS_PER_MINUTE


def _overlap(opens: Instants, ends: Instants, ranges: RangeSet) -> NDArray[np.bool_]:
    following = np.searchsorted(ranges.ends, opens, side="right")
    found = following < len(ranges)
    found[found] = ranges.starts[following[found]] < ends[found]
    return found


def _within(opens: Instants, ends: Instants, ranges: RangeSet) -> NDArray[np.bool_]:
    last = np.searchsorted(ranges.starts, opens, side="right") - 1
    found = last >= 0
    found[found] = ends[found] <= ranges.ends[last[found]]
    return found
