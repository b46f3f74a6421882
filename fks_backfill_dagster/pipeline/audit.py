"""The audit: everything that is recorded of a series, recomputed from its candles alone.

Belongs here: which series, one after the other, and what is repaired. Does not belong here: what can be
wrong (`ledger.reconcile`), how candles are read (`store.audit_reader`) and tables written (`store.writer`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.reconcile import Difference, Kind, SeriesAudit
from fks_backfill_dagster.pipeline.calendars import CalendarChange, calendar_changes
from fks_backfill_dagster.store.audit_reader import examine
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import stored_series
from fks_backfill_dagster.store.writer.repair import repair_series


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit of many series found."""

    series: tuple[SeriesAudit, ...]
    seconds: float

    @property
    def candles(self) -> int:
        return sum(one.candles for one in self.series)

    @property
    def differences(self) -> int:
        return sum(len(one.differences) for one in self.series)

    @property
    def left(self) -> int:
        """How many differences are still there."""
        return sum(len(one.left) for one in self.series)

    @property
    def repaired(self) -> int:
        return self.differences - self.left


def audit(
    database: Database,
    series: Sequence[Series],
    clock: Callable[[], int],
    *,
    repair: bool = True,
    done: Callable[[SeriesAudit], None] = lambda _: None,
) -> AuditReport:
    """Audits each series by itself; `done` gets its result as it ends. What is not stored is left out.

    A series that somebody syncs meanwhile is audited as it was at one moment, and repaired, if it has
    to be, between two of its commits. One whose calendar has changed is not compared before that is accepted: a
    repair would turn sessions that are new into gaps.
    """
    began = time.monotonic()
    found = []
    changes = calendar_changes(database, series)
    for one in series:
        result = (
            _of_changed(one, changes[one]) if one in changes else _audit_one(database, one, clock, repair)
        )
        if result is not None:
            found.append(result)
            done(result)
    return AuditReport(tuple(found), time.monotonic() - began)


def _of_changed(series: Series, change: CalendarChange) -> SeriesAudit:
    hull = change.difference.spans.hull
    return SeriesAudit(
        series,
        differences=(Difference(Kind.CALENDAR_CHANGED, hull.start, hull.end, None, None, str(change)),),
    )


def _audit_one(
    database: Database, series: Series, clock: Callable[[], int], repair: bool
) -> SeriesAudit | None:
    try:
        grid = _usable_grid(series, clock())
    except ValueError as error:
        return SeriesAudit(
            series, differences=(Difference(Kind.NO_CALENDAR, None, None, None, None, str(error)),)
        )
    found = examine(database, series, grid, clock)
    if repair and found is not None and found.repairable:
        found = repair_series(database, series, grid, clock)
    return found


def _usable_grid(series: Series, now: int) -> Grid:
    """Raises ValueError where nobody can tell what is expected now: no calendar, or one that ran out."""
    grid = grid_of(series)
    grid.closed_end(now)
    return grid


def auditable(database: Database, configured: Iterable[Series]) -> tuple[Series, ...]:
    """Every stored series, as the settings have it where they have it."""
    known = {(one.symbol, one.timeframe): one for one in configured}
    return tuple(known.get((one.symbol, one.timeframe), one) for one in stored_series(database))
