"""One HTTP exchange of a provider, with its permits and its retries.

A request needs a pool slot (limits the requests in flight of this process), then a permit of the limiter (rate limit
and cool-down of the provider). With a permit it is sent immediately: a later request could fall into a cool-down or
into the next rate window. A request without a permit releases its slot while it waits, so that a slow provider cannot
starve a fast one.

Does not belong here: paths, parameters or responses of individual providers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_any

from fks_backfill_dagster.domain.rate_limits import Permit
from fks_backfill_dagster.providers.base import (
    Cancelled,
    InvalidResponse,
    ProviderError,
    ProviderOptions,
    TransientError,
)
from fks_backfill_dagster.providers.http.body import MAX_JSON_BYTES, read_body
from fks_backfill_dagster.providers.http.errors import (
    Unreachable,
    excerpt,
    network_error,
    place_of,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import Limiter
from fks_backfill_dagster.providers.http.pool import (
    RECHECK_SECONDS,
    UNREPORTED_SECONDS,
    RequestPool,
    T,
    Tally,
)
from fks_backfill_dagster.providers.http.retry import RetryBudget, server_wait_or_backoff
from fks_backfill_dagster.providers.keys import keep_out_of_logs
from fks_backfill_dagster.providers.network import (
    Session,
)

CONNECT_SECONDS = 10.0
RESPONSE_TIMEOUTS = 3

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """A response. `place` is host and path, for texts; it has no query, so no key."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    place: str


def log_reply(response: requests.Response, body: bytes, place: str) -> None:
    """Logs one reply; `place` has no query, which may hold a key. The seconds are those up to its headers."""
    seconds = response.elapsed.total_seconds()
    _log.debug("%s: %d after %.2f s, %d bytes", place, response.status_code, seconds, len(body))


class HttpClient:
    """The HTTP client of one provider: permits, retries and error handling.

    setting: the settings key of the address, for texts.

    One session per thread, so connections are reused but not shared.
    """

    def __init__(
        self,
        provider: str,
        options: ProviderOptions,
        pool: RequestPool,
        limiter: Limiter,
        *,
        headers: Mapping[str, str] | None = None,
        setting: str | None = None,
    ) -> None:
        self.provider = provider
        self.setting = setting
        self.options = options
        self.pool = pool
        self.limiter = limiter
        self._headers = dict(headers or {})
        self._local = threading.local()
        self._unreachable = False
        if options.key:
            keep_out_of_logs(options.key)

    def session(self) -> Session:
        """This thread's session."""
        made: Session | None = getattr(self._local, "session", None)
        if made is None:
            made = Session()
            made.headers.update(self._headers)
            self._local.session = made
        return made

    @property
    def response_seconds(self) -> float:
        """The maximum time for a whole response, however steadily data arrives."""
        return RESPONSE_TIMEOUTS * self.options.timeout_seconds

    def run(
        self,
        attempt: Callable[[], T],
        tally: Tally,
        *,
        weight: int = 1,
        attempts: int | None = None,
    ) -> T:
        """Runs `attempt` (one exchange and the parsing of its response) until it succeeds.

        TransientError is retried after the wait that the provider demands, otherwise after an exponential back-off
        with jitter, for `retry_budget_seconds` from the first failure on (and for at most `attempts` tries).
        Demanded waits do not count; their sum is limited by `longest_wait_seconds`. If a budget does not cover the
        next wait, the error is raised immediately. After a fetch failed because the provider is unreachable, each
        further request is tried only once until it responds: otherwise hundreds of series would wait for the same
        dead address one after another.
        """
        budget = RetryBudget(self.options)
        tries = 1 if self._unreachable else attempts

        def report(state: RetryCallState) -> None:
            lasts = (state.seconds_since_start or 0.0) + state.upcoming_sleep
            if state.outcome is not None and lasts > UNREPORTED_SECONDS:
                retry = f"retrying in {max(state.upcoming_sleep, 1.0):.0f} s"
                self.pool.report_wait(self.provider, f"{state.outcome.exception()}; {retry}")

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=server_wait_or_backoff,
            stop=stop_any(budget, stop_after_attempt(tries)) if tries else budget,
            sleep=self.pool.sleep,
            before_sleep=report,
            reraise=True,
        )
        try:
            result: T = retrying(self._once, attempt, tally, budget, weight)
        except Cancelled:
            raise
        except ProviderError as error:
            self._unreachable = isinstance(error, Unreachable)
            raise
        self._unreachable = False
        return result

    def _once(self, attempt: Callable[[], T], tally: Tally, budget: RetryBudget, weight: int) -> T:
        """Runs `attempt` as soon as it gets a permit; waits within the budget."""
        while True:
            with self.pool.slot():
                permit = self.limiter.acquire(self.provider, weight)
                if not permit.wait:
                    return self._with_permit(permit, attempt, tally)
            pause = min(permit.wait, RECHECK_SECONDS)
            budget.spend(self.provider, permit, pause)
            if permit.wait > UNREPORTED_SECONDS:
                why = (permit.reason or "rate limit").removesuffix(": wait")
                self.pool.report_wait(self.provider, f"{self.provider}: waiting {permit.wait:.0f} s: {why}")
            self.pool.sleep(pause)

    def _with_permit(self, permit: Permit, attempt: Callable[[], T], tally: Tally) -> T:
        try:
            tally.add()
            return attempt()
        except TransientError as error:
            if error.retry_after is not None:
                self.limiter.cool_down(self.provider, error.retry_after)
            raise
        finally:
            self.limiter.release(permit)

    def exchange(
        self, url: str, params: Mapping[str, str] | None = None, *, max_bytes: int = MAX_JSON_BYTES
    ) -> Reply:
        """One GET, whatever its status. Raises TransientError for an incomplete or too large response."""
        place = place_of(url)
        timeout = (min(CONNECT_SECONDS, self.options.timeout_seconds), self.options.timeout_seconds)
        try:
            with self.session().get(
                url, params=params, timeout=timeout, stream=True, allow_redirects=False
            ) as response:
                body = read_body(response, max_bytes, self.response_seconds)
                log_reply(response, body, place)
                return Reply(response.status_code, response.headers, body, place)
        except requests.RequestException as error:
            # `from None`: the text of the original holds the URL with its query, which may hold a key.
            raise network_error(
                self.provider, error, place, key=self.options.key, setting=self.setting
            ) from None

    def failure(self, reply: Reply) -> ProviderError:
        """The error for the status of a reply; see `status_error`."""
        return status_error(
            self.provider, reply.status, reply.headers, reply.body, reply.place, key=self.options.key
        )

    def json(self, reply: Reply) -> object:
        """The decoded body. InvalidResponse for HTML, truncated JSON and the like."""
        try:
            return orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            content = excerpt(reply.body, self.options.key)
            raise InvalidResponse(
                self.provider, f"{reply.place} returned no valid JSON but {content}"
            ) from None
