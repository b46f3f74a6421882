"""Writes candles to their table, with a revision of each value that is replaced.

The method is the fastest one measured (rows per second relative to a bare COPY): into an empty range by COPY (0.8),
otherwise through a staging table and a join that drops unchanged rows (0.9, and no WAL for them), never by
ON CONFLICT (0.3, and it writes WAL for rows that it does not change).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.store import copy_format
from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster.store.schema import WITHDRAWAL
from fks_backfill_dagster.store.sql import table_of
from fks_backfill_dagster.store.writer.lineage import open_lineage
from fks_backfill_dagster.store.writer.records import BatchWrite, Committed, Withdrawal

NO_INSTANTS = np.empty(0, dtype=np.int64)


def merge_deliveries(
    deliveries: Sequence[Delivery], batch_ids: Sequence[int]
) -> tuple[Candles, NDArray[np.int32]]:
    """The candles of all deliveries, ascending, and the batch id of each.

    Raises ValueError if two deliveries contain the same candle.
    """
    rows = Candles.concat([d.candles for d in deliveries])
    origins = np.repeat(np.array(batch_ids, dtype=np.int32), [len(d.candles) for d in deliveries])
    if len(deliveries) > 1:
        order = np.argsort(rows.ts, kind="stable")
        rows, origins = rows.take(order), origins[order]
        if bool((rows.ts[1:] == rows.ts[:-1]).any()):
            raise ValueError("two deliveries of one batch hold the same candle")
    return rows, origins


def refuse_misplaced(opens: Instants, window: TimeRange, grid: Grid) -> None:
    """Raises ValueError unless the opens ascend, are unique, inside the window and on the grid."""
    if not len(opens):
        return
    if bool((opens[1:] <= opens[:-1]).any()):
        raise ValueError("the candles of a delivery are not ascending and unique")
    if opens[0] < window.start or opens[-1] >= window.end:
        raise ValueError(f"a candle lies outside the batch {window}")
    if not bool(grid.contains(opens).all()):
        raise ValueError("a candle opens where none is expected")


@dataclass(frozen=True, slots=True)
class Dated:
    """The batches of a commit whose publication time is known, as columns."""

    ids: list[int]
    providers: list[str]
    published: list[datetime]

    @classmethod
    def of(cls, deliveries: Sequence[Delivery], batch_ids: Sequence[int]) -> Dated:
        found = [
            (batch, d.origin.provider, to_datetime(d.origin.published_at))
            for d, batch in zip(deliveries, batch_ids, strict=True)
            if d.origin.published_at is not None
        ]
        return cls([f[0] for f in found], [f[1] for f in found], [f[2] for f in found])


REFETCHED = "refetched: the source gives other values"


@dataclass(frozen=True, slots=True)
class Written:
    """The numbers of rows per batch id: inserted, updated, and differing ones that were not written, because the
    stored candle is from a newer publication (`outdated`) or pinned by a person (`pinned`)."""

    inserted: dict[int, int] = field(default_factory=dict)
    updated: dict[int, int] = field(default_factory=dict)
    outdated: dict[int, int] = field(default_factory=dict)
    pinned: dict[int, int] = field(default_factory=dict)

    def committed(self, missing: int, *, withdrawn: int) -> Committed:
        """The result of a commit that wrote these rows."""
        return Committed(
            inserted=sum(self.inserted.values()),
            updated=sum(self.updated.values()),
            missing=missing,
            outdated=sum(self.outdated.values()),
            withdrawn=withdrawn,
            pinned=sum(self.pinned.values()),
        )


def write_candles(
    connection: sa.Connection,
    series: Series,
    identity: int,
    rows: Candles,
    origins: NDArray[np.int32],
    dated: Dated,
) -> Written:
    """Inserts and updates ascending, unique rows; `origins` are their batch ids, one each. Pinned candles stay."""
    if not len(rows):
        return Written()
    table = table_of(series.timeframe)
    reach = {"id": identity, "first": to_datetime(int(rows.ts[0])), "last": to_datetime(int(rows.ts[-1]))}
    occupied = connection.scalar(
        sa.text(f"SELECT EXISTS (SELECT FROM {table} WHERE series_id = :id AND ts BETWEEN :first AND :last)"),
        reach,
    )
    if not occupied:
        _copy(connection, table, identity, rows, origins)
        return Written(_tally(origins))
    stage(connection, table, identity, rows, origins)
    return write_staged(connection, table, reach, dated)


def stage(
    connection: sa.Connection, table: str, identity: int, rows: Candles, origins: NDArray[np.int32]
) -> None:
    """Copies rows into the temporary table `staged_candles`, which the end of the transaction empties."""
    connection.execute(
        sa.text(f"CREATE TEMPORARY TABLE IF NOT EXISTS staged_candles (LIKE {table}) ON COMMIT DELETE ROWS")
    )
    _copy(connection, "staged_candles", identity, rows, origins)


def write_staged(
    connection: sa.Connection,
    table: str,
    reach: dict[str, object],
    dated: Dated,
    *,
    reason: str = REFETCHED,
    by_person: bool = False,
) -> Written:
    """Writes the staged rows within `reach` (`id`, `first`, `last`). `reason`: of the revisions. `by_person`: pinned
    candles are replaced, too."""
    inserted = _insert_new(connection, table, reach)
    named = reach | {"reason": reason, "by_person": by_person}
    return Written(inserted, *_update_changed(connection, table, named, dated))


def _copy(
    connection: sa.Connection, table: str, identity: int, rows: Candles, origins: NDArray[np.int32]
) -> None:
    columns = ", ".join(copy_format.CANDLE_COLUMNS)
    with (
        cursor_of(connection) as cursor,
        cursor.copy(f"COPY {table} ({columns}) FROM STDIN (FORMAT BINARY)") as copy,
    ):
        for block in copy_format.encode(identity, rows, origins):
            copy.write(block)


def _insert_new(connection: sa.Connection, table: str, reach: dict[str, object]) -> dict[int, int]:
    columns = ", ".join(copy_format.CANDLE_COLUMNS)
    return _counts(
        connection.execute(
            sa.text(
                f"WITH new AS ("
                f" INSERT INTO {table} ({columns})"
                f" SELECT {', '.join(f's.{name}' for name in copy_format.CANDLE_COLUMNS)}"
                f" FROM staged_candles s LEFT JOIN {table} c"
                f"   ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = s.ts"
                f" WHERE c.ts IS NULL ORDER BY s.ts RETURNING batch_id"
                f") SELECT batch_id, count(*) FROM new GROUP BY batch_id"
            ),
            reach,
        )
    )


# A look-up in the lineage for each candle that differs, and only where the new one comes from a dated publication:
# a join would read the lineage of all series.
_IS_OUTDATED = """
f.id IS NOT NULL AND coalesce((
    SELECT b.provider = f.provider AND coalesce(b.published_at, b.fetched_at) > f.published_at
    FROM fks.batch b WHERE b.id = c.batch_id), false)
