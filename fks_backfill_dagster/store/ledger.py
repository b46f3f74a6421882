"""The stored state of a series, read before anything is fetched: coverage, gaps, listings, eligible providers, status.

Coverage is the set of synced ranges. Inside it every expected candle is either stored or in a
gap, so the missing candles of a range follow from a few rows, without a scan of candles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import sqlalchemy as sa
from psycopg.types.multirange import TimestamptzMultirange
from psycopg.types.range import TimestamptzRange

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Instrument, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Evidence, Known, LedgerGap
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.errors import SeriesChanged
from fks_backfill_dagster.store.sql import as_series, listed, named


def series_id(connection: sa.Connection, series: Series) -> int | None:
    """The id of a stored series; None for one that was never synced."""
    table = schema.series
    query = sa.select(table.c.id).where(
        table.c.symbol == series.symbol, table.c.timeframe == series.timeframe.value
    )
    return connection.scalar(query)


@dataclass(frozen=True, slots=True)
class Registered:
    """A stored series: its id, its eligible providers as last recorded (see `reopen`), and the closed dates that its
    ledger was last settled by, as written in the settings."""

    identity: int
    eligible: frozenset[str]
    closed: str = ""


def registered(connection: sa.Connection, series: Series) -> Registered | None:
    """The row of a series; None for one that was never synced.

    Raises SeriesChanged where it is stored with another asset class or calendar: its ledger was computed on
    another grid, so closed days would count as missing, and open ones as complete. The calendar matters for
    stocks only.
    """
    table = schema.series
    row = connection.execute(
        sa.select(table).where(table.c.symbol == series.symbol, table.c.timeframe == series.timeframe.value)
    ).one_or_none()
    if row is None:
        return None
    stored = as_series(row).instrument
    if stored.venue == series.instrument.venue:
        return Registered(int(row.id), frozenset(row.eligible or ()), row.closed)
    is_stock = stored.asset_class is AssetClass.STOCKS
    raise SeriesChanged(
        f"{series} is stored as {_kind(stored)}, and is now requested as {_kind(series.instrument)}: put asset_class:"
        f" {stored.asset_class}{f' and calendar: {stored.calendar}' if is_stock else ''} into its entry of the"
        f" settings, or delete the stored series with `fks-backfill series remove {series} --yes`."
    )


def _kind(instrument: Instrument) -> str:
    """What determines the grid of its series, in words."""
    is_stock = instrument.asset_class is AssetClass.STOCKS
    return f"stocks with the calendar {instrument.calendar}" if is_stock else instrument.venue


def register(connection: sa.Connection, series: Series, closed: str = "") -> int:
    """The id of a series, created on first use; `closed`: the closed dates that its ledger will be settled by, as
    written in the settings. Raises SeriesChanged."""
    found = registered(connection, series)
    if found is not None:
        return found.identity
    table = schema.series
    insert = (
        sa.dialects.postgresql.insert(table)
        .values(
            **named(series),
            asset_class=series.asset_class.value,
            calendar=series.calendar,
            closed=closed,
        )
        .on_conflict_do_nothing()
    )
    connection.execute(insert)
    made = series_id(connection, series)
    assert made is not None
    connection.execute(
        sa.dialects.postgresql.insert(schema.sync_state).values(series_id=made).on_conflict_do_nothing()
    )
    return made


# Unfilled gaps are disjoint, so the last one that starts before an instant is the only one that can
# extend beyond it: two look-ups in the index `gap_missing` instead of all gaps since the beginning.
# The first row holds the coverage; its gap columns are NULL where there is no gap.
_KNOWN_AROUND = """
SELECT CASE WHEN row_number() OVER (ORDER BY g.gap_start) = 1
    THEN s.synced * tstzmultirange(tstzrange(:start, :end)) END AS covered, g.*
FROM fks.sync_state s LEFT JOIN fks.gap g
ON g.series_id = :id AND g.status <> 'filled'
AND g.gap_start >= coalesce(
    (SELECT max(gap_start) FROM fks.gap WHERE series_id = :id AND status <> 'filled' AND gap_start < :start),
    :start)
