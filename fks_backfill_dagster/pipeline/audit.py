"""The audit: the recorded state of each series, recomputed from its candles alone.

Belongs here: the selection of series, their sequence, and the repair. Does not belong here: the kinds of
difference (`ledger.reconcile`), reading candles (`store.audit_reader`), writing tables (`store.writer`).
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
    """The result of an audit of many series."""

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
        """How many differences are not repaired."""
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
    """Audits the series one by one; `done` receives each result. Series that are not stored are skipped.

    A series that is being synced is audited in one snapshot, and repaired, if necessary, between two commits of the
    sync. A series whose calendar has changed is not compared until the change is accepted: a repair would turn new
    sessions into gaps.
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
    """Raises ValueError if the expected candles are unknown now: no calendar, or one that has ended."""
    grid = grid_of(series)
    grid.closed_end(now)
    return grid


def auditable(database: Database, configured: Iterable[Series]) -> tuple[Series, ...]:
    """Every stored series, as configured if the settings contain it."""
    known = {one.key: one for one in configured}
    return tuple(known.get(one.key, one) for one in stored_series(database))
