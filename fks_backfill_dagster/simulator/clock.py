"""The market's clock, and the request limits, which run on the caller's real minutes."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


class Clock:
    """Real time, real time moved by an offset, or an instant that stands still."""

    def __init__(self, now: int | None = None, *, runs: bool = False) -> None:
        self.set(now, runs=runs)

    def set(self, now: int | None, *, runs: bool) -> None:
        """Moves the clock to `now` (microseconds), None for real time; `runs` lets it go on from there."""
        self._fixed = None if now is None or runs else now
        self._offset = 0 if now is None else now - _real()

    def now(self) -> int:
        return self._fixed if self._fixed is not None else _real() + self._offset

    @property
    def runs(self) -> bool:
        return self._fixed is None


def _real() -> int:
    return time.time_ns() // 1000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the limit says to a request: weight used in this window; the refusal's status, if any."""

    used: int
    refused: int | None = None
    retry_after: int = 0


class Meter:
    """Weight per clock minute (or other number of `seconds`); refuses with 429 above it, and bans with
    418 who goes on regardless.

    `limit` None counts without refusing. Minutes and bans are real time even where the market's
    clock stands still: the caller waits in real time.
    """

    def __init__(
        self,
        limit: int | None,
        ban_after: int | None = None,
        ban_seconds: float = 0,
        *,
        seconds: int = 60,
    ) -> None:
        self.limit = limit
        self._seconds = seconds
        self._ban_after = ban_after
        self._ban_seconds = ban_seconds
        self._window = 0
        self.used = 0
        self._refusals = 0
        self._banned_until = 0.0

    def charge(self, weight: int) -> Verdict:
        now = time.time()
        if now < self._banned_until:
            return Verdict(self.used, 418, math.ceil(self._banned_until - now))
        if (window := int(now // self._seconds)) != self._window:
            self._window, self.used, self._refusals = window, 0, 0
        self.used += weight
        if self.limit is None or self.used <= self.limit:
            return Verdict(self.used)
        self._refusals += 1
        if self._ban_after is not None and self._refusals > self._ban_after:
            self._banned_until = now + self._ban_seconds
            return Verdict(self.used, 418, math.ceil(self._ban_seconds))
        return Verdict(self.used, 429, math.ceil((window + 1) * self._seconds - now))

    def reset(self, limit: int | None) -> None:
        """A new limit, nothing used, no ban."""
        self.limit, self.used, self._refusals, self._banned_until = limit, 0, 0, 0.0
