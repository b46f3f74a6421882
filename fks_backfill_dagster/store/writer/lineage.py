"""The advisory locks of a commit, and its rows of fks.batch: opened first, stamped last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery, Origin
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.store import schema

# Advisory locks: (class, series id) for one series, one key for the commit gate (see fks.ohlcv_as_of).
_SERIES_LOCK = 46137
_COMMIT_GATE = 4613732


def lock(connection: sa.Connection, identity: int) -> None:
    """Locks the series, and sets the planner for its statements, until the end of the transaction."""
    connection.execute(
        sa.text("SELECT pg_advisory_xact_lock(:class, :id)"), {"class": _SERIES_LOCK, "id": identity}
    )
    # The same statements on both kinds of server: plain PostgreSQL accepts the last one as a custom setting.
    # The planner would pick a nested loop over every chunk (93k rows/s instead of 427k). Where a disabled
    # plan is the only one, its estimate is so high that PostgreSQL before 18 JIT-compiles a query of one
    # row: 100 ms per commit. TimescaleDB's default limit on rows changed in compressed chunks would refuse
    # a large correction.
    connection.execute(
        sa.text(
            "SET LOCAL enable_nestloop = off; SET LOCAL jit = off;"
            " SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0"
        )
    )


def open_batch(
    connection: sa.Connection, identity: int, delivery: Delivery, run_id: str | None, grid: Grid
) -> int:
    """Like `open_lineage`, for the candles of a delivery."""
    ts = delivery.candles.ts
    return open_lineage(
        connection, identity, delivery.origin, delivery.origin.transport.value, ts, run_id, grid
    )


def open_lineage(
    connection: sa.Connection,
    identity: int,
    origin: Origin,
    transport: str,
    ts: Instants,
    run_id: str | None,
    grid: Grid,
) -> int:
    """Inserts an unstamped lineage row (`committed_at` is `infinity`); returns its id."""
    row = {
        "series_id": identity,
        "provider": origin.provider,
        "transport": transport,
        "source": origin.source,
        "host": origin.host,
        "instrument": origin.instrument,
        "sha256": origin.sha256,
        "published_at": None if origin.published_at is None else to_datetime(origin.published_at),
        "range_start": to_datetime(int(ts[0])),
        "range_end": to_datetime(int(grid.closes(ts[-1:])[0])),
        "run_id": run_id,
        "fetched_at": to_datetime(origin.requested_at),
        "committed_at": sa.text("'infinity'"),
        "inserted": 0,
        "updated": 0,
        "author": origin.author,
        "reason": origin.reason,
    }
    return int(
        connection.execute(sa.insert(schema.batch).values(row).returning(schema.batch.c.id)).scalar_one()
    )


def drop_idle(connection: sa.Connection, batch_ids: Sequence[int]) -> None:
    """Deletes lineage rows of batches that changed nothing."""
    if batch_ids:
        connection.execute(sa.text("DELETE FROM fks.batch WHERE id = ANY(:ids)"), {"ids": list(batch_ids)})


def volumes(rows: Candles, origins: NDArray[np.int32], inserted: dict[int, int]) -> dict[int, float]:
    """The volume of the batches whose candles were all inserted and have a volume in at least one candle."""
    found = {}
    for batch, count in inserted.items():
        volumes = rows.volume[origins == batch]
        if len(volumes) == count and not np.isnan(volumes).all():
            found[batch] = float(np.nansum(volumes))
    return found


def stamp(
    connection: sa.Connection,
    batch_ids: Sequence[int],
    inserted: dict[int, int],
    updated: dict[int, int],
    volumes: dict[int, float],
) -> None:
    """Sets the counts and the commit time of batches under the commit gate; the last statements of a transaction."""
    if not batch_ids:
        return
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:gate)"), {"gate": _COMMIT_GATE})
    connection.execute(
        sa.text(
            # The clock may be set back; the order of commits must not change. MATERIALIZED: a join may
            # evaluate a subquery per row, and the batches of one commit would get different times.
            "WITH stamp AS MATERIALIZED ("
            " SELECT greatest(clock_timestamp(), max(committed_at) + interval '1 microsecond') AS now"
            " FROM fks.batch WHERE committed_at < 'infinity')"
            " UPDATE fks.batch b"
            " SET committed_at = stamp.now, inserted = n.inserted, updated = n.updated, volume_sum = n.volume"
            " FROM stamp, unnest(CAST(:ids AS int[]), CAST(:inserted AS int[]), CAST(:updated AS int[]),"
            "   CAST(:volumes AS float8[])) AS n(id, inserted, updated, volume)"
            " WHERE b.id = n.id"
        ),
        {
            "ids": list(batch_ids),
            "inserted": [inserted.get(b, 0) for b in batch_ids],
            "updated": [updated.get(b, 0) for b in batch_ids],
            "volumes": [volumes.get(b) for b in batch_ids],
        },
    )
