"""The one module that writes candles, and with them everything that must change together.

One transaction a batch, under the advisory lock of its series: candles, lineage, revisions, the
ledger of gaps, coverage, totals and quarantine. A process that is killed anywhere leaves the last
commit; two processes on one series wait for each other and the second one finds nothing to change.

Rows go the shortest way there is (measured, rows per second against a bare COPY): into an empty
range by COPY (0.8), otherwise through a staging table and a join that drops what is the same (0.9,
and no WAL for unchanged rows), never by ON CONFLICT (0.3, and it writes WAL for rows it leaves alone).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.closures import ClosureChange
from fks_backfill_dagster.domain.delivery import Delivery, Origin, RejectedRows
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.reconcile import SeriesAudit
from fks_backfill_dagster.ledger.records import Known, Outcome
from fks_backfill_dagster.ledger.settle import (
    Response,
    Rules,
    Settlement,
    settle,
    surroundings,
    with_repeated,
)
from fks_backfill_dagster.store import copy_format, schema
from fks_backfill_dagster.store.audit_reader import Clock, examine_within
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster.store.errors import StoreError, repeated
from fks_backfill_dagster.store.ledger import known_around, series_id, to_multirange
from fks_backfill_dagster.store.schema import WITHDRAWAL

_NONE = np.empty(0, dtype=np.int64)

# Advisory locks: (class, series id) for one series, one key for the gate (see fks.ohlcv_as_of).
_SERIES_LOCK = 46137
_COMMIT_GATE = 4613732


@dataclass(frozen=True, slots=True, eq=False)
class Withdrawal:
    """Stored candles that a response of their own provider does not hold any more.

    `opens`: ascending and unique, inside the batch. Of them those are deleted that the same provider
    delivered under the same instrument; lineage that names no instrument (from before it was kept) does
    not match.
    """

    origin: Origin
    opens: Instants


@dataclass(frozen=True, slots=True)
class BatchWrite:
    """All that one batch changes. No two deliveries hold the same open; none leaves the window.

    Each delivery is verified: ascending, unique, on the grid; it becomes one lineage row. A delivery of a
    dated publication (`origin.published_at`) does not replace what its provider published or returned later.
    """

    window: TimeRange
    deliveries: tuple[Delivery, ...]
    rejected: tuple[RejectedRows, ...] = ()
    responses: tuple[Response, ...] = ()
    rules: Rules = Rules()  # noqa: RUF009 - frozen
    run_id: str | None = None
    withdrawn: tuple[Withdrawal, ...] = ()


@dataclass(frozen=True, slots=True)
class Committed:
    """What a commit changed, and how many expected candles of its window are not stored after it.

    outdated: delivered candles that differ from the stored ones and were not written, because those are of
        a newer publication of the same provider.
    withdrawn: stored candles that were deleted because their provider does not return them any more.
    """

    inserted: int
    updated: int
    missing: int
    outdated: int = 0
    withdrawn: int = 0


@repeated
def commit_batch(
    database: Database, series: Series, identity: int, write: BatchWrite, grid: Grid
) -> Committed:
    """Writes one batch; all of it or nothing. Committing the same batch twice changes nothing.

    So a batch whose connection is lost is committed again. Where it was lost after the commit and before its
    confirmation, the result is that of the second commit, which found nothing to change.

    Raises ValueError for candles that the batch may not hold: the ledger would be wrong for ever.
    """
    deliveries = tuple(d for d in write.deliveries if len(d.candles))
    withdrawals = tuple(w for w in write.withdrawn if len(w.opens))
    with database.begin() as connection:
        _lock(connection, identity)
        before = known_around(connection, identity, surroundings(write.window, grid))
        batch_ids = [_open_batch(connection, identity, d, write.run_id, grid) for d in deliveries]
        rows, row_batches = _merge(deliveries, batch_ids)
        _refuse_misplaced(rows.ts, write.window, grid)
        dated = _Dated.of(deliveries, batch_ids)
        inserted, updated, outdated = _write_candles(connection, series, identity, rows, row_batches, dated)
        gone, gone_by = _withdraw(connection, series, identity, withdrawals, rows.ts, write, grid)
        missing = np.union1d(_still_missing(before, write.window, rows.ts, grid), gone)
        responses = _with_repeated(connection, identity, write, grid)
        settlement = settle(
            before.gaps, write.window, missing, rows.ts, responses, grid, before.synced, write.rules
        )
        _write_gaps(connection, identity, settlement)
        _write_rejected(connection, identity, write.rejected)
        _cover(connection, identity, write.window, inserted, rows.ts)
        if len(gone):
            _recount(connection, identity, series, -len(gone))
        changed = updated | gone_by
        opened = [*batch_ids, *gone_by]
        useful = [batch for batch in opened if inserted.get(batch) or changed.get(batch)]
        _drop_idle(connection, [batch for batch in opened if batch not in useful])
        _stamp(connection, useful, inserted, changed, _volumes(rows, row_batches, inserted))
        return Committed(
            sum(inserted.values()), sum(updated.values()), len(missing), sum(outdated.values()), len(gone)
        )


def _lock(connection: sa.Connection, identity: int) -> None:
    connection.execute(
        sa.text("SELECT pg_advisory_xact_lock(:class, :id)"), {"class": _SERIES_LOCK, "id": identity}
    )
    # One path for both kinds of server: a plain one takes the last for an unknown custom setting.
    # The planner would pick a nested loop over every chunk (93k rows/s instead of 427k). Where it has
    # no other way than the one forbidden, its estimate is so high that the server compiles a query of
    # one row first (PostgreSQL before 18): 100 ms a commit. The default limit of TimescaleDB on rows
    # changed in compressed chunks would refuse a large correction.
    connection.execute(
        sa.text(
            "SET LOCAL enable_nestloop = off; SET LOCAL jit = off;"
            " SET LOCAL timescaledb.max_tuples_decompressed_per_dml_transaction = 0"
        )
    )


# Lineage ------------------------------------------------------------------------------------------------


def _open_batch(
    connection: sa.Connection, identity: int, delivery: Delivery, run_id: str | None, grid: Grid
) -> int:
    ts = delivery.candles.ts
    return _open_lineage(
        connection, identity, delivery.origin, delivery.origin.transport.value, ts, run_id, grid
    )


def _open_lineage(
    connection: sa.Connection,
    identity: int,
    origin: Origin,
    transport: str,
    ts: Instants,
    run_id: str | None,
    grid: Grid,
) -> int:
    """A lineage row, not yet stamped: `infinity` until the gate."""
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
    }
    return int(
        connection.execute(sa.insert(schema.batch).values(row).returning(schema.batch.c.id)).scalar_one()
    )


def _drop_idle(connection: sa.Connection, batch_ids: Sequence[int]) -> None:
    """Deletes lineage rows of batches that changed nothing."""
    if batch_ids:
        connection.execute(sa.text("DELETE FROM fks.batch WHERE id = ANY(:ids)"), {"ids": list(batch_ids)})


def _volumes(rows: Candles, origins: NDArray[np.int32], inserted: dict[int, int]) -> dict[int, float]:
    """The volume of the batches of which every candle was inserted and any has a volume."""
    found = {}
    for batch, count in inserted.items():
        volumes = rows.volume[origins == batch]
        if len(volumes) == count and not np.isnan(volumes).all():
            found[batch] = float(np.nansum(volumes))
    return found


def _stamp(
    connection: sa.Connection,
    batch_ids: Sequence[int],
    inserted: dict[int, int],
    updated: dict[int, int],
    volumes: dict[int, float],
) -> None:
    """Gives batches their numbers and their commit time, behind the gate; the last thing a transaction does."""
    if not batch_ids:
        return
    connection.execute(sa.text("SELECT pg_advisory_xact_lock(:gate)"), {"gate": _COMMIT_GATE})
    connection.execute(
        sa.text(
            # The clock may be set back; the order of commits may not. Materialized: a join may look at
            # a subquery once a row, and the batches of one commit would get moments of their own.
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


# Candles ------------------------------------------------------------------------------------------------


def _merge(deliveries: Sequence[Delivery], batch_ids: Sequence[int]) -> tuple[Candles, NDArray[np.int32]]:
    """All candles of the batch in the order of the primary key, each with its lineage."""
    rows = Candles.concat([d.candles for d in deliveries])
    origins = np.repeat(np.array(batch_ids, dtype=np.int32), [len(d.candles) for d in deliveries])
    if len(deliveries) > 1:
        order = np.argsort(rows.ts, kind="stable")
        rows, origins = rows.take(order), origins[order]
        if bool((rows.ts[1:] == rows.ts[:-1]).any()):
            raise ValueError("two deliveries of one batch hold the same candle")
    return rows, origins


def _refuse_misplaced(opens: Instants, window: TimeRange, grid: Grid) -> None:
    if not len(opens):
        return
    if bool((opens[1:] <= opens[:-1]).any()):
        raise ValueError("the candles of a delivery are not ascending and unique")
    if opens[0] < window.start or opens[-1] >= window.end:
        raise ValueError(f"a candle lies outside the batch {window}")
    if not bool(grid.contains(opens).all()):
        raise ValueError("a candle opens where none is expected")


@dataclass(frozen=True, slots=True)
class _Dated:
    """The batches of a commit whose publication time is known, as columns."""

    ids: list[int]
    providers: list[str]
    published: list[datetime]

    @classmethod
    def of(cls, deliveries: Sequence[Delivery], batch_ids: Sequence[int]) -> _Dated:
        found = [
            (batch, d.origin.provider, to_datetime(d.origin.published_at))
            for d, batch in zip(deliveries, batch_ids, strict=True)
            if d.origin.published_at is not None
        ]
        return cls([f[0] for f in found], [f[1] for f in found], [f[2] for f in found])


def _write_candles(
    connection: sa.Connection,
    series: Series,
    identity: int,
    rows: Candles,
    origins: NDArray[np.int32],
    dated: _Dated,
) -> tuple[dict[int, int], dict[int, int], dict[int, int]]:
    """Returns the numbers of inserted, of updated and of outdated rows per batch id."""
    if not len(rows):
        return {}, {}, {}
    table = _table(series)
    reach = {"id": identity, "first": to_datetime(int(rows.ts[0])), "last": to_datetime(int(rows.ts[-1]))}
    occupied = connection.scalar(
        sa.text(f"SELECT EXISTS (SELECT FROM {table} WHERE series_id = :id AND ts BETWEEN :first AND :last)"),
        reach,
    )
    if not occupied:
        _copy(connection, table, identity, rows, origins)
        return _tally(origins), {}, {}
    connection.execute(
        sa.text(f"CREATE TEMPORARY TABLE IF NOT EXISTS staged_candles (LIKE {table}) ON COMMIT DELETE ROWS")
    )
    _copy(connection, "staged_candles", identity, rows, origins)
    return _insert_new(connection, table, reach), *_update_changed(connection, table, reach, dated)


def _table(series: Series) -> str:
    return f'fks."candles_{series.timeframe}"'


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


# A look-up in the lineage for each candle that differs, and only where the new one is of a dated publication: as
# a join it would read the lineage of all series.
_IS_OUTDATED = """
f.id IS NOT NULL AND coalesce((
    SELECT b.provider = f.provider AND coalesce(b.published_at, b.fetched_at) > f.published_at
    FROM fks.batch b WHERE b.id = c.batch_id), false)
