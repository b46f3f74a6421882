"""Retries of a failed request: budget, exponential back-off, and the wait that the provider demands."""

from __future__ import annotations

import time

from tenacity import RetryCallState
from tenacity.stop import stop_base
from tenacity.wait import wait_exponential_jitter

from fks_backfill_dagster.domain.rate_limits import Permit
from fks_backfill_dagster.providers.base import (
    ProviderOptions,
    RateLimited,
    TransientError,
)


class RetryBudget(stop_base):
    """The time that one request may be retried, counted from its first failure.

    Waiting for a permit and waits that the provider demands do not count: they are not failures, and a limit per
    minute ends after a minute. Demanded waits have a budget of their own.
    """

    def __init__(self, options: ProviderOptions) -> None:
        self._budget = options.retry_budget_seconds
        self.demanded_waits_left = options.longest_wait_seconds
        self._failed_at: float | None = None

    def spend(self, provider: str, permit: Permit, pause: float) -> None:
        """Accounts for a `pause` of the wait returned by the limiter. Raises RateLimited if a demanded wait exceeds
        the remaining budget."""
        if permit.reason is not None:
            if permit.wait > self.demanded_waits_left:
                text = f"{permit.reason} another {permit.wait:.0f} s"
                raise RateLimited(provider, text, retry_after=permit.wait)
            self.demanded_waits_left -= pause
        if self._failed_at is not None:
            self._failed_at += pause

    def __call__(self, retry_state: RetryCallState) -> bool:
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        pause = retry_state.upcoming_sleep
        if server_wait(retry_state):
            self.demanded_waits_left -= pause
            self._failed_at += pause
            return self.demanded_waits_left < 0
        return time.monotonic() - self._failed_at + pause >= self._budget


backoff = wait_exponential_jitter(multiplier=0.1, max=15, jitter=0.2)


def server_wait(state: RetryCallState) -> float | None:
    """The wait in seconds that the provider demands, if any. A demanded wait of 0 is replaced by the back-off."""
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after or None) if isinstance(error, TransientError) else None


def server_wait_or_backoff(state: RetryCallState) -> float:
    """Seconds before the next attempt."""
    return server_wait(state) or backoff(state)