"""

# A look-up by the key of the pins, of which there are few.
_IS_PINNED = """
NOT :by_person AND EXISTS (
    SELECT FROM fks.pin p WHERE p.series_id = :id AND p.ts = c.ts AND p.batch_id = c.batch_id
        AND p.released_at IS NULL)
"""


def _update_changed(
    connection: sa.Connection, table: str, reach: dict[str, object], dated: Dated
) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Records a candle's former values in the revision table, then changes it.

    Returns per batch id the numbers of updated, outdated and pinned rows; see `Written`.
    """
    counts = connection.execute(
        sa.text(
            f"WITH differing AS ("
            f" SELECT c.series_id, c.ts, s.batch_id AS new, c.batch_id AS old,"
            f"   c.open, c.high, c.low, c.close, c.volume, s.open AS open_after, s.high AS high_after,"
            f"   s.low AS low_after, s.close AS close_after, s.volume AS volume_after,"
            f"   {_IS_OUTDATED} AS outdated, {_IS_PINNED} AS pinned"
            f" FROM staged_candles s JOIN {table} c"
            f"   ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = s.ts"
            f" LEFT JOIN unnest(CAST(:dated AS int[]), CAST(:providers AS text[]),"
            f"     CAST(:published AS timestamptz[])) AS f(id, provider, published_at) ON f.id = s.batch_id"
            f" WHERE (c.open, c.high, c.low, c.close, c.volume)"
            f"   IS DISTINCT FROM (s.open, s.high, s.low, s.close, s.volume)"
            f" AND c.batch_id <> s.batch_id"
            f"), revised AS ("
            f" INSERT INTO fks.revision (series_id, ts, replaced_by, batch_id,"
            f"   open, high, low, close, volume,"
            f"   open_after, high_after, low_after, close_after, volume_after, reason)"
            f" SELECT series_id, ts, new, old, open, high, low, close, volume,"
            f"   open_after, high_after, low_after, close_after, volume_after, CAST(:reason AS text)"
            f" FROM differing WHERE NOT (outdated OR pinned)"
            f") SELECT new, count(*) FILTER (WHERE NOT (outdated OR pinned)) AS updated,"
            f"   count(*) FILTER (WHERE outdated AND NOT pinned) AS outdated,"
            f"   count(*) FILTER (WHERE pinned) AS pinned"
            f" FROM differing GROUP BY new"
        ),
        reach | {"dated": dated.ids, "providers": dated.providers, "published": dated.published},
    ).all()
    revised = _counts((row.new, row.updated) for row in counts if row.updated)
    if revised:
        connection.execute(
            sa.text(
                f"UPDATE {table} c SET batch_id = r.replaced_by, open = r.open_after, high = r.high_after,"
                f"   low = r.low_after, close = r.close_after, volume = r.volume_after"
                f" FROM fks.revision r"
                f" WHERE r.replaced_by = ANY(:batches) AND r.series_id = :id"
                f" AND c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = r.ts"
            ),
            reach | {"batches": list(revised)},
        )
    outdated = _counts((row.new, row.outdated) for row in counts if row.outdated)
    return revised, outdated, _counts((row.new, row.pinned) for row in counts if row.pinned)