"""


def _update_changed(
    connection: sa.Connection, table: str, reach: dict[str, object], dated: _Dated
) -> tuple[dict[int, int], dict[int, int]]:
    """Keeps what a candle was in the revision table, then changes it.

    Returns the numbers of updated rows, and of those left as they are because a newer publication of the
    same provider gave them, per batch id.
    """
    counts = connection.execute(
        sa.text(
            f"WITH differing AS ("
            f" SELECT c.series_id, c.ts, s.batch_id AS new, c.batch_id AS old,"
            f"   c.open, c.high, c.low, c.close, c.volume, s.open AS open_after, s.high AS high_after,"
            f"   s.low AS low_after, s.close AS close_after, s.volume AS volume_after,"
            f"   {_IS_OUTDATED} AS outdated"
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
            f"   open_after, high_after, low_after, close_after, volume_after,"
            f"   'refetched: the source gives other values'"
            f" FROM differing WHERE NOT outdated"
            f") SELECT new, count(*) FILTER (WHERE NOT outdated), count(*) FILTER (WHERE outdated)"
            f" FROM differing GROUP BY new"
        ),
        reach | {"dated": dated.ids, "providers": dated.providers, "published": dated.published},
    ).all()
    revised = _counts((batch, changed) for batch, changed, _ in counts if changed)
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
    return revised, _counts((batch, left) for batch, _, left in counts if left)


# The subquery is a look-up for each of a few candles; as a join it would read the lineage of all series.
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


def _withdraw(
    connection: sa.Connection,
    series: Series,
    identity: int,
    withdrawals: Sequence[Withdrawal],
    delivered: Instants,
    write: BatchWrite,
    grid: Grid,
) -> tuple[Instants, dict[int, int]]:
    """Deletes what is withdrawn and keeps it as a revision without values after.

    Returns the opens that went, and how many per lineage row of a withdrawing response.
    """
    went: list[Instants] = []
    counts: dict[int, int] = {}
    for one in withdrawals:
        _refuse_misplaced(one.opens, write.window, grid)
        if np.isin(one.opens, delivered).any():
            raise ValueError("a candle of the batch is delivered and withdrawn at once")
        batch = _open_lineage(connection, identity, one.origin, WITHDRAWAL, one.opens, write.run_id, grid)
        found = connection.scalars(
            sa.text(_WITHDRAW.format(table=_table(series))),
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
        went.append(opens)
    return np.concatenate([np.empty(0, dtype=np.int64), *went]), counts


def _counts(found: Iterable[Any]) -> dict[int, int]:
    """From rows of (batch id, count)."""
    return {int(batch): int(count) for batch, count in found}


def _tally(origins: NDArray[np.int32]) -> dict[int, int]:
    batches, counts = np.unique(origins, return_counts=True)
    return dict(zip(batches.tolist(), counts.tolist(), strict=True))


# Ledger, coverage, quarantine -----------------------------------------------------------------------------


def _still_missing(before: Known, window: TimeRange, stored: Instants, grid: Grid) -> Instants:
    """The expected opens of the window that are not in the table after this commit."""
    absent = [grid.opens(r) for r in before.absent(window)]
    return missing_of(np.concatenate(absent), stored) if absent else np.empty(0, dtype=np.int64)


def _write_gaps(connection: sa.Connection, identity: int, settlement: Settlement) -> None:
    if settlement.removed:
        connection.execute(
            sa.text(
                "DELETE FROM fks.gap"
                " WHERE series_id = :id AND status <> 'filled' AND gap_start = ANY(:starts)"
            ),
            {"id": identity, "starts": [to_datetime(start) for start in settlement.removed]},
        )
    if not settlement.added:
        return
    connection.execute(
        sa.text(
            "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts,"
            "   next_attempt_at, evidence, found_at)"
            " VALUES (:id, :start, :end, :missing, :status, :attempts, :next, CAST(:evidence AS jsonb),"
            "   coalesce(:found_at, now()))"
        ),
        [
            {
                "id": identity,
                "start": to_datetime(g.start),
                "end": to_datetime(g.end),
                "missing": g.missing,
                "status": g.status.value,
                "attempts": g.attempts,
                "next": None if g.next_attempt_at is None else to_datetime(g.next_attempt_at),
                "evidence": json.dumps([e.to_json() for e in g.evidence]),
                "found_at": None if g.found_at is None else to_datetime(g.found_at),
            }
            for g in settlement.added
        ],
    )


_VALUES = ("open", "high", "low", "close", "volume")

# A look-up by the unique key of the quarantine: its rows within the batch are few.
_KNOWN_REJECTED = """
SELECT n.place
FROM unnest(CAST(:ts AS timestamptz[]), CAST(:open AS float8[]), CAST(:high AS float8[]), CAST(:low AS float8[]),
        CAST(:close AS float8[]), CAST(:volume AS float8[]))
    WITH ORDINALITY AS n(ts, open, high, low, close, volume, place)
