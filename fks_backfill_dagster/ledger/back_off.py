"""When a gap is requested again after a request that did not fill it."""

from __future__ import annotations

from dataclasses import dataclass

from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE


@dataclass(frozen=True, slots=True)
class BackOff:
    """Exponential back-off of a gap after a request that did not fill it: the delay equals the age of the gap.

    So delays double, and the number of attempts grows with the logarithm of time. Microseconds.
    """

    first: int
    longest: int

    def delay(self, known_for: int) -> int:
        """The time until the next attempt for a gap that was found `known_for` ago."""
        return min(max(self.first, known_for), self.longest)


# An eligible provider has not responded, and may do so soon.
UNANSWERED = BackOff(5 * MICROS_PER_MINUTE, MICROS_PER_DAY)
# Every eligible provider has responded, and none has it: late data are published within hours or never.
EXHAUSTED = BackOff(MICROS_PER_HOUR, 30 * MICROS_PER_DAY)
