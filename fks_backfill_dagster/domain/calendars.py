"""The past sessions of an exchange calendar as a value that is stored and compared with later library versions.

A calendar library corrects the past: a closure that was announced on short notice, an early close, a rule of a
year long ago. The grid of every series of that calendar changes with it; stored data do not. So the sessions
by which a database was filled are stored in it (`store.calendars`).

Belongs here: the stored form of a calendar, its digest, and the difference between two of them. Does not belong
here: the sessions themselves (`grid`), the handling of a difference (`pipeline.calendars`).
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass
from datetime import date
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import sessions_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, to_datetime

_MOST_DATES = 5


@dataclass(frozen=True, slots=True, eq=False)
class PastSessions:
    """Stretches of trading, one a row: date of the session (00:00 UTC), start, end; microseconds, ascending."""

    rows: NDArray[np.int64]

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.rows, dtype="<i8").tobytes()).hexdigest()

    def packed(self) -> bytes:
        """The input of `unpacked`. Differences of neighbours repeat, so they compress well."""
        differences = np.diff(self.rows, axis=0, prepend=np.zeros((1, 3), dtype=np.int64))
        return zlib.compress(np.ascontiguousarray(differences.T, dtype="<i8").tobytes(), 9)

    @classmethod
    def unpacked(cls, packed: bytes) -> PastSessions:
        differences = np.frombuffer(zlib.decompress(packed), dtype="<i8").reshape(3, -1).T
        return cls(np.cumsum(differences, axis=0, dtype=np.int64))

    def by_date(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """The stretches of each session by its date."""
        found: dict[int, tuple[tuple[int, int], ...]] = {}
        for day, start, end in self.rows.tolist():
            found[day] = (*found.get(day, ()), (start, end))
        return found


@dataclass(frozen=True, slots=True)
class Difference:
    """How the sessions of two calendars differ, by date: `new` and `gone` sessions, and sessions with other `hours`.

    `spans`: the affected ranges, each from the date or the first trade to the last trade or the end of the minute
    in which the candle of a day opens.
    """

    new: tuple[date, ...]
    gone: tuple[date, ...]
    hours: tuple[date, ...]
    spans: RangeSet

    def __bool__(self) -> bool:
        return bool(self.new or self.gone or self.hours)

    def __str__(self) -> str:
        """Such as `2023-09-01 and 2023-09-08 are no sessions any more, the hours of 2023-07-17 have changed`."""
        parts = []
        if self.new:
            one = len(self.new) == 1
            parts.append(f"{_listed(self.new)} {'is a new session' if one else 'are new sessions'}")
        if self.gone:
            one = len(self.gone) == 1
            parts.append(f"{_listed(self.gone)} {'is no session' if one else 'are no sessions'} any more")
        if self.hours:
            parts.append(f"the hours of {_listed(self.hours)} have changed")
        return ", ".join(parts)


@lru_cache(maxsize=256)
def past_sessions(calendar: str, until: int) -> PastSessions:
    """The library's sessions dated before `until` (00:00 UTC of a date, microseconds).

    Raises ValueError for a calendar that is unknown or cannot be built.
    """
    known = sessions_of(calendar)
    count = int(np.searchsorted(known.days, until, side="left"))
    rows = np.stack([known.days, known.starts, known.ends], axis=1)[:count]
    return PastSessions(rows)


@lru_cache(maxsize=256)
def digest_of(calendar: str, until: int) -> str:
    """The digest of `past_sessions`, computed once."""
    return past_sessions(calendar, until).digest


def compare(recorded: PastSessions, present: PastSessions) -> Difference:
    """The differences of `present` from `recorded`."""
    before, now = recorded.by_date(), present.by_date()
    new, gone = sorted(now.keys() - before.keys()), sorted(before.keys() - now.keys())
    hours = sorted(day for day in before.keys() & now.keys() if before[day] != now[day])
    spans = []
    for day in (*new, *gone, *hours):
        edges = [edge for found in (before, now) for stretch in found.get(day, ()) for edge in stretch]
        spans.append(TimeRange(min(day, *edges), max(day + MICROS_PER_MINUTE, *edges)))
    return Difference(_dates(new), _dates(gone), _dates(hours), RangeSet(spans))


def start_of_day(instant: int) -> int:
    """00:00 UTC of the date of an instant."""
    return instant - instant % MICROS_PER_DAY


def _dates(days: list[int]) -> tuple[date, ...]:
    return tuple(to_datetime(day).date() for day in days)


def _listed(dates: tuple[date, ...]) -> str:
    shown = [str(day) for day in dates[:_MOST_DATES]]
    if len(dates) > _MOST_DATES:
        return f"{', '.join(shown)} and {len(dates) - _MOST_DATES:,} more dates"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))
