"""Undoes the adjustment of prices by splits, as far as the prices themselves show that they are adjusted.

Belongs here: whether a named split has been applied to the prices before it, and the prices as traded.
Does not belong here: which splits a provider names, on which session a bar lies.

A provider that adjusts by splits names them, and sometimes has not applied one of them, or only to the newer
part of its history. So each split is decided by its own prices, from the newest to the oldest:

1. The jump from the close before it to the open on its day. A split of ratio r (4.0 for 4:1) that was applied
   leaves none, one that was not leaves a factor of r. It decides when it is nearer to one of the two than
   a third of the distance between them, and that distance is three times the largest other overnight jump
   nearby, and three times 10 % at least. So it is right whenever the market moved by less than 20 % that night.
2. The ticks. Prices are traded in whole cents (below 1.00: hundredths of a cent), and what was divided by 1.05
   is no whole cent any more. It decides where the jump does not (1.05, 1.046, a wild market) and may not
   contradict it.

Where neither decides, what lies before that split is declined. So is what lies before a jump that looks like
the edge of a part to which a split was applied, or not applied, unlike to the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, iso

Indices = NDArray[np.intp]

_NEARBY = 20  # bars on either side whose jumps tell how much this market moves
_LEAST_NOISE = 0.1  # no market is taken to move less than this (natural logarithm) overnight
_LONGEST_PAUSE = 14 * MICROS_PER_DAY  # after a longer one an open says little about the close before it
_BLOCK = 60  # bars before a split whose ticks are looked at
_FEWEST_PRICES = 8  # different ones, for the ticks to mean anything
_ON, _OFF = 0.95, 0.7  # the shares of prices in whole ticks that make them right, or wrong
_OFF_RUN = 3  # neighbouring bars off the ticks that are no accident
_TOO_MANY = 256  # combinations of splits; a symbol with so many is declined before the last of them
# Significant digits of a price that was a 32-bit float once, and of one that was only divided and rounded.
_NARROW_DIGITS, _WIDE_DIGITS = 7, 8


@dataclass(frozen=True, slots=True, eq=False)
class Traded:
    """Bars as traded. Those before index `first` are not certain, for the reason `doubt`; '' where all are."""

    bars: Candles
    first: int
    doubt: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Prices:
    """The bars that have an open and a close, and what they show.

    index: where each stands among all bars. prices: (4, n). jumps[i]: natural logarithm of close[i - 1] / open[i];
    NaN where there is none (the first bar, a long pause).
    """

    index: Indices
    dates: Instants
    prices: Floats
    jumps: Floats

    @classmethod
    def of(cls, bars: Candles, dates: Instants) -> _Prices:
        prices = np.stack([bars.open, bars.high, bars.low, bars.close])
        index = np.flatnonzero((np.isfinite(prices[[0, 3]]) & (prices[[0, 3]] > 0)).all(axis=0))
        prices, dates = prices[:, index], dates[index]
        jumps = np.full(len(index), np.nan)
        jumps[1:] = np.log(prices[3, :-1] / prices[0, 1:])
        jumps[1:][np.diff(dates) > _LONGEST_PAUSE] = np.nan
        return cls(index, dates, prices, jumps)

    def __len__(self) -> int:
        return len(self.index)


def as_traded(bars: Candles, dates: Instants, split_dates: Instants, ratios: Floats) -> Traded:
    """`bars`: ascending, as the provider gives them. `dates`: the session date of each, ascending.
    `split_dates`: ascending, the first session with the new shares. `ratios`: new shares for one old share."""
    seen = _Prices.of(bars, dates)
    edges = np.searchsorted(seen.dates, split_dates)
    factor, first, doubt = np.ones(len(bars)), 0, ""
    applied, steps, ticks_from = 1.0, np.zeros(1), 0
    places = [int(place) for place in np.unique(edges[edges > 0])[::-1]]
    for place, older in zip(places, [*places[1:], 0], strict=True):
        mine = edges == place
        choices, named = _unapplied(ratios[mine]), float(np.prod(ratios[mine]))
        chosen, by_ticks = _decided(seen, place, older, choices, edges, named * applied)
        begins = int(np.searchsorted(dates, split_dates[mine][0]))
        if chosen is None or len(steps) * len(choices) > _TOO_MANY:
            which = _named(split_dates[mine], ratios[mine])
            first, doubt = begins, f"its prices do not show whether they are adjusted by {which}"
            break
        applied *= named / chosen
        factor[:begins] = applied
        if by_ticks:
            ticks_from = max(ticks_from, place)
        else:
            steps = np.unique((steps[:, None] + np.log(choices / chosen)[None, :]).round(9))
        step = _step_inside(seen, range(older + 1, place), steps, applied)
        if step:
            first, doubt = int(seen.index[step]), _step_text(seen.dates[step])
            break
    unlike = _off_ticks(seen, factor[seen.index], ticks_from)
    if unlike and int(seen.index[unlike - 1]) >= first:
        first, doubt = int(seen.index[unlike - 1]) + 1, _step_text(seen.dates[unlike - 1])
    return Traded(_multiplied(bars, factor), first, doubt)


def _unapplied(ratios: Floats) -> Floats:
    """For splits of one night: every factor that may not have been applied; 1.0: all of them were."""
    products = np.ones(1)
    for ratio in ratios[:8]:
        products = np.concatenate([products, products * ratio])
    return products[np.unique(np.log(products).round(9), return_index=True)[1]]


def _decided(
    seen: _Prices, place: int, older: int, choices: Floats, edges: Indices, factor: float
) -> tuple[float | None, bool]:
    """Which of the choices the prices show, if any, and whether only the ticks do.

    `factor` makes prices before `place` as traded if all of the splits there were applied.
    """
    if len(choices) == 1:
        return float(choices[0]), False
    by_ticks = _by_ticks(seen.prices[:, max(older, place - _BLOCK) : place], factor / choices)
    by_jump = _by_jump(seen, place, np.log(choices), edges)
    if by_jump is None:
        return (None, False) if by_ticks is None else (float(choices[by_ticks]), True)
    return (None, False) if by_ticks not in (None, by_jump) else (float(choices[by_jump]), False)


def _by_jump(seen: _Prices, place: int, choices: Floats, edges: Indices) -> int | None:
    """The choice (a logarithm) that the jump at `place` shows."""
    if place >= len(seen) or np.isnan(seen.jumps[place]):
        return None
    distances = np.abs(seen.jumps[place] - choices)
    nearest = int(np.argmin(distances))
    apart = float(np.abs(np.delete(choices, nearest) - choices[nearest]).min())
    around = np.arange(max(place - _NEARBY, 1), min(place + _NEARBY + 1, len(seen)))
    others = np.abs(seen.jumps[around[~np.isin(around, edges)]])
    noise = max(_LEAST_NOISE, float(np.nanmax(others, initial=0.0)))
    return nearest if distances[nearest] <= apart / 3 and apart >= 3 * noise else None


def _by_ticks(prices: Floats, factors: Floats) -> int | None:
    """The only factor that turns these prices into whole ticks."""
    flat = np.unique(prices[np.isfinite(prices) & (prices > 0)])
    if len(flat) < _FEWEST_PRICES:
        return None
    shares = np.array([_in_ticks(flat * factor).mean() for factor in factors])
    best = int(np.argmax(shares))
    return best if shares[best] >= _ON and (np.delete(shares, best) <= _OFF).all() else None


def _in_ticks(prices: Floats) -> NDArray[np.bool_]:
    """Whether each is a whole number of ticks, within the precision of a 32-bit float."""
    tick = np.where(prices >= 1.0, 0.01, 0.0001)
    whole: NDArray[np.bool_] = np.abs(prices - np.rint(prices / tick) * tick) <= prices * 2e-7 + 1e-9
    return whole


def _step_inside(seen: _Prices, places: range, steps: Floats, factor: float) -> int:
    """The newest bar of `places` that jumps as if what lies before it had another adjustment; 0: none.

    `steps`: logarithms of the factors by which the adjustment may differ there.
    """
    real = steps[steps != 0.0]
    if not len(places) or not len(real):
        return 0
    jumps = seen.jumps[places.start : places.stop]
    near = np.abs(jumps[:, None] - real[None, :]) <= np.maximum(np.abs(real) / 3, 2 * _LEAST_NOISE)
    for at in np.flatnonzero(near.any(axis=1))[::-1]:
        place = places.start + int(at)
        block = seen.prices[:, max(place - _BLOCK, places.start - 1) : place]
        if _by_ticks(block, factor / np.exp(np.append(0.0, real[near[at]]))) != 0:
            return place
    return 0


def _off_ticks(seen: _Prices, factor: Floats, end: int) -> int:
    """Up to where bars before `end` are not in whole ticks, though a split there was decided by its ticks.

    That is the end of the newest run of such bars; a shorter one counts if it is the oldest of all.
    """
    prices = seen.prices[:, :end]
    off = (_in_ticks(np.nan_to_num(prices, nan=0.01) * factor[:end]) | np.isnan(prices)).sum(axis=0) < 3
    edges = np.flatnonzero(np.diff(np.concatenate([[False], off, [False]])))
    runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    return max((stop for start, stop in runs if stop - start >= _OFF_RUN or start == 0), default=0)


def _multiplied(bars: Candles, factor: Floats) -> Candles:
    """Prices times `factor`, volumes divided by it.

    Prices that were 32-bit floats come as 32.259998321533203: they are rounded to the digits such a float has,
    so that 32.26 x 4 becomes 129.04 again. Others are rounded where they were divided.
    """
    prices = np.stack([bars.open, bars.high, bars.low, bars.close])
    narrow = bool((np.isnan(prices) | (prices == prices.astype(np.float32))).all())
    traded = _rounded(prices * factor, _NARROW_DIGITS if narrow else _WIDE_DIGITS)
    opened, high, low, close = traded if narrow else np.where(factor == 1.0, prices, traded)
    volume = np.where(factor == 1.0, bars.volume, np.rint(bars.volume / factor))
    return Candles(bars.ts, opened, high, low, close, volume)


def _rounded(prices: Floats, digits: int) -> Floats:
    """To so many significant digits; what is not positive stays, it is bad anyway."""
    usable = np.where(prices > 0, prices, 1.0)
    scale = 10.0 ** (digits - 1 - np.floor(np.log10(usable)))
    return np.where(prices > 0, np.rint(usable * scale) / scale, prices)


def _named(dates: Instants, ratios: Floats) -> str:
    """`the split of 1:190 on 2024-03-22`, for each."""
    texts = [
        f"the split of {ratio:.6g}:1 on {iso(int(date))[:10]}"
        if ratio >= 1
        else f"the split of 1:{1 / ratio:.6g} on {iso(int(date))[:10]}"
        for date, ratio in zip(dates.tolist(), ratios.tolist(), strict=True)
    ]
    return " and ".join(texts)


def _step_text(date: np.int64) -> str:
    return f"its prices change at {iso(int(date))[:10]} as if those before were adjusted otherwise"
