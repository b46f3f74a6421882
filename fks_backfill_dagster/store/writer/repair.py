"""Rebuilds ledger, coverage and totals from the stored candles."""

from __future__ import annotations

import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.reconcile import SeriesAudit
from fks_backfill_dagster.ledger.settle import (
    Settlement,
)
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.audit_reader import Clock, examine_within
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import series_id, to_multirange
from fks_backfill_dagster.store.writer.ledger import write_gaps
from fks_backfill_dagster.store.writer.lineage import lock


def repair_series(database: Database, series: Series, grid: Grid, clock: Clock) -> SeriesAudit | None:
    """Rebuilds ledger, coverage and totals from the candles; None where the series is not stored.

    The series is examined again under its lock, and that audit is returned. No candle is changed: flaws of candles
    remain, for an operator to decide. A gap keeps its history where its candles are still missing.
    """
    with database.begin() as connection:
        identity = series_id(connection, series)
        if identity is None:
            return None
        lock(connection, identity)
        found = examine_within(connection, series, grid, clock)
        if found is None or not found.repairable:
            return found
        write_gaps(connection, identity, Settlement(found.removed, found.added), grid)
        _rewrite_state(connection, identity, found)
        connection.execute(
            sa.text("DELETE FROM fks.lease WHERE series_id = :id AND expires_at < now()"), {"id": identity}
        )
        return found.after_repair()


def _rewrite_state(connection: sa.Connection, identity: int, found: SeriesAudit) -> None:
    """The outcome of the last sync is not rewritten: it does not follow from the candles."""
    row = {
        "synced": to_multirange(found.coverage),
        "total_candles": found.candles,
        "oldest": None if found.oldest is None else to_datetime(found.oldest),
        "newest": None if found.newest is None else to_datetime(found.newest),
    }
    connection.execute(
        sa.dialects.postgresql.insert(schema.sync_state)
        .values(row | {"series_id": identity})
        .on_conflict_do_update(index_elements=["series_id"], set_=row)
    )
