"""Settlement: how the gap ledger changes after a window was requested. Pure arithmetic, no SQL.

Rows are cut at the edges of the window, rows inside it follow from the candles that are missing now, and
rows that are neighbours in the grid are joined: an outage that spans two batches is one gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import numpy as np

from fks_backfill_dagster.domain.delivery import RejectedRows, holding_rejected
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, inside
from fks_backfill_dagster.domain.timeframe import (
    to_micros,
)
from fks_backfill_dagster.ledger.back_off import EXHAUSTED, UNANSWERED
from fks_backfill_dagster.ledger.gaps import GIVEN_UP, MISSING, GapStatus, close_before, find_gaps
from fks_backfill_dagster.ledger.no_trade import NEIGHBOURS, Absent, Mask, no_trade
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap, Outcome, latest

_NOTHING = np.empty(0, dtype=np.int64)
# No calendar extends beyond it.
_LAST = to_micros(datetime(2050, 1, 1, tzinfo=UTC))


@dataclass(frozen=True, slots=True, eq=False)
class Response:
    """A provider's response about requested candles that it did not return."""

    evidence: Evidence
    opens: Instants


def with_repeated(
    responses: Sequence[Response], rejected: Sequence[tuple[RejectedRows, Mask]], grid: Grid
) -> tuple[Response, ...]:
    """The responses, with rows that were rejected before counted as an absence: a retry returns the same.

    `rejected`: rows, and for each whether it was in the quarantine before this request. A candle with other rows
    than before stays REJECTED: a garbled response is temporary.
    """
    found = []
    for response in responses:
        evidence = response.evidence
        if evidence.outcome is not Outcome.REJECTED:
            found.append(response)
            continue
        mine = [(rows, known) for rows, known in rejected if rows.origin.provider == evidence.provider]
        opens = response.opens
        old = holding_rejected(opens, [rows.take(known) for rows, known in mine], grid)
        new = holding_rejected(opens, [rows.take(~known) for rows, known in mine], grid)
        # A whole response of another symbol is rejected: its missing candles have no rows of their own.
        bare = ~(old | new)
        same = (old & ~new) | (bare & (old.any() and not new.any()))
        again = replace(
            evidence,
            outcome=Outcome.ABSENT,
            detail=f"{evidence.detail or 'rows quarantined'}, the same as before",
            repeated=True,
        )
        found += [
            Response(kind, opens[mask]) for kind, mask in ((again, same), (evidence, ~same)) if mask.any()
        ]
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Rules:
    """What decides the state of a gap besides the responses.

    eligible: the providers that serve the series and have their key; once all of them have responded, a gap
        is explained. Empty: no gap is explained.
    strict: the providers that return every interval: candles that one of them lacks are an outage, not no-trade.
    tolerated: the largest number of missing candles of a gap that is tolerated once all have responded.
    closed: where the market was closed although candles are expected; declared: the part of it that the settings
        close. reopened: where the settings close it no longer: decisions based on it are made again.
    """

    eligible: frozenset[str] = frozenset()
    strict: frozenset[str] = frozenset()
    tolerated: int = 0
    closed: RangeSet = field(default_factory=RangeSet)
    declared: RangeSet = field(default_factory=RangeSet)
    reopened: RangeSet = field(default_factory=RangeSet)

    def exhausted(self, gap: LedgerGap) -> bool:
        """Whether every eligible provider has responded finally."""
        return bool(self.eligible) and self.eligible <= gap.declined()

    def tolerates(self, gap: LedgerGap) -> bool:
        """Whether a gap is short enough, and no provider returned invalid rows for it, which may be corrected."""
        return gap.missing <= self.tolerated and not gap.rejected()

    def confirmed_by(self, gap: LedgerGap) -> int:
        """How many providers that omit no-trade intervals confirm the absence; 0 if a strict provider lacks the
        candles too (an outage) or has not responded (it may have them), or if a provider returned rows for them,
        even invalid ones (they did trade)."""
        if gap.rejected():
            return 0
        absent_at = {item.provider for item in gap.evidence if item.outcome is Outcome.ABSENT}
        if (absent_at | (self.eligible - gap.declined())) & self.strict:
            return 0
        return len(gap.confirmed())