JOIN fks.quarantine q ON q.ts = n.ts
    AND (q.open, q.high, q.low, q.close, q.volume) IS NOT DISTINCT FROM (n.open, n.high, n.low, n.close, n.volume)
WHERE q.series_id = :id AND q.provider = :provider AND q.reason = :reason
"""


def _with_repeated(
    connection: sa.Connection, identity: int, write: BatchWrite, grid: Grid
) -> tuple[Response, ...]:
    """The responses, in view of what an earlier request left in the quarantine."""
    if not any(response.evidence.outcome is Outcome.REJECTED for response in write.responses):
        return write.responses
    known = []
    for rows in write.rejected:
        names = {"id": identity, "provider": rows.origin.provider, "reason": rows.reason.value}
        found = connection.scalars(sa.text(_KNOWN_REJECTED), names | _columns_of(rows)).all()
        mask = np.zeros(len(rows.candles), dtype=bool)
        mask[np.array(found, dtype=np.int64) - 1] = True
        known.append((rows, mask))
    return with_repeated(write.responses, known, grid)


def _columns_of(rows: RejectedRows) -> dict[str, list[Any]]:
    """Rows as the quarantine keeps them: what is no number is NULL."""
    ts, *values = rows.candles.columns()
    return {"ts": [to_datetime(at) for at in ts.tolist()]} | {
        name: [value if math.isfinite(value) else None for value in column.tolist()]
        for name, column in zip(_VALUES, values, strict=True)
    }


def _write_rejected(connection: sa.Connection, identity: int, rejected: Sequence[RejectedRows]) -> None:
    """One row a broken row, however often it came."""
    rows = []
    for one in rejected:
        about = {
            "series_id": identity,
            "provider": one.origin.provider,
            "source": one.origin.source,
            "reason": one.reason.value,
        }
        columns = _columns_of(one)
        rows += [about | dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if not rows:
        return
    table = schema.quarantine
    insert = sa.dialects.postgresql.insert(table)
    connection.execute(
        insert.on_conflict_do_update(
            constraint="quarantine_once", set_={"seen": table.c.seen + 1, "last_seen_at": sa.func.now()}
        ),
        rows,
    )


def _cover(
    connection: sa.Connection, identity: int, window: TimeRange, inserted: dict[int, int], stored: Instants
) -> None:
    first, last = (to_datetime(int(stored[0])), to_datetime(int(stored[-1]))) if len(stored) else (None, None)
    connection.execute(
        sa.text(
            "UPDATE fks.sync_state SET synced = synced + CAST(:window AS tstzmultirange),"
            " total_candles = total_candles + :inserted,"
            " oldest = least(oldest, CAST(:first AS timestamptz)),"
            " newest = greatest(newest, CAST(:last AS timestamptz))"
            " WHERE series_id = :id"
        ),
        {
            "id": identity,
            "window": to_multirange(RangeSet([window])),
            "inserted": sum(inserted.values()),
            "first": first,
            "last": last,
        },
    )


def _recount(connection: sa.Connection, identity: int, series: Series, change: int) -> None:
    """The totals after candles were deleted or came back; `change` of their number."""
    table = _table(series)
    connection.execute(
        sa.text(
            "UPDATE fks.sync_state SET total_candles = total_candles + :change,"
            f" oldest = (SELECT min(ts) FROM {table} WHERE series_id = :id),"
            f" newest = (SELECT max(ts) FROM {table} WHERE series_id = :id) WHERE series_id = :id"
        ),
        {"id": identity, "change": change},
    )


# Undo ---------------------------------------------------------------------------------------------------


def undo_batch(database: Database, series: Series, identity: int, batch_id: int, grid: Grid) -> Committed:
    """Takes back a batch: its insertions go, its corrections give way to the values before, and the
    candles that it withdrew come back.

    The undo is a batch of its own, so that the history stays whole; what goes becomes an open gap.
    Candles that a later batch changed are left as that batch made them; if that one is undone too,
    what comes back is from before both. Raises StoreError when the batch does not exist, belongs to
    another series, is an undo, or was undone before.
    """
    with database.begin() as connection:
        _lock(connection, identity)
        batch = connection.execute(sa.select(schema.batch).where(schema.batch.c.id == batch_id)).one_or_none()
        if batch is None or batch.series_id != identity:
            raise StoreError(f"There is no batch {batch_id} of {series}: see `fks-backfill batches list`.")
        if batch.undoes is not None:
            raise StoreError(
                f"Batch {batch_id} is itself an undo; sync the series to bring the candles back."
            )
        if connection.scalar(
            sa.text("SELECT EXISTS (SELECT FROM fks.batch WHERE undoes = :id)"), {"id": batch_id}
        ):
            raise StoreError(f"Batch {batch_id} was undone before: there is nothing left to take back.")
        window = TimeRange(to_micros(batch.range_start), to_micros(batch.range_end))
        undo = _open_undo(connection, identity, batch)
        table = _table(series)
        names = {"id": identity, "batch": batch_id, "undo": undo, "reason": f"batch {batch_id} undone"}
        named = names | {"first": batch.range_start, "last": batch.range_end}
        for statement in (_FIND_FORMER, _KEEP_UNDONE):
            connection.execute(sa.text(statement.format(table=table)), named)
        changed = connection.execute(sa.text(_RESTORE.format(table=table)), named).rowcount
        removed = _opens_of(connection.scalars(sa.text(_REMOVE.format(table=table)), named))
        returned = _opens_of(connection.scalars(sa.text(_BRING_BACK.format(table=table)), named))
        before = known_around(connection, identity, window)
        # A candle that opened where none is expected leaves no gap.
        missing = np.union1d(_still_missing(before, window, returned, grid), removed[grid.contains(removed)])
        settlement = settle(before.gaps, window, missing, returned, (), grid, before.synced)
        _write_gaps(connection, identity, settlement)
        _recount(connection, identity, series, len(returned) - len(removed))
        # Kept even if every candle was changed since: the batch must not come back by a later undo.
        total = len(removed) + changed + len(returned)
        _stamp(connection, [undo], {}, {undo: total}, {})
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

# The states of a candle form a stack: values, each of the batch that gave them, and absences, each of the
# batch that withdrew the candle. An undo takes the states of its batch out; where one of them is on top, what
# is below comes back. `version` goes down the stack from the batch; what `undone` names was taken out before.
# Below a state lies what it replaced (a revision has it); below one that replaced nothing, the absence of
# the last withdrawal before it; else nothing (batch_id NULL).
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

_BRING_BACK = """
INSERT INTO {table} (series_id, ts, batch_id, open, high, low, close, volume)
SELECT :id, f.ts, f.batch_id, f.open, f.high, f.low, f.close, f.volume FROM former f
LEFT JOIN {table} c ON c.series_id = :id AND c.ts BETWEEN :first AND :last AND c.ts = f.ts
WHERE c.ts IS NULL AND f.open IS NOT NULL
RETURNING ts
"""


# Closed dates -------------------------------------------------------------------------------------------

_RENEW = """
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
    """Settles the ledger by other closed dates, `closed`; nothing was requested.

    Absent candles of dates that were added are explained, those of dates that were withdrawn are gaps again, with
    the history that they had. A gap that only touches an added date (a week) is due at once: it may be derived
    now. No candle is changed. Returns how many candles are stored on the added dates.
    """
    with database.begin() as connection:
        _lock(connection, identity)
        for window in change.touched:
            before = known_around(connection, identity, surroundings(window, grid))
            for part in before.synced & RangeSet([window]):
                missing = _still_missing(before, part, _NONE, grid)
                settlement = settle(before.gaps, part, missing, _NONE, (), grid, before.synced, rules)
                _write_gaps(connection, identity, settlement)
                before = known_around(connection, identity, surroundings(window, grid))
        stored = 0
        for window in change.added:
            named = {"id": identity, "start": to_datetime(window.start), "end": to_datetime(window.end)}
            connection.execute(sa.text(_RENEW), named)
        for window in change.touched & rules.declared:
            named = {"id": identity, "start": to_datetime(window.start), "end": to_datetime(window.end)}
            count = (
                f"SELECT count(*) FROM {_table(series)} WHERE series_id = :id AND ts >= :start AND ts < :end"
            )
            stored += connection.scalar(sa.text(count), named) or 0
        connection.execute(
            sa.text("UPDATE fks.series SET closed = :closed WHERE id = :id"),
            {"id": identity, "closed": closed},
        )
        return stored