# The subquery is a look-up for each of a few candles; a join would read the lineage of all series.
_WITHDRAW = """
WITH gone AS (
    DELETE FROM {table} c
    WHERE c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = ANY(CAST(:opens AS timestamptz[]))
      AND (SELECT b.provider = :provider AND b.instrument = :instrument FROM fks.batch b WHERE b.id = c.batch_id)
    RETURNING c.*
), kept AS (
    INSERT INTO fks.revision (series_id, ts, replaced_by, batch_id, open, high, low, close, volume, reason)
    SELECT series_id, ts, :batch, batch_id, open, high, low, close, volume, :reason FROM gone
)
SELECT ts FROM gone ORDER BY ts
"""

WITHDRAWN = "withdrawn: the provider does not return it any more"


def withdraw(
    connection: sa.Connection,
    series: Series,
    identity: int,
    withdrawals: Sequence[Withdrawal],
    delivered: Instants,
    write: BatchWrite,
    grid: Grid,
) -> tuple[Instants, dict[int, int]]:
    """Deletes withdrawn candles and keeps each as a revision without values after.

    Returns the opens of the deleted candles, and their number per lineage row of a withdrawing response. Raises
    ValueError for a candle outside of the batch, and for one that the batch also delivers.
    """
    deleted: list[Instants] = []
    counts: dict[int, int] = {}
    for one in withdrawals:
        refuse_misplaced(one.opens, write.window, grid)
        if np.isin(one.opens, delivered).any():
            raise ValueError("a candle of the batch is delivered and withdrawn at once")
        batch = open_lineage(connection, identity, one.origin, WITHDRAWAL, one.opens, write.run_id, grid)
        found = connection.scalars(
            sa.text(_WITHDRAW.format(table=table_of(series.timeframe))),
            {
                "id": identity,
                "batch": batch,
                "first": to_datetime(int(one.opens[0])),
                "last": to_datetime(int(one.opens[-1])),
                "opens": [to_datetime(ts) for ts in one.opens.tolist()],
                "provider": one.origin.provider,
                "instrument": one.origin.instrument,
                "reason": WITHDRAWN,
            },
        )
        opens = np.array([to_micros(ts) for ts in found], dtype=np.int64)
        counts[batch] = len(opens)
        deleted.append(opens)
    return np.concatenate([np.empty(0, dtype=np.int64), *deleted]), counts


def _counts(found: Iterable[Any]) -> dict[int, int]:
    """From rows of (batch id, count)."""
    return {int(batch): int(count) for batch, count in found}


def _tally(origins: NDArray[np.int32]) -> dict[int, int]:
    batches, counts = np.unique(origins, return_counts=True)
    return dict(zip(batches.tolist(), counts.tolist(), strict=True))
