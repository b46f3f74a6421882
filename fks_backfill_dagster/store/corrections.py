"""Read queries about corrections: every replaced value, and what a person inserted, with its pin.

Does not belong here: writing them (`writer.correction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import sqlalchemy as sa

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import series_of, table_of


@dataclass(frozen=True, slots=True)
class CorrectionInfo:
    """One value of a candle that was replaced, withdrawn, undone or given by a person.

    Prices are None where there was, or is, no candle. source: the provider, `manual` for a person. origin: the file or
    the request. pinned: it is the stored value, and no source replaces it.
    """

    symbol: str
    timeframe: str
    ts: datetime
    corrected_at: datetime
    open_before: float | None
    high_before: float | None
    low_before: float | None
    close_before: float | None
    volume_before: float | None
    open_after: float | None
    high_after: float | None
    low_after: float | None
    close_after: float | None
    volume_after: float | None
    source: str
    reason: str
    batch: int
    author: str | None
    origin: str
    pinned: bool


# The inner limit: a refetch may have replaced millions of values. `given`: the value of an inserted candle, which has
# no revision of its own.
_CORRECTIONS = """
SELECT s.symbol, s.timeframe, x.ts, b.committed_at AS corrected_at,
    r.open AS open_before, r.high AS high_before, r.low AS low_before, r.close AS close_before,
    r.volume AS volume_before,
    coalesce(r.open_after, given.open) AS open_after, coalesce(r.high_after, given.high) AS high_after,
    coalesce(r.low_after, given.low) AS low_after, coalesce(r.close_after, given.close) AS close_after,
    coalesce(r.volume_after, given.volume) AS volume_after,
    b.provider AS source, coalesce(r.reason, b.reason, '') AS reason, b.id AS batch, b.author, b.source AS origin,
    coalesce(p.released_at IS NULL AND p.batch_id = c.batch_id, false) AS pinned
FROM (
    SELECT series_id, ts, replaced_by AS batch_id FROM fks.revision
    WHERE NOT :pinned AND series_id = ANY(:ids) AND {within}
    UNION
    SELECT series_id, ts, batch_id FROM fks.pin WHERE series_id = ANY(:ids) AND {within}
    ORDER BY batch_id DESC, ts
    LIMIT CASE WHEN :pinned THEN NULL ELSE CAST(:limit AS bigint) END
) x
JOIN fks.series s ON s.id = x.series_id
JOIN fks.batch b ON b.id = x.batch_id
LEFT JOIN fks.revision r ON r.series_id = x.series_id AND r.ts = x.ts AND r.replaced_by = x.batch_id
LEFT JOIN fks.pin p ON p.series_id = x.series_id AND p.ts = x.ts AND p.batch_id = x.batch_id
LEFT JOIN {table} c ON c.series_id = x.series_id AND c.ts = x.ts
LEFT JOIN LATERAL (
    SELECT c.open, c.high, c.low, c.close, c.volume WHERE r.ts IS NULL AND c.batch_id = x.batch_id
    UNION ALL
    SELECT v.open, v.high, v.low, v.close, v.volume FROM fks.revision v
    WHERE r.ts IS NULL AND v.series_id = x.series_id AND v.ts = x.ts AND v.batch_id = x.batch_id
    LIMIT 1
) given ON true
WHERE NOT :pinned OR (p.released_at IS NULL AND p.batch_id = c.batch_id)
ORDER BY b.id DESC, x.ts
LIMIT :limit
"""
_WITHIN = (
    "ts >= coalesce(CAST(:start AS timestamptz), '-infinity')"
    " AND ts < coalesce(CAST(:end AS timestamptz), 'infinity')"
)


def corrections(
    database: Database,
    series: Sequence[Series],
    start: int | None,
    end: int | None,
    *,
    pinned: bool = False,
    limit: int | None = None,
) -> list[CorrectionInfo]:
    """Corrections of candles that open in `[start, end)`, newest first; with `pinned` only those that are pinned."""
    named = {
        "start": None if start is None else to_datetime(start),
        "end": None if end is None else to_datetime(end),
        "pinned": pinned,
        "limit": limit,
    }
    found: list[CorrectionInfo] = []
    with database.begin() as connection:
        owners = series_of(connection, series)
        for timeframe in Timeframe:
            ids = [identity for identity, one in owners.items() if one.timeframe is timeframe]
            if ids:
                query = _CORRECTIONS.format(table=table_of(timeframe), within=_WITHIN)
                rows = connection.execute(sa.text(query), named | {"ids": ids})
                found += [CorrectionInfo(**row._mapping) for row in rows]
    newest_first = sorted(found, key=lambda one: (-one.batch, one.ts))
    return newest_first if limit is None else newest_first[:limit]
