"""Undoing a batch: its candles are deleted, its corrections replaced by the former values. An undo can be undone, too.

The states of a candle form a stack, one per batch: values, or the absence that a withdrawal left. All of them are
kept, in the candle and in its revisions. The stored candle is the newest state whose batch is in effect; an undo
changes which batches are, and restores that rule for every candle with a state of its batch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.delivery import Transport
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, inside
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_micros
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.ledger.settle import settle, with_evidence
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.ledger import known_around
from fks_backfill_dagster.store.schema import UNDO
from fks_backfill_dagster.store.sql import table_of
from fks_backfill_dagster.store.writer.findings import mark_corrected
from fks_backfill_dagster.store.writer.ledger import recount, still_missing, write_gaps
from fks_backfill_dagster.store.writer.lineage import lock, stamp
from fks_backfill_dagster.store.writer.records import Committed


def undo_batch(database: Database, series: Series, identity: int, batch_id: int, grid: Grid) -> Committed:
    """Undoes a batch: deletes its insertions, restores the values before its corrections, and restores the
    candles that it withdrew. Undoing an undo takes that back.

    The undo is itself a batch, so that the history stays complete; deleted candles become open gaps, whose evidence
    names the undo. Candles that a later batch changed stay unchanged; if that one is undone too, the values from before
    both are restored. Raises StoreError when the batch does not exist, belongs to another series, or was undone before.
    """
    with database.begin() as connection:
        lock(connection, identity)
        batch = _undoable(connection, series, identity, batch_id)
        undo = _open_undo(connection, identity, batch)
        origin = _take_effect(connection, batch, undo)
        changed = _restore_states(connection, series, identity, origin, undo, f"batch {batch_id} undone")
        missing = _settle(connection, identity, origin, changed, undo, grid)
        recount(connection, identity, series, len(changed.restored) - len(changed.removed))
        mark_corrected(connection, identity, [undo])
        # Recorded even if every candle was changed since: a later undo must not restore this batch.
        stamp(connection, [undo], {}, {undo: changed.total}, {})
        return Committed(0, changed.total, missing)


def _undoable(connection: sa.Connection, series: Series, identity: int, batch_id: int) -> sa.Row[Any]:
    batch = connection.execute(sa.select(schema.batch).where(schema.batch.c.id == batch_id)).one_or_none()
    if batch is None or batch.series_id != identity:
        raise StoreError(f"There is no batch {batch_id} of {series}: see `fks-backfill batches list`.")
    if batch.undone_by is not None:
        raise StoreError(
            f"Batch {batch_id} was undone before, by batch {batch.undone_by}: there is nothing left to undo;"
            f" `fks-backfill batches undo {batch.undone_by}` restores its candles."
        )
    return batch


def _open_undo(connection: sa.Connection, identity: int, batch: sa.Row[Any]) -> int:
    row = {
        "series_id": identity,
        "provider": batch.provider,
        "transport": UNDO,
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


# The newest undo of the batch that is in effect.
_RECORD_EFFECT = """
UPDATE fks.batch b SET undone_by = (
    SELECT max(u.id) FROM fks.batch u WHERE u.undoes = b.id AND u.undone_by IS NULL)
WHERE b.id = :id
RETURNING b.*
"""


def _take_effect(connection: sa.Connection, batch: sa.Row[Any], undo: int) -> sa.Row[Any]:
    """Records which batches of the chain are in effect now: the undone one no longer, what it had undone again, and so
    on. Returns the batch with candles at the end of the chain."""
    while True:
        row = connection.execute(sa.text(_RECORD_EFFECT), {"id": batch.id}).one()
        if row.undoes is None:
            return row
        batch = connection.execute(sa.select(schema.batch).where(schema.batch.c.id == row.undoes)).one()


# Candles ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Changed:
    """The opens of deleted and of restored candles, ascending, and the number of all changed candles."""

    removed: Instants
    restored: Instants
    total: int


def _restore_states(
    connection: sa.Connection, series: Series, identity: int, batch: sa.Row[Any], undo: int, reason: str
) -> _Changed:
    is_scattered = batch.transport == Transport.CORRECTION
    if is_scattered:
        connection.execute(sa.text("SET LOCAL enable_nestloop = on"))
    undone = connection.scalars(
        sa.text("SELECT id FROM fks.batch WHERE series_id = :id AND undone_by IS NOT NULL"), {"id": identity}
    ).all()
    named = {
        "id": identity,
        "batch": batch.id,
        "undo": undo,
        "undone": list(undone),
        "reason": reason,
        "first": batch.range_start,
        "last": batch.range_end,
    }
    table = table_of(series.timeframe)

    def run(statement: str) -> sa.CursorResult[Any]:
        return connection.execute(sa.text(statement.format(table=table)), named)

    # The planner chooses between look-ups and a pass by the size of these tables.
    run(_TOUCHED_BY_PERSON if is_scattered else _TOUCHED)
    connection.execute(sa.text("ANALYZE touched"))
    run(_FIND_STATES)
    connection.execute(sa.text("ANALYZE state"))
    run(_KEEP_FORMER)
    updated = run(_UPDATE).rowcount
    removed = _opens_of(run(_REMOVE).scalars())
    restored = _opens_of(run(_REINSERT).scalars())
    return _Changed(removed, restored, updated + len(removed) + len(restored))


def _opens_of(found: Iterable[datetime]) -> Instants:
    return np.array(sorted(to_micros(ts) for ts in found), dtype=np.int64)


# The candles with a state of the batch: stored, replaced since, or withdrawn by it.
_TOUCHED = """
CREATE TEMPORARY TABLE touched ON COMMIT DROP AS
SELECT c.ts FROM {table} c WHERE c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.batch_id = :batch
UNION
SELECT r.ts FROM fks.revision r WHERE r.series_id = :id AND r.ts BETWEEN :first AND :last
    AND (r.batch_id = :batch OR r.replaced_by = :batch)
