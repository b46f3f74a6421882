"""Continuity of the responses of one request: detects a response that belongs to another instrument.

Belongs here: the comparison of neighbouring responses by their candles alone. Does not belong here: the
comparison with stored candles (`pipeline.fetch.splice`), repeated requests (`pipeline`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import PRICES, Candles, Floats
from fks_backfill_dagster.domain.ranges import Instants, among

JUMP = 0.20
"""A step at the edge of a response below this share of the price is no jump."""

_SAME = 0.5
"""The jumps in and out of a response are the same factor if the smaller is at least this share of the larger
(in logarithms): the other instrument moves meanwhile."""


_USUAL = 3.0
"""A step at the edge of a response below this multiple of the median step inside is no jump either: in some
instruments every candle opens away from the previous close."""


def _edges(candles: Candles, seams: Instants) -> tuple[Instants, Floats, float]:
    """Where responses begin inside the block, the steps there (logarithms), and the least step that is a jump."""
    index = np.searchsorted(candles.ts, seams)
    index = np.unique(index[(index > 0) & (index < len(candles))])
    if not len(index):
        return index, np.empty(0), np.inf
    steps = np.log(candles.open[1:]) - np.log(candles.close[:-1])
    inside = np.abs(np.delete(steps, index - 1))
    usual = float(np.median(inside)) if len(inside) else 0.0
    return index, steps[index - 1], max(float(np.log1p(JUMP)), _USUAL * usual)


def foreign(candles: Candles, seams: Instants) -> NDArray[np.bool_]:
    """Which candles lie in responses that begin with a jump and end with the same jump back.

    `candles` ascend; `seams` are the opens at which a response begins. A real move does not begin and end
    exactly at the edges of responses; a split or a crash jumps once. The first and the last response
    have one edge only and are never foreign here.
    """
    mask = np.zeros(len(candles), dtype=bool)
    index, step, least = _edges(candles, seams)
    jumps = np.flatnonzero(np.abs(step) >= least)
    at = 0
    while at + 1 < len(jumps):
        into, out = step[jumps[at]], step[jumps[at + 1]]
        if into * out < 0 and min(abs(into), abs(out)) >= _SAME * max(abs(into), abs(out)):
            mask[index[jumps[at]] : index[jumps[at + 1]]] = True
            at += 1
        at += 1
    return mask


def doubtful(candles: Candles, seams: Instants) -> NDArray[np.bool_]:
    """Which candles lie between a jump at a seam and the nearer end of the block, where only one edge of a
    response is known: a split or a crash, or the first or last response of another instrument."""
    mask = np.zeros(len(candles), dtype=bool)
    index, step, least = _edges(candles, seams)
    for at in index[np.abs(step) >= least].tolist():
        if at <= len(candles) - at:
            mask[:at] = True
        else:
            mask[at:] = True
    return mask


def contradict(one: Candles, other: Candles, tolerance: float) -> bool | None:
    """Whether two responses differ by more than `tolerance` in every price of a common candle; None: they have no
    common candle.

    Both ascend. A correction between two requests changes a price or two; another instrument all four.
    """
    mine, theirs = one.take(among(one.ts, other.ts)), other.take(among(other.ts, one.ts))
    if not len(mine):
        return None
    return bool((difference(mine, theirs).min(axis=0) > tolerance).any())


def difference(ours: Candles, theirs: Candles) -> Floats:
    """The relative difference of each price (rows: open, high, low, close) of candles of the same opens."""
    return np.stack(
        [np.abs(getattr(ours, name) - getattr(theirs, name)) / getattr(theirs, name) for name in PRICES]
    )