# Repair -------------------------------------------------------------------------------------------------


def repair_series(database: Database, series: Series, grid: Grid, clock: Clock) -> SeriesAudit | None:
    """Makes ledger, coverage and totals what the candles say; None where the series is not stored.

    What is wrong is looked for anew under the lock, where it stands still, and that is what is told.
    No candle is touched: what is wrong with one of them stays, for a person to judge. A gap keeps its
    history where its candles are still missing.
    """
    with database.begin() as connection:
        identity = series_id(connection, series)
        if identity is None:
            return None
        _lock(connection, identity)
        found = examine_within(connection, series, grid, clock)
        if found is None or not found.repairable:
            return found
        _write_gaps(connection, identity, Settlement(found.removed, found.added))
        _rewrite_state(connection, identity, found)
        connection.execute(
            sa.text("DELETE FROM fks.lease WHERE series_id = :id AND expires_at < now()"), {"id": identity}
        )
        return found.after_repair()


def _rewrite_state(connection: sa.Connection, identity: int, found: SeriesAudit) -> None:
    """How the last sync ended is not among it: no candle tells that."""
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


# Removal ------------------------------------------------------------------------------------------------


def remove_series(database: Database, series: Series) -> int:
    """Deletes a series with its candles, lineage, ledger and quarantine; returns how many candles went.

    Also what `ohlcv_as_of` could tell of it is gone. Raises StoreError when it is being synced.
    """
    named = {"symbol": series.symbol, "timeframe": series.timeframe.value}
    with database.begin() as connection:
        query = "SELECT id FROM fks.series WHERE symbol = :symbol AND timeframe = :timeframe"
        identity = connection.scalar(sa.text(query), named)
        if identity is None:
            return 0
        _lock(connection, identity)
        busy = (
            "SELECT EXISTS (SELECT FROM fks.lease WHERE series_id = :id AND expires_at > clock_timestamp())"
        )
        if connection.scalar(sa.text(busy), {"id": identity}):
            raise StoreError(
                f"{series} is being synced just now: stop that or wait for its end, then try again."
            )
        delete = sa.text(f'DELETE FROM fks."candles_{series.timeframe}" WHERE series_id = :id')
        candles = connection.execute(delete, {"id": identity}).rowcount
        # Everything else belongs to the series by ON DELETE CASCADE.
        connection.execute(sa.text("DELETE FROM fks.series WHERE id = :id"), {"id": identity})
        return candles


__all__ = [
    "BatchWrite",
    "Committed",
    "Withdrawal",
    "commit_batch",
    "remove_series",
    "repair_series",
    "settle_closures",
    "undo_batch",
]
