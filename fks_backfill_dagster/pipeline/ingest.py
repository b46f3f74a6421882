"""Ingestion: writes the candles of one batch to the database. All sources of candles use it.

    deliveries ─> the batch's part of each ─> one commit: candles, lineage, ledger, coverage, quarantine

Belongs here: which part of a span belongs to which batch. Does not belong here: the source of candles (a sync, a
file), their verification (`request`), the write (`store.writer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.delivery import Delivery, RejectedRows
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.settle import Response, Rules
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched, Withdrawn
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.commit import commit_batch
from fks_backfill_dagster.store.writer.records import BatchWrite, Committed, Withdrawal


@dataclass(frozen=True, slots=True)
class Ingest:
    """The input of an ingestion: verified deliveries, rejected rows, responses about missing candles, stored candles
    that their provider no longer returns, and corporate actions, which belong to no batch. `priority`: the order of the
    providers whose actions are used."""

    deliveries: Sequence[Delivery]
    rejected: Sequence[RejectedRows] = ()
    responses: Sequence[Response] = ()
    withdrawn: Sequence[Withdrawn] = ()
    actions: Sequence[ReportedActions] = ()
    priority: Sequence[str] = ()

    @classmethod
    def of(cls, fetched: Fetched, priority: Sequence[str]) -> Ingest:
        """Everything that a span has fetched; of equal lists of actions the first one."""
        actions = {(one.provider, one.actions): one for one in reversed(fetched.actions)}
        return cls(
            fetched.deliveries,
            fetched.rejected,
            fetched.responses,
            fetched.withdrawn,
            tuple(actions.values())[::-1],
            priority,
        )


def ingest(
    database: Database,
    series: Series,
    identity: int,
    window: TimeRange,
    given: Ingest,
    rules: Rules,
    *,
    run_id: str | None = None,
) -> Committed:
    """Commits the part of `given` that belongs to `window`, atomically and idempotently."""
    write = BatchWrite(
        window=window,
        deliveries=tuple(delivery.within(window) for delivery in given.deliveries),
        rejected=tuple(part for one in given.rejected if len((part := one.within(window)).candles)),
        responses=tuple(given.responses),
        rules=rules,
        run_id=run_id,
        withdrawn=tuple(
            Withdrawal(one.origin, one.opens[(one.opens >= window.start) & (one.opens < window.end)])
            for one in given.withdrawn
        ),
        actions=tuple(given.actions),
        priority=tuple(given.priority),
    )
    return commit_batch(database, series, identity, write, grid_of(series))
