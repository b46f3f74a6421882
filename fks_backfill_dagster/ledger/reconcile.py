"""Reconciliation (the audit): the recorded tables against the tables that follow from the candles.

Pure arithmetic, no SQL, and independent of `settle`, so that an error there is not repeated here. Settlement
changes the recorded rows of one requested window; reconciliation derives all rows from all candles. From the
recorded rows it takes only what does not follow from candles: the coverage, and the history of a gap (status,
attempts, evidence, when it was found).

It computes in ranks, the numbers of the expected candles (`Grid.rank`): a candle is an integer, neighbours
differ by one, and there are no nights or weekends. A `RangeSet` is a set of integers, so it represents sets
of ranks as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import LedgerGap


class Kind(StrEnum):
    """The kinds of difference. All but the last six can be repaired from the candles alone."""

    UNRECORDED_GAP = "unrecorded_gap"  # absent inside the coverage, and in no row of the ledger
    STORED_IN_GAP = "stored_in_gap"  # a row spans candles that are stored
    GAP_COUNT = "gap_count"
    GAP_EDGES = "gap_edges"
    GAP_OVERLAP = "gap_overlap"
    GAP_OUTSIDE = "gap_outside_coverage"
    GAP_DAYS = "gap_days"  # see reconcile_days
    CANDLES_OUTSIDE = "candles_outside_coverage"
    COVERAGE_AHEAD = "coverage_ahead"  # beyond the last closed candle
    NO_STATUS = "no_status"
    TOTAL = "total_candles"
    OLDEST = "oldest"
    NEWEST = "newest"
    EXPIRED_LEASE = "expired_lease"
    OFF_GRID = "off_grid"
    UNCLOSED = "unclosed"
    BROKEN_RULE = "broken_rule"
    NO_LINEAGE = "no_lineage"
    NO_CALENDAR = "no_calendar"
    CALENDAR_CHANGED = "calendar_changed"  # not compared: the expected candles are uncertain

    @property
    def repairable(self) -> bool:
        return self not in _MANUAL

    @property
    def tells_time(self) -> bool:
        """Whether `recorded` and `actual` are instants; for all other kinds they are numbers."""
        return self in (Kind.OLDEST, Kind.NEWEST)


# A candle is delivered data: a difference in it is reported, never deleted.
_MANUAL = frozenset(
    {
        Kind.OFF_GRID,
        Kind.UNCLOSED,
        Kind.BROKEN_RULE,
        Kind.NO_LINEAGE,
        Kind.NO_CALENDAR,
        Kind.CALENDAR_CHANGED,
    }
)


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference, in `start` to `end` (exclusive); None if it has no range.

    `recorded` is the value in the tables, `actual` the value that follows from the candles: numbers of candles
    (for a lease: of leases), and instants for `oldest` and `newest`.
    """

    kind: Kind
    start: int | None
    end: int | None
    recorded: int | None
    actual: int | None
    message: str
    repaired: bool = False


@dataclass(frozen=True, slots=True)
class Recorded:
    """The recorded state of a series. `gaps` are its unfilled rows, ascending."""

    exists: bool
    synced: RangeSet
    total: int
    oldest: int | None
    newest: int | None
    gaps: tuple[LedgerGap, ...]
    expired_leases: int = 0


@dataclass(frozen=True, slots=True)
class Flaw:
    """Candles of one batch with the same error: their number, the first and the last open."""

    kind: Kind
    batch: int
    provider: str | None
    candles: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Seen:
    """The state that follows from the candles. `stored` are the ranks of the closed candles on the grid."""

    candles: int
    oldest: int | None
    newest: int | None
    stored: RangeSet
    flaws: tuple[Flaw, ...] = ()


@dataclass(frozen=True, slots=True)
class SeriesAudit:
    """The differences of one series, and the correct content of its tables.

    `expected`, `missing` and `explained` count candles inside the correct coverage. `removed` (by their start)
    and `added` are the ledger rows to remove and to add.
    """

    series: Series
    candles: int = 0
    expected: int = 0
    missing: int = 0
    explained: int = 0
    differences: tuple[Difference, ...] = ()
    coverage: RangeSet = field(default_factory=RangeSet)
    oldest: int | None = None
    newest: int | None = None
    removed: tuple[int, ...] = ()
    added: tuple[LedgerGap, ...] = ()

    @property
    def left(self) -> tuple[Difference, ...]:
        """The differences that are not repaired."""
        return tuple(d for d in self.differences if not d.repaired)

    @property
    def repairable(self) -> bool:
        return any(d.kind.repairable for d in self.differences)

    def after_repair(self) -> SeriesAudit:
        marked = tuple(replace(d, repaired=d.kind.repairable) for d in self.differences)
        return replace(self, differences=marked)