@dataclass(frozen=True, slots=True)
class Settlement:
    """The change of the ledger: rows to remove (by their start), rows to add."""

    removed: tuple[int, ...]
    added: tuple[LedgerGap, ...]


def with_evidence(settlement: Settlement, evidence: Evidence, opens: Instants) -> Settlement:
    """The settlement with one more item of evidence in the unfilled rows that contain one of `opens` (ascending)."""
    added = tuple(
        replace(row, evidence=latest((*row.evidence, evidence)))
        if row.status is not GapStatus.FILLED and len(inside(opens, TimeRange(row.start, row.end)))
        else row
        for row in settlement.added
    )
    return replace(settlement, added=added)


def settle(
    before: Sequence[LedgerGap],
    window: TimeRange,
    missing: Instants,
    stored: Instants,
    responses: Sequence[Response],
    grid: Grid,
    covered: RangeSet,
    rules: Rules = Rules(),
) -> Settlement:
    """The ledger after `window` was requested.

    `before`: the unfilled rows of `surroundings(window, grid)` and the nearest one on either side of it;
    ascending. `covered`: the synced part of the surroundings. `missing`: the expected opens of the window that are
    still not stored. `stored`: the opens stored by this request. `responses`: those of the providers that lack them.
    """
    if not grid.count(window):
        return Settlement((), ())
    within = [g.start < window.end and g.end > window.start for g in before]
    touched = [g for g, inside in zip(before, within, strict=True) if inside]
    untouched = [g for g, inside in zip(before, within, strict=True) if not inside]
    pieces = [piece for g in touched for piece in _outside(g, window, grid)]
    pieces += _inside(touched, missing, responses, grid, rules)
    now = tuple(response.evidence for response in responses)
    if rules.eligible:
        covered = (covered | RangeSet([window])) & RangeSet([surroundings(window, grid)])
        changed = _decided(pieces, untouched, window, now, grid, covered, rules)
        kept = [g for g in untouched if id(g) not in changed.taken]
        dropped = [g for g in untouched if id(g) in changed.taken]
        pieces, untouched = changed.rows, kept
    else:
        dropped = []
    waiting = [_waits(g, now, rules) for g in (*pieces, *untouched)]
    pieces, absorbed = _joined(pieces, untouched, waiting, grid)
    pieces = [_timed(piece, now, rules) for piece in pieces]
    return Settlement(
        removed=tuple(g.start for g in (*touched, *dropped, *absorbed)),
        added=(*pieces, *_filled(touched, stored, grid)),
    )


def surroundings(window: TimeRange, grid: Grid) -> TimeRange:
    """The window with the candles on either side that decide about the gaps in it and beside it."""
    low, high, end = grid.rank(np.array([window.start, window.end, _LAST])).tolist()
    first, last = max(low - 2 * NEIGHBOURS, 0), min(high + 2 * NEIGHBOURS, end - 1)
    edges = grid.at(np.array([first, last])).tolist()
    return TimeRange(min(edges[0], window.start), max(edges[1], window.end))


@dataclass(frozen=True, slots=True)
class _Decided:
    """Rows with their new state; `taken`: the ids of untouched rows whose state has changed, now in `rows`."""

    rows: list[LedgerGap]
    taken: frozenset[int]


