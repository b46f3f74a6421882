"""Read queries about the quarantine: rejected rows, what a person decided about them, the stored candles around them.

Does not belong here: decisions (`writer.quarantine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import as_series, series_of, table_of

NEIGHBOURS = 2
"""Stored candles that are shown on either side of a quarantined row."""


@dataclass(frozen=True, slots=True)
class QuarantinedRow:
    """A rejected row as received (None for a value that was not a finite number), and the decision about it.

    batch: the correction that its release has written; None also where the same values were stored already.
    """

    id: int
    series: Series
    ts: datetime
    open: float | None
    high: float | None
    low: float | None
    close: float | None
    volume: float | None
    provider: str
    source: str
    reason: str
    first_seen_at: datetime
    last_seen_at: datetime
    seen: int
    decision: str | None
    decided_at: datetime | None
    decided_by: str | None
    decision_reason: str | None
    batch: int | None


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A stored candle near a quarantined row."""

    ts: datetime
    open: float
    high: float
    low: float
    close: float
    volume: float | None
    provider: str


_COLUMNS = """
SELECT s.symbol, s.timeframe, s.asset_class, s.calendar, q.id, q.ts, q.open, q.high, q.low, q.close, q.volume,
    q.provider, q.source, q.reason, q.first_seen_at, q.last_seen_at, q.seen, q.decision, q.decided_at, q.decided_by,
    q.decision_reason, q.batch_id AS batch
FROM fks.quarantine q JOIN fks.series s ON s.id = q.series_id
"""

_LIST = f"""
{_COLUMNS}
WHERE q.series_id = ANY(:ids) AND q.reason = coalesce(CAST(:reason AS text), q.reason)
  AND (q.decision IS NOT NULL) = :decided
ORDER BY q.last_seen_at DESC, q.id DESC LIMIT :limit
"""


def quarantined(
    database: Database,
    series: Sequence[Series],
    *,
    reason: str | None = None,
    decided: bool = False,
    limit: int | None = None,
) -> list[QuarantinedRow]:
    """The rows that wait for a decision, or with `decided` the others; last seen first. `reason`: why rejected."""
    with database.begin() as connection:
        ids = list(series_of(connection, series))
        named = {"ids": ids, "reason": reason, "decided": decided, "limit": limit}
        return [_row(row) for row in connection.execute(sa.text(_LIST), named)]


def rows_by_id(database: Database, ids: Sequence[int]) -> list[QuarantinedRow]:
    """The rows with these ids, ascending; those that do not exist are left out."""
    query = sa.text(f"{_COLUMNS} WHERE q.id = ANY(CAST(:ids AS bigint[])) ORDER BY q.id")
    with database.begin() as connection:
        return [_row(row) for row in connection.execute(query, {"ids": list(ids)})]


def neighbours(database: Database, row: QuarantinedRow) -> list[Neighbour]:
    """The stored candles around a row, its own open included, ascending."""
    candle = (
        f"SELECT c.ts, c.open, c.high, c.low, c.close, c.volume, b.provider FROM {table_of(row.series.timeframe)} c"
        " JOIN fks.series s ON s.id = c.series_id AND s.symbol = :symbol AND s.timeframe = :timeframe"
        " JOIN fks.batch b ON b.id = c.batch_id WHERE c.ts"
    )
    query = (
        f"(({candle} < :ts ORDER BY c.ts DESC LIMIT :most) UNION ALL ({candle} = :ts)"
        f" UNION ALL ({candle} > :ts ORDER BY c.ts LIMIT :most)) ORDER BY ts"
    )
    symbol, timeframe = row.series.key
    named = {"symbol": symbol, "timeframe": timeframe, "ts": row.ts, "most": NEIGHBOURS}
    with database.begin() as connection:
        return [Neighbour(**found._mapping) for found in connection.execute(sa.text(query), named)]


def _row(row: sa.Row[tuple[object, ...]]) -> QuarantinedRow:
    values = dict(row._mapping)
    for name in ("symbol", "timeframe", "asset_class", "calendar"):
        del values[name]
    return QuarantinedRow(series=as_series(row), **values)
