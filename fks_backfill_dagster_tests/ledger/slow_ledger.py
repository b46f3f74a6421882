"""The rules of the ledger candle by candle: the reference that settlement is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.no_trade import Absent, no_trade
from fks_backfill_dagster.ledger.records import LedgerGap

Responses = dict[str, tuple[int, bool]]
"""When each provider last responded without a candle, and whether that is confirmed."""


@dataclass
class Hole:
    """The record of one missing candle in the slow ledger."""

    status: GapStatus
    attempts: int
    responses: Responses
    found_at: int
    due: int | None = None

    @property
    def kind(self) -> tuple[GapStatus, frozenset[str]]:
        """Equal for neighbours that belong to one row."""
        tolerated = self.status == GapStatus.TOLERATED
        sure = frozenset(name for name, (_, confirmed) in self.responses.items() if confirmed)
        return (GapStatus.UNAVAILABLE if tolerated else self.status, sure)


@dataclass(frozen=True)
class Attempt:
    """The request of one window: the provider that responded (None: none was requested), and the rules.

    `confirmed`: the candles whose absence it confirms.
    """

    window: TimeRange
    delivered: set[int]
    provider: str | None
    confirmed: set[int]
    eligible: frozenset[str]
    tolerated: int
    now: int

    def requested(self, hole: Hole) -> bool:
        return any(when == self.now for when, _ in hole.responses.values())

    def state(self, hole: Hole) -> GapStatus:
        """The state of a candle that is not no-trade."""
        exhausted = bool(self.eligible) and self.eligible <= set(hole.responses)
        return GapStatus.UNAVAILABLE if exhausted else GapStatus.OPEN

    def waits(self, hole: Hole) -> bool:
        """Whether the hole still has to be requested: it is due, or not every provider was requested for it."""
        if self.provider is None or hole.status is GapStatus.NO_TRADE:
            return False
        if self.requested(hole):
            return not self.eligible <= set(hole.responses)
        never = hole.status is GapStatus.OPEN and hole.due is None
        return never or (hole.due or self.now + 1) <= self.now or not self.eligible <= set(hole.responses)


@dataclass
class Slow:
    """The state of every candle: not in `known` if never requested, None if stored, else a Hole."""

    opens: list[int]
    grid: Grid
    known: dict[int, Hole | None] = field(default_factory=dict)
    cuts: set[int] = field(default_factory=set)
    """Where a row begins although the hole before it is of its kind: one of them still has to be requested."""

    def apply(self, attempt: Attempt) -> set[int]:
        """Returns the filled holes."""
        filled: set[int] = set()
        if not any(attempt.window.contains(ts) for ts in self.opens):
            return filled
        touched = {ts for ts in self.opens if attempt.window.contains(ts)}
        for run in self.runs():
            if run[0] < attempt.window.end and run[-1] + MICROS_PER_HOUR > attempt.window.start:
                touched.update(run)
        for ts in self.opens:
            if not attempt.window.contains(ts):
                continue
            hole = self.known.get(ts)
            if ts in attempt.delivered or (ts in self.known and hole is None):
                if hole is not None:
                    filled.add(ts)
                self.known[ts] = None
                continue
            hole = hole or Hole(GapStatus.OPEN, 0, {}, attempt.now)
            self.known[ts] = hole
            if attempt.provider is not None:
                responses = hole.responses | {attempt.provider: (attempt.now, ts in attempt.confirmed)}
                self.known[ts] = Hole(GapStatus.OPEN, hole.attempts + 1, responses, hole.found_at)
                self.hole(ts).status = attempt.state(self.hole(ts))
        if attempt.eligible:
            touched |= self.decide(attempt)
        for before, ts in itertools.pairwise(self.opens):
            if touched & {before, ts}:
                self.cuts.discard(ts)
                left, right = self.known.get(before), self.known.get(ts)
                if left and right and attempt.waits(left) != attempt.waits(right):
                    self.cuts.add(ts)
        for run in self.runs():
            self.settle(run, attempt)
        return filled

    def decide(self, attempt: Attempt) -> set[int]:
        """Decides which of all holes are no-trade, by the rule (test_no_trade.py). Returns the candles of rows that
        have changed."""
        holes = [ts for ts in self.opens if self.known.get(ts)]
        sure = [sum(confirmed for _, confirmed in self.hole(ts).responses.values()) for ts in holes]
        absent = Absent(
            np.array(holes, dtype=np.int64),
            np.array(sure, dtype=np.int64) > 0,
            np.array(sure, dtype=np.int64) > 1,
            np.zeros(len(holes), dtype=bool),
        )
        known = [TimeRange(ts, int(self.grid.closes(np.array([ts]))[0])) for ts in self.known]
        mask = no_trade(absent, RangeSet(known), self.grid, RangeSet())
        before = {run[0]: [self.hole(ts).status for ts in run] for run in self.runs()}
        rows = self.runs()
        for ts, quiet in zip(holes, mask.tolist(), strict=True):
            hole = self.hole(ts)
            if quiet:
                hole.status, hole.due = GapStatus.NO_TRADE, None
            elif hole.status is GapStatus.NO_TRADE:
                hole.status, hole.due = attempt.state(hole), None
        changed = [run for run in rows if [self.hole(ts).status for ts in run] != before[run[0]]]
        return {ts for run in changed for ts in run}

    def settle(self, run: list[int], attempt: Attempt) -> None:
        """Merges an outage into one row: its candles get the same record, and its length decides the state."""
        holes = [self.hole(ts) for ts in run]
        responses: Responses = {}
        for hole in holes:
            for name, (when, confirmed) in hole.responses.items():
                if when >= responses.get(name, (0, False))[0]:
                    responses[name] = (when, confirmed)
        attempts = max(hole.attempts for hole in holes)
        found_at = min(h.found_at for h in holes)
        dues = [h.due for h in holes if h.due is not None and h.found_at == found_at]
        due = min(dues, default=None)
        status = holes[0].status
        last = max((when for when, _ in responses.values()), default=0)
        if status is not GapStatus.NO_TRADE and responses and last == attempt.now:
            delay = min(max(5 * MICROS_PER_MINUTE, attempt.now - found_at), MICROS_PER_DAY)
            short = False
            if status is not GapStatus.OPEN:
                short = len(run) <= attempt.tolerated
                status = GapStatus.TOLERATED if short else GapStatus.UNAVAILABLE
                delay = min(max(MICROS_PER_HOUR, attempt.now - found_at), 30 * MICROS_PER_DAY)
            due = None if short else min(*dues, attempt.now + delay) if dues else attempt.now + delay
        elif status is GapStatus.UNAVAILABLE and due is None:  # a no-trade interval until now
            short = len(run) <= attempt.tolerated
            status = GapStatus.TOLERATED if short else status
            due = None if short else last + MICROS_PER_HOUR
        for hole in holes:
            hole.status, hole.responses, hole.attempts, hole.due = status, responses, attempts, due
            hole.found_at = found_at

    def hole(self, ts: int) -> Hole:
        hole = self.known[ts]
        assert hole is not None
        return hole

    def runs(self) -> list[list[int]]:
        """Holes that are neighbours in the grid and belong together."""
        runs: list[list[int]] = []
        for before, ts in itertools.pairwise([-1, *self.opens]):
            hole, last = self.known.get(ts), self.known.get(before)
            if hole is None:
                continue
            if last is None or last.kind != hole.kind or ts in self.cuts:
                runs.append([])
            runs[-1].append(ts)
        return runs


Row = tuple[int, int, int, GapStatus, int, Responses, int | None, int | None]


def slow_rows(slow: Slow, grid: Grid) -> list[Row]:
    rows: list[Row] = []
    for run in slow.runs():
        hole, end = slow.hole(run[0]), int(grid.closes(np.array(run[-1:]))[0])
        numbers = (len(run), hole.status, hole.attempts, hole.responses, hole.found_at, hole.due)
        rows.append((run[0], end, *numbers))
    return rows


def rows_of(ledger: Sequence[LedgerGap]) -> list[Row]:
    return [
        (
            g.start,
            g.end,
            g.missing,
            g.status,
            g.attempts,
            {e.provider: (e.asked_at, e.confirmed) for e in g.evidence},
            g.found_at,
            g.next_attempt_at,
        )
        for g in ledger
    ]