def reconcile(series: Series, grid: Grid, recorded: Recorded, seen: Seen, closed_end: int) -> SeriesAudit:
    """Reconciles one series. `closed_end` is the open of the first candle that is not closed yet."""
    claims = _Claims.of(recorded.gaps, grid)
    kept = _closed_part(recorded.synced, grid, closed_end)
    coverage = _extended(kept, seen.stored, grid)
    covered = _ranks(coverage, grid)
    missing = covered - seen.stored
    gaps = _correct_rows(claims, missing, grid)
    correct, present = set(gaps), set(recorded.gaps)
    found = [
        *_state_differences(recorded, seen),
        *_coverage_differences(recorded.synced, kept, seen.stored, grid, closed_end),
        *_unrecorded(missing, claims, grid),
        *_gap_differences(claims, covered, missing, grid),
        *(_flaw_difference(series, flaw) for flaw in seen.flaws),
    ]
    return SeriesAudit(
        series=series,
        candles=seen.candles,
        expected=_size(covered),
        missing=_size(missing),
        explained=sum(g.missing for g in gaps if g.status is not GapStatus.OPEN),
        differences=tuple(sorted(found, key=lambda d: (d.start is not None, d.start or 0))),
        coverage=coverage,
        oldest=seen.oldest,
        newest=seen.newest,
        removed=tuple(g.start for g in recorded.gaps if g not in correct),
        added=tuple(g for g in gaps if g not in present),
    )


# Ranks --------------------------------------------------------------------------------------------------


def _ranks(ranges: RangeSet, grid: Grid) -> RangeSet:
    """The ranks of the expected candles that open in `ranges`."""
    return RangeSet.from_arrays(grid.rank(ranges.starts), grid.rank(ranges.ends))


def _size(ranks: RangeSet) -> int:
    return int((ranks.ends - ranks.starts).sum())


def _count_within(ranks: RangeSet, low: Instants, high: Instants) -> Instants:
    """How many of `ranks` lie in each `[low, high)`."""
    before = np.concatenate([[0], np.cumsum(ranks.ends - ranks.starts)])

    def below(bound: Instants) -> Instants:
        index = np.searchsorted(ranks.starts, bound, side="right") - 1
        if not len(ranks):
            return np.zeros(len(bound), dtype=np.int64)
        inside = np.minimum(bound, ranks.ends[index]) - ranks.starts[index]
        return np.where(index >= 0, before[index] + inside, 0)

    return below(high) - below(low)


def _reached(high: Instants) -> Instants:
    """For each span the furthest end of the spans before it."""
    return np.maximum.accumulate(np.concatenate([[np.iinfo(np.int64).min], high]))[:-1]


def _span(low: int, high: int, grid: Grid) -> TimeRange:
    """From the open of the first candle to the close of the last of the ranks `[low, high)`."""
    first, last = grid.at(np.array([low, high - 1], dtype=np.int64))
    return TimeRange(int(first), int(grid.closes(np.array([last]))[0]))


# Coverage -----------------------------------------------------------------------------------------------


def _closed_part(synced: RangeSet, grid: Grid, closed_end: int) -> RangeSet:
    """The coverage without candles that are not closed yet."""
    ahead = synced - RangeSet([TimeRange(min(closed_end, synced.hull.start), closed_end)])
    return synced if not _size(_ranks(ahead, grid)) else synced - ahead


def _extended(synced: RangeSet, stored: RangeSet, grid: Grid) -> RangeSet:
    """The coverage, extended to every stored candle.

    For a run of stored neighbours only the run itself is added, so that history that was never requested does not
    become a gap. A run after the end of the coverage is different: the series is refreshed from that end, so an
    uncovered range before the run would never be requested again. The coverage is extended up to the run, and
    candles that are absent in between are a gap.
    """
    outside = stored - _ranks(synced, grid)
    end = synced.hull.end
    last_rank = int(grid.rank(np.array([end]))[0])
    added = []
    for low, high in zip(outside.starts.tolist(), outside.ends.tolist(), strict=True):
        run = _span(low, high, grid)
        added.append(TimeRange(end, run.end) if synced and low >= last_rank else run)
    return synced | RangeSet(added)


