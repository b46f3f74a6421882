"""Plausibility check: single candles that differ by a factor of 50 from those around them.

Belongs here: which candles need a second opinion. Does not belong here: the provider to request (`pipeline`).
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats

FACTOR = 50.0
AROUND = 5
"""The number of candles on either side that a candle is compared with, as far as there are."""


def implausible(candles: Candles) -> NDArray[np.bool_]:
    """Which candles have a price at least FACTOR from the median of all prices around, their own included,
    while neither neighbour opens and closes at that level.

    `candles` are verified and ascend. A level that lasts for two candles or more is plausible.
    """
    found = np.zeros(len(candles), dtype=bool)
    if len(candles) < 2 or candles.high.max() < FACTOR * candles.low.min():
        return found
    rows = np.flatnonzero(_spread(candles) >= FACTOR)
    median = _median_around(candles, rows)
    low, high = candles.low[rows], candles.high[rows]
    outlying = np.where(high >= FACTOR * median, high, low)
    far = (high >= FACTOR * median) | (low * FACTOR <= median)
    stays = _at_level(candles, rows - 1, outlying, median) | _at_level(candles, rows + 1, outlying, median)
    found[rows] = far & ~stays
    return found


def _spread(candles: Candles) -> Floats:
    """The highest price around each candle divided by the lowest one."""
    width = 2 * AROUND + 1
    high = sliding_window_view(np.pad(candles.high, AROUND, mode="edge"), width).max(axis=1)
    low = sliding_window_view(np.pad(candles.low, AROUND, mode="edge"), width).min(axis=1)
    spread: Floats = high / low
    return spread


def _median_around(candles: Candles, rows: NDArray[np.intp]) -> Floats:
    """The median of all prices of the candles around each row."""
    if not len(rows):
        return np.empty(0)
    around = rows[:, None] + np.arange(-AROUND, AROUND + 1)
    outside = (around < 0) | (around >= len(candles))
    prices = np.stack([candles.open, candles.high, candles.low, candles.close], axis=1)
    values = prices[np.clip(around, 0, len(candles) - 1)]
    values[outside] = np.nan
    median: Floats = np.nanmedian(values.reshape(len(rows), -1), axis=1)
    return median


def _at_level(candles: Candles, rows: NDArray[np.intp], level: Floats, median: Floats) -> NDArray[np.bool_]:
    """Whether these candles open and close nearer to `level` than to `median`, as factors."""
    exists = (rows >= 0) & (rows < len(candles))
    rows = np.clip(rows, 0, len(candles) - 1)
    there = exists.copy()
    for price in (candles.open[rows], candles.close[rows]):
        there &= np.abs(np.log(price / level)) < np.abs(np.log(price / median))
    return there
