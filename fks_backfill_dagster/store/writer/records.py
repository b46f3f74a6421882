"""What a batch is to write, and what a commit has changed."""

from __future__ import annotations

from dataclasses import dataclass

from fks_backfill_dagster.domain.delivery import Delivery, Origin, RejectedRows
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.ledger.settle import (
    Response,
    Rules,
)


@dataclass(frozen=True, slots=True, eq=False)
class Withdrawal:
    """Stored candles that a response of their own provider does not hold any more.

    `opens`: ascending and unique, inside the batch. Of them those are deleted that the same provider
    delivered under the same instrument; lineage that names no instrument (from before it was kept) does
    not match.
    """

    origin: Origin
    opens: Instants


@dataclass(frozen=True, slots=True)
class BatchWrite:
    """All that one batch changes. No two deliveries hold the same open; none leaves the window.

    Each delivery is verified: ascending, unique, on the grid; it becomes one lineage row. A delivery of a
    dated publication (`origin.published_at`) does not replace what its provider published or returned later.
    """

    window: TimeRange
    deliveries: tuple[Delivery, ...]
    rejected: tuple[RejectedRows, ...] = ()
    responses: tuple[Response, ...] = ()
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    run_id: str | None = None
    withdrawn: tuple[Withdrawal, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit changed, and how many expected candles of its window are not stored after it.

    outdated: delivered candles that differ from the stored ones and were not written, because those are of
        a newer publication of the same provider.
    withdrawn: stored candles that were deleted because their provider does not return them any more.
    """

    inserted: int
    updated: int
    missing: int
    outdated: int = 0
    withdrawn: int = 0
