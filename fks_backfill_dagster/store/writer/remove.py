"""Deletes a series and all its rows."""

from __future__ import annotations

import sqlalchemy as sa

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.sql import named, table_of
from fks_backfill_dagster.store.writer.lineage import lock


def remove_series(database: Database, series: Series) -> int:
    """Deletes a series with its candles, lineage, gaps, findings and quarantine; returns the number of deleted candles.

    `ohlcv_as_of` then returns nothing for it either. Raises StoreError while it is being synced.
    """
    with database.begin() as connection:
        query = "SELECT id FROM fks.series WHERE symbol = :symbol AND timeframe = :timeframe"
        identity = connection.scalar(sa.text(query), named(series))
        if identity is None:
            return 0
        lock(connection, identity)
        busy = (
            "SELECT EXISTS (SELECT FROM fks.lease WHERE series_id = :id AND expires_at > clock_timestamp())"
        )
        if connection.scalar(sa.text(busy), {"id": identity}):
            raise StoreError(
                f"{series} is being synced: stop that sync or wait until it ends, then try again."
            )
        delete = sa.text(f"DELETE FROM {table_of(series.timeframe)} WHERE series_id = :id")
        candles = connection.execute(delete, {"id": identity}).rowcount
        # ON DELETE CASCADE deletes the rest.
        connection.execute(sa.text("DELETE FROM fks.series WHERE id = :id"), {"id": identity})
        return candles
