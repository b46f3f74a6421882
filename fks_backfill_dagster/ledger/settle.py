"""How the ledger of gaps changes when a window was asked for: pure arithmetic, no SQL.

Rows are cut at the window's edges, inside it they follow from what is missing now, and open
neighbours that touch in the grid become one: an outage that two batches saw is one gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE
from fks_backfill_dagster.ledger.gaps import GIVEN_UP, GapStatus, close_before, find_gaps
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap, latest


@dataclass(frozen=True, slots=True)
class BackOff:
    """How long a gap rests after it was asked for in vain: as long again as it has been known.

    So the rests double, and the attempts grow like the logarithm of time. Microseconds.
    """

    first: int
    longest: int

    def rest(self, known_for: int) -> int:
        return min(max(self.first, known_for), self.longest)


# Somebody has not answered, and may do so soon.
UNANSWERED = BackOff(5 * MICROS_PER_MINUTE, MICROS_PER_DAY)
# Everybody has answered, and nobody has it: late data are published within hours or never.
EXHAUSTED = BackOff(MICROS_PER_HOUR, 30 * MICROS_PER_DAY)

_NOTHING = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Findings:
    """What is known of the candles that are still missing, beside who said what.

    asked: the parts of the window that were asked for; None for all of it.
    quiet: missing opens that somebody left out between two bars, as it does where nothing traded.
    strict: the providers that give every interval: what one of them lacks was no quiet interval.
    able: the providers that can serve the series; when all of them were heard, a gap is explained.
        Empty: nothing is explained.
    tolerated: how many candles a gap may lack that one can live with, once all were asked.
    """

    asked: RangeSet | None = None
    quiet: Instants = field(default_factory=lambda: _NOTHING)
    strict: frozenset[str] = frozenset()
    able: frozenset[str] = frozenset()
    tolerated: int = 0


@dataclass(frozen=True, slots=True)
class Settlement:
    """The change of the ledger: rows to take out (by their start), rows to put in."""

    removed: tuple[int, ...]
    added: tuple[LedgerGap, ...]


def settle(
    before: Sequence[LedgerGap],
    window: TimeRange,
    missing: Instants,
    stored: Instants,
    evidence: tuple[Evidence, ...],
    grid: Grid,
    findings: Findings = Findings(),
) -> Settlement:
    """The ledger after `window` was asked for.

    `before`: the unfilled rows that overlap the window, and the nearest one on either side;
    ascending. `missing`: the expected opens of the window that are still not stored. `stored`: the
    opens stored just now. `evidence`: what was said by those who were asked for the missing ones.
    """
    if not grid.count(window):
        return Settlement((), ())
    within = [g.start < window.end and g.end > window.start for g in before]
    touched = [g for g, inside in zip(before, within, strict=True) if inside]
    untouched = [g for g, inside in zip(before, within, strict=True) if not inside]
    pieces = [piece for g in touched for piece in _outside(g, window, grid)]
    pieces += _inside(touched, missing, evidence, grid, findings)
    waiting = [_waits(g, evidence, findings) for g in (*pieces, *untouched)]
    pieces, absorbed = _joined(pieces, untouched, waiting, grid)
    pieces = [_judged(piece, evidence, findings) for piece in pieces]
    return Settlement(
        removed=tuple(g.start for g in (*touched, *absorbed)),
        added=(*pieces, *_filled(touched, stored, grid)),
    )


def _outside(gap: LedgerGap, window: TimeRange, grid: Grid) -> list[LedgerGap]:
    """What of a row lies before and after the window, with its own numbers."""
    rest = []
    if gap.start < window.start:
        part = TimeRange(gap.start, window.start)
        rest.append(replace(gap, end=close_before(grid, part.end), missing=grid.count(part)))
    if gap.end > window.end:
        part = TimeRange(window.end, gap.end)
        first = grid.next_open(part.start)
        if first is not None and first < part.end:
            rest.append(replace(gap, start=first, missing=grid.count(part)))
    return rest


def _inside(
    touched: Sequence[LedgerGap],
    missing: Instants,
    evidence: tuple[Evidence, ...],
    grid: Grid,
    findings: Findings,
) -> list[LedgerGap]:
    """Rows for what is missing now; each keeps the history of the row it was part of."""
    owner = _owners(touched, missing)
    asked = np.ones(len(missing), bool) if findings.asked is None else findings.asked.contains(missing)
    quiet = asked & np.isin(missing, findings.quiet, assume_unique=True)
    kinds, kind = np.unique(np.stack([owner, asked, quiet]), axis=1, return_inverse=True)
    rows = []
    for index, (of, was_asked, was_quiet) in enumerate(kinds.T.tolist()):
        old = touched[of] if of >= 0 else LedgerGap(0, 0, 0, GapStatus.OPEN)
        new = _after_asking(old, evidence, findings, bool(was_quiet)) if was_asked else old
        rows += [
            replace(new, start=part.start, end=part.end, missing=part.missing)
            for part in find_gaps(missing[kind.ravel() == index], grid)
        ]
    return rows


def _after_asking(
    old: LedgerGap, evidence: tuple[Evidence, ...], findings: Findings, was_quiet: bool
) -> LedgerGap:
    """The state of what was asked for and is still missing; its length decides later what it is called."""
    if not evidence:
        return old
    row = replace(
        old,
        attempts=old.attempts + 1,
        evidence=latest((*old.evidence, *evidence)),
        found_at=_asked_at(evidence) if old.found_at is None else old.found_at,
    )
    # Who gives every interval and lacks it had an outage; who gives it and was not heard may have it.
    lacked = {word.provider for word in row.evidence if word.outcome == "absent"}
    if was_quiet and not (lacked | (findings.able - row.heard())) & findings.strict:
        return replace(row, status=GapStatus.NO_TRADE, next_attempt_at=None)
    exhausted = bool(findings.able) and findings.able <= row.heard()
    return replace(row, status=GapStatus.UNAVAILABLE if exhausted else GapStatus.OPEN, next_attempt_at=None)


def _judged(gap: LedgerGap, evidence: tuple[Evidence, ...], findings: Findings) -> LedgerGap:
    """When a gap that was asked for just now is looked at again. One that nobody can fill and that is
    short enough is tolerated, and is not."""
    if gap.status is GapStatus.NO_TRADE or not _asked(gap, evidence):
        return gap
    exhausted = gap.status in GIVEN_UP
    if exhausted and gap.missing <= findings.tolerated:
        return replace(gap, status=GapStatus.TOLERATED, next_attempt_at=None)
    asked_at = _asked_at(evidence)
    known_for = asked_at - (asked_at if gap.found_at is None else gap.found_at)
    rest = (EXHAUSTED if exhausted else UNANSWERED).rest(known_for)
    status = GapStatus.UNAVAILABLE if exhausted else GapStatus.OPEN
    return replace(gap, status=status, next_attempt_at=_earlier(gap.next_attempt_at, asked_at + rest))


def _asked(gap: LedgerGap, evidence: tuple[Evidence, ...]) -> bool:
    """Whether it was asked for just now, or a part of it."""
    return any(word in evidence for word in gap.evidence)


def _waits(gap: LedgerGap, evidence: tuple[Evidence, ...], findings: Findings) -> bool:
    """Whether it is still to be asked for, now that others were, or not by everybody."""
    if not evidence or gap.status is GapStatus.NO_TRADE:
        return False
    if _asked(gap, evidence):
        return not findings.able <= {word.provider for word in gap.evidence}
    return gap.is_due(findings.able, _asked_at(evidence))


def _asked_at(evidence: tuple[Evidence, ...]) -> int:
    return max(word.asked_at for word in evidence)


def _filled(touched: Sequence[LedgerGap], stored: Instants, grid: Grid) -> list[LedgerGap]:
    """Rows that tell which part of a known gap was filled."""
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
    """Rows of one kind that are neighbours in the grid made one; also tells which untouched ones it took in.

    One that still waits to be asked for stays apart from one that does not: its neighbour's rest is not
    its own. `waiting` tells of `pieces`, then of `untouched`.
    """
    known = {id(g): g for g in untouched}
    joined: list[LedgerGap] = []
    absorbed: list[LedgerGap] = []
    waited = False
    marked = zip([*pieces, *untouched], waiting, strict=True)
    for piece, waits in sorted(marked, key=lambda pair: pair[0].start):
        last = joined[-1] if joined else None
        if last is None or waits != waited or not _neighbours(last, piece, grid):
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
    """Together they are as old as the older one, and so rest as long: an outage that goes on is not asked
    for as a whole whenever a candle more is missing, nor put off by it."""
    if one.found_at == other.found_at:
        return _earlier(one.next_attempt_at, other.next_attempt_at)
    older = one if _earlier(one.found_at, other.found_at) == one.found_at else other
    return older.next_attempt_at


def _earlier(one: int | None, other: int | None) -> int | None:
    return min((t for t in (one, other) if t is not None), default=None)


def _neighbours(left: LedgerGap, right: LedgerGap, grid: Grid) -> bool:
    """Of one kind, and no expected candle between them."""
    if _kind(left.status) != _kind(right.status) or left.end > right.start:
        return False
    return grid.count(TimeRange(left.end, right.start)) == 0


def _kind(status: GapStatus) -> GapStatus:
    """Tolerated and unavailable differ in length only, which may grow."""
    return GapStatus.UNAVAILABLE if status in GIVEN_UP else status