AND g.gap_start <= coalesce(
    (SELECT min(gap_start) FROM fks.gap WHERE series_id = :id AND status <> 'filled' AND gap_start >= :end),
    :end)
WHERE s.series_id = :id
ORDER BY g.gap_start
"""


def known(connection: sa.Connection, identity: int | None, window: TimeRange) -> Known:
    """Coverage and unfilled gaps within `window`; nothing for a series that was never synced."""
    around = known_around(connection, identity, window)
    return Known(
        around.synced, tuple(g for g in around.gaps if g.start < window.end and g.end > window.start)
    )


def known_around(connection: sa.Connection, identity: int | None, window: TimeRange) -> Known:
    """Like `known`, with the nearest unfilled gap on either side, which a new gap of the window may adjoin."""
    if identity is None:
        return Known(RangeSet(), ())
    rows = connection.execute(
        sa.text(_KNOWN_AROUND),
        {"start": to_datetime(window.start), "end": to_datetime(window.end), "id": identity},
    ).all()
    if not rows:
        return Known(RangeSet(), ())
    gaps = tuple(gap_of(row) for row in rows if row.gap_start is not None)
    return Known(from_multirange(rows[0].covered), gaps)


def gap_of(row: sa.Row[Any]) -> LedgerGap:
    """A row of fks.gap."""
    return LedgerGap(
        start=to_micros(row.gap_start),
        end=to_micros(row.gap_end),
        missing=row.missing_candles,
        status=GapStatus(row.status),
        attempts=row.attempts,
        evidence=tuple(Evidence.from_json(found) for found in row.evidence),
        found_at=to_micros(row.found_at),
        next_attempt_at=None if row.next_attempt_at is None else to_micros(row.next_attempt_at),
    )


def from_multirange(found: Sequence[Any] | None) -> RangeSet:
    """A tstzmultirange as a RangeSet; every range of ours is half-open and bounded."""
    if not found:
        return RangeSet()
    edges = np.array([(to_micros(r.lower), to_micros(r.upper)) for r in found], dtype=np.int64)
    return RangeSet.from_arrays(edges[:, 0], edges[:, 1])


def to_multirange(ranges: RangeSet) -> TimestamptzMultirange:
    return TimestamptzMultirange([TimestamptzRange(to_datetime(r.start), to_datetime(r.end)) for r in ranges])


# Listings ---------------------------------------------------------------------------------------------


class ListingKind(StrEnum):
    CLAIM = "claim"  # what the provider declares
    OBSERVATION = "observation"  # where its complete response begins


@dataclass(frozen=True, slots=True)
class Listing:
    """When a provider listed a symbol, by its claim or by observation, and when that was found or confirmed.

    Instants in microseconds, `found_at` by the database's clock.
    """

    listed_at: int
    kind: ListingKind
    found_at: int


def listings(connection: sa.Connection, symbol: str) -> dict[str, Listing]:
    """The known listings of the symbol, by provider."""
    table = schema.listing
    rows = connection.execute(sa.select(table).where(table.c.symbol == symbol))
    return {
        row.provider: Listing(to_micros(row.listed_at), ListingKind(row.kind), to_micros(row.found_at))
        for row in rows
    }


def remember_listing(
    connection: sa.Connection, provider: str, symbol: str, listed_at: int, kind: ListingKind
) -> None:
    """Records the latest finding: a claim can be corrected, to an earlier or a later time."""
    table = schema.listing
    found = {"listed_at": to_datetime(listed_at), "kind": kind.value, "found_at": sa.func.now()}
    connection.execute(
        sa.dialects.postgresql.insert(table)
        .values(provider=provider, symbol=symbol, **found)
        .on_conflict_do_update(index_elements=["provider", "symbol"], set_=found)
    )


# Two look-ups per series and provider in the index `batch_by_oldest`, however many batches there are.
_DELIVERED = """
b.series_id = {series} AND b.undoes IS NULL AND b.transport <> 'withdrawal'
"""
_OLDEST = f"""
WITH RECURSIVE pair AS (
    SELECT s.id, (SELECT min(b.provider) FROM fks.batch b WHERE {_DELIVERED.format(series="s.id")}) AS provider
    FROM fks.series s WHERE s.symbol = :symbol
    UNION ALL
    SELECT p.id, (SELECT min(b.provider) FROM fks.batch b
        WHERE {_DELIVERED.format(series="p.id")} AND b.provider > p.provider)
    FROM pair p WHERE p.provider IS NOT NULL
)
SELECT p.provider, s.timeframe, o.range_start AS oldest
FROM pair p JOIN fks.series s ON s.id = p.id CROSS JOIN LATERAL (
    SELECT b.range_start FROM fks.batch b
    WHERE {_DELIVERED.format(series="p.id")} AND b.provider = p.provider
      AND b.undone_by IS NULL
    ORDER BY b.range_start LIMIT 1) o
