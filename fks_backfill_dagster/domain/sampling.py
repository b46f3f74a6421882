"""Which candles of a long range are compared with other providers: a sample that is the same each time.

Belongs here: the units of a sample and their choice. Does not belong here: the comparison (`comparison`), the requests
that a sample costs (`pipeline.validate`).

A sample has units spread evenly over the range, and those where an error is most likely: beside gaps, and around the
largest moves.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe

FEW = 2_000
"""Up to this number all candles are compared unless a share is given: a few requests return them."""
SPREAD = 12
"""Units spread over the range, unless a share is given."""
MOST_EDGES = 8
"""Edges of gaps in a sample."""
MOST_MOVES = 10
"""Largest moves in a sample."""

_CANDLES_A_UNIT = 28
"""Of timeframes from 1d up: four weeks of days."""


def unit_of(timeframe: Timeframe) -> int:
    """The length of a unit in microseconds: a day, or 28 candles of 1d and 1w."""
    return MICROS_PER_DAY if timeframe.is_intraday else _CANDLES_A_UNIT * timeframe.micros


def sample_of(series: Series, window: TimeRange, share: float | None, special: Instants) -> RangeSet:
    """The sampled part of a window: whole units, cut to the window.

    share: of the units, 0 < share <= 1; None: SPREAD units. One unit at least. special: instants whose units are
    sampled besides. The same arguments have the same sample.
    """
    if not window:
        return RangeSet()
    unit = unit_of(series.timeframe)
    first, past = window.start // unit, -(-window.end // unit)
    total = past - first
    count = min(total, SPREAD if share is None else max(1, math.ceil(share * total)))
    edges = first + np.arange(count + 1, dtype=np.int64) * total // count
    seed = zlib.crc32(f"{series} {window.start} {window.end}".encode())
    chosen = np.random.default_rng(seed).integers(edges[:-1], edges[1:])
    inside = special[(special >= window.start) & (special < window.end)]
    units = np.unique(np.concatenate([chosen, inside // unit]))
    return RangeSet.from_arrays(units * unit, (units + 1) * unit) & RangeSet([window])


@dataclass(frozen=True, slots=True, eq=False)
class Moves:
    """The largest moves of a series so far: their opens and sizes, and the last close."""

    ts: Instants
    size: Floats
    close: float = math.nan

    @classmethod
    def none(cls) -> Moves:
        return cls(np.empty(0, dtype=np.int64), np.empty(0))

    def after(self, candles: Candles) -> Moves:
        """With the next candles, ascending; at most MOST_MOVES are kept.

        The size of a move is the distance of high or low from the close before, in logarithms, so a wick counts.
        """
        if not len(candles):
            return self
        before = np.concatenate([[self.close], candles.close[:-1]])
        size = np.fmax(np.abs(np.log(candles.high / before)), np.abs(np.log(candles.low / before)))
        known = np.isfinite(size)
        ts, size = (
            np.concatenate([self.ts, candles.ts[known]]),
            np.concatenate([self.size, size[known]]),
        )
        largest = np.argsort(-size, kind="stable")[:MOST_MOVES]
        return Moves(ts[largest], size[largest], float(candles.close[-1]))