def _decided(
    pieces: Sequence[LedgerGap],
    untouched: Sequence[LedgerGap],
    window: TimeRange,
    now: tuple[Evidence, ...],
    grid: Grid,
    covered: RangeSet,
    rules: Rules,
) -> _Decided:
    """The rows, split into no-trade intervals and others by the rule of `no_trade`.

    Rows near the window are decided again: their neighbourhood contains the candles stored in it.
    """
    known = {id(g) for g in untouched}
    rows = sorted((*pieces, *untouched), key=lambda g: g.start)
    near = _near(window, grid)
    opens = [grid.opens(TimeRange(g.start, g.end)) for g in rows]
    owner = np.repeat(np.arange(len(rows)), [len(some) for some in opens])
    missing = np.concatenate([_NOTHING, *opens])
    confirmed = np.array([rules.confirmed_by(g) for g in rows], dtype=np.int64)
    declined = np.array([bool(g.declined()) for g in rows], dtype=bool)
    before = np.array([_decided_before(g, now) for g in rows], dtype=bool)
    decided = before[owner] & ~rules.reopened.contains(missing)
    decided |= declined[owner] & rules.declared.contains(missing)
    absent = Absent(missing, (confirmed > 0)[owner], (confirmed > 1)[owner], decided)
    is_no_trade = no_trade(absent, covered, grid, rules.closed)
    found, taken = list[LedgerGap](), set[int]()
    for index, (row, mask) in enumerate(zip(rows, _split(is_no_trade, opens), strict=True)):
        if id(row) in known:
            was = row.status is GapStatus.NO_TRADE
            if not (near.start < row.end and row.start < near.end) or bool((mask == was).all()):
                continue
            taken.add(id(row))
        found += _with_state(row, opens[index], mask, now, grid, rules)
    return _Decided(found, frozenset(taken))


def _near(window: TimeRange, grid: Grid) -> TimeRange:
    """The range in which gaps have a candle of the window in their neighbourhood."""
    low, high, end = grid.rank(np.array([window.start, window.end, _LAST])).tolist()
    edges = grid.at(np.array([max(low - NEIGHBOURS, 0), min(high + NEIGHBOURS, end - 1)])).tolist()
    return TimeRange(min(edges[0], window.start), max(edges[1], window.end))


def _decided_before(gap: LedgerGap, now: tuple[Evidence, ...]) -> bool:
    """Whether it is a no-trade interval of an earlier version, whose evidence does not record how it was
    confirmed: it stays until it is requested again."""
    old = gap.status is GapStatus.NO_TRADE and not any(item.confirmed for item in gap.evidence)
    return old and not _requested(gap, now)


def _split(mask: Mask, opens: Sequence[Instants]) -> list[Mask]:
    edges = np.cumsum([len(some) for some in opens])[:-1]
    return list(np.split(mask, edges)) if len(opens) else []


def _with_state(
    row: LedgerGap, opens: Instants, is_no_trade: Mask, now: tuple[Evidence, ...], grid: Grid, rules: Rules
) -> list[LedgerGap]:
    """The row, cut at the edges of its no-trade intervals."""
    found = []
    for quiet in (True, False):
        parts = find_gaps(opens[is_no_trade == quiet], grid)
        if not parts:
            continue
        state = row
        if quiet:
            state = replace(row, status=GapStatus.NO_TRADE, next_attempt_at=None)
        elif row.status is GapStatus.NO_TRADE or _requested(row, now):
            status = GapStatus.UNAVAILABLE if rules.exhausted(row) else GapStatus.OPEN
            state = replace(row, status=status, next_attempt_at=None)
        found += [replace(state, start=part.start, end=part.end, missing=part.missing) for part in parts]
    return found


def _outside(gap: LedgerGap, window: TimeRange, grid: Grid) -> list[LedgerGap]:
    """The parts of a row before and after the window, each with its own number of candles."""
    parts = []
    if gap.start < window.start:
        part = TimeRange(gap.start, window.start)
        parts.append(replace(gap, end=close_before(grid, part.end), missing=grid.count(part)))
    if gap.end > window.end:
        part = TimeRange(window.end, gap.end)
        first = grid.next_open(part.start)
        if first is not None and first < part.end:
            parts.append(replace(gap, start=first, missing=grid.count(part)))
    return parts


