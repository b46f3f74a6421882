"""Evaluates stored candles by the rules of findings, and records what is suspicious, or is no longer.

A range is read in parts of bounded size, each an evaluation of its own: under the lock of the series, in one
transaction with what follows from it. So a commit never changes candles between their evaluation and its record, and a
killed call leaves complete evaluations.

A rule is a pure function of a block of columns. A further one is a module in `domain/` and a line in CHECKS.

Belongs here: which rules there are, their sequence, the report. Does not belong here: the rules (`domain`), how
the ledger changes (`ledger.findings`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.evaluation import Block, Evaluation
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import sane
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.spikes import CONTEXT, evaluate_spikes
from fks_backfill_dagster.ledger.detections import changed, detections
from fks_backfill_dagster.ledger.findings import (
    Detection,
    EvaluatedWindow,
    FindingChanges,
    FindingStatus,
    Rule,
    Severity,
    reconcile,
)
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import parts_of
from fks_backfill_dagster.store.writer.findings import EvaluationInput, evaluate_window


@dataclass(frozen=True, slots=True)
class Check:
    """A rule that is evaluated. `context`: the stored candles on either side that a result depends on."""

    rule: Rule
    severity: Severity
    context: int
    evaluate: Callable[[Block], Evaluation]


CHECKS = (Check(Rule.SPIKE, Severity.WARNING, CONTEXT, evaluate_spikes),)


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The result for one series.

    candles: the stored ones of the window. evaluated: those that every rule could evaluate. new, reopened, resolved,
    corrected: the findings that changed so.
    """

    series: Series
    window: TimeRange
    candles: int = 0
    evaluated: int = 0
    new: int = 0
    reopened: int = 0
    resolved: int = 0
    corrected: int = 0


def evaluate_series(
    database: Database,
    series: Series,
    window: TimeRange,
    now: int,
    *,
    checks: Sequence[Check] = CHECKS,
    done: Callable[[Evaluated], None] = lambda _: None,
) -> Evaluated:
    """Evaluates the stored candles of a window; `done` receives the result so far after each part.

    Running it twice changes nothing but `last_seen_at`. Raises ValueError for a series whose calendar is unknown.
    """
    grid = grid_of(series)
    context = max((check.context for check in checks), default=0)
    found = Evaluated(series, window)
    for part in parts_of(series, window):
        one = _Evaluator(series, grid, _whole(part, grid), now, checks)
        evaluate_window(database, series, one.window, context, one)
        found = _summed(found, one.result)
        done(found)
    return found


def _whole(part: TimeRange, grid: Grid) -> TimeRange:
    """The part up to the close of its last candle, so that it cuts none."""
    last = grid.previous_open(part.end)
    if last is None or last < part.start:
        return part
    return TimeRange(part.start, max(part.end, int(grid.closes(np.array([last]))[0])))


class _Evaluator:
    """One evaluation: called with what it reads, it returns the changes of the ledger, and keeps their numbers in
    `result`."""

    def __init__(
        self, series: Series, grid: Grid, window: TimeRange, now: int, checks: Sequence[Check]
    ) -> None:
        self._series, self._grid, self._now, self._checks = series, grid, now, checks
        self.window = window
        self.result = Evaluated(series, window)

    def __call__(self, given: EvaluationInput) -> FindingChanges:
        block = self._block(given.candles)
        evaluations = [(check, check.evaluate(block)) for check in self._checks]
        found: list[Detection] = []
        for check, evaluation in evaluations:
            found += detections(check.rule, check.severity, block, evaluation, given.window, given.active)
        rules = frozenset(check.rule for check in self._checks)
        now = EvaluatedWindow(given.window, rules, self._now, changed(block, given.active))
        changes = reconcile(given.active, found, now)
        self.result = self._counted(given, block, [one for _, one in evaluations], changes)
        return changes

    def _block(self, candles: Candles) -> Block:
        """Without candles off the grid or against the rules of OHLC, which no rule can evaluate: the audit reports
        them."""
        fits = self._grid.contains(candles.ts) & sane(candles)
        return Block(candles if fits.all() else candles.take(fits), self._grid, self._series.timeframe)

    def _counted(
        self, given: EvaluationInput, block: Block, evaluations: Sequence[Evaluation], changes: FindingChanges
    ) -> Evaluated:
        """The candles of the window without those that it was widened by: another evaluation counts them."""
        evaluated = np.ones(len(block.candles), dtype=bool)
        for one in evaluations:
            evaluated &= one.evaluated
        before = {finding.number: finding.status for finding in given.active}
        now = [finding.status for finding in changes.changed if finding.status is not before[finding.number]]
        return replace(
            self.result,
            candles=len(given.candles.within(self.window)),
            evaluated=len(block.candles.take(evaluated).within(self.window)),
            new=len(changes.added),
            reopened=now.count(FindingStatus.OPEN),
            resolved=now.count(FindingStatus.RESOLVED),
            corrected=now.count(FindingStatus.CORRECTED),
        )


_COUNTS = ("candles", "evaluated", "new", "reopened", "resolved", "corrected")


def _summed(total: Evaluated, part: Evaluated) -> Evaluated:
    return replace(total, **{name: getattr(total, name) + getattr(part, name) for name in _COUNTS})
