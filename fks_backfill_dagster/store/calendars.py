"""The exchange calendars that the database was filled with: one row each, their sessions up to a date.

Belongs here: the row, and the series affected by a change of a calendar. Does not belong here: the difference
(`domain.calendars`), its handling (`pipeline.calendars`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, time

import sqlalchemy as sa

from fks_backfill_dagster.domain.calendars import PastSessions
from fks_backfill_dagster.domain.ranges import RangeSet
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.ledger import to_multirange
from fks_backfill_dagster.store.sql import as_series


@dataclass(frozen=True, slots=True)
class RecordedCalendar:
    """The record of a calendar: the digest of its sessions dated before `until` (00:00 UTC of a date,
    microseconds), and the version of the library that they come from."""

    name: str
    until: int
    digest: str
    library: str


def recorded(connection: sa.Connection, names: Collection[str]) -> dict[str, RecordedCalendar]:
    """The recorded calendars by name, in one statement."""
    table = schema.calendar
    query = sa.select(table.c.name, table.c.until, table.c.digest, table.c.library)
    rows = connection.execute(query.where(table.c.name.in_(names)))
    return {
        row.name: RecordedCalendar(
            row.name,
            to_micros(datetime.combine(row.until, time(), UTC)),
            row.digest,
            row.library,
        )
        for row in rows
    }


def sessions_of(connection: sa.Connection, name: str) -> PastSessions:
    """The sessions of a recorded calendar."""
    table = schema.calendar
    packed = connection.execute(sa.select(table.c.sessions).where(table.c.name == name)).scalar_one()
    return PastSessions.unpacked(packed)


def record(
    connection: sa.Connection, name: str, until: int, past: PastSessions, library: str, replaces: str | None
) -> bool:
    """Records a calendar if the row still has the digest `replaces` (None: if there is no row). Returns whether it
    did: another process may have recorded one meanwhile."""
    table = schema.calendar
    row = {
        "until": to_datetime(until).date(),
        "digest": past.digest,
        "sessions": past.packed(),
        "library": library,
        "recorded_at": sa.func.now(),
    }
    if replaces is None:
        insert = sa.dialects.postgresql.insert(table).values(row | {"name": name})
        return connection.execute(insert.on_conflict_do_nothing()).rowcount == 1
    update = sa.update(table).where(table.c.name == name, table.c.digest == replaces).values(row)
    return connection.execute(update).rowcount == 1


_CONCERNED = """
SELECT s.symbol, s.timeframe, s.asset_class, s.calendar FROM fks.series s
JOIN fks.sync_state t ON t.series_id = s.id
WHERE s.asset_class = :stocks AND s.calendar = :calendar AND t.synced && CAST(:spans AS tstzmultirange)
ORDER BY s.symbol, s.timeframe
"""


def concerned(connection: sa.Connection, name: str, spans: RangeSet) -> tuple[Series, ...]:
    """The series of a calendar whose coverage overlaps `spans`."""
    rows = connection.execute(
        sa.text(_CONCERNED),
        {"stocks": AssetClass.STOCKS.value, "calendar": name, "spans": to_multirange(spans)},
    )
    return tuple(as_series(row) for row in rows)
