"""Progress events of a sync. A user interface shows them as a progress bar, a log line or metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.plan import Plan


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is made: emitted once, before the first request for candles."""

    series: Series
    plan: Plan
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch was committed (`error` None) or failed."""

    series: Series
    window: TimeRange
    candles: int
    missing: int
    providers: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Warned:
    """A problem that did not stop the sync."""

    series: Series
    message: str


SyncEvent = Planned | BatchDone | Warned
Listener = Callable[[SyncEvent], None]


def silent(event: SyncEvent) -> None:
    """A listener that ignores all events."""
