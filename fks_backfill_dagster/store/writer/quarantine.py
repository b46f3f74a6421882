"""Decisions of a person about quarantined rows. A row stays with its decision: nothing is deleted."""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa

from fks_backfill_dagster.domain.delivery import Origin
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError

_DECIDE = """
UPDATE fks.quarantine SET decision = :decision, decided_at = clock_timestamp(), decided_by = :author,
    decision_reason = :reason, batch_id = :batch
WHERE id = ANY(:ids) AND decision IS NULL
"""


def decide_released(connection: sa.Connection, ids: Sequence[int], origin: Origin, batch: int | None) -> None:
    """Records that a correction has released these rows."""
    if ids:
        _decide(connection, ids, "released", origin.author or "", origin.reason or "", batch)


def drop_rows(database: Database, ids: Sequence[int], author: str, reason: str) -> int:
    """Records that these rows are wrong; returns their number. Raises StoreError if one was decided before."""
    with database.begin() as connection:
        return _decide(connection, ids, "dropped", author, reason, None)


def _decide(
    connection: sa.Connection, ids: Sequence[int], decision: str, author: str, reason: str, batch: int | None
) -> int:
    named = {"decision": decision, "author": author, "reason": reason, "batch": batch, "ids": list(ids)}
    changed = connection.execute(sa.text(_DECIDE), named).rowcount
    if changed != len(set(ids)):
        raise StoreError(
            "A quarantined row was decided before, or does not exist: see `fks-backfill quarantine list --decided`."
        )
    return changed
