"""How often a provider may be asked: the values that providers, store and faces exchange about it.

Belongs here: limits, whose they are, and what an asker is told. Does not belong here: counting, which
needs a clock (providers/http/limiter.py in one process, store/rate_limits.py in the database).
"""

from __future__ import annotations

from dataclasses import dataclass

# A limit over this long or longer is a budget: nobody waits for the rest of a day in the middle of a run.
BUDGET_SECONDS = 3600.0

# However long a provider asks for (a header of a century, a ban until 2126), after a day it is requested again: if
# it meant that, it says so again, at the cost of one request a day.
LONGEST_WAIT = 86_400.0


def bounded_wait(seconds: float) -> float:
    """The seconds of a wait that a provider named, as far as they are heeded: 0 .. LONGEST_WAIT, and 0 for NaN."""
    return min(seconds, LONGEST_WAIT) if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Window:
    """At most `limit` of weight in any `seconds`, wherever they begin."""

    limit: int
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.limit < 1 or self.seconds <= 0:
            raise ValueError(f"a limit of {self.limit} in {self.seconds} s lets nobody through")

    @property
    def reason(self) -> str | None:
        """What to tell who must wait for it; None for one that is only a matter of pace."""
        if self.seconds < BUDGET_SECONDS:
            return None
        return f"its {self.limit} requests in {self.seconds / 3600:g} hours are used up: wait"


@dataclass(frozen=True, slots=True)
class Pace:
    """The limits of one account at one provider; all of them hold at once, none means no limit.

    account: tells budgets apart, without giving away the key: what is counted is counted for it.
    longest: seconds after which a request is over for certain, even if nobody said so (a killed process).
    """

    windows: tuple[Window, ...] = ()
    account: str = ""
    longest: float = 120.0


@dataclass(frozen=True, slots=True)
class Turn:
    """What an asker is told: go ahead (`wait` 0), or ask again after `wait` seconds.

    reason: set where the wait is not the pace of a moment but something to be told and perhaps not to be
        waited for: the provider asked for it, or a budget is spent.
    number: names the request while it is under way; 0 where nobody counts it.
    """

    wait: float = 0.0
    reason: str | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class Rest:
    """A provider is left alone for `seconds` more, because of `reason`."""

    seconds: float
    reason: str