def _coverage_differences(
    synced: RangeSet, kept: RangeSet, stored: RangeSet, grid: Grid, closed_end: int
) -> Iterator[Difference]:
    ahead = _size(_ranks(synced - kept, grid))
    if ahead:
        text = f"the coverage extends beyond {iso(closed_end)}, the end of the closed candles"
        yield Difference(Kind.COVERAGE_AHEAD, closed_end, synced.hull.end, ahead, 0, text)
    outside = stored - _ranks(kept, grid)
    for low, high in zip(outside.starts.tolist(), outside.ends.tolist(), strict=True):
        span, count = _span(low, high, grid), high - low
        text = f"{_candles(count)} stored outside the coverage"
        yield Difference(Kind.CANDLES_OUTSIDE, span.start, span.end, 0, count, text)


# The ledger ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Claims:
    """The unfilled rows of the ledger, ascending, and the ranks `[low, high)` that each one spans."""

    rows: tuple[LedgerGap, ...]
    starts: Instants
    ends: Instants
    low: Instants
    high: Instants
    is_open: Instants

    @classmethod
    def of(cls, rows: Sequence[LedgerGap], grid: Grid) -> _Claims:
        starts = np.array([g.start for g in rows], dtype=np.int64)
        ends = np.array([g.end for g in rows], dtype=np.int64)
        is_open = np.array([g.status is GapStatus.OPEN for g in rows], dtype=np.int64)
        return cls(tuple(rows), starts, ends, grid.rank(starts), grid.rank(ends), is_open)

    @property
    def ranks(self) -> RangeSet:
        return RangeSet.from_arrays(self.low, self.high)


def _correct_rows(claims: _Claims, missing: RangeSet, grid: Grid) -> tuple[LedgerGap, ...]:
    """The correct ledger rows for these missing candles.

    Each candle keeps the history of its row; a candle without a row is a new open gap. Where rows overlap, an
    open one takes precedence over an explained one, so that no open gap is explained by mistake, and an earlier
    one over a later one.
    """
    parts: list[tuple[int, int, int]] = []
    left = missing
    for chosen in (np.flatnonzero(claims.is_open == 1), np.flatnonzero(claims.is_open == 0)):
        low, high = claims.low[chosen], claims.high[chosen]
        low = np.maximum(low, _reached(high))  # without the candles of the rows before it
        some = low < high
        parts += _parts(chosen[some], low[some], high[some], left)
        left = left - RangeSet.from_arrays(low, high)
    parts += [(-1, low, high) for low, high in zip(left.starts.tolist(), left.ends.tolist(), strict=True)]
    new = LedgerGap(0, 0, 0, GapStatus.OPEN)
    return tuple(
        _row(claims.rows[owner] if owner >= 0 else new, low, high, grid)
        for owner, low, high in sorted(parts, key=lambda part: part[1])
    )


def _parts(
    owners: Instants, low: Instants, high: Instants, missing: RangeSet
) -> Iterable[tuple[int, int, int]]:
    """(owner, first rank, rank past the last) of the missing candles in each of these disjoint, ascending spans."""
    common = RangeSet.from_arrays(low, high) & missing
    inside = low[common.contains(low)]
    starts = np.union1d(common.starts, inside)
    ends = np.union1d(common.ends, inside[~np.isin(inside, common.starts)])
    owner = owners[np.searchsorted(low, starts, side="right") - 1]
    return zip(owner.tolist(), starts.tolist(), ends.tolist(), strict=True)


def _row(history: LedgerGap, low: int, high: int, grid: Grid) -> LedgerGap:
    span = _span(low, high, grid)
    return replace(history, start=span.start, end=span.end, missing=high - low)


def _unrecorded(missing: RangeSet, claims: _Claims, grid: Grid) -> Iterator[Difference]:
    unrecorded = missing - claims.ranks
    for low, high in zip(unrecorded.starts.tolist(), unrecorded.ends.tolist(), strict=True):
        span, count = _span(low, high, grid), high - low
        text = f"{_candles(count)} absent without a gap in the ledger"
        yield Difference(Kind.UNRECORDED_GAP, span.start, span.end, 0, count, text)


