"""When a failed request is sent again: exponential back-off, or what the server has asked for."""

from __future__ import annotations

import time

from tenacity import RetryCallState
from tenacity.stop import stop_base
from tenacity.wait import wait_exponential_jitter

from fks_backfill_dagster.domain.rate_limits import Turn
from fks_backfill_dagster.providers.base import (
    ProviderOptions,
    RateLimited,
    TransientError,
)


class Patience(stop_base):
    """How long one request may still be retried: the budget runs from its first failure on.

    Neither waiting for a turn at a slow pace nor a wait that the provider asked for eats it: both
    are no failures, and a limit of so much a minute is over after a minute.
    """

    def __init__(self, options: ProviderOptions) -> None:
        self._budget = options.retry_budget_seconds
        self.for_told_waits = options.longest_wait_seconds
        self._failed_at: float | None = None

    def spend(self, provider: str, turn: Turn, pause: float) -> None:
        """Allows for a `pause` of the wait that the limiter tells. Raises RateLimited when the whole of it is
        longer than is left."""
        if turn.reason is not None:
            if turn.wait > self.for_told_waits:
                text = f"{turn.reason} another {turn.wait:.0f} s"
                raise RateLimited(provider, text, retry_after=turn.wait)
            self.for_told_waits -= pause
        if self._failed_at is not None:
            self._failed_at += pause

    def __call__(self, retry_state: RetryCallState) -> bool:
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        pause = retry_state.upcoming_sleep
        if server_wait(retry_state):
            self.for_told_waits -= pause
            self._failed_at += pause
            return self.for_told_waits < 0
        return time.monotonic() - self._failed_at + pause >= self._budget


backoff = wait_exponential_jitter(multiplier=0.1, max=15, jitter=0.2)


def server_wait(state: RetryCallState) -> float | None:
    """The seconds the provider asked us to wait, if it did. A told zero is no licence to hammer."""
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after or None) if isinstance(error, TransientError) else None


def server_wait_or_backoff(state: RetryCallState) -> float:
    """Seconds before the next attempt."""
    return server_wait(state) or backoff(state)
