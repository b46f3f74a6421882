"""How the ledger of gaps changes when a window was asked for: pure arithmetic, no SQL.

Rows are cut at the window's edges, inside it they follow from what is missing now, and open
neighbours that touch in the grid become one: an outage that two batches saw is one gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fks_backfill_dagster.domain.gaps import GapStatus, find_gaps
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.store.ledger import Evidence, LedgerGap, latest

# No exchange is closed for longer, so a neighbour in the grid is found within it.
LONGEST_PAUSE = 30 * MICROS_PER_DAY


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
) -> Settlement:
    """The ledger after `window` was asked for.

    `before`: the unfilled rows that overlap the window or may touch it, ascending. `missing`: the
    expected opens of the window that are still not stored. `stored`: the opens stored just now.
    `evidence`: what was said by those who were asked for the missing ones.
    """
    touched = [g for g in before if g.start < window.end and g.end > window.start]
    pieces = [piece for g in touched for piece in _outside(g, window, grid)]
    pieces += _inside(touched, missing, evidence, grid)
    pieces.sort(key=lambda g: g.start)
    untouched = [g for g in before if g not in touched]
    pieces, absorbed = _joined(pieces, untouched, grid)
    return Settlement(
        removed=tuple(g.start for g in (*touched, *absorbed)),
        added=(*pieces, *_filled(touched, stored, grid)),
    )


def _outside(gap: LedgerGap, window: TimeRange, grid: Grid) -> list[LedgerGap]:
    """What of a row lies before and after the window, with its own numbers."""
    rest = []
    if gap.start < window.start:
        part = TimeRange(gap.start, window.start)
        near = grid.opens(TimeRange(max(part.start, part.end - LONGEST_PAUSE), part.end))
        end = int(grid.closes(near[-1:])[0])
        rest.append(replace(gap, end=end, missing=grid.count(part)))
    if gap.end > window.end:
        part = TimeRange(window.end, gap.end)
        near = grid.opens(TimeRange(part.start, min(part.end, part.start + LONGEST_PAUSE)))
        if len(near):
            rest.append(replace(gap, start=int(near[0]), missing=grid.count(part)))
    return rest


def _inside(
    touched: Sequence[LedgerGap], missing: Instants, evidence: tuple[Evidence, ...], grid: Grid
) -> list[LedgerGap]:
    """Rows for what is missing now; each keeps the state and the history of the row it was part of."""
    owner = _owners(touched, missing)
    rows = []
    for index in np.unique(owner).tolist():
        found = find_gaps(missing[owner == index], grid)
        new = LedgerGap(0, 0, 0, GapStatus.OPEN)
        old = touched[index] if index >= 0 else new
        rows += [
            replace(
                old,
                start=part.start,
                end=part.end,
                missing=part.missing,
                attempts=old.attempts + bool(evidence),
                evidence=latest((*old.evidence, *evidence)),
            )
            for part in found
        ]
    return rows


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
    pieces: list[LedgerGap], untouched: Sequence[LedgerGap], grid: Grid
) -> tuple[list[LedgerGap], list[LedgerGap]]:
    """Open rows that are neighbours in the grid made one; also tells which untouched rows that took in."""
    if not pieces:
        return [], []
    known = {id(g): g for g in untouched}
    joined: list[LedgerGap] = []
    absorbed: list[LedgerGap] = []
    for piece in sorted([*pieces, *untouched], key=lambda g: g.start):
        last = joined[-1] if joined else None
        both_untouched = last is not None and id(last) in known and id(piece) in known
        if last is None or both_untouched or not _neighbours(last, piece, grid):
            joined.append(piece)
            continue
        absorbed += [g for g in (last, piece) if id(g) in known]
        joined[-1] = LedgerGap(
            start=last.start,
            end=piece.end,
            missing=last.missing + piece.missing,
            status=GapStatus.OPEN,
            attempts=max(last.attempts, piece.attempts),
            evidence=latest((*last.evidence, *piece.evidence)),
            found_at=min((t for t in (last.found_at, piece.found_at) if t is not None), default=None),
        )
    return [g for g in joined if id(g) not in known], absorbed


def _neighbours(left: LedgerGap, right: LedgerGap, grid: Grid) -> bool:
    """Both open, and no expected candle between them."""
    if left.status != GapStatus.OPEN or right.status != GapStatus.OPEN or left.end > right.start:
        return False
    pause = TimeRange(left.end, right.start)
    return not pause or (pause.duration <= LONGEST_PAUSE and grid.count(pause) == 0)