def _inside(
    touched: Sequence[LedgerGap],
    missing: Instants,
    responses: Sequence[Response],
    grid: Grid,
    rules: Rules,
) -> list[LedgerGap]:
    """Rows for the candles that are missing now; each keeps the history of the row it was part of."""
    owner = _owners(touched, missing)
    about = [np.isin(missing, response.opens, assume_unique=True) for response in responses]
    kinds, kind = np.unique(np.stack([owner, *about]), axis=1, return_inverse=True)
    rows = []
    for index, (of, *concerns) in enumerate(kinds.T.tolist()):
        old = touched[of] if of >= 0 else LedgerGap(0, 0, 0, GapStatus.OPEN)
        evidence = tuple(r.evidence for r, about_it in zip(responses, concerns, strict=True) if about_it)
        new = _after_request(old, evidence, rules)
        rows += [
            replace(new, start=part.start, end=part.end, missing=part.missing)
            for part in find_gaps(missing[kind.ravel() == index], grid)
        ]
    return rows


def _after_request(old: LedgerGap, evidence: tuple[Evidence, ...], rules: Rules) -> LedgerGap:
    """The row of candles that are still missing after a request; whether they are no-trade is decided later."""
    if not evidence:
        return old
    row = replace(
        old,
        attempts=old.attempts + 1,
        evidence=latest((*old.evidence, *evidence)),
        found_at=_requested_at(evidence) if old.found_at is None else old.found_at,
        next_attempt_at=None,
    )
    return replace(row, status=GapStatus.UNAVAILABLE if rules.exhausted(row) else GapStatus.OPEN)


def _timed(gap: LedgerGap, now: tuple[Evidence, ...], rules: Rules) -> LedgerGap:
    """A gap that was requested just now, with its next attempt; one that no provider can fill and that is short
    enough is tolerated and has none."""
    if gap.status not in MISSING or not _requested(gap, now):
        return gap if gap.next_attempt_at is not None else _timed_after_no_trade(gap, rules)
    exhausted = gap.status in GIVEN_UP
    if exhausted and rules.tolerates(gap):
        return replace(gap, status=GapStatus.TOLERATED, next_attempt_at=None)
    requested_at = _requested_at(now)
    known_for = requested_at - (requested_at if gap.found_at is None else gap.found_at)
    delay = (EXHAUSTED if exhausted else UNANSWERED).delay(known_for)
    status = GapStatus.UNAVAILABLE if exhausted else GapStatus.OPEN
    return replace(gap, status=status, next_attempt_at=_earlier(gap.next_attempt_at, requested_at + delay))


def _timed_after_no_trade(gap: LedgerGap, rules: Rules) -> LedgerGap:
    """A gap that was a no-trade interval until now: unavailable or tolerated, by its length."""
    if gap.status is not GapStatus.UNAVAILABLE or not gap.evidence:
        return gap
    if rules.tolerates(gap):
        return replace(gap, status=GapStatus.TOLERATED)
    return replace(gap, next_attempt_at=_requested_at(gap.evidence) + EXHAUSTED.first)


def _requested(gap: LedgerGap, now: tuple[Evidence, ...]) -> bool:
    """Whether the gap or a part of it was requested just now."""
    return any(item in now for item in gap.evidence)


def _waits(gap: LedgerGap, now: tuple[Evidence, ...], rules: Rules) -> bool:
    """Whether the gap still has to be requested after this request: it is due, or not every eligible provider was
    requested for it."""
    if not now or gap.status is GapStatus.NO_TRADE:
        return False
    if _requested(gap, now):
        return not rules.eligible <= {item.provider for item in gap.evidence}
    return gap.is_due(rules.eligible, _requested_at(now))


