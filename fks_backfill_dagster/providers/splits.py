"""Undoes split adjustment, as far as the prices themselves show that they are adjusted.

Belongs here: whether a listed split has been applied to the prices before it, and the prices as traded.
Does not belong here: the splits that a provider lists, the session of a bar.

A provider that adjusts by splits lists them, but sometimes has not applied one of them, or only to the newer part of
its history. So each split is decided by the surrounding prices, from the newest to the oldest:

1. The jump from the previous close to the open of the split's day. A split of ratio r (4.0 for 4:1) that was applied
   leaves no jump, one that was not applied leaves a factor of r. The jump decides if its distance to one of the two is
   less than a third of the distance between them (in logarithms), and if that distance is at least 0.3 and three times
   the largest other jump nearby. So it is right whenever the market moved by less than 20 % overnight.
2. The ticks. Prices are traded in whole cents (below 1.00: hundredths of a cent), and a price divided by 1.05 usually
   is not a whole cent. The ticks decide if the jump does not (1.05, 1.046, a volatile market), and must not contradict
   it.

If neither decides, the candles before that split are declined; also those around it if another jump within 20 bars
looks like it: the reason may be single bars that were adjusted twice or not at all, or a split listed some days off.
Candles before a jump are also declined if the jump looks like the edge of a part with another adjustment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, iso

Indices = NDArray[np.intp]

_NEARBY = 20  # bars on either side whose jumps measure the volatility
_LEAST_NOISE = 0.1  # the assumed minimum of overnight moves (natural logarithm)
_LEAST_STEP = 3 * _LEAST_NOISE  # the smallest step distinguishable from market moves: a factor of 1.35
_LONGEST_PAUSE = 14 * MICROS_PER_DAY  # after a longer pause an open is unrelated to the previous close
_BLOCK = 60  # bars before a split whose ticks are examined
_FEWEST_PRICES = 8  # distinct prices required for a decision by ticks
_LARGEST_PRICE = 2500.0  # above, a 32-bit float does not resolve a cent
_ON, _OFF = 0.95, 0.7  # the minimum share of prices in whole ticks if right, the maximum if wrong
_OFF_RUN = (
    3  # consecutive bars off the ticks that are significant; as many next to them may be on ticks by chance
)
_MOST_AT_ONCE, _TOO_MANY = 4, 256  # splits of one night, combinations of splits: above, prices are declined
# Significant digits of a price that was a 32-bit float, and of one that was only divided and rounded.
_NARROW_DIGITS, _WIDE_DIGITS = 7, 8


@dataclass(frozen=True, slots=True, eq=False)
class Traded:
    """Bars as traded. Those before index `first` are not certain, because of `doubt`; '' if all are certain."""

    bars: Candles
    first: int
    doubt: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class _Prices:
    """The bars that have an open and a close.

    index: their position among all bars. prices: (4, n). jumps[i]: natural logarithm of close[i - 1] / open[i];
    NaN for the first bar and after a long pause.
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
    """The bars as traded.

    bars: ascending, as returned by the provider. dates: the session date of each, ascending. split_dates: ascending,
    the first session with the new shares. ratios: new shares for one old share.
    """
    seen = _Prices.of(bars, dates)
    edges = np.searchsorted(seen.dates, split_dates)
    factor, first, doubt = np.ones(len(bars)), 0, ""
    reading, listed, ticks_from = _Reading(np.ones(1), 1.0), 1.0, 0
    places = [int(place) for place in np.unique(edges[edges > 0])[::-1]]
    for place, older in zip(places, [*places, 0][1:], strict=True):
        mine = edges == place
        listed *= float(np.prod(ratios[mine]))
        begins, choices = int(np.searchsorted(dates, split_dates[mine][0])), _products(ratios[mine])
        beside = _beside(seen, place, np.log(choices), edges)
        found = None if beside else _decided(seen, place, older, reading, choices, edges, listed)
        if found is None or np.count_nonzero(mine) > _MOST_AT_ONCE:
            which = _splits_text(split_dates[mine], ratios[mine])
            first = max(begins, int(seen.index[beside]) if beside else 0)
            doubt = f"its prices do not show whether they are adjusted by {which}"
            break
        reading, by_ticks = found
        ticks_from = ticks_from or (place if by_ticks else 0)
        factor[:begins] = listed / reading.undone
        step = _step_inside(seen, range(older + 1, place), reading, listed)
        if step:
            first, doubt = int(seen.index[step]), _step_text(seen.dates[step])
            break
    unlike = _off_ticks(seen, factor[seen.index], ticks_from)
    if unlike and int(seen.index[unlike - 1]) >= first:
        first, doubt = int(seen.index[unlike - 1]) + 1, _step_text(seen.dates[unlike - 1])
    return Traded(_multiplied(bars, factor), first, doubt)


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """The adjustment of the prices between two splits.

    possible: the possible products of ratios that were not applied to them; 1.0: all were applied. undone: the product
    that the prices show.
    """

    possible: Floats
    undone: float

    @property
    def steps(self) -> Floats:
        """Logarithms of the jumps between parts with different products, without those that are too small."""
        steps = np.log(self.possible / self.undone)
        return steps[np.abs(steps) >= _LEAST_STEP]


