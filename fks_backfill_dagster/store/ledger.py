"""What is known of a series before anything is fetched: coverage, open gaps, listing, status.

Coverage is the set of ranges once synced. Inside it every expected candle is either stored or in a
gap, so what is missing from a range follows from a few rows, never from a scan of candles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from psycopg.types.multirange import TimestamptzMultirange
from psycopg.types.range import TimestamptzRange

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Evidence, Known, LedgerGap
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.errors import SeriesChanged


def series_id(connection: sa.Connection, series: Series) -> int | None:
    """The id of a series that was synced before, else None."""
    table = schema.series
    query = sa.select(table.c.id).where(
        table.c.symbol == series.symbol, table.c.timeframe == series.timeframe.value
    )
    return connection.scalar(query)


def refuse_changed(connection: sa.Connection, series: Series) -> None:
    """Raises SeriesChanged where the series is stored as one of another asset class or calendar.

    Its ledger was reckoned on another grid: to go on would call closed days missing, and open ones
    complete. The calendar matters for stocks only.
    """
    table = schema.series
    row = connection.execute(
        sa.select(table).where(table.c.id == series_id(connection, series))
    ).one_or_none()
    if row is None:
        return
    stored = Series(series.symbol, series.timeframe, AssetClass(row.asset_class), row.calendar)
    if _kind(stored) == _kind(series):
        return
    is_stock = stored.asset_class is AssetClass.STOCKS
    raise SeriesChanged(
        f"{series} is stored as {_kind(stored)}, and is now asked for as {_kind(series)}: put asset_class:"
        f" {stored.asset_class}{f' and calendar: {stored.calendar}' if is_stock else ''} into its entry of the"
        f" settings, or delete what is stored with `fks-backfill series remove {series} --yes`."
    )


def _kind(series: Series) -> str:
    """What decides about its grid."""
    is_stock = series.asset_class is AssetClass.STOCKS
    return f"stocks with the calendar {series.calendar}" if is_stock else series.asset_class.value


def register(connection: sa.Connection, series: Series) -> int:
    """The id of a series, made on its first use. Raises SeriesChanged."""
    refuse_changed(connection, series)
    found = series_id(connection, series)
    if found is not None:
        return found
    table = schema.series
    insert = (
        sa.dialects.postgresql.insert(table)
        .values(
            symbol=series.symbol,
            timeframe=series.timeframe.value,
            asset_class=series.asset_class.value,
            calendar=series.calendar,
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
# reach beyond it: two look-ups in the index `gap_missing` instead of all gaps since the beginning.
_GAPS_AROUND = """
SELECT * FROM fks.gap
WHERE series_id = :id AND status <> 'filled'
AND gap_start >= coalesce(
    (SELECT max(gap_start) FROM fks.gap WHERE series_id = :id AND status <> 'filled' AND gap_start < :start),
    :start)
AND gap_start <= coalesce(
    (SELECT min(gap_start) FROM fks.gap WHERE series_id = :id AND status <> 'filled' AND gap_start >= :end),
    :end)
ORDER BY gap_start
"""


def known(connection: sa.Connection, identity: int | None, window: TimeRange) -> Known:
    """Coverage and unfilled gaps within `window`; nothing for a series that was never synced."""
    around = known_around(connection, identity, window)
    return Known(
        around.synced, tuple(g for g in around.gaps if g.start < window.end and g.end > window.start)
    )


def known_around(connection: sa.Connection, identity: int | None, window: TimeRange) -> Known:
    """As `known`, with the nearest unfilled gap on either side: one that the window may come to touch."""
    if identity is None:
        return Known(RangeSet(), ())
    synced = connection.scalar(
        sa.text(
            "SELECT synced * tstzmultirange(tstzrange(:start, :end)) FROM fks.sync_state WHERE series_id = :id"
        ),
        {"start": to_datetime(window.start), "end": to_datetime(window.end), "id": identity},
    )
    rows = connection.execute(
        sa.text(_GAPS_AROUND),
        {"start": to_datetime(window.start), "end": to_datetime(window.end), "id": identity},
    )
    return Known(from_multirange(synced), tuple(gap_of(row) for row in rows))


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


def listings(connection: sa.Connection, symbol: str) -> dict[str, int]:
    """Since when each provider has the symbol, as far as that was found out: {provider: instant}."""
    table = schema.listing
    rows = connection.execute(sa.select(table).where(table.c.symbol == symbol))
    return {row.provider: to_micros(row.listed_at) for row in rows}


def remember_listing(connection: sa.Connection, provider: str, symbol: str, listed_at: int) -> None:
    connection.execute(
        sa.dialects.postgresql.insert(schema.listing)
        .values(provider=provider, symbol=symbol, listed_at=to_datetime(listed_at))
        .on_conflict_do_nothing()
    )


# Leases and the outcome of a sync ------------------------------------------------------------------------


def hold_lease(connection: sa.Connection, identity: int, owner: str, seconds: float) -> None:
    """Says that `owner` is syncing the series for the next `seconds`, by the database's clock."""
    connection.execute(
        sa.text(
            "INSERT INTO fks.lease (series_id, owner, expires_at)"
            " VALUES (:id, :owner, clock_timestamp() + make_interval(secs => :seconds))"
            " ON CONFLICT (series_id, owner) DO UPDATE SET expires_at = excluded.expires_at"
        ),
        {"id": identity, "owner": owner, "seconds": seconds},
    )


def end_sync(connection: sa.Connection, identity: int, owner: str, error_message: str | None) -> None:
    """Gives the lease back and keeps how the sync ended."""
    release_lease(connection, identity, owner)
    connection.execute(
        sa.text(
            "UPDATE fks.sync_state SET last_sync_time = clock_timestamp(), error_message = :error"
            " WHERE series_id = :id"
        ),
        {"id": identity, "error": error_message},
    )


def release_lease(connection: sa.Connection, identity: int, owner: str) -> None:
    """Gives the lease back and leaves the status as it was; expired leases of the dead go with it."""
    connection.execute(
        sa.text(
            "DELETE FROM fks.lease WHERE series_id = :id AND (owner = :owner OR expires_at < clock_timestamp())"
        ),
        {"id": identity, "owner": owner},
    )
