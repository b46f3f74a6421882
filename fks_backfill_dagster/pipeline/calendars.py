"""Changed exchange calendars: compares their past sessions with those by which the database was filled.

An update of the calendar library can add, remove or change past sessions. Stored data do not change with it: the
sessions are recorded per calendar, a difference that affects a synced range is reported wherever the series is
synced, shown or checked, and the operator accepts it (docs/adr/0022-calendars-that-change.md).

Belongs here: comparing, recording, accepting. Does not belong here: how two calendars differ (`domain.calendars`),
the repair of the ledger (`audit`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.metadata import version

from fks_backfill_dagster.domain.calendars import (
    Difference,
    compare,
    digest_of,
    past_sessions,
    start_of_day,
)
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.store import calendars
from fks_backfill_dagster.store.calendars import RecordedCalendar
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError

LIBRARY = "exchange-calendars"


@dataclass(frozen=True, slots=True)
class CalendarChange:
    """A calendar whose past sessions differ from the recorded ones, by which these series were synced."""

    recorded: RecordedCalendar
    difference: Difference
    series: tuple[Series, ...]

    def __str__(self) -> str:
        name = self.recorded.name
        return (
            f"the calendar {name} has changed ({LIBRARY} {self.recorded.library}, now {version(LIBRARY)}):"
            f" {self.difference}; gaps and candles are unchanged: `fks-backfill series accept-calendar {name}`"
            " settles them by the new calendar"
        )

    def concerns(self, series: Series) -> bool:
        return series in self.series


def calendar_change(database: Database, name: str) -> CalendarChange | None:
    """The change of one calendar, if it affects a synced series. Read-only."""
    with database.begin() as connection:
        found = calendars.recorded(connection, [name])
    return _change(database, found[name]) if name in found else None


def calendar_changes(database: Database, series: Iterable[Series]) -> dict[Series, CalendarChange]:
    """The series that are affected by a changed calendar; one statement if none has changed. Read-only.

    A calendar that the library no longer has is skipped: the syncs of its series fail and name it.
    """
    stocks = [one for one in series if one.asset_class is AssetClass.STOCKS]
    if not stocks:
        return {}
    with database.begin() as connection:
        found = calendars.recorded(connection, {one.calendar for one in stocks})
    changes: dict[str, CalendarChange] = {}
    for name, recorded in found.items():
        try:
            change = _change(database, recorded)
        except ValueError:
            continue
        if change is not None:
            changes[name] = change
    return {
        one: changes[one.calendar]
        for one in stocks
        if one.calendar in changes and changes[one.calendar].concerns(one)
    }


def _change(database: Database, recorded: RecordedCalendar) -> CalendarChange | None:
    """Raises ValueError for a calendar that is unknown or cannot be built."""
    if digest_of(recorded.name, recorded.until) == recorded.digest:
        return None
    with database.begin() as connection:
        before = calendars.sessions_of(connection, recorded.name)
        difference = compare(before, past_sessions(recorded.name, recorded.until))
        series = calendars.concerned(connection, recorded.name, difference.spans)
    return CalendarChange(recorded, difference, series) if series else None


def keep_calendar(database: Database, name: str, now: int) -> CalendarChange | None:
    """Records the sessions of a calendar up to today, unless they differ for a synced series: then returns the
    change. At most one write per day.

    Raises ValueError for a calendar that is unknown or cannot be built.
    """
    today = start_of_day(now)
    with database.begin() as connection:
        found = calendars.recorded(connection, [name]).get(name)
    if found is not None:
        change = _change(database, found)
        if change is not None:
            return change
        if found.until >= today and found.digest == digest_of(name, found.until):
            return None
    _record(database, name, max(today, found.until if found else 0), found)
    return None


def _record(database: Database, name: str, until: int, replaces: RecordedCalendar | None) -> None:
    with database.begin() as connection:
        calendars.record(
            connection,
            name,
            until,
            past_sessions(name, until),
            version(LIBRARY),
            None if replaces is None else replaces.digest,
        )


def accept_calendar(database: Database, change: CalendarChange, now: int) -> None:
    """Records the present calendar; an audit then settles the ledger of its series.

    Raises StoreError if another process has recorded one meanwhile.
    """
    name, until = change.recorded.name, max(start_of_day(now), change.recorded.until)
    with database.begin() as connection:
        done = calendars.record(
            connection,
            name,
            until,
            past_sessions(name, until),
            version(LIBRARY),
            change.recorded.digest,
        )
    if not done:
        raise StoreError(f"The calendar {name} was recorded by another process meanwhile: check it again.")


@dataclass(slots=True)
class CalendarWatch:
    """Calls `keep_calendar` once per calendar, for all series of an operation. Thread-safe."""

    _known: dict[str, CalendarChange | None] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def change_for(
        self, database: Database, series: Series, clock: Callable[[], int]
    ) -> CalendarChange | None:
        """The change of the series' calendar, if it affects the series. Raises ValueError like `keep_calendar`."""
        if series.asset_class is not AssetClass.STOCKS:
            return None
        with self._lock:
            if series.calendar not in self._known:
                self._known[series.calendar] = keep_calendar(database, series.calendar, clock())
            change = self._known[series.calendar]
        return change if change is not None and change.concerns(series) else None
