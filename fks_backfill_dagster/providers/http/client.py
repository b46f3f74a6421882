"""One HTTP exchange of a provider, with its permits and its retries.

A request needs a pool slot (how many are in flight in this process), then a permit of the limiter (whether this
provider may be requested now). It is sent at once: nothing that has a permit is sent later, into a penalty or into the
next rate window. A request that gets no permit returns its slot and waits without one, so that a slow provider
cannot starve a quick one.

Does not belong here: the path, the parameters or the response of any one provider.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import orjson
import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_any

from fks_backfill_dagster.domain.rate_limits import Turn
from fks_backfill_dagster.providers.base import (
    BadAnswer,
    Cancelled,
    ProviderError,
    ProviderOptions,
    TransientError,
)
from fks_backfill_dagster.providers.http.body import MAX_JSON_BYTES, read_body
from fks_backfill_dagster.providers.http.errors import (
    Unreachable,
    network_error,
    place_of,
    said_in,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import Limiter
from fks_backfill_dagster.providers.http.pool import LOOK_AGAIN_SECONDS, SILENT_SECONDS, RequestPool, T, Tally
from fks_backfill_dagster.providers.http.retry import Patience, server_wait_or_backoff
from fks_backfill_dagster.providers.keys import keep_out_of_logs
from fks_backfill_dagster.providers.network import (
    Session,
)

CONNECT_SECONDS = 10.0
ANSWER_TIMEOUTS = 3


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back. `place` is host and path, for texts; it has no query, so no key."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    place: str


class HttpClient:
    """Asks one provider over HTTP, with the manners of all of them.

    `setting` is the place in the settings that holds the address, for texts.

    One session per thread, so connections are reused and nothing is shared.
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
    def answer_seconds(self) -> float:
        """How long a whole answer may take, however steadily it drips."""
        return ANSWER_TIMEOUTS * self.options.timeout_seconds

    def run(
        self,
        attempt: Callable[[], T],
        tally: Tally,
        *,
        weight: int = 1,
        attempts: int | None = None,
    ) -> T:
        """Runs `attempt` (one exchange, and the reading of its answer) until it succeeds.

        TransientError is retried after the seconds the provider told, else after an exponential wait
        with jitter, for `retry_budget_seconds` from the first failure on (and for at most `attempts`
        tries). Told waits do not eat that budget, their sum has its own: `longest_wait_seconds`.
        When a budget does not cover the next wait, the error is raised at once. After a budget was used
        up on a provider that cannot be reached, everybody tries once only until it answers again: else
        hundreds of series would wait for the same dead address one after the other.
        """
        patience = Patience(self.options)
        tries = 1 if self._unreachable else attempts

        def once() -> T:
            while True:
                with self.pool.slot():
                    turn = self.limiter.admit(self.provider, weight)
                    if not turn.wait:
                        return self._take(turn, attempt, tally)
                pause = min(turn.wait, LOOK_AGAIN_SECONDS)
                patience.spend(self.provider, turn, pause)
                if turn.wait > SILENT_SECONDS:
                    why = turn.reason or "as its rate limit demands"
                    self.pool.told(self.provider, f"{self.provider}: waiting {turn.wait:.0f} s, {why}")
                self.pool.sleep(pause)

        def tell(state: RetryCallState) -> None:
            lasts = (state.seconds_since_start or 0.0) + state.upcoming_sleep
            if state.outcome is not None and lasts > SILENT_SECONDS:
                again = f"trying again in {max(state.upcoming_sleep, 1.0):.0f} s"
                self.pool.told(self.provider, f"{state.outcome.exception()}; {again}")

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=server_wait_or_backoff,
            stop=stop_any(patience, stop_after_attempt(tries)) if tries else patience,
            sleep=self.pool.sleep,
            before_sleep=tell,
            reraise=True,
        )
        try:
            result = retrying(once)
        except Cancelled:
            raise
        except ProviderError as error:
            self._unreachable = isinstance(error, Unreachable)
            raise
        self._unreachable = False
        return result

    def _take(self, turn: Turn, attempt: Callable[[], T], tally: Tally) -> T:
        try:
            tally.add()
            return attempt()
        except TransientError as error:
            if error.retry_after is not None:
                self.limiter.penalise(self.provider, error.retry_after)
            raise
        finally:
            self.limiter.over(turn)

    def exchange(
        self, url: str, params: Mapping[str, str] | None = None, *, max_bytes: int = MAX_JSON_BYTES
    ) -> Reply:
        """One GET, whatever its status. Raises TransientError when no whole answer came, or one too large."""
        place = place_of(url)
        timeout = (min(CONNECT_SECONDS, self.options.timeout_seconds), self.options.timeout_seconds)
        try:
            with self.session().get(
                url, params=params, timeout=timeout, stream=True, allow_redirects=False
            ) as response:
                body = read_body(response, max_bytes, self.answer_seconds)
                return Reply(response.status_code, response.headers, body, place)
        except requests.RequestException as error:
            # `from None`: the text of the original holds the URL with its query, which may hold a key.
            raise network_error(
                self.provider, error, place, key=self.options.key, setting=self.setting
            ) from None

    def failure(self, reply: Reply) -> ProviderError:
        """The error that a reply's status stands for; see `status_error`."""
        return status_error(
            self.provider, reply.status, reply.headers, reply.body, reply.place, key=self.options.key
        )

    def json(self, reply: Reply) -> object:
        """The decoded body. BadAnswer for HTML, truncated JSON and the like."""
        try:
            return orjson.loads(reply.body)
        except orjson.JSONDecodeError:
            said = said_in(reply.body, self.options.key)
            raise BadAnswer(self.provider, f"{reply.place} answered no valid JSON but {said}") from None
