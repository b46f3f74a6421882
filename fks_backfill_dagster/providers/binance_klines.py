"""Requests for Binance's klines, through ccxt's raw call: one page each, parsed and checked.

Belongs here: the bytes of a page and its checks, Binance's errors, its used weight. Does not belong here: which pages
are requested and whether neighbours agree (`binance.py`).

A row outside the requested times or out of order invalidates its page. An invalid page is requested again within the
retry budget; then InvalidResponse is raised.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import requests
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND
from fks_backfill_dagster.known_providers import BINANCE
from fks_backfill_dagster.providers.base import (
    InvalidResponse,
    PermanentError,
    ProviderError,
    ProviderOptions,
    RateLimited,
    UnknownSymbol,
)
from fks_backfill_dagster.providers.http.body import MAX_JSON_BYTES, read_body
from fks_backfill_dagster.providers.http.client import HttpClient, log_reply
from fks_backfill_dagster.providers.http.errors import (
    excerpt,
    network_error,
    place_of,
    retry_after,
    seconds_to_next_minute,
    server_time,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally

NAME = BINANCE.name

KLINES_PATH = "/api/v3/klines"
# From this share of the weight on, requests wait for the next minute; others may be in flight.
_PAUSE_AT = 0.95
_COLUMNS = 12
_NOT_BINANCE = "run it again later, or correct providers.binance.base_url"
_MILLIS = 1000


@dataclass(frozen=True, slots=True)
class Page:
    """The closed candles of one response, ascending, and the server's clock at that time."""

    window: TimeRange
    candles: Candles
    server_time: int


class Klines:
    """Requests klines through ccxt, with the limiter, slots and retries of HttpClient."""

    def __init__(
        self, options: ProviderOptions, pool: RequestPool, limiter: Limiter, clock: Callable[[], int]
    ) -> None:
        self.url = options.base_url.rstrip("/") + KLINES_PATH
        self.place = place_of(self.url)
        self._client = HttpClient(NAME, options, pool, limiter)
        self._limiter = limiter
        self._clock = clock
        a_minute = options.requests_per_minute or BINANCE.requests_per_minute
        self._pause_at = _PAUSE_AT * BINANCE.request_weight * a_minute
        self._local = threading.local()

    def fetch(
        self, queries: Sequence[Mapping[str, str | int]], windows: Sequence[TimeRange], tally: Tally
    ) -> list[Page]:
        """One page per query, concurrently; each is retried until it is a valid page of its window."""

        def page(item: tuple[Mapping[str, str | int], TimeRange]) -> Page:
            query, window = item
            return self._client.run(
                lambda: self._once(query, window, tally), tally, weight=BINANCE.request_weight
            )

        return self._client.pool.map(NAME, page, list(zip(queries, windows, strict=True)))

    def _once(self, query: Mapping[str, str | int], window: TimeRange, tally: Tally) -> Page:
        market = self._market()
        answer = market.klines(query)
        now = tally.closed_by(market.headers, self._clock())
        self._respect_weight(market.headers, now)
        return read_page(answer, window, now, self.place)

    def _respect_weight(self, headers: Mapping[str, str], now: int) -> None:
        """Pauses all requests until the next minute if the weight of this IP address, also used by others, is nearly
        used up."""
        used = headers.get("X-MBX-USED-WEIGHT-1M", "")
        if (
            re.fullmatch("[0-9]+", used) and float(used) >= self._pause_at
        ):  # int() refuses thousands of digits
            self._limiter.cool_down(NAME, seconds_to_next_minute(now))

    def _market(self) -> _Market:
        made: _Market | None = getattr(self._local, "market", None)
        if made is None:
            made = self._local.market = _Market(self._client, self.url)
        return made


class _Market:
    """One thread's ccxt instance (takes 3 ms to create), and its last response.

    ccxt returns no status, and Retry-After only with its exceptions; so a hook on its session keeps each response.
    Its own limiter and retries are off, because those of HttpClient apply.
    """

    def __init__(self, client: HttpClient, url: str) -> None:
        import ccxt  # here, because it takes a third of a second and most commands send no request

        self._client = client
        self._url = url
        self._response: requests.Response | None = None
        session = client.session()
        session.hooks["response"].append(self._remember)
        self._errors: type[Exception] = ccxt.BaseError
        self._ccxt: Any = ccxt.binance(
            {
                "session": session,
                "enableRateLimit": False,
                "options": {"maxRetriesOnFailure": 0},
                "timeout": int(client.options.timeout_seconds * 1000),
                "enableLastHttpResponse": False,
                "enableLastJsonResponse": False,
                "urls": {"api": {"public": url.removesuffix("/klines")}},
            }
        )

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers if self._response is not None else {}

    def klines(self, query: Mapping[str, str | int]) -> object:
        """The decoded response; the text itself if it is not JSON. Raises ProviderError."""
        self._response = None
        symbol = str(query["symbol"])
        try:
            answer = self._ccxt.public_get_klines(dict(query))
        except self._errors as error:
            raise self._error_of(error, symbol) from None
        except UnicodeDecodeError:  # ccxt decodes the body before it can be checked
            raise InvalidResponse(NAME, f"{place_of(self._url)} returned no text: {_NOT_BINANCE}") from None
        if self._response is not None and self._response.status_code != 200:
            raise self._response_error(self._response, symbol)  # ccxt accepts a redirect without a target
        return answer

    def _remember(self, response: requests.Response, *_: object, **__: object) -> None:
        self._response = response
        body = read_body(response, MAX_JSON_BYTES, self._client.response_seconds)
        log_reply(response, body, place_of(self._url))
        response.raw = io.BytesIO(body)  # requests reads the content from here after the hooks

    def _error_of(self, error: Exception, symbol: str) -> ProviderError:
        cause = error.__cause__
        broken = isinstance(cause, requests.RequestException) and not isinstance(cause, requests.HTTPError)
        if self._response is None or broken:
            return network_error(NAME, cause or error, place_of(self._url))
        return self._response_error(self._response, symbol)

    def _response_error(self, response: requests.Response, symbol: str) -> ProviderError:
        place = place_of(self._url)
        return binance_error(response.status_code, response.headers, response.content, place, symbol)


