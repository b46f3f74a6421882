"""What every provider does with HTTP: limits, waits, retries, and errors that say what happened.

Belongs here: the bound on requests in flight, the limiter and its protocol, one HTTP exchange, the
retry loop around it, the meaning of a status code.
Does not belong here: the path, the parameters or the answer of any one provider.

A request passes two doors: a slot of the pool (how many are in flight in this process?), then the
limiter (may this provider be asked now?), and goes onto the wire at once, so that nothing admitted is
sent later, into a penalty or into the next window. Who is not admitted gives the slot back and waits
outside: a slow provider cannot starve a quick one.
"""

from __future__ import annotations

import itertools
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import orjson
import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, stop_any
from tenacity.stop import stop_base
from tenacity.wait import wait_exponential_jitter
from urllib3.exceptions import (
    HTTPError,
    MaxRetryError,
    NameResolutionError,
    NewConnectionError,
    ReadTimeoutError,
)

from fks_backfill_dagster.domain.rate_limits import Pace, Turn, Window, bounded_wait
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, to_micros
from fks_backfill_dagster.providers.base import (
    BadAnswer,
    Cancelled,
    Clocks,
    NotEntitled,
    PermanentError,
    ProviderError,
    ProviderOptions,
    RateLimited,
    TransientError,
    WrongKey,
)
from fks_backfill_dagster.providers.keys import keep_out_of_logs, redact
from fks_backfill_dagster.providers.network import (
    Refusal,
    Session,
    UnusableCertificates,
    proxy_of,
    refusal_of,
    refused,
)

T = TypeVar("T")
Item = TypeVar("Item")

# Well above any documented answer (50,000 Polygon bars have 6 MB), as sent and as unpacked. Parsed, JSON takes
# up to thirty times as much memory.
MAX_JSON_BYTES = 16 * 1024 * 1024
CONNECT_SECONDS = 10.0
_CHUNK = 1 << 18
# A wait that is longer than the first is told, but not more often than the second.
_SILENT_SECONDS = 2.0
_TOLD_AGAIN_SECONDS = 30.0
# Who waits longer asks the limiter again in between: the wait may have been ended by hand.
_LOOK_AGAIN_SECONDS = 10.0
ANSWER_TIMEOUTS = 3


class Unreachable(TransientError):
    """No connection (refused, unknown host), or no answer in time."""


def system_micros() -> int:
    """Now, in microseconds UTC: the default clock of the providers."""
    return time.time_ns() // 1000


# --- limits ---------------------------------------------------------------------------------------


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


