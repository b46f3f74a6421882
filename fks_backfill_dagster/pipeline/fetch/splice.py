"""Splice detection: whether a provider's candles fit the stored ones beside them.

A fallback often quotes another market (`X:BTCUSD` for BTC/USDT): its candles would be a step in the series.
So it is requested with one stored neighbour on either side, and compared there.

Belongs here: the comparison. Does not belong here: which candles are requested (`fallback`).
"""

from __future__ import annotations

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import difference

FAR = 0.05
"""A first provider that differs by more than this in every price of a stored candle serves another market:
a correction changes one or two prices, a split changes no candle before it."""


def splice(ours: Candles, theirs: Candles, tolerance: float, *, first: bool) -> float | None:
    """The relative difference beside the range, if it is a splice; else None.

    `ours` are stored or accepted neighbours of the range, `theirs` the same candles of the provider; both may
    contain others as well. The first provider may correct earlier candles, so for it only a difference that excludes
    the same market counts.
    """
    mine, its = only(ours, theirs.ts), only(theirs, ours.ts)
    if not len(mine):
        return None
    differences = difference(mine, its)
    found = float(differences.min(axis=0).max() if first else differences.max())
    return found if found > (FAR if first else tolerance) else None


def only(candles: Candles, wanted: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Candles:
    """The candles whose open is wanted; `wanted` ascending. Usually all of them."""
    if len(candles) == 0 or len(wanted) == 0:
        return candles.take(slice(0, 0))
    index = np.minimum(np.searchsorted(wanted, candles.ts), len(wanted) - 1)
    mask = wanted[index] == candles.ts
    return candles if bool(mask.all()) else candles.take(mask)
