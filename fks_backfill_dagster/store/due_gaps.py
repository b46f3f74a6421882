"""The due gaps of thousands of series in one query, from the ledger alone.

Belongs here: which gaps are due, and their order. Does not belong here: requesting them, and how many at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.sql import listed

# LedgerGap.is_due in SQL, for gaps that may still be filled. Tolerated gaps are skipped, and so are series with a
# live lease: the running sync may fill them.
_DUE = """
WITH wanted AS (
    SELECT s.id, s.symbol, w.grain, w.since, coalesce(w.until, 'infinity') AS until,
        string_to_array(w.able, ',') AS able
    FROM unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[]), CAST(:grains AS text[]),
        CAST(:sinces AS timestamptz[]), CAST(:untils AS timestamptz[]), CAST(:ables AS text[]))
        AS w(symbol, timeframe, grain, since, until, able)
    JOIN fks.series s ON s.symbol = w.symbol AND s.timeframe = w.timeframe
    WHERE NOT EXISTS (
        SELECT FROM fks.lease l WHERE l.series_id = s.id AND l.expires_at > clock_timestamp())
), place AS (
    SELECT w.id, w.symbol, to_char(p, 'YYYY-MM-DD') AS key,
        min(greatest(g.gap_start, w.since, p AT TIME ZONE 'UTC')) AS first,
        max(least(g.gap_end, w.until, (p + CAST('1 ' || w.grain AS interval)) AT TIME ZONE 'UTC')) AS past,
        min(g.found_at) AS found_at, sum(g.missing_candles)::bigint AS missing
    FROM wanted w
    JOIN fks.gap g ON g.series_id = w.id AND g.status IN ('open', 'unavailable')
        AND g.gap_end > w.since AND g.gap_start < w.until
    CROSS JOIN LATERAL generate_series(
        date_trunc(w.grain, greatest(g.gap_start, w.since) AT TIME ZONE 'UTC'),
        (least(g.gap_end, w.until) - interval '1 microsecond') AT TIME ZONE 'UTC',
        CAST('1 ' || w.grain AS interval)) p
    WHERE g.next_attempt_at <= :now
        OR (g.status = 'open' AND (g.next_attempt_at IS NULL
            OR NOT jsonb_path_query_array(g.evidence, '$[*].provider') ?& w.able))
        OR (g.status = 'unavailable' AND NOT g.heard ?& w.able)
    GROUP BY 1, 2, 3
)
SELECT s.symbol, s.timeframe, p.key, p.first, p.past, p.found_at, p.missing
FROM (
    SELECT *, row_number() OVER (PARTITION BY symbol ORDER BY found_at, missing DESC, id, key) AS turn
    FROM place
) p
JOIN fks.series s ON s.id = p.id
ORDER BY p.turn, p.found_at, p.missing DESC, p.id, p.key
LIMIT :most
"""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The range of a series in which gaps count, its partition grain and its eligible providers.

    `eligible`: the eligible providers. `until`: None for no end.
    """

    since: int
    grain: Grain
    eligible: frozenset[str]
    until: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """The due gaps of one series in one partition; `key` is the day on which it begins.

    `window` spans them within it. `found_at`: when the oldest of them was found. `missing`: their missing
    candles, including those outside the partition where a gap extends beyond it.
    """

    series: Series
    key: str
    window: TimeRange
    found_at: int
    missing: int


def due_places(database: Database, wanted: Mapping[Series, Wanted], now: int, most: int) -> list[Place]:
    """The partitions in which gaps are due at `now`: at most `most`.

    Fair between symbols: each has its first place before any has its second. Then the gap that was found first
    goes first, then the largest. A series without an eligible provider has none.
    """
    eligible = {one: want for one, want in wanted.items() if want.eligible}
    by_name = {one.key: one for one in eligible}
    with database.begin() as connection:
        rows = connection.execute(
            sa.text(_DUE),
            {
                **listed(eligible),
                "grains": [want.grain.value for want in eligible.values()],
                "sinces": [to_datetime(want.since) for want in eligible.values()],
                "untils": [None if w.until is None else to_datetime(w.until) for w in eligible.values()],
                "ables": [",".join(sorted(want.eligible)) for want in eligible.values()],
                "now": to_datetime(now),
                "most": most,
            },
        ).all()
    places = [
        Place(
            by_name[row.symbol, row.timeframe],
            row.key,
            TimeRange(to_micros(row.first), to_micros(row.past)),
            to_micros(row.found_at),
            row.missing,
        )
        for row in rows
    ]
    # A gap ends at the close of its last candle, which may lie in the next partition.
    return [place for place in places if grid_of(place.series).count(place.window)]