"""


def oldest_by_provider(connection: sa.Connection, symbol: str) -> dict[str, dict[Timeframe, int]]:
    """The open of the oldest candle of the symbol that each provider delivered, by timeframe.

    From the lineage: batches that changed something and were not undone. It therefore still counts a candle that
    another provider corrected since, or that was withdrawn.
    """
    rows = connection.execute(sa.text(_OLDEST), {"symbol": symbol})
    found: dict[str, dict[Timeframe, int]] = {}
    for row in rows:
        found.setdefault(row.provider, {})[Timeframe(row.timeframe)] = to_micros(row.oldest)
    return found


# Eligible providers ------------------------------------------------------------------------------------

# The series whose set has changed, each under its lock (class 46137, see store/writer/lineage.py), so that no
# commit settles the ledger at the same time. One that is locked now keeps its recorded set, and the next call
# finds it again. MATERIALIZED: a lock must not be taken for rows that the condition excludes.
_CHANGED = """
WITH changed AS MATERIALIZED (
    SELECT s.id FROM fks.series s
    JOIN unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[]), CAST(:eligible AS text[]))
        AS w(symbol, timeframe, eligible) ON w.symbol = s.symbol AND w.timeframe = s.timeframe
    WHERE s.eligible IS DISTINCT FROM string_to_array(w.eligible, ',')
)
SELECT id FROM changed WHERE pg_try_advisory_xact_lock(46137, id)
"""

# A newly eligible provider reopens the gaps that it has not responded to and that are based on a single response:
# all of them if it was never eligible before, else those decided since it was last eligible.
_REOPEN = """
WITH wanted AS (
    SELECT s.id, s.symbol, s.timeframe, coalesce(s.eligible, '{}') AS before, s.eligible_until AS until,
        string_to_array(w.eligible, ',') AS present
    FROM fks.series s
    JOIN unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[]), CAST(:eligible AS text[]))
        AS w(symbol, timeframe, eligible) ON w.symbol = s.symbol AND w.timeframe = s.timeframe
    WHERE s.id = ANY(:ids)
), added AS (
    SELECT w.id, p.name, CAST(w.until ->> p.name AS timestamptz) AS since
    FROM wanted w CROSS JOIN LATERAL unnest(w.present) AS p(name) WHERE p.name <> ALL(w.before)
), reopened AS (
    UPDATE fks.gap g SET status = 'open', next_attempt_at = NULL, changed_at = now()
    WHERE g.status = 'no_trade' AND g.series_id = ANY(:ids)
      AND jsonb_array_length(jsonb_path_query_array(g.evidence, '$[*] ? (@.outcome == "absent")')) <= 1
      AND EXISTS (
        SELECT FROM added a
        WHERE a.id = g.series_id AND NOT g.heard ? a.name
          AND (a.since IS NULL OR a.since <= (
            SELECT max(CAST(e ->> 'asked_at' AS timestamptz)) FROM jsonb_array_elements(g.evidence) e)))
    RETURNING g.series_id
), recorded AS (
    UPDATE fks.series s
    SET eligible = w.present,
        eligible_until = (w.until || (
            SELECT coalesce(jsonb_object_agg(p.name, CAST(:now AS timestamptz)), '{}')
            FROM unnest(w.before) AS p(name) WHERE p.name <> ALL(w.present))) - w.present
    FROM wanted w WHERE w.id = s.id
)
SELECT w.symbol, w.timeframe, count(*) AS gaps FROM reopened r JOIN wanted w ON w.id = r.series_id GROUP BY 1, 2
"""


def reopen(
    connection: sa.Connection, eligible: Mapping[Series, frozenset[str]], now: int
) -> dict[Series, int]:
    """Reopens `no_trade` gaps that are based on one provider's response where another one became eligible.

    `eligible`: the eligible providers of each series by the settings at `now`; they are recorded with it.
    A provider that was eligible earlier reopens only the gaps decided while it was not. A series is skipped if its
    recorded set is the same, if it is not stored, or if a commit holds its lock (the next call finds it). Two
    statements, whatever the number of series. Returns the number of reopened gaps per series that has any.
    """
    parameters: dict[str, Any] = {
        **listed(eligible),
        "eligible": [",".join(sorted(names)) for names in eligible.values()],
    }
    ids = list(connection.scalars(sa.text(_CHANGED), parameters))
    if not ids:
        return {}
    by_name = {one.key: one for one in eligible}
    rows = connection.execute(sa.text(_REOPEN), parameters | {"ids": ids, "now": to_datetime(now)})
    return {by_name[row.symbol, row.timeframe]: row.gaps for row in rows}


# Closed dates ------------------------------------------------------------------------------------------

_OTHER_CLOSURES = """
SELECT s.symbol, s.timeframe, s.id, s.eligible, s.closed FROM fks.series s
JOIN unnest(CAST(:symbols AS text[]), CAST(:timeframes AS text[]), CAST(:closed AS text[]))
    AS w(symbol, timeframe, closed) ON w.symbol = s.symbol AND w.timeframe = s.timeframe
