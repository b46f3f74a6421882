"""Settles the ledger by changed closed dates: absent candles of a closed date are explained."""

from __future__ import annotations

import sqlalchemy as sa

from fks_backfill_dagster.domain.closures import ClosureChange
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import RangeSet
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.settle import (
    Rules,
    settle,
    surroundings,
)
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import known_around
from fks_backfill_dagster.store.sql import table_of
from fks_backfill_dagster.store.writer.candles import NO_INSTANTS
from fks_backfill_dagster.store.writer.ledger import still_missing, write_gaps
from fks_backfill_dagster.store.writer.lineage import lock

_REOPEN = """
UPDATE fks.gap SET status = 'open', next_attempt_at = NULL, changed_at = now()
WHERE series_id = :id AND status IN ('open', 'unavailable', 'tolerated')
  AND gap_start < :end AND gap_end > :start
"""


def settle_closures(
    database: Database,
    series: Series,
    identity: int,
    change: ClosureChange,
    rules: Rules,
    grid: Grid,
    closed: str,
) -> int:
    """Settles the ledger by changed closed dates, `closed`, without a request.

    Absent candles of added dates are explained; those of removed dates are gaps again, with their former history.
    A gap that only overlaps an added date (a week) is due at once: it may be derived now. No candle is changed.
    Returns the number of candles stored on the added dates.
    """
    with database.begin() as connection:
        lock(connection, identity)
        for window in change.touched:
            before = known_around(connection, identity, surroundings(window, grid))
            for part in before.synced & RangeSet([window]):
                missing = still_missing(before, part, NO_INSTANTS, grid)
                settlement = settle(before.gaps, part, missing, NO_INSTANTS, (), grid, before.synced, rules)
                write_gaps(connection, identity, settlement, grid)
                before = known_around(connection, identity, surroundings(window, grid))
        stored = 0
        for window in change.added:
            named = {"id": identity, "start": to_datetime(window.start), "end": to_datetime(window.end)}
            connection.execute(sa.text(_REOPEN), named)
        for window in change.touched & rules.declared:
            named = {"id": identity, "start": to_datetime(window.start), "end": to_datetime(window.end)}
            count = (
                f"SELECT count(*) FROM {table_of(series.timeframe)}"
                " WHERE series_id = :id AND ts >= :start AND ts < :end"
            )
            stored += connection.scalar(sa.text(count), named) or 0
        connection.execute(
            sa.text("UPDATE fks.series SET closed = :closed WHERE id = :id"),
            {"id": identity, "closed": closed},
        )
        return stored
