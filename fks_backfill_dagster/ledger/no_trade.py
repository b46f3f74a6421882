"""The rule for no-trade intervals: which absent candles had no trade, and which are missing.

It is the same for every provider and timeframe, and for the parts of a derived candle. It evaluates whole runs of
absent candles and the candles around them, so it depends neither on batches nor on the order of requests.

An absent candle is no_trade if a provider that omits intervals without trades omitted it in two complete
responses with candles on both sides (`confirmed`), and

    the market was closed (holidays of forex, the closed days of the settings), or
    another such provider omits it in the same way (`corroborated`), or
    the length of its run fits the local density of trades (`fits`).

A run that contains a whole session of an exchange is never no_trade, unless the market was closed.

On a day that the settings close, one final response without the candle is enough, from any provider: the operator
has stated that nothing traded. This is `decided` by the caller.

A run at the end of a series is undecided, since its length is not known yet. Whether it may still become a
no-trade interval follows from the same arithmetic (`quiet_tail`).

Belongs here: the rule. Does not belong here: how absence is confirmed (`pipeline.fetch.request`), the state of
candles that are not no_trade (`settle`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange

Mask = NDArray[np.bool_]
Counts = NDArray[np.int64] | NDArray[np.float64]

NEIGHBOURS = 500
"""The number of expected candles before and after a run that are its neighbourhood."""

_CHANCE = 0.001
_PRIOR_RUNS = 5
_WITNESSES = 5


@dataclass(frozen=True, slots=True, eq=False)
class Absent:
    """Expected candles that are not stored: one element each, `opens` ascending.

    confirmed, corroborated: see the module. decided: no_trade for another reason than this rule.
    """

    opens: Instants
    confirmed: Mask
    corroborated: Mask
    decided: Mask

    @classmethod
    def of(cls, opens: Instants, confirmed: Instants, corroborated: Instants | None = None) -> Absent:
        """From ascending opens; `confirmed` and `corroborated` are subsets of them."""
        none = np.zeros(len(opens), dtype=bool)
        twice = none if corroborated is None else np.isin(opens, corroborated, assume_unique=True)
        return cls(opens, np.isin(opens, confirmed, assume_unique=True), twice, none)


def no_trade(absent: Absent, covered: RangeSet, grid: Grid, closed: RangeSet) -> Mask:
    """Which of the absent candles are no-trade intervals.

    `covered`: where every expected candle is stored or in `absent`. `closed`: where the market was closed
    although candles are expected. Runs at the edge of `covered` are not decided.
    """
    if not len(absent.opens):
        return np.zeros(0, dtype=bool)
    rank = grid.rank(absent.opens)
    is_closed = closed.contains(absent.opens)
    runs = _Runs.of(rank, is_closed, absent.confirmed | absent.decided)
    likely = runs.bracketed(covered, grid) & ~grid.holds_session(runs.first, runs.last)
    fits = likely & _fits(runs, rank, covered, grid)
    found: Mask = absent.confirmed & (
        is_closed | fits[runs.of_open] | (absent.corroborated & likely[runs.of_open])
    )
    return found | absent.decided


def quiet_tail(absent: Absent, covered: RangeSet, grid: Grid, closed: RangeSet, tail: TimeRange) -> int:
    """How many expected candles of `tail`, which are all absent, are quiet although they are still undecided.

    All of them if a run of their length, or of a longer one that it may become, is likely by chance among the
    candles before it: as `no_trade` would decide if only the next candle were stored. Otherwise those on
    `closed` dates. `absent` and `covered` describe the candles before the tail; a run counts there if some
    candle of it is confirmed or decided.
    """
    first, end = grid.rank(np.array([tail.start, tail.end])).tolist()
    candles = end - first
    if candles <= 0:
        return 0
    shut = sum(grid.count(part) for part in closed & RangeSet([tail]))
    lengths = np.arange(candles - shut, NEIGHBOURS + 1)
    if candles == shut or not len(lengths) or not len(absent.opens):
        return shut
    lasts = end - 1 + np.arange(len(lengths))
    fits = _fits_before(first, lengths, absent, covered, grid, closed)
    return candles if (fits & ~grid.holds_session(np.full(len(lasts), first), lasts)).any() else shut


@dataclass(frozen=True, slots=True, eq=False)
class _Runs:
    """Maximal runs of absent candles. `first`, `last`: their ranks. `length`: their candles, except those of
    closed days. `candidate`: some candle may be a no-trade interval. `of_open`: the run of each candle."""

    first: Instants
    last: Instants
    length: Instants
    candidate: Mask
    of_open: Instants

    @classmethod
    def of(cls, rank: Instants, is_closed: Mask, possible: Mask) -> _Runs:
        starts = np.concatenate([[True], np.diff(rank) != 1])
        of_open = np.cumsum(starts) - 1
        index = np.flatnonzero(starts)
        last = np.concatenate([index[1:], [len(rank)]]) - 1
        length = np.bincount(of_open, weights=~is_closed).astype(np.int64)
        candidate = (np.bincount(of_open, weights=possible) > 0) & (length > 0)
        return cls(rank[index], rank[last], length, candidate, of_open)

    def bracketed(self, covered: RangeSet, grid: Grid) -> Mask:
        """Whether the candles on both sides are stored: they are covered, and a run is maximal."""
        starts, ends = _covered_ranks(covered, grid)
        return _within(self.first - 1, starts, ends) & _within(self.last + 1, starts, ends)


def _within(ranks: Instants, starts: Instants, ends: Instants) -> Mask:
    """Which ranks lie in one of the ranges, which ascend and are disjoint."""
    index = np.searchsorted(starts, ranks, side="right") - 1
    found: Mask = (index >= 0) & (ranks < ends[index]) if len(starts) else np.zeros(len(ranks), dtype=bool)
    return found


def _fits(runs: _Runs, rank: Instants, covered: RangeSet, grid: Grid) -> Mask:
    """Whether a run of its length is likely by chance among the trades around it.

    The shorter runs of the neighbourhood (for single candles: the other ones) give the rates at which a run
    begins and continues. Longer runs do not count: two outages must not explain one another. A run fits if at
    least _CHANCE runs of its length are expected in its neighbourhood, and if there are as many shorter runs as
    it has candles (at most _WITNESSES are needed): without another absent candle the rate of intervals without
    trades is unknown, and no run fits.
    """
    low, high = runs.first - NEIGHBOURS, runs.last + 1 + NEIGHBOURS
    covered_below = _counter(covered, grid)
    stored = (
        covered_below(high) - covered_below(low) - (np.searchsorted(rank, high) - np.searchsorted(rank, low))
    )
    from_run, to_run = np.searchsorted(runs.first, low), np.searchsorted(runs.first, high)
    begun, gone_on = np.zeros(len(low)), np.zeros(len(low))
    for length in np.unique(runs.length[runs.candidate]).tolist():
        mine = np.flatnonzero(runs.length == length)
        shorter = runs.candidate & (runs.length < max(length, 2))
        begun[mine] = _sum(shorter, from_run[mine], to_run[mine]) - shorter[mine]
        longer = shorter & (runs.length > 1)
        gone_on[mine] = _sum(longer, from_run[mine], to_run[mine])
    return runs.candidate & _expected(begun, gone_on, stored, runs.length)


def _fits_before(
    first: int, lengths: Instants, absent: Absent, covered: RangeSet, grid: Grid, closed: RangeSet
) -> Mask:
    """Like `_fits`, for runs of any of `lengths` from rank `first` on, with one stored candle after them."""
    rank = grid.rank(absent.opens)
    runs = _Runs.of(rank, closed.contains(absent.opens), absent.confirmed | absent.decided)
    low = first - NEIGHBOURS
    below = _counter(covered, grid)(np.array([low, first]))
    stored = int(below[1] - below[0]) - int(((rank >= low) & (rank < first)).sum()) + 1
    known = np.sort(runs.length[runs.candidate & (runs.first >= low) & (runs.first < first)])
    begun = np.searchsorted(known, np.maximum(lengths, 2), side="left")
    return _expected(begun, begun - np.searchsorted(known, 2), np.full(len(lengths), stored), lengths)


def _expected(begun: Counts, gone_on: Counts, stored: Instants, length: Instants) -> Mask:
    """Whether enough runs of a length are expected among `begun` shorter ones, of which `gone_on` are longer
    than one candle, and `stored` candles."""
    share = begun / np.maximum(stored, 1)
    going_on = np.minimum((gone_on + _PRIOR_RUNS * share) / (begun + _PRIOR_RUNS), 1.0)
    expected = begun * going_on ** np.maximum(length - 1, 0)
    fits: Mask = (begun >= np.clip(length, 1, _WITNESSES)) & (expected >= _CHANCE)
    return fits


def _sum(mask: Mask, start: Instants, end: Instants) -> Instants:
    """How many elements of `mask` are set from each `start` up to each `end`."""
    total = np.concatenate([[0], np.cumsum(mask)])
    found: Instants = total[end] - total[start]
    return found


def _covered_ranks(covered: RangeSet, grid: Grid) -> tuple[Instants, Instants]:
    """The ranks of the expected candles in each range of `covered`: from, to (exclusive)."""
    return grid.rank(covered.starts), grid.rank(covered.ends)


def _counter(covered: RangeSet, grid: Grid) -> Callable[[Instants], Instants]:
    """A function that counts the covered ranks below given ones."""
    starts, ends = _covered_ranks(covered, grid)
    # Linear inside a range, constant between two.
    edges = np.stack([starts, ends], axis=1).ravel()
    below = np.stack([np.cumsum(ends - starts) - (ends - starts), np.cumsum(ends - starts)], axis=1).ravel()
    return lambda ranks: (
        np.interp(ranks, edges, below).astype(np.int64) if len(edges) else np.zeros_like(ranks)
    )