def _gap_differences(
    claims: _Claims, covered: RangeSet, missing: RangeSet, grid: Grid
) -> Iterator[Difference]:
    """The differences of the recorded rows, row by row."""
    if not claims.rows:
        return
    spanned = claims.high - claims.low
    inside = _count_within(covered, claims.low, claims.high)
    absent = _count_within(missing, claims.low, claims.high)
    some = spanned > 0
    first, last = claims.low[some], claims.high[some] - 1
    tidy = np.ones(len(some), dtype=bool)
    tidy[some] = (grid.at(first) == claims.starts[some]) & (grid.closes(grid.at(last)) == claims.ends[some])
    overlaps = some & (claims.low < _reached(claims.high))
    counts = np.array([g.missing for g in claims.rows], dtype=np.int64)
    miscounted = (counts != spanned) & (counts != absent)
    wrong = (inside != spanned) | (absent != inside) | ~tidy | overlaps | miscounted | ~some
    for i in np.flatnonzero(wrong).tolist():
        row, of, gone = claims.rows[i], int(spanned[i]), int(absent[i])
        at, name = (row.start, row.end), f"the {row.status} gap"
        if not of:
            text = f"{name} spans no expected candle"
            yield Difference(Kind.GAP_COUNT, *at, row.missing, 0, text)
            continue
        if stored := int(inside[i]) - gone:
            text = f"{name} spans {_candles(of)}, of which {stored:,} are stored"
            yield Difference(Kind.STORED_IN_GAP, *at, row.missing, gone, text)
        if uncovered := of - int(inside[i]):
            text = f"{name} spans {_candles(uncovered)} outside the coverage"
            yield Difference(Kind.GAP_OUTSIDE, *at, row.missing, gone, text)
        if miscounted[i]:
            text = f"{name} records {_candles(row.missing)} missing instead of {gone:,}"
            yield Difference(Kind.GAP_COUNT, *at, row.missing, gone, text)
        if not tidy[i]:
            span = _span(int(claims.low[i]), int(claims.high[i]), grid)
            text = f"{name} does not extend from an open to a close: its candles are {span}"
            yield Difference(Kind.GAP_EDGES, *at, row.missing, gone, text)
        if overlaps[i]:
            text = f"{name} overlaps the gap before it"
            yield Difference(Kind.GAP_OVERLAP, *at, row.missing, gone, text)


# Status and candles -------------------------------------------------------------------------------------


def _state_differences(recorded: Recorded, seen: Seen) -> Iterator[Difference]:
    if recorded.expired_leases:
        text = f"{recorded.expired_leases} leases of syncs that ended without releasing them"
        yield Difference(Kind.EXPIRED_LEASE, None, None, recorded.expired_leases, 0, text)
    if not recorded.exists:
        text = "the row in sync_state is missing, and with it the coverage and the time of the last sync"
        yield Difference(Kind.NO_STATUS, None, None, None, seen.candles, text)
        return
    if recorded.total != seen.candles:
        text = f"the status records {_candles(recorded.total)} instead of {seen.candles:,}"
        yield Difference(Kind.TOTAL, None, None, recorded.total, seen.candles, text)
    ends: Mapping[Kind, tuple[int | None, int | None]] = {
        Kind.OLDEST: (recorded.oldest, seen.oldest),
        Kind.NEWEST: (recorded.newest, seen.newest),
    }
    for kind, (value, found) in ends.items():
        if value != found:
            text = f"the status records {_when(value)} as the {kind} candle instead of {_when(found)}"
            yield Difference(kind, None, None, value, found, text)


_FLAWS = {
    Kind.OFF_GRID: "open where no candle is expected",
    Kind.UNCLOSED: "open in the future or are not closed yet",
    Kind.BROKEN_RULE: "break a rule of OHLC",
    Kind.NO_LINEAGE: "refer to a batch that does not exist, so no view shows them",
}


def _flaw_difference(series: Series, flaw: Flaw) -> Difference:
    by = f"batch {flaw.batch}" + (f" of {flaw.provider}" if flaw.provider else "")
    text = f"{_candles(flaw.candles)} of {by} {_FLAWS[flaw.kind]}: {_remedy(series, flaw)}"
    return Difference(flaw.kind, flaw.first, flaw.last + series.timeframe.micros, None, flaw.candles, text)


def _remedy(series: Series, flaw: Flaw) -> str:
    undo = f"`fks-backfill batches undo {flaw.batch}` undoes the batch"
    if flaw.kind is Kind.OFF_GRID:
        return undo
    if flaw.kind is Kind.NO_LINEAGE:
        return (
            f"restore fks.batch from a backup, or `fks-backfill series remove {series}` and backfill it again"
        )
    first, past = to_datetime(flaw.first), to_datetime(flaw.last + series.timeframe.micros)
    span = f"--start {first:%Y-%m-%dT%H:%M} --end {past:%Y-%m-%dT%H:%M}"
    again = f"`fks-backfill backfill {series} {span} --refetch` fetches them again"
    return f"{again} once they have closed" if flaw.kind is Kind.UNCLOSED else f"{again}, {undo}"


def _candles(number: int) -> str:
    return f"{number:,} candle" if number == 1 else f"{number:,} candles"


def _when(instant: int | None) -> str:
    return "none" if instant is None else iso(instant)
