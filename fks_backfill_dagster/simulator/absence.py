"""Which rows a provider lacks in its outages.

Belongs here: the rule, over opens and ends. Not here: what is planted (`state`), trades that did not
happen (the markets leave those minutes out themselves).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.ranges import Instants, RangeSet
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE


def lacking(opens: Instants, ends: Instants, outage: RangeSet, hours: RangeSet | None) -> NDArray[np.bool_]:
    """For each row `[open, end)` whether `outage` takes it.

    It does if the row holds a minute of trading that opens in the outage, or nothing but minutes of it.
    `hours` are the trading hours that count for these rows, None for a market that never closes: a stock's
    day is not touched by an outage overnight. Whether anybody traded in a minute is not asked: a provider
    that lacks a quiet minute does not know that it was quiet.
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
