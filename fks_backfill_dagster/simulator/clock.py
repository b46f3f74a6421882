"""The market's clock, and the request limits, which use real time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass


class Clock:
    """Real time, real time with an offset, or a fixed instant."""

    def __init__(self, now: int | None = None, *, runs: bool = False) -> None:
        self.set(now, runs=runs)

    def set(self, now: int | None, *, runs: bool) -> None:
        """Sets the clock to `now` (microseconds; None: real time); with `runs` it continues from there."""
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
    """The outcome of a request at the limit: weight used in this rate window; HTTP status of a rejection."""

    used: int
    status: int | None = None
    retry_after: int = 0


class Meter:
    """Weight per clock minute (or other number of `seconds`): 429 above the limit, and a ban with 418
    for clients that continue.

    `limit` None counts without rejecting. Rate windows and bans use real time even if the market's
    clock is fixed: the client waits in real time.
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
        self._rejections = 0
        self._banned_until = 0.0

    def charge(self, weight: int) -> Verdict:
        now = time.time()
        if now < self._banned_until:
            return Verdict(self.used, 418, math.ceil(self._banned_until - now))
        if (window := int(now // self._seconds)) != self._window:
            self._window, self.used, self._rejections = window, 0, 0
        self.used += weight
        if self.limit is None or self.used <= self.limit:
            return Verdict(self.used)
        self._rejections += 1
        if self._ban_after is not None and self._rejections > self._ban_after:
            self._banned_until = now + self._ban_seconds
            return Verdict(self.used, 418, math.ceil(self._ban_seconds))
        return Verdict(self.used, 429, math.ceil((window + 1) * self._seconds - now))

    def reset(self, limit: int | None) -> None:
        """Sets a limit; clears used weight and ban."""
        self.limit, self.used, self._rejections, self._banned_until = limit, 0, 0, 0.0
