"""Rate limits of providers: the values that providers, store and user interfaces exchange.

Belongs here: limits per account, permits, cool-downs. Does not belong here: counting, which needs a clock
(providers/http/limiter.py in one process, store/rate_limits.py in the database).
"""

from __future__ import annotations

from dataclasses import dataclass

# A rate window of this length or longer is a budget: a run does not wait for hours until it is renewed.
BUDGET_SECONDS = 3600.0

# A longer wait demanded by a provider (a header of a century, a ban until 2126) is cut to a day: if the provider
# still limits requests then, its response demands the next wait, at the cost of one request a day.
LONGEST_WAIT = 86_400.0


def bounded_wait(seconds: float) -> float:
    """The wait demanded by a provider, limited to 0 .. LONGEST_WAIT seconds; 0 for NaN."""
    return min(seconds, LONGEST_WAIT) if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class RateWindow:
    """A rate window: at most `limit` of request weight in any period of `seconds`."""

    limit: int
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.limit < 1 or self.seconds <= 0:
            raise ValueError(f"a limit of {self.limit} in {self.seconds} s permits no request")

    @property
    def reason(self) -> str | None:
        """Why a request has to wait for this rate window; None if the window is shorter than a budget."""
        if self.seconds < BUDGET_SECONDS:
            return None
        return f"its {self.limit} requests in {self.seconds / 3600:g} hours are used up: wait"


@dataclass(frozen=True, slots=True)
class RateLimits:
    """The rate limits of one account at one provider; all of them apply at once, none means no limit.

    account: identifies the account that requests are counted for, without revealing its key.
    longest: seconds after which a permit counts as released even if it was not (a killed process).
    """

    windows: tuple[RateWindow, ...] = ()
    account: str = ""
    longest: float = 120.0


@dataclass(frozen=True, slots=True)
class Permit:
    """The result of acquiring a permit: granted (`wait` 0), or try again after `wait` seconds.

    reason: set if the provider demanded the wait (`Retry-After`), or if a budget is used up. Only such waits count
        towards `longest_wait_seconds`.
    number: identifies the request in flight; 0 if it is not counted.
    """

    wait: float = 0.0
    reason: str | None = None
    number: int = 0


@dataclass(frozen=True, slots=True)
class CoolDown:
    """The cool-down of a provider: it is not requested for another `seconds`, because of `reason`."""

    seconds: float
    reason: str
