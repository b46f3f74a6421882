"""Completes the gaps of a database that an earlier version has written: their missing candles by day.

Belongs here: what a migration cannot do in SQL, which does not know the grid. Does not belong here: the counts
(`ledger.days`).
"""

from __future__ import annotations

from itertools import groupby

import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.ledger.days import missing_by_day
from fks_backfill_dagster.store.ledger import gap_of
from fks_backfill_dagster.store.sql import as_series

_INCOMPLETE = """
SELECT s.symbol, s.timeframe, s.asset_class, s.calendar, s.id AS owner, g.*
FROM fks.gap g JOIN fks.series s ON s.id = g.series_id
WHERE g.by_day IS NULL AND g.status <> 'filled' ORDER BY s.id
"""

_COMPLETE = """
UPDATE fks.gap g SET by_day = CAST(n.counts AS int[])
FROM unnest(CAST(:ids AS bigint[]), CAST(:counts AS text[])) AS n(id, counts) WHERE n.id = g.id
"""


def complete(connection: sa.Connection) -> None:
    """Idempotent, and one query if nothing is incomplete. Gaps of a calendar that cannot be built stay as they are:
    the audit reports the calendar, and completes them once it can be built."""
    rows = connection.execute(sa.text(_INCOMPLETE)).all()
    for _, mine in groupby(rows, key=lambda row: row.owner):
        gaps = list(mine)
        try:
            grid = grid_of(as_series(gaps[0]))
        except ValueError:
            continue
        counts = [missing_by_day(gap_of(row), grid) for row in gaps]
        connection.execute(
            sa.text(_COMPLETE),
            {
                "ids": [row.id for row in gaps],
                "counts": [f"{{{','.join(map(str, one))}}}" for one in counts],
            },
        )
