"""The plan of a sync: the missing parts of a range, cut into batches, before the first request.

wanted   = the range - before listing - not closed yet - synced, plus its open gaps and those that are due
batch    = at most `batch_size_days` of it: one transaction
span     = neighbouring batches that fit into one response: one fetch
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from operator import itemgetter

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_SECOND
from fks_backfill_dagster.ledger.records import Known

# The delay after its close from which a candle is requested: providers need a moment to settle it.
GRACE = 10 * MICROS_PER_SECOND

# From this size on batches are whole calendar months, as archives and Dagster's partitions are.
_MONTH_DAYS = 28


class Scope(Enum):
    """The part of its range that a sync requests."""

    MISSING = "missing"
    """Ranges that were never synced, and gaps."""
    GAPS = "gaps"
    """Gaps alone; ranges that were never synced stay pending."""
    EVERYTHING = "everything"
    """The whole range again; stored candles that the source returns differently are corrected."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The unit of one transaction: a window, the parts of it to request, and the number of candles expected in them."""

    window: TimeRange
    wanted: RangeSet
    candles: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a sync of `window`.

    `window` is the requested range from the listing to the last closed candle. `expected` counts all candles of it,
    `missing` those that are neither stored nor explained, or are due for a retry; they lie in `missing_ranges`.
    """

    series: Series
    window: TimeRange
    expected: int
    missing: int
    missing_ranges: RangeSet
    batches: tuple[Batch, ...]
    scope: Scope = Scope.MISSING

    def spans(self, page_size: int) -> tuple[tuple[Batch, ...], ...]:
        """Neighbouring batches in groups that fit into a page of `page_size` candles."""
        groups: list[list[Batch]] = []
        for batch in self.batches:
            last = groups[-1] if groups else None
            if (
                last
                and last[-1].window.end == batch.window.start
                and sum(b.candles for b in last) + batch.candles <= page_size
            ):
                last.append(batch)
            else:
                groups.append([batch])
        return tuple(tuple(group) for group in groups)


def closed_window(window: TimeRange, grid: Grid, now: int, listed_at: int | None) -> TimeRange:
    """The part of `window` in which candles can exist: after the listing, and closed at `now` minus the grace.

    The first candle is the one that contains the listing: Binance's first day began at 04:00.
    """
    start = window.start
    if listed_at is not None and listed_at > start:
        before = grid.opens(TimeRange(max(start, listed_at - 8 * MICROS_PER_DAY), listed_at + 1))
        start = int(before[-1]) if len(before) and int(grid.closes(before[-1:])[0]) > listed_at else listed_at
    end = min(window.end, grid.closed_end(now - GRACE))
    return TimeRange(min(start, window.end), max(min(start, window.end), end))


def make_plan(
    series: Series,
    window: TimeRange,
    known: Known,
    grid: Grid,
    *,
    batch_size_days: int,
    eligible: frozenset[str] = frozenset(),
    now: int | None = None,
    scope: Scope = Scope.MISSING,
) -> Plan:
    """Plans a sync of `window`, which `closed_window` has cut. Pure: no requests.

    `eligible` are the eligible providers: an explained gap is requested again when it is due at `now` (None: at
    once), or when one of them has not responded about it. An open gap is always requested, except with `Scope.GAPS`,
    where it has to be due as well.
    """
    missing = known.due(window, eligible, now)
    if scope is not Scope.GAPS:
        missing |= known.missing(window)
    wanted = RangeSet([window]) if scope is Scope.EVERYTHING else missing
    # A batch covers all of its window, so the gaps on either side of pending history are two batches.
    apart = known.synced if scope is Scope.GAPS else RangeSet([window])
    return Plan(
        series=series,
        window=window,
        expected=grid.count(window),
        missing=int(_counts(missing, grid).sum()),
        missing_ranges=missing,
        batches=tuple(
            batch for part in apart for batch in _batches(wanted & RangeSet([part]), grid, batch_size_days)
        ),
        scope=scope,
    )


def _batches(wanted: RangeSet, grid: Grid, batch_size_days: int) -> Iterator[Batch]:
    """The wanted part of each cell of the batch calendar, ascending; cells without a candle are skipped."""
    if not wanted:
        return
    edges = np.array(_edges(wanted.hull, batch_size_days), dtype=np.int64)
    pieces = _cut(wanted, edges)
    cell = np.searchsorted(edges, [piece.start for piece in pieces], side="right")
    for _, members in itertools.groupby(zip(cell.tolist(), pieces, strict=True), key=itemgetter(0)):
        parts = RangeSet([piece for _, piece in members])
        candles = int(_counts(parts, grid).sum())
        if candles:
            yield Batch(parts.hull, parts, candles)


def _cut(ranges: RangeSet, edges: Instants) -> list[TimeRange]:
    """The ranges, cut at the edges that lie inside them; ascending."""
    inside = edges[ranges.contains(edges) & ~np.isin(edges, ranges.starts)]
    starts = np.union1d(ranges.starts, inside)
    ends = np.union1d(ranges.ends, inside)
    return [TimeRange(*edge) for edge in zip(starts.tolist(), ends.tolist(), strict=True)]


def _counts(ranges: RangeSet, grid: Grid) -> Instants:
    """How many candles are expected in each range."""
    return grid.rank(ranges.ends) - grid.rank(ranges.starts)


def _edges(hull: TimeRange, batch_size_days: int) -> list[int]:
    """The edges of batches, from at or before the start of the hull to at or after its end: month starts, or
    every `batch_size_days` from the first day on."""
    if batch_size_days < _MONTH_DAYS:
        step = batch_size_days * MICROS_PER_DAY
        first = hull.start // MICROS_PER_DAY * MICROS_PER_DAY
        return [*range(first, hull.end, step), first + -(-(hull.end - first) // step) * step]
    months = max(1, batch_size_days // 30)
    edges = [Grain.MONTH.start(hull.start)]
    while edges[-1] < hull.end:
        edges.append(Grain.MONTH.start(edges[-1], months))
    return edges