def _requested_at(evidence: tuple[Evidence, ...]) -> int:
    return max(item.asked_at for item in evidence)


def _filled(touched: Sequence[LedgerGap], stored: Instants, grid: Grid) -> list[LedgerGap]:
    """Rows that record the filled parts of known gaps."""
    owner = _owners(touched, stored)
    return [
        replace(
            old, start=g.start, end=g.end, missing=g.missing, status=GapStatus.FILLED, next_attempt_at=None
        )
        for index, old in enumerate(touched)
        for g in find_gaps(stored[owner == index], grid)
    ]


def _owners(gaps: Sequence[LedgerGap], opens: Instants) -> Instants:
    """For each open the index of the gap that contains it, or -1. `gaps` ascending and disjoint."""
    if not gaps:
        return np.full(len(opens), -1, dtype=np.int64)
    starts = np.array([g.start for g in gaps], dtype=np.int64)
    ends = np.array([g.end for g in gaps], dtype=np.int64)
    index = np.searchsorted(starts, opens, side="right") - 1
    return np.where((index >= 0) & (opens < ends[index]), index, -1)


def _joined(
    pieces: list[LedgerGap], untouched: Sequence[LedgerGap], waiting: Sequence[bool], grid: Grid
) -> tuple[list[LedgerGap], list[LedgerGap]]:
    """Joins rows of the same kind that are neighbours in the grid; also returns the untouched rows it absorbed.

    Two untouched rows are never joined. A row that still has to be requested is not joined with one that does not:
    the back-off of the other does not apply to it. `waiting` is in the order of `pieces`, then `untouched`.
    """
    known = {id(g): g for g in untouched}
    joined: list[LedgerGap] = []
    absorbed: list[LedgerGap] = []
    waited = False
    marked = zip([*pieces, *untouched], waiting, strict=True)
    for piece, waits in sorted(marked, key=lambda pair: pair[0].start):
        last = joined[-1] if joined else None
        both_stand = id(last) in known and id(piece) in known
        if last is None or both_stand or waits != waited or not _neighbours(last, piece, grid):
            joined.append(piece)
            waited = waits
            continue
        absorbed += [g for g in (last, piece) if id(g) in known]
        joined[-1] = LedgerGap(
            start=last.start,
            end=piece.end,
            missing=last.missing + piece.missing,
            status=last.status,
            attempts=max(last.attempts, piece.attempts),
            evidence=latest((*last.evidence, *piece.evidence)),
            found_at=_earlier(last.found_at, piece.found_at),
            next_attempt_at=_next_of_both(last, piece),
        )
    return [g for g in joined if id(g) not in known], absorbed


def _next_of_both(one: LedgerGap, other: LedgerGap) -> int | None:
    """The next attempt of two joined rows is that of the older one: in an ongoing outage each new missing candle
    neither triggers nor delays a request for the whole gap."""
    if one.found_at == other.found_at:
        return _earlier(one.next_attempt_at, other.next_attempt_at)
    older = one if _earlier(one.found_at, other.found_at) == one.found_at else other
    return older.next_attempt_at


def _earlier(one: int | None, other: int | None) -> int | None:
    return min((t for t in (one, other) if t is not None), default=None)


def _neighbours(left: LedgerGap, right: LedgerGap, grid: Grid) -> bool:
    """Whether two rows are of the same kind, confirmed and rejected by the same providers, and without an expected
    candle between them.

    The evidence of a row must not be transferred to a neighbour whose absence has another cause.
    """
    if _kind(left.status) != _kind(right.status) or left.end > right.start:
        return False
    if left.confirmed() != right.confirmed() or left.rejected() != right.rejected():
        return False
    return grid.count(TimeRange(left.end, right.start)) == 0


def _kind(status: GapStatus) -> GapStatus:
    """The status with tolerated as unavailable: they differ in length only, which may grow."""
    return GapStatus.UNAVAILABLE if status in GIVEN_UP else status