class RequestPool:
    """Bounds the HTTP requests in flight of this process, and runs many requests side by side.

    Every provider has a lane of threads of its own; the bound lies in the slots all lanes share. A
    slot is held for one exchange and nothing is waited for inside it, and lane threads never submit
    to a lane: so any number of threads may call `map` at once without a deadlock.

    `stop` ends every wait of a retry or a limiter with Cancelled; the pool is of no use afterwards.
    `tell` gets a sentence for the user when a provider keeps everybody waiting, from any thread.
    """

    def __init__(
        self,
        max_concurrent_requests: int,
        *,
        stop: threading.Event | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, not {max_concurrent_requests}")
        self.max_concurrent_requests = max_concurrent_requests
        self.stop = stop or threading.Event()
        self._tell = tell
        self._tell_again: dict[str, float] = {}
        self._slots = threading.BoundedSemaphore(max_concurrent_requests)
        self._lock = threading.Lock()
        self._lanes: dict[str, ThreadPoolExecutor] = {}

    @contextmanager
    def slot(self) -> Iterator[None]:
        with self._slots:
            yield

    def sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Cancelled("requests", "interrupted while waiting for a retry")

    def told(self, provider: str, text: str) -> None:
        """Tells why `provider` is being waited for, once in a while, whoever waits."""
        with self._lock:
            now = time.monotonic()
            if now < self._tell_again.get(provider, now):
                return
            self._tell_again[provider] = now + _TOLD_AGAIN_SECONDS
        self._tell(text)

    def map(self, lane: str, function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """`function` of every item, in their order, run by the threads of `lane`.

        The first error is raised as soon as it happens; what has not started by then never does.
        """

        def unless_stopped(item: Item) -> T:
            if self.stop.is_set():
                raise Cancelled(lane, "the run is being interrupted")
            return function(item)

        executor = self._lane(lane)
        try:
            futures = [executor.submit(unless_stopped, item) for item in items]
        except RuntimeError:  # closed since
            raise Cancelled(lane, "the run is being interrupted") from None
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            self.stop.set()
            raise
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Interrupts what is waiting and ends the threads.

        After `stop` nobody waits for an exchange that is under way: a market may never answer.
        """
        interrupted = self.stop.is_set()
        self.stop.set()
        with self._lock:
            lanes, self._lanes = list(self._lanes.values()), {}
        for executor in lanes:
            # Not cancel_futures: `wait` is not told of futures that end that way, and waits for ever.
            executor.shutdown(wait=not interrupted)

    def _lane(self, name: str) -> ThreadPoolExecutor:
        with self._lock:
            if self.stop.is_set():
                raise Cancelled(name, "the run is being interrupted")
            if name not in self._lanes:
                self._lanes[name] = ThreadPoolExecutor(
                    self.max_concurrent_requests, thread_name_prefix=f"requests-{name}"
                )
            return self._lanes[name]


@dataclass(slots=True)
class Tally:
    """Counts the requests of one fetch over all threads that work for it, and keeps what clocks they showed.

    count: requests, retries included. clocks: as in `Answer`.
    """

    count: int = 0
    clocks: Clocks | None = None
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self) -> None:
        """Raises Cancelled where the fetch has failed already: another page of it is of no use any more."""
        with self._lock:
            if self._over:
                raise Cancelled("requests", "another request of the same fetch has failed")
            self.count += 1

    def end(self) -> int:
        """The count, which does not change any more."""
        with self._lock:
            self._over = True
            return self.count

    def closed_by(self, headers: Mapping[str, str], ours: int) -> int:
        """The instant by which a candle must have closed to be final: the earlier one of the server's clock, by
        its Date header, and ours."""
        theirs = server_time(headers)
        if theirs is None:
            return ours
        age = headers.get("Age", "").strip()
        in_cache = int(age) * MICROS_PER_SECOND if re.fullmatch("[0-9]{1,9}", age) else 0
        clocks = Clocks(theirs, ours, in_cache)
        with self._lock:
            if self.clocks is None or ours - theirs > self.clocks.ours - self.clocks.theirs:
                self.clocks = clocks
        return min(theirs, ours)


@contextmanager
def counted() -> Iterator[Tally]:
    """The tally of one fetch; an error that ends the fetch has its count."""
    tally = Tally()
    try:
        yield tally
    except ProviderError as error:
        error.requests = tally.end()
        raise


# --- one exchange ---------------------------------------------------------------------------------


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
        patience = _Patience(self.options)
        tries = 1 if self._unreachable else attempts

        def once() -> T:
            while True:
                with self.pool.slot():
                    turn = self.limiter.admit(self.provider, weight)
                    if not turn.wait:
                        return self._take(turn, attempt, tally)
                pause = min(turn.wait, _LOOK_AGAIN_SECONDS)
                patience.spend(self.provider, turn, pause)
                if turn.wait > _SILENT_SECONDS:
                    why = turn.reason or "as its rate limit demands"
                    self.pool.told(self.provider, f"{self.provider}: waiting {turn.wait:.0f} s, {why}")
                self.pool.sleep(pause)

        def tell(state: RetryCallState) -> None:
            lasts = (state.seconds_since_start or 0.0) + state.upcoming_sleep
            if state.outcome is not None and lasts > _SILENT_SECONDS:
                again = f"trying again in {max(state.upcoming_sleep, 1.0):.0f} s"
                self.pool.told(self.provider, f"{state.outcome.exception()}; {again}")

        retrying = Retrying(
            retry=retry_if_exception_type(TransientError),
            wait=_told_or_backoff,
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


class TooLarge(requests.RequestException):
    """An answer of more bytes than `limit`; what is left of it is not read."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"more than {limit:,} bytes")


def read_body(response: requests.Response, max_bytes: int, seconds: float) -> bytes:
    """The decoded body of a streamed response, bounded in size and in time.

    The timeout of requests starts anew with every byte, so it alone never ends a dripping answer.
    Raises requests exceptions only, like the rest of an exchange.
    """
    deadline = time.monotonic() + seconds
    body = bytearray()
    try:
        while chunk := response.raw.read1(_CHUNK, decode_content=True):
            body += chunk
            if len(body) > max_bytes:
                raise TooLarge(max_bytes)
            if time.monotonic() > deadline:
                raise requests.ReadTimeout("timed out")
    except requests.RequestException:
        raise
    except ReadTimeoutError:
        raise requests.ReadTimeout("timed out") from None
    except HTTPError as error:
        raise requests.exceptions.ChunkedEncodingError(str(error)) from None
    return bytes(body)


class _Patience(stop_base):
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
        if _told(retry_state):
            self.for_told_waits -= pause
            self._failed_at += pause
            return self.for_told_waits < 0
        return time.monotonic() - self._failed_at + pause >= self._budget


_backoff = wait_exponential_jitter(multiplier=0.1, max=15, jitter=0.2)


def _told(state: RetryCallState) -> float | None:
    """The seconds the provider asked us to wait, if it did. A told zero is no licence to hammer."""
    error = state.outcome.exception() if state.outcome else None
    return (error.retry_after or None) if isinstance(error, TransientError) else None


def _told_or_backoff(state: RetryCallState) -> float:
    """Seconds before the next attempt."""
    return _told(state) or _backoff(state)


# --- what an answer means -------------------------------------------------------------------------


def status_error(
    provider: str, status: int, headers: Mapping[str, str], body: bytes, place: str, *, key: str | None = None
) -> ProviderError:
    """What a status other than 200 means, where the provider's file knows nothing better.

    429 and 418 are limits, 401 a wrong key, 403 one that does not cover it; 408, 425 and 5xx may pass. Everything else
    (451 for a forbidden country, a redirection, 404) would be the same the next time.
    """
    text = f"{place} answered {status}: {said_in(body, key)}"
    told = retry_after(headers)
    if status in (418, 429):
        return RateLimited(provider, text, retry_after=told)
    if status == 407 and (proxy := proxy_of(place)) is not None:
        return _proxy_error(provider, refused(proxy, status, "", place))
    if status == 401:
        return WrongKey(provider, f"{text} (check its key)")
    if status == 403 and not body.lstrip().startswith(b"<"):  # a page is some firewall's
        return NotEntitled(provider, text)
    if status in (408, 425) or status >= 500:
        return TransientError(provider, text, retry_after=told)
    if status == 451:
        return PermanentError(provider, f"{text} (it does not serve the country this machine is in)")
    if 300 <= status < 400:
        return PermanentError(provider, f"{place} answered {status}, it has moved: correct base_url")
    return PermanentError(provider, text)


def network_error(
    provider: str,
    error: BaseException,
    place: str,
    *,
    key: str | None = None,
    setting: str | None = None,
) -> ProviderError:
    """What a requests exception means; the text holds neither the query nor the key.

    `setting` names the place of the address in the settings, for the remedy.
    """
    setting = setting or f"providers.{provider}.base_url"
    check = f"check the network, or correct {setting}"
    if isinstance(error, UnusableCertificates):
        return PermanentError(provider, f"{place} is not requested: {error}")
    if isinstance(error, requests.RequestException) and (refusal := refusal_of(error, place)) is not None:
        return _proxy_error(provider, refusal)
    if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.MissingSchema):
        return PermanentError(provider, f"{place} is no usable address: correct {setting}")
    if isinstance(error, requests.TooManyRedirects):
        return PermanentError(provider, f"{place} has moved: correct {setting}")
    untrusted = re.search(r"certificate verify failed: ([\w ,'-]+)", str(error))
    if isinstance(error, requests.exceptions.SSLError) and untrusted:
        return PermanentError(
            provider,
            f"{place}: its certificate is not trusted ({untrusted[1].strip()}): where a proxy of your network signs"
            " it, name a file with the certificates to trust in REQUESTS_CA_BUNDLE or SSL_CERT_FILE",
        )
    if isinstance(error, requests.exceptions.SSLError):
        return TransientError(provider, f"{place}: no secure connection, its certificate does not fit")
    cause = error.args[0] if error.args else None
    reason = cause.reason if isinstance(cause, MaxRetryError) else None
    if isinstance(error, requests.ConnectTimeout):
        return Unreachable(provider, f"{place}: nobody answers the connection: {check}")
    if isinstance(reason, NameResolutionError):
        host = urlsplit(place).hostname
        return Unreachable(provider, f"{place}: no connection (the host {host} is unknown): {check}")
    if isinstance(reason, NewConnectionError) and "refused" in str(reason):
        text = f"no connection (refused): start what should listen there, or correct {setting}"
        return Unreachable(provider, f"{place}: {text}")
    if isinstance(reason, NewConnectionError):
        why = redact(str(reason).rsplit(": ", 1)[-1], key)
        return Unreachable(provider, f"{place}: no connection ({why}): {check}")
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return Unreachable(provider, f"{place} did not answer in time: {check}")
    if isinstance(error, TooLarge):
        return BadAnswer(provider, f"{place} answered {error}, which is too large to be an answer")
    if isinstance(error, requests.exceptions.ContentDecodingError):
        return BadAnswer(provider, f"{place} sent a body that cannot be read: {error}")
    return TransientError(provider, f"{place}: the connection broke before the answer was complete")


def _proxy_error(provider: str, refusal: Refusal) -> ProviderError:
    """Unreachable where the proxy gave no answer; what it refuses it refuses the next time as well."""
    if refusal.status is None:
        return Unreachable(provider, refusal.text)
    if refusal.status < 500:
        return PermanentError(provider, refusal.text)
    return TransientError(provider, refusal.text)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header, a number or a date; None where there is none that makes sense.

    They may be too many: TransientError bounds them. A date is taken by the server's clock, where it tells it.
    """
    text = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]*)?", text):
        return float(text)
    until = header_time(headers, "Retry-After")
    if until is None:
        return None
    now = server_time(headers) or system_micros()
    return max(0.0, (until - now) / MICROS_PER_SECOND)


def server_time(headers: Mapping[str, str]) -> int | None:
    """The server's clock at the answer, from its Date header (whole seconds), in microseconds."""
    return header_time(headers, "Date")


def header_time(headers: Mapping[str, str], name: str) -> int | None:
    """The instant that a header names, in microseconds; None without it, or where it is no date since 1970."""
    try:
        moment = parsedate_to_datetime(headers.get(name, ""))
        # "-0000" leaves the zone open; the dates of HTTP are always UTC.
        named = to_micros(moment if moment.tzinfo else moment.replace(tzinfo=UTC))
    except (ArithmeticError, LookupError, TypeError, ValueError):  # a year of 400 digits is an OverflowError
        return None
    return named if named >= 0 else None


def said_in(body: bytes, key: str | None = None) -> str:
    """The gist of an error body in one short line, without the key."""
    text = " ".join(body[:4000].decode("utf-8", "replace").split())
    if not text:
        return "nothing"
    if sum(not c.isprintable() or c == "\ufffd" for c in text) > len(text) // 10:
        return f"{len(body)} bytes that are no text"
    if text.startswith("<"):
        return "an HTML page"
    return redact(text, key)[:200]


def place_of(url: str) -> str:
    """Scheme, host and path of a URL, for texts."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def host_of(url: str) -> str:
    """Scheme, host and port of a URL, as lineage keeps them; never a user or password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def seconds_to_next_minute(now: int) -> float:
    """From an instant (microseconds) to the next full minute, never 0."""
    return 60.0 - (now / MICROS_PER_SECOND) % 60.0
