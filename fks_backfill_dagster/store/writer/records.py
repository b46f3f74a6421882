"""The input and the result of a commit."""

from __future__ import annotations

from dataclasses import dataclass

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.delivery import Delivery, Origin, RejectedRows
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.ledger.settle import (
    Response,
    Rules,
)


@dataclass(frozen=True, slots=True, eq=False)
class Withdrawal:
    """Stored candles that a response of their own provider no longer contains.

    `opens`: ascending and unique, inside the batch. Only candles that the same provider delivered under the
    same instrument are deleted; lineage without an instrument (from before it was recorded) does not match.
    """

    origin: Origin
    opens: Instants


@dataclass(frozen=True, slots=True)
class BatchWrite:
    """Everything that one batch changes. Deliveries do not overlap and lie inside the window.

    Each delivery is verified: ascending, unique, on the grid; it becomes one lineage row. A delivery of a
    dated publication (`origin.published_at`) does not replace candles that its provider published or returned later.
    The actions are of the instrument as a whole; `priority` is the order of providers for them.
    """

    window: TimeRange
    deliveries: tuple[Delivery, ...]
    rejected: tuple[RejectedRows, ...] = ()
    responses: tuple[Response, ...] = ()
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    run_id: str | None = None
    withdrawn: tuple[Withdrawal, ...] = ()
    actions: tuple[ReportedActions, ...] = ()
    priority: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit changed. `missing`: expected candles of its window that are not stored after it.

    outdated: delivered candles that differ from the stored ones and were not written, because the stored ones
        come from a newer publication of the same provider.
    withdrawn: stored candles that were deleted because their provider no longer returns them.
    pinned: delivered candles that differ from the stored ones and were not written, because a person corrected those.
    """

    inserted: int
    updated: int
    missing: int
    outdated: int = 0
    withdrawn: int = 0
    pinned: int = 0
