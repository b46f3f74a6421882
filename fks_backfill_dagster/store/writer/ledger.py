"""The ledger in a commit: gaps, coverage, totals and quarantine."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa

from fks_backfill_dagster.domain.delivery import RejectedRows
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.days import missing_by_day
from fks_backfill_dagster.ledger.gaps import GapStatus, missing_of
from fks_backfill_dagster.ledger.records import Known, Outcome
from fks_backfill_dagster.ledger.settle import (
    Response,
    Settlement,
    with_repeated,
)
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.ledger import to_multirange
from fks_backfill_dagster.store.sql import table_of
from fks_backfill_dagster.store.writer.records import BatchWrite


def still_missing(before: Known, window: TimeRange, stored: Instants, grid: Grid) -> Instants:
    """The expected opens of the window that are not in the table after this commit."""
    absent = [grid.opens(r) for r in before.absent(window)]
    return missing_of(np.concatenate(absent), stored) if absent else np.empty(0, dtype=np.int64)


def write_gaps(connection: sa.Connection, identity: int, settlement: Settlement, grid: Grid) -> None:
    """Deletes and inserts the rows of the settlement. Filled rows are history and are never deleted."""
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
            "   next_attempt_at, evidence, found_at, by_day)"
            " VALUES (:id, :start, :end, :missing, :status, :attempts, :next, CAST(:evidence AS jsonb),"
            "   coalesce(:found_at, now()), CAST(:by_day AS int[]))"
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
                "by_day": None if g.status is GapStatus.FILLED else list(missing_by_day(g, grid)),
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


def with_known_rejections(
    connection: sa.Connection, identity: int, write: BatchWrite, grid: Grid
) -> tuple[Response, ...]:
    """The responses, adjusted for rows that an earlier request left in the quarantine."""
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
    """Rows as the quarantine stores them: a value that is not finite is NULL."""
    ts, *values = rows.candles.columns()
    return {"ts": [to_datetime(at) for at in ts.tolist()]} | {
        name: [value if math.isfinite(value) else None for value in column.tolist()]
        for name, column in zip(_VALUES, values, strict=True)
    }


def write_rejected(connection: sa.Connection, identity: int, rejected: Sequence[RejectedRows]) -> None:
    """Stores one quarantine row per rejected row, however often it was received."""
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


def cover(
    connection: sa.Connection, identity: int, ranges: RangeSet, inserted: int, stored: Instants
) -> None:
    """Extends coverage by the ranges, and the totals by their candles.

    `inserted`: how many are new. `stored`: the opens of all candles of the commit, ascending.
    """
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
            "window": to_multirange(ranges),
            "inserted": inserted,
            "first": first,
            "last": last,
        },
    )


def recount(connection: sa.Connection, identity: int, series: Series, change: int) -> None:
    """Updates the totals after candles were deleted or restored; `change`: the difference of their number."""
    table = table_of(series.timeframe)
    connection.execute(
        sa.text(
            "UPDATE fks.sync_state SET total_candles = total_candles + :change,"
            f" oldest = (SELECT min(ts) FROM {table} WHERE series_id = :id),"
            f" newest = (SELECT max(ts) FROM {table} WHERE series_id = :id) WHERE series_id = :id"
        ),
        {"id": identity, "change": change},
    )
