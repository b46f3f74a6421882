"""The rule `spike`: a price that goes out and comes back within one candle.

A close is a spike if both legs (from the close before, to the close after) have opposite signs and the smaller one
exceeds K times the usual move and FLOOR. A high or a low is a spike if it lies as far beyond the bodies of both
neighbours; this includes the open, which lies between them. The usual move is 1.4826 times (that of a normal
distribution) the local median of |return|: of the AROUND candles around, or of the NEAR nearest ones if these move
more, as in the hour of an announcement. For a high or a low it is at least 1.4826 times the local median of the range
of a candle, since ranges are wider than moves from close to close.

The figures of K = 10, measured on real and on planted candles, are in docs/measurements.md.

Belongs here: which candles are suspicious. Does not belong here: whether the market really did it, which needs finer
candles or a second source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.evaluation import Block, Evaluation, Mask

K = 10.0
FLOOR = float(np.log(1.005))
AROUND, NEAR = 101, 11
"""Candles of the local medians, the candle itself in the middle; fewer at the ends of the block."""

LEAST_RETURNS = 20
"""Known returns among AROUND; with fewer of them the usual move is unknown and the candle is not evaluated."""

CONTEXT = AROUND // 2 + 1
"""Stored candles on either side that an evaluation depends on."""

_NORMAL = 1.4826
_PRICES = ("close", "high", "low")


def evaluate_spikes(block: Block, k: float = K) -> Evaluation:
    """Evaluates every candle of a block. The first and last CONTEXT ones are evaluated as the ends of the series."""
    candles, count = block.candles, len(block.candles)
    if count < 3:
        none = np.zeros(count, dtype=bool)
        return Evaluation(none, none, np.zeros(count), lambda _: {})
    joined = block.joined()
    moves = _moves(candles, joined)
    evaluated = _evaluated(joined, moves)
    legs = {name: np.where(evaluated, leg, 0.0) for name, leg in _legs(candles).items()}
    rows = np.flatnonzero(np.max(np.stack(list(legs.values())), axis=0) > FLOOR)
    usual = _usual(candles, moves, rows)
    factors = np.stack([legs[name][rows] / np.maximum(usual[name], FLOOR / k) for name in _PRICES])
    found = _Found(rows, factors, usual, {name: legs[name][rows] for name in _PRICES})
    strength = np.zeros(count)
    strength[rows] = np.where(factors.max(axis=0) > k, factors.max(axis=0) / k, 0.0)
    return Evaluation(evaluated, strength > 0, strength, found.detail)


@dataclass(frozen=True, slots=True, eq=False)
class _Found:
    """The candles above FLOOR: their indices, and by price their legs, usual moves and the factor between them."""

    rows: NDArray[np.intp]
    factors: Floats
    usual: Mapping[str, Floats]
    legs: Mapping[str, Floats]

    def detail(self, index: int) -> dict[str, object]:
        """The price that is furthest out. Moves in percent; that of a low is measured from the neighbour down."""
        at = int(np.searchsorted(self.rows, index))
        price = _PRICES[int(self.factors[:, at].argmax())]
        leg, usual = float(self.legs[price][at]), float(self.usual[price][at])
        distance = -np.expm1(-leg) if price == "low" else np.expm1(leg)
        return {
            "price": price,
            "leg_pct": round(100 * float(distance), 4),
            "usual_pct": round(100 * float(np.expm1(usual)), 4),
            "factor": round(float(self.factors[:, at].max()), 1),
        }


def _moves(candles: Candles, joined: Mask) -> Floats:
    """|return| into each candle, logarithmic; NaN for the first, and where the candle before is no neighbour."""
    moves = np.full(len(candles), np.nan)
    moves[1:] = np.where(joined, np.abs(np.diff(np.log(candles.close))), np.nan)
    return moves


def _evaluated(joined: Mask, moves: Floats) -> Mask:
    """Whether a candle has both neighbours, and enough known returns around."""
    known = np.concatenate([[0], np.cumsum(~np.isnan(moves))])
    middle, half = np.arange(len(moves)), AROUND // 2
    around = known[np.minimum(middle + half + 1, len(moves))] - known[np.maximum(middle - half, 0)]
    both = np.concatenate([[False], joined[:-1] & joined[1:], [False]])
    evaluated: Mask = both & (around >= LEAST_RETURNS)
    return evaluated


def _legs(candles: Candles) -> dict[str, Floats]:
    """By price the smaller leg of each candle, logarithmic; 0 or less where the price is not out on one side."""
    close = np.log(candles.close)
    into, out = np.diff(close)[:-1], np.diff(close)[1:]
    top = np.log(np.maximum(candles.open, candles.close))
    bottom = np.log(np.minimum(candles.open, candles.close))
    inner = {
        "close": np.where(into * out < 0, np.minimum(np.abs(into), np.abs(out)), 0.0),
        "high": np.log(candles.high[1:-1]) - np.maximum(top[:-2], top[2:]),
        "low": np.minimum(bottom[:-2], bottom[2:]) - np.log(candles.low[1:-1]),
    }
    return {name: np.pad(leg, 1) for name, leg in inner.items()}


def _usual(candles: Candles, moves: Floats, rows: NDArray[np.intp]) -> dict[str, Floats]:
    """By price the usual move around each of `rows`. Only of these: most candles do not exceed FLOOR."""
    move = _NORMAL * np.maximum(_median_around(moves, rows, AROUND), _median_around(moves, rows, NEAR))
    width = np.log(candles.high) - np.log(candles.low)
    wick = np.maximum(move, _NORMAL * _median_around(width, rows, AROUND))
    return {"close": move, "high": wick, "low": wick}


def _median_around(values: Floats, rows: NDArray[np.intp], width: int) -> Floats:
    """The median of the `width` values around each row, without NaN; 0 where all of them are NaN."""
    half = width // 2
    padded = np.pad(values, half, constant_values=np.nan)
    around = np.sort(padded[rows[:, None] + np.arange(width)], axis=1)  # NaN last
    known = width - np.isnan(around).sum(axis=1)
    each = np.arange(len(rows))
    low, high = np.maximum(known - 1, 0) // 2, np.minimum(known // 2, np.maximum(known - 1, 0))
    median = (around[each, low] + around[each, high]) / 2
    return np.where(known > 0, median, 0.0)
