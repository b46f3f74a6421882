"""Outages of a whole venue: several of its symbols miss candles at the same time.

A halted exchange leaves the same hole in all of its series, so it is reported once instead of as one gap
per series.

The rule: an instant belongs to an outage when, for some timeframe, at least LEAST_SYMBOLS of the
symbols synced there at that timeframe or a finer one miss candles, and at least LEAST_SHARE of them.
A symbol counts once, whatever its timeframes. A coarser timeframe can extend an outage and never
reduces one: a day's candle exists although minutes of it are missing.

Does not belong here: which gaps count, the providers' responses to them (`pipeline.outages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe

LEAST_SYMBOLS = 3
LEAST_SHARE = 0.5

_FRAMES = list(Timeframe)
_LEVEL = {timeframe: level for level, timeframe in enumerate(_FRAMES)}

Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Spans:
    """Time ranges of many series as columns of equal length, in any order; `owner` is the series' index."""

    owner: Indices
    starts: Instants
    ends: Instants

    def of(self, wanted: NDArray[np.bool_]) -> Spans:
        """The ranges for which `wanted` is true; one bool per range."""
        return Spans(self.owner[wanted], self.starts[wanted], self.ends[wanted])


@dataclass(frozen=True, slots=True)
class VenueOutage:
    """`symbols` (ascending) of `synced` symbols of a venue miss candles within `window`.

    Both are counted among the series of `timeframe` and finer ones; it is the coarsest at which the outage
    is visible.
    """

    venue: str
    window: TimeRange
    timeframe: Timeframe
    symbols: tuple[str, ...]
    synced: int


def recognise(series: Sequence[Series], synced: Spans, missing: Spans) -> tuple[VenueOutage, ...]:
    """The outages of all venues among `series`, ascending by venue and time.

    The owners in `synced` and `missing` are indices of `series`; where candles are missing a series counts as
    synced. Ranges without an expected candle between them are one outage. Costs O(n log n) in the number of ranges.
    """
    venues = [one.instrument.venue for one in series]
    found: list[VenueOutage] = []
    for venue in sorted(set(venues)):
        mine = np.array([name == venue for name in venues])
        found += _of_venue(
            venue, series, mine, synced.of(mine[synced.owner]), missing.of(mine[missing.owner])
        )
    return tuple(found)


def _of_venue(
    venue: str, series: Sequence[Series], mine: NDArray[np.bool_], synced: Spans, missing: Spans
) -> list[VenueOutage]:
    members = [one for one, is_mine in zip(series, mine.tolist(), strict=True) if is_mine]
    names = sorted({one.symbol for one in members})
    if len(names) < LEAST_SYMBOLS or not len(missing.owner):
        return []
    number = {name: index for index, name in enumerate(names)}
    symbol = np.array([number.get(one.symbol, -1) for one in series], dtype=np.int64)
    level = np.array([_LEVEL[one.timeframe] for one in series])
    edges = np.unique(np.concatenate([missing.starts, missing.ends, synced.starts, synced.ends]))
    seen = np.full(len(edges), -1)
    lacking: dict[int, _Presence] = {}
    synced_at: dict[int, _Presence] = {}
    for each in sorted({_LEVEL[one.timeframe] for one in members}):
        absent = missing.of(level[missing.owner] <= each)
        known = synced.of(level[synced.owner] <= each)
        lacking[each] = _Presence.of(symbol[absent.owner], absent, edges)
        both = Spans(*(np.concatenate(pair) for pair in zip(_columns(absent), _columns(known), strict=True)))
        synced_at[each] = _Presence.of(symbol[both.owner], both, edges)
        count, total = lacking[each].counts(len(edges)), synced_at[each].counts(len(edges))
        seen[(count >= LEAST_SYMBOLS) & (count >= LEAST_SHARE * total)] = each
    found: list[VenueOutage] = []
    first, past, coarsest = _runs(seen, edges, min(members, key=lambda one: _LEVEL[one.timeframe]))
    for each in np.unique(coarsest).tolist():
        these = coarsest == each
        affected = lacking[each].within(first[these], past[these])
        members_there = synced_at[each].within(first[these], past[these])
        found += [
            VenueOutage(venue, TimeRange(start, end), _FRAMES[each], tuple(names[i] for i in some), len(all_))
            for start, end, some, all_ in zip(
                edges[first[these]].tolist(),
                edges[past[these]].tolist(),
                affected,
                members_there,
                strict=True,
            )
        ]
    return sorted(found, key=lambda outage: outage.window)


def _columns(spans: Spans) -> tuple[Indices, Instants, Instants]:
    return spans.owner, spans.starts, spans.ends


def _runs(seen: Indices, edges: Instants, finest: Series) -> tuple[Indices, Indices, Indices]:
    """Where `seen` has a level, as columns: first edge, edge past it, the coarsest level in between.

    `seen[i]` covers the time from edge i to the next one. Runs separated by closed hours only, in which no
    candle of the `finest` series is expected, are joined.
    """
    bad = np.concatenate([[False], seen >= 0, [False]])
    first, past = np.flatnonzero(bad[1:] & ~bad[:-1]), np.flatnonzero(bad[:-1] & ~bad[1:])
    if not len(first):
        return first, past, first
    rank = grid_of(finest).rank
    apart = np.concatenate([[True], rank(edges[first[1:]]) > rank(edges[past[:-1]])])
    first, past = first[apart], past[np.concatenate([apart[1:], [True]])]
    return first, past, np.maximum.reduceat(seen, first)


@dataclass(frozen=True, slots=True)
class _Presence:
    """The merged ranges of each symbol: disjoint per symbol, as indices of edges."""

    symbol: Indices
    first: Indices
    past: Indices

    @classmethod
    def of(cls, symbol: Indices, spans: Spans, edges: Instants) -> _Presence:
        """Merges the ranges of each symbol; all symbols at once, end to end on one axis."""
        width = len(edges) + 1  # so that the last range of one symbol does not touch the first of the next
        first, past = np.searchsorted(edges, spans.starts), np.searchsorted(edges, spans.ends)
        merged = RangeSet.from_arrays(symbol * width + first, symbol * width + past)
        return cls(merged.starts // width, merged.starts % width, merged.ends % width)

    def counts(self, edges: int) -> Indices:
        """How many symbols have a range from each edge to the next."""
        steps = np.bincount(self.first, minlength=edges) - np.bincount(self.past, minlength=edges)
        return np.cumsum(steps)

    def within(self, first: Indices, past: Indices) -> list[list[int]]:
        """For each of these disjoint, ascending ranges the symbols with a range in it, ascending."""
        low = np.searchsorted(past, self.first, side="right")
        times = np.maximum(np.searchsorted(first, self.past, side="left") - low, 0)
        which = np.repeat(low - np.cumsum(times) + times, times) + np.arange(times.sum())
        stride = int(self.symbol.max(initial=0)) + 1
        pairs = np.unique(which * stride + np.repeat(self.symbol, times))
        cuts = np.searchsorted(pairs, np.arange(1, len(first)) * stride)
        return [part.tolist() for part in np.split(pairs % stride, cuts)]
