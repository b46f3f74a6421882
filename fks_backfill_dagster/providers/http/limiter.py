"""The rate limiter's protocol, and the one of a single process."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fks_backfill_dagster.domain.rate_limits import Pace, Turn, Window, bounded_wait


def system_micros() -> int:
    """Now, in microseconds UTC: the default clock of the providers."""
    return time.time_ns() // 1000


class Limiter(Protocol):
    """The door to a provider, shared by all who ask it. Nobody waits inside: waiting is the asker's."""

    def admit(self, provider: str, weight: int) -> Turn:
        """Lets a request through now (`wait` 0, it counts from here on), or tells when to ask again."""
        ...

    def over(self, turn: Turn) -> None:
        """The request of an admitted turn is over, whatever came of it.

        Until then it is unknown when it reaches the provider, so it counts as the newest of all.
        """
        ...

    def penalise(self, provider: str, seconds: float) -> None:
        """Nobody asks this provider during the next `seconds`, a day at most."""
        ...


@dataclass(slots=True)
class _Spent:
    weight: int
    until: float = math.inf  # when its request was over


class ProcessLimiter:
    """A Limiter for one process, which forgets with it; see store/rate_limits.py for the shared one.

    A provider that is not in `paces` has no limit and only obeys penalties.
    """

    def __init__(self, paces: Mapping[str, Pace]) -> None:
        self._paces = dict(paces)
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._spent: dict[str, dict[int, _Spent]] = {}
        self._under_way: dict[int, _Spent] = {}
        self._closed_until: dict[str, float] = {}

    def admit(self, provider: str, weight: int) -> Turn:
        with self._lock:
            now = time.monotonic()
            if (closed := self._closed_until.get(provider, now) - now) > 0:
                return Turn(closed, "told us to wait")
            windows = self._paces.get(provider, Pace()).windows
            if not windows:
                return Turn()
            spent = self._spent.setdefault(provider, {})
            longest = max(window.seconds for window in windows)
            for number in [n for n, one in spent.items() if one.until <= now - longest]:
                del spent[number]
            turn = max(
                (self._fits(window, spent.values(), weight, now) for window in windows),
                key=lambda turn: turn.wait,
            )
            if turn.wait:
                return turn
            number = next(self._numbers)
            spent[number] = self._under_way[number] = _Spent(weight)
            return Turn(number=number)

    def over(self, turn: Turn) -> None:
        with self._lock:
            if spent := self._under_way.pop(turn.number, None):
                spent.until = time.monotonic()

    def penalise(self, provider: str, seconds: float) -> None:
        with self._lock:
            until = time.monotonic() + bounded_wait(seconds)
            self._closed_until[provider] = max(until, self._closed_until.get(provider, until))

    @staticmethod
    def _fits(window: Window, spent: Iterable[_Spent], weight: int, now: float) -> Turn:
        counted = sorted((one.until, one.weight) for one in spent if one.until > now - window.seconds)
        # A request heavier than the whole limit still goes out, alone.
        excess = min(sum(w for _, w in counted) + weight - window.limit, sum(w for _, w in counted))
        if excess <= 0:
            return Turn()
        for until, one in counted:
            excess -= one
            if excess <= 0:
                wait = window.seconds if until == math.inf else until + window.seconds - now
                return Turn(wait, window.reason)
        raise AssertionError("the excess is at most what is counted")