WHERE s.closed <> w.closed
"""


def closed_otherwise(connection: sa.Connection, closed: Mapping[Series, str]) -> dict[Series, Registered]:
    """The stored series whose ledger was settled by closed dates that differ from these (as `domain.closures` writes
    them), in one statement."""
    by_name = {one.key: one for one in closed}
    rows = connection.execute(
        sa.text(_OTHER_CLOSURES),
        {
            **listed(closed),
            "closed": list(closed.values()),
        },
    )
    return {
        by_name[row.symbol, row.timeframe]: Registered(row.id, frozenset(row.eligible or ()), row.closed)
        for row in rows
    }


# Leases and the outcome of a sync ------------------------------------------------------------------------


def hold_lease(connection: sa.Connection, identity: int, owner: str, seconds: float) -> None:
    """Acquires or renews the lease of `owner` on the series for `seconds`, by the database's clock."""
    connection.execute(
        sa.text(
            "INSERT INTO fks.lease (series_id, owner, expires_at)"
            " VALUES (:id, :owner, clock_timestamp() + make_interval(secs => :seconds))"
            " ON CONFLICT (series_id, owner) DO UPDATE SET expires_at = excluded.expires_at"
        ),
        {"id": identity, "owner": owner, "seconds": seconds},
    )


def end_sync(connection: sa.Connection, identity: int, owner: str, error_message: str | None) -> None:
    """Releases the lease and records the outcome of the sync."""
    release_lease(connection, identity, owner)
    connection.execute(
        sa.text(
            "UPDATE fks.sync_state SET last_sync_time = clock_timestamp(), error_message = :error"
            " WHERE series_id = :id"
        ),
        {"id": identity, "error": error_message},
    )


def release_lease(connection: sa.Connection, identity: int, owner: str) -> None:
    """Releases the lease without changing the status; also deletes the series' expired leases."""
    connection.execute(
        sa.text(
            "DELETE FROM fks.lease WHERE series_id = :id AND (owner = :owner OR expires_at < clock_timestamp())"
        ),
        {"id": identity, "owner": owner},
    )
