"""The stored candles of a window with their lineage.

Belongs here: the join of the two reads. Does not belong here: what a comparison concludes from them
(`fetch.suspicion`, `validate`).
"""

from __future__ import annotations

import numpy as np

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.fetch.suspicion import StoredRows
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database


def stored_rows(database: Database, series: Series, window: TimeRange) -> StoredRows:
    """The stored candles that open in `window`; one that is written or removed between the two reads is left out."""
    candles = queries.read_candles(database, series, window)
    with database.begin() as connection:
        found = queries.stored_origins(connection, series, window)
    candles = candles.take(np.isin(candles.ts, found.ts))
    kept = np.isin(found.ts, candles.ts)
    return StoredRows(candles, found.provider[kept], found.instrument[kept], found.as_of[kept])
