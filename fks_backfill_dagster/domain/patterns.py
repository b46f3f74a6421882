"""What kind of error the differences of two sources show: a factor, a shift in time, another symbol.

Belongs here: the patterns and how each is recognised, from columns alone. Does not belong here: which differences are
too large (`comparison`).

A pattern is an interpretation and changes no verdict. The order of the rules matters: a shifted random walk is
uncorrelated too, so it is looked for before another symbol.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.comparison import Compared, compare
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR


class Pattern(StrEnum):
    """The value is its name in JSON."""

    WICK = "wick"
    """Only high or low differ."""
    FACTOR = "constant_factor"
    """The closes differ by one factor: another unit (100, 1000), an unadjusted split."""
    BAR_OFFSET = "bar_offset"
    """The candles agree when shifted by a few bars: stamped with their close."""
    ZONE_OFFSET = "zone_offset"
    """The candles agree when shifted by whole hours: local time taken for UTC."""
    OTHER_SYMBOL = "other_symbol"
    """Another level, and returns without correlation."""
    QUOTE_BASIS = "quote_basis"
    """Slightly other prices whose ratio changes slowly, with the same returns: USD and USDT."""
    SCATTERED = "scattered"
    """None of the above: single candles, or too few for a pattern."""


@dataclass(frozen=True, slots=True)
class Classification:
    """A pattern with its measure.

    factor: the median of stored / other closes, for FACTOR and QUOTE_BASIS. bars: by how many bars the stored candles
    are late (negative: early), for the offsets; hours: the same in hours, for ZONE_OFFSET.
    """

    pattern: Pattern
    factor: float | None = None
    bars: int | None = None
    hours: int | None = None

    def __str__(self) -> str:
        if self.pattern is Pattern.FACTOR and self.factor is not None:
            return f"stored prices are {factor_name(self.factor)} times the others"
        if self.hours is not None:
            return f"stored candles are {abs(self.hours)} h {_direction(self.hours)}"
        if self.bars is not None:
            number = abs(self.bars)
            return f"stored candles are {number} {'bar' if number == 1 else 'bars'} {_direction(self.bars)}"
        return _TEXTS[self.pattern]


_TEXTS = {
    Pattern.WICK: "only high or low differ",
    Pattern.OTHER_SYMBOL: "another level and uncorrelated returns, as of another symbol",
    Pattern.QUOTE_BASIS: "slightly different prices with the same returns, as of another quote currency",
    Pattern.SCATTERED: "single candles differ",
}

NEAR = 0.05
"""Prices of one market in two quote currencies differ by less than this; other symbols and factors by more."""

_FEW = 3
"""Fewer candles show no common factor."""
_ENOUGH = 20
"""Fewer candles, or pairs of neighbours, show neither a shift nor a correlation."""
_MOST = 20_000
"""Candles that are classified: the pattern of more is the same."""
_FIT = 0.25
"""A shift explains the differences if those that remain are at most this share of them."""
_UNUSUAL = 0.05
"""The share of candles that may contradict a factor or a shift."""
_CORRELATED = 0.5
_SMOOTH = 0.25
"""The ratio changes slowly if its usual step is at most this share of its usual distance from 1."""

_BARS = 3
_HOURS = 14
"""The largest offset of a time zone."""


def classify(stored: Candles, other: Candles, tolerance: float, step: int) -> Classification | None:
    """The pattern of the discrepancies of two sources; None if there are none.

    `stored` and `other` ascend, and may have different opens: a shift compares a candle with its neighbours. `step`:
    the timeframe in microseconds.
    """
    compared = compare(stored, other, tolerance)
    wrong = np.flatnonzero(compared.exceeded.any(axis=0))[:_MOST]
    if not len(wrong):
        return None
    if not compared.exceeded[[0, 3]].any():
        return Classification(Pattern.WICK)
    shifted = _shift(compared, other, wrong, tolerance, step)
    if shifted is not None:
        return shifted
    closes = np.flatnonzero(compared.exceeded[3])[:_MOST]
    ratio = np.log(compared.stored.close[closes] / compared.other.close[closes])
    return (
        _factor(ratio, tolerance) or _by_returns(compared, closes, ratio) or Classification(Pattern.SCATTERED)
    )


def _factor(ratio: Floats, tolerance: float) -> Classification | None:
    """A constant factor beyond NEAR; `ratio`: logarithms of stored / other closes."""
    if not len(ratio):
        return None
    middle = float(np.median(ratio))
    unlike = float((np.abs(ratio - middle) > np.log1p(tolerance)).mean())
    if abs(middle) <= np.log1p(NEAR) or unlike > _UNUSUAL:
        return None
    factor = float(np.exp(middle))
    if len(ratio) < _FEW and _unit(factor) is None:
        return None
    return Classification(Pattern.FACTOR, factor=factor)


def _by_returns(compared: Compared, closes: NDArray[np.intp], ratio: Floats) -> Classification | None:
    """Another symbol or another quote currency, from the returns between neighbouring candles that differ."""
    pairs = np.flatnonzero(np.diff(closes) == 1)
    if len(pairs) < _ENOUGH:
        return None
    mine = np.diff(np.log(compared.stored.close))[closes[pairs]]
    its = np.diff(np.log(compared.other.close))[closes[pairs]]
    correlation = rank_correlation(mine, its)
    if correlation is None:
        return None
    distance = float(np.median(np.abs(ratio)))
    if correlation < _CORRELATED:
        return Classification(Pattern.OTHER_SYMBOL) if distance > np.log1p(NEAR) else None
    steps = float(np.median(np.abs(np.diff(ratio)[pairs])))
    near = float((np.abs(ratio) > np.log1p(NEAR)).mean()) <= _UNUSUAL
    if near and steps <= _SMOOTH * distance:
        return Classification(Pattern.QUOTE_BASIS, factor=float(np.exp(np.median(ratio))))
    return None


def _shift(
    compared: Compared, other: Candles, wrong: NDArray[np.intp], tolerance: float, step: int
) -> Classification | None:
    """The shift in time with which the differing candles agree.

    Beyond the tolerance at most a few, and much better than without a shift: in a calm market the neighbour of a
    candle is similar, too.
    """
    mine = compared.stored.take(wrong)
    unshifted = float(np.median(compared.differences[:, wrong].max(axis=0)))
    best: tuple[float, int] | None = None
    for bars in _shifts(step):
        moved = Candles(mine.ts - bars * step, *mine.columns()[1:])
        found = compare(moved, other, tolerance)
        if len(found) < max(_ENOUGH, len(mine) // 2):
            continue
        if float(found.exceeded.any(axis=0).mean()) > _UNUSUAL:
            continue
        remaining = float(np.median(found.differences.max(axis=0)))
        if remaining <= _FIT * unshifted and (best is None or remaining < best[0]):
            best = remaining, bars
    if best is None:
        return None
    bars = best[1]
    hours, rest = divmod(bars * step, MICROS_PER_HOUR)
    if rest or abs(bars) == 1 or step > MICROS_PER_HOUR:
        return Classification(Pattern.BAR_OFFSET, bars=bars)
    return Classification(Pattern.ZONE_OFFSET, bars=bars, hours=hours)


def _shifts(step: int) -> list[int]:
    """The shifts to try, in bars: a few, and whole hours."""
    few = set(range(1, _BARS + 1))
    hours = range(1, _HOURS + 1) if step <= MICROS_PER_HOUR else ()
    zones = {hour * MICROS_PER_HOUR // step for hour in hours}
    found = sorted(few | zones)
    return [*found, *(-bars for bars in found)]


def rank_correlation(one: Floats, other: Floats) -> float | None:
    """Spearman's correlation, on which single spikes have little effect; None if either does not vary."""
    if not len(one) or np.ptp(one) == 0 or np.ptp(other) == 0:
        return None
    return float(np.corrcoef(_ranks(one), _ranks(other))[0, 1])


def _ranks(values: Floats) -> Floats:
    """Ranks of equal values are their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def _direction(number: int) -> str:
    return "late" if number > 0 else "early"


_SPLITS = ((2, 1), (3, 1), (3, 2), (4, 1), (4, 3), (5, 1), (5, 2), (5, 4), (6, 1), (7, 1), (8, 1), (20, 1))
_NAMED = 0.01


def _unit(factor: float) -> str | None:
    """A power of ten from 10 on; None for any other factor."""
    power = round(float(np.log10(factor)))
    if power == 0 or abs(factor / 10.0**power - 1) > _NAMED:
        return None
    return f"{10**power:,}" if power > 0 else f"1/{10**-power:,}"


def factor_name(factor: float) -> str:
    """A factor as a power of ten or as the ratio of a split (`100`, `1/7`, `3/2`), if it is close to one; else its
    digits."""
    if (unit := _unit(factor)) is not None:
        return unit
    for new, old in _SPLITS:
        for above, below in ((new, old), (old, new)):
            if abs(factor * below / above - 1) <= _NAMED:
                return f"{above}" if below == 1 else f"{above}/{below}"
    return f"{factor:.4g}"
