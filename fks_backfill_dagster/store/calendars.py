"""The exchange calendars by which the database was filled: one row each, their sessions up to a date.

Belongs here: the row, and which series a change of a calendar concerns. Does not belong here: what changed
(`domain.calendars`), what becomes of it (`pipeline.calendars`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime, time

import sqlalchemy as sa

from fks_backfill_dagster.domain.calendars import PastSessions
from fks_backfill_dagster.domain.ranges import RangeSet
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.ledger import to_multirange


@dataclass(frozen=True, slots=True)
class RecordedCalendar:
    """What is kept of a calendar: the digest of its sessions dated before `until` (00:00 UTC of a date,
    microseconds), and the version of the library that gave them."""

    name: str
    until: int
    digest: str
    library: str


def recorded(connection: sa.Connection, names: Collection[str]) -> dict[str, RecordedCalendar]:
    """The calendars that are kept, by name: one statement for any number."""
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
    """The sessions of a calendar that is kept."""
    table = schema.calendar
    packed = connection.execute(sa.select(table.c.sessions).where(table.c.name == name)).scalar_one()
    return PastSessions.unpacked(packed)


def record(
    connection: sa.Connection, name: str, until: int, past: PastSessions, library: str, replaces: str | None
) -> bool:
    """Keeps a calendar where the row still has the digest `replaces` (None: where there is no row); whether it
    did. Another process may have recorded one meanwhile."""
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
    """The series of a calendar that were synced somewhere in `spans`."""
    rows = connection.execute(
        sa.text(_CONCERNED),
        {"stocks": AssetClass.STOCKS.value, "calendar": name, "spans": to_multirange(spans)},
    )
    return tuple(
        Series(row.symbol, Timeframe(row.timeframe), AssetClass(row.asset_class), row.calendar)
        for row in rows
    )
