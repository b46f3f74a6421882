"""Undoing a batch: its insertions are deleted, its corrections replaced by the former values."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_micros
from fks_backfill_dagster.ledger.settle import (
    settle,
)
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.ledger import known_around
from fks_backfill_dagster.store.sql import table_of
from fks_backfill_dagster.store.writer.findings import mark_corrected
from fks_backfill_dagster.store.writer.ledger import recount, still_missing, write_gaps
from fks_backfill_dagster.store.writer.lineage import lock, stamp
from fks_backfill_dagster.store.writer.records import Committed


def undo_batch(database: Database, series: Series, identity: int, batch_id: int, grid: Grid) -> Committed:
    """Undoes a batch: deletes its insertions, restores the values before its corrections, and restores the
    candles that it withdrew.

    The undo is itself a batch, so that the history stays complete; deleted candles become open gaps.
    Candles that a later batch changed stay unchanged; if that one is undone too, the values from before
    both are restored. Raises StoreError when the batch does not exist, belongs to another series, is an
    undo, or was undone before.
    """
    with database.begin() as connection:
        lock(connection, identity)
        batch = connection.execute(sa.select(schema.batch).where(schema.batch.c.id == batch_id)).one_or_none()
        if batch is None or batch.series_id != identity:
            raise StoreError(f"There is no batch {batch_id} of {series}: see `fks-backfill batches list`.")
        if batch.undoes is not None:
            raise StoreError(
                f"Batch {batch_id} is itself an undo; sync the series to fetch the candles again."
            )
        if connection.scalar(
            sa.text("SELECT EXISTS (SELECT FROM fks.batch WHERE undoes = :id)"), {"id": batch_id}
        ):
            raise StoreError(f"Batch {batch_id} was undone before: there is nothing left to undo.")
        window = TimeRange(to_micros(batch.range_start), to_micros(batch.range_end))
        undo = _open_undo(connection, identity, batch)
        table = table_of(series.timeframe)
        parameters = {"id": identity, "batch": batch_id, "undo": undo, "reason": f"batch {batch_id} undone"}
        named = parameters | {"first": batch.range_start, "last": batch.range_end}
        for statement in (_FIND_FORMER, _KEEP_UNDONE):
            connection.execute(sa.text(statement.format(table=table)), named)
        changed = connection.execute(sa.text(_RESTORE.format(table=table)), named).rowcount
        removed = _opens_of(connection.scalars(sa.text(_REMOVE.format(table=table)), named))
        restored = _opens_of(connection.scalars(sa.text(_REINSERT.format(table=table)), named))
        before = known_around(connection, identity, window)
        # A deleted candle off the grid leaves no gap.
        missing = np.union1d(still_missing(before, window, restored, grid), removed[grid.contains(removed)])
        settlement = settle(before.gaps, window, missing, restored, (), grid, before.synced)
        write_gaps(connection, identity, settlement, grid)
        recount(connection, identity, series, len(restored) - len(removed))
        mark_corrected(connection, identity, [undo])
        # Recorded even if every candle was changed since: a later undo must not restore this batch.
        total = len(removed) + changed + len(restored)
        stamp(connection, [undo], {}, {undo: total}, {})
        return Committed(0, total, len(missing))


def _opens_of(found: Iterable[datetime]) -> Instants:
    return np.array(sorted(to_micros(ts) for ts in found), dtype=np.int64)


def _open_undo(connection: sa.Connection, identity: int, batch: sa.Row[Any]) -> int:
    row = {
        "series_id": identity,
        "provider": batch.provider,
        "transport": "undo",
        "source": f"batch {batch.id}",
        "host": batch.host,
        "instrument": batch.instrument,
        "range_start": batch.range_start,
        "range_end": batch.range_end,
        "fetched_at": sa.func.clock_timestamp(),
        "committed_at": sa.text("'infinity'"),
        "inserted": 0,
        "updated": 0,
        "undoes": batch.id,
    }
    return int(
        connection.execute(sa.insert(schema.batch).values(row).returning(schema.batch.c.id)).scalar_one()
    )


_UNDONE_CANDLES = "c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.batch_id = :batch"

# The states of a candle form a stack: values, each of the batch that delivered them, and absences, each of the
# batch that withdrew the candle. An undo removes the states of its batch; where one of them is on top, the one
# below is restored. `version` walks down the stack from the batch; the batches in `undone` are removed already.
# Below a state lies the one it replaced (in a revision); below one that replaced nothing, the absence of the last
# withdrawal before it; else nothing (batch_id NULL).
_FIND_FORMER = f"""
CREATE TEMPORARY TABLE former ON COMMIT DROP AS
WITH RECURSIVE undone AS (
    SELECT undoes AS id FROM fks.batch WHERE series_id = :id AND undoes IS NOT NULL
), withdrawn AS (
    SELECT w.ts FROM fks.revision w
    WHERE w.replaced_by = :batch AND w.series_id = :id AND w.close_after IS NULL
      AND NOT EXISTS (SELECT FROM {{table}} c
          WHERE c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = w.ts)
      AND NOT EXISTS (SELECT FROM fks.revision l JOIN fks.batch b ON b.id = l.replaced_by AND b.series_id = :id
          WHERE l.series_id = :id AND l.ts BETWEEN :first AND :last AND l.ts = w.ts AND l.replaced_by > :batch
            AND l.close_after IS NULL AND b.undoes IS NULL AND b.id NOT IN (SELECT id FROM undone))
), version AS (
    SELECT t.ts, CAST(:batch AS int) AS batch_id, CAST(NULL AS float8) AS open, CAST(NULL AS float8) AS high,
        CAST(NULL AS float8) AS low, CAST(NULL AS float8) AS close, CAST(NULL AS float8) AS volume
    FROM (SELECT c.ts FROM {{table}} c WHERE {_UNDONE_CANDLES} UNION ALL SELECT ts FROM withdrawn) t
    UNION ALL
    SELECT v.ts, coalesce(r.batch_id, (
            SELECT max(w.replaced_by) FROM fks.revision w
            WHERE w.series_id = :id AND w.ts = v.ts AND w.replaced_by < v.batch_id AND w.close_after IS NULL
              AND (SELECT b.undoes IS NULL FROM fks.batch b WHERE b.id = w.replaced_by))),
        r.open, r.high, r.low, r.close, r.volume
    FROM version v
    JOIN undone u ON u.id = v.batch_id
    LEFT JOIN fks.revision r ON r.series_id = :id AND r.ts BETWEEN :first AND :last AND r.ts = v.ts
        AND r.replaced_by = v.batch_id
)
SELECT * FROM version v WHERE NOT EXISTS (SELECT FROM undone u WHERE u.id = v.batch_id)
"""

_KEEP_UNDONE = """
INSERT INTO fks.revision (series_id, ts, replaced_by, batch_id, open, high, low, close, volume,
    open_after, high_after, low_after, close_after, volume_after, reason)
SELECT :id, f.ts, :undo, :batch, c.open, c.high, c.low, c.close, c.volume,
    f.open, f.high, f.low, f.close, f.volume, :reason
FROM former f
LEFT JOIN {table} c ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = f.ts
WHERE c.ts IS NOT NULL OR f.open IS NOT NULL
"""

_RESTORE = f"""
UPDATE {{table}} c SET batch_id = f.batch_id, open = f.open, high = f.high, low = f.low,
    close = f.close, volume = f.volume
FROM former f
WHERE f.open IS NOT NULL AND f.ts = c.ts AND {_UNDONE_CANDLES}
"""

_REMOVE = f"DELETE FROM {{table}} c WHERE {_UNDONE_CANDLES} RETURNING c.ts"

_REINSERT = """
INSERT INTO {table} (series_id, ts, batch_id, open, high, low, close, volume)
SELECT :id, f.ts, f.batch_id, f.open, f.high, f.low, f.close, f.volume FROM former f
LEFT JOIN {table} c ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = f.ts
WHERE c.ts IS NULL AND f.open IS NOT NULL
RETURNING ts
"""
