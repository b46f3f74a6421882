"""The rate limiter protocol, and its implementation for a single process."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fks_backfill_dagster.domain.rate_limits import Permit, RateLimits, RateWindow, bounded_wait


def system_micros() -> int:
    """Now, in microseconds UTC: the default clock of the providers."""
    return time.time_ns() // 1000


class Limiter(Protocol):
    """The rate limits of the providers, shared by all processes. Never blocks: the caller waits."""

    def acquire(self, provider: str, weight: int) -> Permit:
        """Acquires a permit: granted (`wait` 0, the request counts from now on), or the wait before the next try."""
        ...

    def release(self, permit: Permit) -> None:
        """Releases a permit after its request, whatever the outcome.

        Until then the request counts as the newest, because the time of its arrival at the provider is unknown.
        """
        ...

    def cool_down(self, provider: str, seconds: float) -> None:
        """Grants no permit for this provider during the next `seconds`, a day at most."""
        ...


@dataclass(slots=True)
class _Spent:
    weight: int
    until: float = math.inf  # the time of the release


class ProcessLimiter:
    """A Limiter in the memory of one process; see store/rate_limits.py for the shared one.

    A provider that is not in `rate_limits` has no rate limit; only cool-downs apply to it.
    """

    def __init__(self, rate_limits: Mapping[str, RateLimits]) -> None:
        self._rate_limits = dict(rate_limits)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._spent: dict[str, dict[int, _Spent]] = {}
        self._in_flight: dict[int, _Spent] = {}
        self._penalised_until: dict[str, float] = {}

    def acquire(self, provider: str, weight: int) -> Permit:
        with self._lock:
            now = time.monotonic()
            if (penalty := self._penalised_until.get(provider, now) - now) > 0:
                return Permit(penalty, "demanded by the provider: wait")
            windows = self._rate_limits.get(provider, RateLimits()).windows
            if not windows:
                return Permit()
            spent = self._spent.setdefault(provider, {})
            longest = max(window.seconds for window in windows)
            for number in [n for n, one in spent.items() if one.until <= now - longest]:
                del spent[number]
            permit = max(
                (self._turn_in(window, spent.values(), weight, now) for window in windows),
                key=lambda permit: permit.wait,
            )
            if permit.wait:
                return permit
            number = next(self._numbers)
            spent[number] = self._in_flight[number] = _Spent(weight)
            return Permit(number=number)

    def release(self, permit: Permit) -> None:
        with self._lock:
            if spent := self._in_flight.pop(permit.number, None):
                spent.until = time.monotonic()

    def cool_down(self, provider: str, seconds: float) -> None:
        with self._lock:
            until = time.monotonic() + bounded_wait(seconds)
            self._penalised_until[provider] = max(until, self._penalised_until.get(provider, until))

    @staticmethod
    def _turn_in(window: RateWindow, spent: Iterable[_Spent], weight: int, now: float) -> Permit:
        counted = sorted((one.until, one.weight) for one in spent if one.until > now - window.seconds)
        # A request heavier than the whole limit is still sent, alone.
        excess = min(sum(w for _, w in counted) + weight - window.limit, sum(w for _, w in counted))
        if excess <= 0:
            return Permit()
        for until, one in counted:
            excess -= one
            if excess <= 0:
                wait = window.seconds if until == math.inf else until + window.seconds - now
                return Permit(wait, window.reason)
        raise AssertionError("the excess is at most what is counted")