def binance_error(
    status: int, headers: Mapping[str, str], body: bytes, place: str, symbol: str
) -> ProviderError:
    """The error for a response of Binance other than klines."""
    code, message = _code_and_message(body)
    if code == -1121:
        return UnknownSymbol(
            NAME,
            f"it has no symbol {symbol}: correct the symbol, or set Binance's own in provider_symbols",
        )
    if code == -1003 or status in (418, 429):
        wait = retry_after(headers)
        return RateLimited(
            NAME,
            f"{place} returned {status}: {excerpt(body)}",
            retry_after=wait if wait is not None else _seconds_of_ban(message, headers),
        )
    if status == 403:
        return PermanentError(NAME, f"{place} returned 403: its firewall blocks the address of this machine")
    if status == 200:
        return InvalidResponse(NAME, f"{place} returned no klines but {excerpt(body)}")
    return status_error(NAME, status, headers, body, place)


def _code_and_message(body: bytes) -> tuple[int, str]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return 0, ""
    if not isinstance(document, dict):
        return 0, ""
    code = document.get("code")
    return code if isinstance(code, int) else 0, str(document.get("msg", ""))


def _seconds_of_ban(message: str, headers: Mapping[str, str]) -> float | None:
    """From "IP banned until <ms>", by the server's clock."""
    until = re.search(r"banned until ([0-9]+)", message)
    if until is None:
        return None
    now = server_time(headers) or system_micros()
    return max(0.0, float(until[1]) / 1000 - now / MICROS_PER_SECOND)


# --- pages ------------------------------------------------------------------------------------------


def read_page(answer: object, window: TimeRange, now: int, place: str) -> Page:
    """Klines to columns, without candles that are not closed at the server's `now`.

    A cell that is not a number becomes NaN (a volume: infinite), which the quality rules reject with their reason.
    Raises InvalidResponse unless it is a list of klines inside `window`.
    """
    if not isinstance(answer, list):
        raise InvalidResponse(
            NAME, f"{place} returned no list of klines but {_glimpse(answer)}: {_NOT_BINANCE}"
        )
    if not answer:
        return Page(window, Candles.empty(), now)
    table = _table(answer, place)
    try:
        opens, closes = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64)
        if any(isinstance(at, float) and at % 1 for at in table[:, 0]):
            raise ValueError("part of a millisecond")
    except (TypeError, ValueError, OverflowError):
        raise InvalidResponse(NAME, f"{place} returned klines without valid times") from None
    inside = (opens >= window.start // _MILLIS) & (opens < -(-window.end // _MILLIS))
    if (opens[0] < window.start // _MILLIS) or not inside.any():
        raise InvalidResponse(NAME, f"{place} returned klines outside of the requested range {window}")
    if (opens[1:] < opens[:-1]).any():
        raise InvalidResponse(NAME, f"{place} returned klines that do not ascend")
    if not inside.all():  # some mirrors continue after endTime; the requested part is complete
        table, opens, closes = table[inside], opens[inside], closes[inside]
    columns = _floats(table[:, 1:6])
    # Every candle has a volume: a missing one must not be read as "no volume at this source".
    columns[4][np.isnan(columns[4])] = np.inf
    candles = Candles(opens * _MILLIS, *columns)
    return Page(window, candles.take(closes < now // _MILLIS), now)


def _table(answer: list[Any], place: str) -> NDArray[np.object_]:
    try:
        table = np.array(answer, dtype=object)
    except ValueError:
        table = np.empty(0, dtype=object)
    if table.ndim != 2 or table.shape[1] != _COLUMNS:
        raise InvalidResponse(
            NAME, f"{place} returned rows that are not klines of {_COLUMNS} columns: {_NOT_BINANCE}"
        )
    return table


def _floats(cells: NDArray[np.object_]) -> list[Floats]:
    """Text cells (n, 5) to five contiguous float64 columns, rounded like float()."""
    try:
        numbers = cells.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        numbers = np.vectorize(_number_or_nan, otypes=[np.float64])(cells)
    return list(np.ascontiguousarray(numbers.T))


def _number_or_nan(cell: object) -> float:
    try:
        return float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return float("nan")


def _glimpse(answer: object) -> str:
    return excerpt((answer if isinstance(answer, str) else repr(answer)).encode(errors="replace"))
