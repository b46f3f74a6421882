"""The eight timeframes, and instants as integers."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum

MICROS_PER_SECOND = 1_000_000
MICROS_PER_MINUTE = 60 * MICROS_PER_SECOND
MICROS_PER_HOUR = 60 * MICROS_PER_MINUTE
MICROS_PER_DAY = 24 * MICROS_PER_HOUR
MICROS_PER_WEEK = 7 * MICROS_PER_DAY

# 1970-01-05 was a Monday: weeks open Monday 00:00 UTC.
FIRST_MONDAY = 4 * MICROS_PER_DAY

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class Timeframe(StrEnum):
    """A candle's nominal length. The value is its name in settings and commands."""

    M1 = "1m"
    M5 = "5m"
    M15 = "15m"
    M30 = "30m"
    H1 = "1h"
    H4 = "4h"
    D1 = "1d"
    W1 = "1w"

    @property
    def micros(self) -> int:
        """Nominal length in microseconds (a forex day may really have 23 to 25 hours)."""
        return _MINUTES[self] * MICROS_PER_MINUTE

    @property
    def minutes(self) -> int:
        return _MINUTES[self]

    @property
    def is_intraday(self) -> bool:
        return self.micros < MICROS_PER_DAY


_MINUTES = {
    Timeframe.M1: 1,
    Timeframe.M5: 5,
    Timeframe.M15: 15,
    Timeframe.M30: 30,
    Timeframe.H1: 60,
    Timeframe.H4: 240,
    Timeframe.D1: 1440,
    Timeframe.W1: 10080,
}


def to_micros(moment: datetime) -> int:
    """The instant of a zone-aware datetime.

    Raises ValueError for a naive one: its instant is undefined.
    """
    if moment.tzinfo is None:
        raise ValueError(f"{moment.isoformat()} has no time zone")
    return (moment - _EPOCH) // _MICROSECOND


def to_datetime(micros: int) -> datetime:
    """The UTC datetime of an instant."""
    return _EPOCH + timedelta(microseconds=micros)


def iso(micros: int) -> str:
    """ISO 8601 with an explicit zone, such as `2024-01-01T00:00:00+00:00`."""
    return to_datetime(micros).isoformat()