def _products(ratios: Floats) -> Floats:
    """The possible products of ratios, for splits of one night, that were not applied; 1.0: all were applied."""
    products = np.ones(1)
    for ratio in ratios[:_MOST_AT_ONCE]:
        products = np.concatenate([products, products * ratio])
    return products[np.unique(np.log(products).round(9), return_index=True)[1]]


def _decided(
    seen: _Prices, place: int, older: int, reading: _Reading, choices: Floats, edges: Indices, listed: float
) -> tuple[_Reading, bool] | None:
    """The reading of the prices before `place`, and whether only the ticks decided; None: undecided.

    reading: of the prices after it. choices: possible products of the splits at `place` that were not applied.
    listed: the product of all ratios from here on.
    """
    if len(choices) * len(reading.possible) > _TOO_MANY:
        return None
    by_jump = _by_jump(seen, place, np.log(choices), reading.steps, edges)
    block = seen.prices[:, max(older, place - _BLOCK) : place]
    by_ticks = _by_ticks(block, listed / (reading.undone * choices))
    found = {choice for choice in (by_jump, by_ticks) if choice is not None}
    if len(found) != 1:
        return None
    chosen = float(choices[found.pop()])
    if by_jump is None:  # ticks also decide without a visible jump
        choices = choices[(choices == chosen) | (np.abs(np.log(choices / chosen)) >= _LEAST_STEP)]
    possible = np.unique(reading.possible * choices[:, None])
    return _Reading(possible, reading.undone * chosen), by_jump is None


def _by_jump(seen: _Prices, place: int, choices: Floats, steps: Floats, edges: Indices) -> int | None:
    """The index of the choice (logarithms) that the jump at `place` shows; None: undecided.

    No choice combined with one of the `steps` may be nearer: then another part of the history ends there.
    """
    if len(choices) == 1:
        return 0
    if place >= len(seen) or np.isnan(seen.jumps[place]):
        return None
    distances = np.abs(seen.jumps[place] - choices)
    nearest = int(np.argmin(distances))
    apart = float(np.abs(np.delete(choices, nearest) - choices[nearest]).min())
    around = np.arange(max(place - _NEARBY, 1), min(place + _NEARBY + 1, len(seen)))
    others = np.abs(seen.jumps[around[~np.isin(around, edges)]])
    noise = float(np.nanmax(others, initial=0.0))
    with_step = np.abs(seen.jumps[place] - choices[:, None] - steps[None, :]).min(initial=np.inf)
    clear = distances[nearest] <= apart / 3 and apart >= max(_LEAST_STEP, 3 * noise)
    return nearest if clear and distances[nearest] <= with_step + 1e-9 else None


def _by_ticks(prices: Floats, factors: Floats) -> int | None:
    """The index of the only factor that turns these prices into whole ticks; None: undecided."""
    flat = np.unique(prices[np.isfinite(prices) & (prices > 0)])
    if len(flat) < _FEWEST_PRICES or flat[-1] * factors.max() > _LARGEST_PRICE:
        return None
    shares = np.array([_in_ticks(flat * factor).mean() for factor in factors])
    best = int(np.argmax(shares))
    return best if shares[best] >= _ON and (np.delete(shares, best) <= _OFF).all() else None


def _in_ticks(prices: Floats) -> NDArray[np.bool_]:
    """Whether each is a whole number of ticks, within the precision of a 32-bit float."""
    tick = np.where(prices >= 1.0, 0.01, 0.0001)
    whole: NDArray[np.bool_] = np.abs(prices - np.rint(prices / tick) * tick) <= prices * 2e-7 + 1e-9
    return whole