"""

# The candles of a correction are scattered over a range that may be all of the table; its pins name them.
_TOUCHED_BY_PERSON = """
CREATE TEMPORARY TABLE touched ON COMMIT DROP AS
SELECT p.ts FROM fks.pin p WHERE p.series_id = :id AND p.ts BETWEEN :first AND :last AND p.batch_id = :batch
"""

# Of the states in effect the newest one; no prices where that is an absence, or where there is none.
_FIND_STATES = """
CREATE TEMPORARY TABLE state ON COMMIT DROP AS
SELECT DISTINCT ON (t.ts) t.ts, s.batch_id, s.open, s.high, s.low, s.close, s.volume
FROM touched t LEFT JOIN (
    SELECT c.ts, c.batch_id, c.open, c.high, c.low, c.close, c.volume
    FROM touched n JOIN {table} c ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = n.ts
    UNION ALL
    SELECT r.ts, r.batch_id, r.open, r.high, r.low, r.close, r.volume
    FROM touched n JOIN fks.revision r ON r.series_id = :id AND r.ts BETWEEN :first AND :last AND r.ts = n.ts
    WHERE r.open IS NOT NULL
    UNION ALL
    SELECT r.ts, r.replaced_by, NULL, NULL, NULL, NULL, NULL
    FROM touched n JOIN fks.revision r ON r.series_id = :id AND r.ts BETWEEN :first AND :last AND r.ts = n.ts
    JOIN fks.batch b ON b.id = r.replaced_by AND b.undoes IS NULL
    WHERE r.close_after IS NULL
) s ON s.ts = t.ts AND s.batch_id <> ALL(CAST(:undone AS int[]))
ORDER BY t.ts, s.batch_id DESC
"""

_KEEP_FORMER = """
INSERT INTO fks.revision (series_id, ts, replaced_by, batch_id, open, high, low, close, volume,
    open_after, high_after, low_after, close_after, volume_after, reason)
SELECT :id, s.ts, :undo, coalesce(c.batch_id, s.batch_id), c.open, c.high, c.low, c.close, c.volume,
    s.open, s.high, s.low, s.close, s.volume, :reason
FROM state s
LEFT JOIN {table} c ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = s.ts
WHERE c.batch_id IS DISTINCT FROM CASE WHEN s.open IS NOT NULL THEN s.batch_id END
"""

_UPDATE = """
UPDATE {table} c SET batch_id = s.batch_id, open = s.open, high = s.high, low = s.low,
    close = s.close, volume = s.volume
FROM state s
WHERE c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = s.ts
  AND s.open IS NOT NULL AND s.batch_id <> c.batch_id
"""

_REMOVE = """
DELETE FROM {table} c USING state s
WHERE c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = s.ts AND s.open IS NULL
RETURNING c.ts
"""

_REINSERT = """
INSERT INTO {table} (series_id, ts, batch_id, open, high, low, close, volume)
SELECT :id, s.ts, s.batch_id, s.open, s.high, s.low, s.close, s.volume FROM state s
LEFT JOIN {table} c ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = s.ts
WHERE c.ts IS NULL AND s.open IS NOT NULL
RETURNING ts
"""


# The ledger ---------------------------------------------------------------------------------------------


def _settle(
    connection: sa.Connection, identity: int, batch: sa.Row[Any], changed: _Changed, undo: int, grid: Grid
) -> int:
    """Settles the ledger within the coverage; returns the number of missing candles there. History between the candles
    of a correction that was never synced stays pending."""
    window = TimeRange(to_micros(batch.range_start), to_micros(batch.range_end))
    evidence = _evidence(connection, undo)
    count = 0
    for part in known_around(connection, identity, window).synced & RangeSet([window]):
        before = known_around(connection, identity, part)
        removed = inside(changed.removed, part)
        removed = removed[grid.contains(removed)]  # a deleted candle off the grid leaves no gap
        restored = inside(changed.restored, part)
        missing = np.union1d(still_missing(before, part, restored, grid), removed)
        settlement = settle(before.gaps, part, missing, restored, (), grid, before.synced)
        write_gaps(connection, identity, with_evidence(settlement, evidence, removed), grid)
        count += len(missing)
    return count


def _evidence(connection: sa.Connection, undo: int) -> Evidence:
    """That an undo has reopened a gap. Its provider is no provider, so that it replaces no response of one."""
    now = connection.scalar(sa.select(sa.func.clock_timestamp()))
    assert now is not None
    return Evidence(UNDO, to_micros(now), Outcome.UNDONE, f"taken back by batch {undo}")
