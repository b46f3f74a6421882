"""What a sync tells while it works. A face turns these into a bar, a log line or metadata."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.plan import Plan


@dataclass(frozen=True, slots=True)
class Planned:
    """The work is known: told once, before the first request for candles."""

    series: Series
    plan: Plan
    providers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BatchDone:
    """A batch was committed (`error` None) or has failed."""

    series: Series
    window: TimeRange
    candles: int
    missing: int
    providers: tuple[str, ...]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that the user should know and that did not stop the work."""

    series: Series
    message: str


SyncEvent = Planned | BatchDone | Warned
Listener = Callable[[SyncEvent], None]


def silent(event: SyncEvent) -> None:
    """The listener of those who do not listen."""