def _beside(seen: _Prices, place: int, choices: Floats, edges: Indices) -> int:
    """The newest bar near a split, on either side, with a jump like that of the split; 0: none.

    If there is one, the place of the split is unknown, and whether bars of its day and later are adjusted.
    """
    steps = choices[np.abs(choices) >= _LEAST_STEP]
    around = np.arange(max(place - _NEARBY, 1), min(place + _NEARBY + 1, len(seen)))
    around = around[~np.isin(around, edges)]
    like = _like(seen.jumps[around], np.concatenate([steps, -steps])).any(axis=1)
    return int(around[like].max(initial=0))


def _like(jumps: Floats, steps: Floats) -> NDArray[np.bool_]:
    """For each jump and each step (logarithms), whether the step plus a market move can explain the jump."""
    near: NDArray[np.bool_] = np.abs(jumps[:, None] - steps[None, :]) <= np.maximum(
        np.abs(steps) / 3, 2 * _LEAST_NOISE
    )
    return near


def _step_inside(seen: _Prices, places: range, reading: _Reading, listed: float) -> int:
    """The newest bar of `places` with a jump as if the bars before it had another adjustment; 0: none."""
    steps = reading.steps
    if not len(places) or not len(steps):
        return 0
    near = _like(seen.jumps[places.start : places.stop], steps)
    for at in np.flatnonzero(near.any(axis=1))[::-1]:
        place = places.start + int(at)
        block = seen.prices[:, max(place - _BLOCK, places.start - 1) : place]
        if _by_ticks(block, listed / reading.undone / np.exp(np.append(0.0, steps[near[at]]))) != 0:
            return place
    return 0


def _off_ticks(seen: _Prices, factor: Floats, end: int) -> int:
    """The index up to which bars before `end` are not in whole ticks, although a split there was decided by ticks.

    It is a little after the end of the newest run of such bars; a short run counts only at the beginning.
    """
    prices = seen.prices[:, :end]
    off = (_in_ticks(np.nan_to_num(prices, nan=0.01) * factor[:end]) | np.isnan(prices)).sum(axis=0) < 3
    edges = np.flatnonzero(np.diff(np.concatenate([[False], off, [False]])))
    runs = zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
    ends = [stop for start, stop in runs if stop - start >= _OFF_RUN or start == 0]
    return min(ends[-1] + _OFF_RUN, end) if ends else 0


def _multiplied(bars: Candles, factor: Floats) -> Candles:
    """Prices times `factor`, volumes divided by it.

    Prices that were 32-bit floats, such as 32.259998321533203, are rounded to the digits of such a float, so that
    32.26 x 4 becomes 129.04 again. Others are rounded if they were divided.
    """
    prices = np.stack([bars.open, bars.high, bars.low, bars.close])
    narrow = bool((np.isnan(prices) | (prices == prices.astype(np.float32))).all())
    traded = _rounded(prices * factor, _NARROW_DIGITS if narrow else _WIDE_DIGITS)
    opened, high, low, close = traded if narrow else np.where(factor == 1.0, prices, traded)
    volume = np.where(factor == 1.0, bars.volume, np.rint(bars.volume / factor))
    return Candles(bars.ts, opened, high, low, close, volume)


def _rounded(prices: Floats, digits: int) -> Floats:
    """Rounded to significant digits; prices that are infinite or not positive stay, as they are invalid anyway."""
    usable = np.where((prices > 0) & (prices < np.inf), prices, 1.0)
    scale = 10.0 ** (digits - 1 - np.floor(np.log10(usable)))
    return np.where(usable == prices, np.rint(usable * scale) / scale, prices)


def _splits_text(dates: Instants, ratios: Floats) -> str:
    """The splits as text: `the split of 1:190 on 2024-03-22`."""
    texts = [
        f"the split of {ratio:.6g}:1 on {iso(int(date))[:10]}"
        if ratio >= 1
        else f"the split of 1:{1 / ratio:.6g} on {iso(int(date))[:10]}"
        for date, ratio in zip(dates.tolist(), ratios.tolist(), strict=True)
    ]
    return " and ".join(texts)


def _step_text(date: np.int64) -> str:
    return f"its prices change at {iso(int(date))[:10]} as if earlier ones were adjusted differently"
