"""Binance spot candles: REST klines through ccxt's raw call, and the public archives.

Belongs here: pages, parsing and checks of klines, Binance's errors, and the order of the sources of a range: monthly
archives, daily archives, REST for the remaining candles.
Does not belong here: the archive files themselves (`binance_archive.py`), the validity of rows (`domain.quality`),
the meaning of a missing candle (`pipeline`).

Detection of wrong responses: neighbouring pages overlap by one candle, which must be equal in both; a page of another
market differs there. A row outside the requested times or out of order invalidates its page. An invalid page is
requested again within the retry budget; then BadAnswer is raised and nothing of the range is delivered. Candles
missing from a page are requested a second time and count as absent if both responses miss them: so a short or empty
page is repaired, and a real outage costs one more request.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np
import orjson
import requests
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, among
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, Timeframe
from fks_backfill_dagster.known_providers import BINANCE
from fks_backfill_dagster.providers.base import (
    Answer,
    BadAnswer,
    Capabilities,
    Contradiction,
    Delivery,
    Estimate,
    Origin,
    PermanentError,
    ProviderError,
    ProviderOptions,
    RateLimited,
    Transport,
    UnknownSymbol,
)
from fks_backfill_dagster.providers.binance_archive import ArchiveFile, Archives, Fetched, choose_files
from fks_backfill_dagster.providers.http.body import MAX_JSON_BYTES, read_body
from fks_backfill_dagster.providers.http.client import HttpClient
from fks_backfill_dagster.providers.http.errors import (
    excerpt,
    host_of,
    network_error,
    place_of,
    retry_after,
    seconds_to_next_minute,
    server_time,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.pages import contradicting, differing, joined

NAME = BINANCE.name

PAGE_SIZE = 1000
KLINES_PATH = "/api/v3/klines"
# From this share of the weight on, requests wait for the next minute; others may be in flight.
_PAUSE_AT = 0.95
# Rounds of repeated requests for pages that contradict their neighbours.
_ROUNDS = 4
_COLUMNS = 12
_NOT_BINANCE = "run it again later, or correct providers.binance.base_url"
_MILLIS = 1000
# The duration of a download in an estimate; the archives have no rate limit.
_SECONDS_PER_FILE = 0.2


def page_ranges(window: TimeRange, step: int, size: int = PAGE_SIZE) -> list[TimeRange]:
    """Pages of at most `size` candles over a window of whole candles; neighbours share one candle."""
    count = window.duration // step
    if count == 0:
        return []
    return [
        TimeRange(window.start + first * step, window.start + min(first + size, count) * step)
        for first in range(0, max(count - 1, 1), size - 1)
    ]


@dataclass(frozen=True, slots=True)
class _Page:
    """The closed candles of one response, ascending, and the server's clock at that time."""

    window: TimeRange
    candles: Candles
    server_time: int


class Binance:
    """Implements `Provider`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.CRYPTO: frozenset(Timeframe)}, page_size=PAGE_SIZE, confirms_absence=True
    )

    def __init__(
        self,
        options: ProviderOptions,
        pool: RequestPool,
        limiter: Limiter,
        clock: Callable[[], int] = system_micros,
    ) -> None:
        self._options = options
        self._clock = clock
        self._klines = _Klines(options, pool, limiter, clock)
        self._archives = Archives(options, pool, limiter, clock)
        self._host = host_of(options.base_url)

    def missing_key(self) -> str | None:
        return None

    def instrument(self, series: Series) -> str:
        return symbol_of(series)

    def fetch(self, series: Series, window: TimeRange) -> Answer:
        with counted() as tally:
            return self._fetch(series, window, tally)

    def _fetch(self, series: Series, window: TimeRange, tally: Tally) -> Answer:
        plan = _Plan(symbol_of(series), series, self._opens(series, window))
        fetched = self._from_archives(plan, tally)
        deliveries = [one.delivery for one in fetched if one.delivery and len(one.delivery.candles)]
        archived = Candles.concat([delivery.candles for delivery in deliveries])
        if plan.missing(archived):
            covered = RangeSet(one.file.period for one in fetched if one.delivery)
            deliveries += self._from_rest(plan, archived, covered, tally)
        warnings = tuple(one.warning for one in fetched if one.warning)
        return Answer(tuple(deliveries), tally.count, warnings, tally.clocks)

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        """Assumes that every archive file that can be published exists and is complete."""
        plan = _Plan(symbol_of(series), series, self._opens(series, window))
        files: list[ArchiveFile] = []
        if self._archives.available:
            files = choose_files(plan.symbol, series.timeframe, plan.wanted, (), self._clock())
        remaining = plan.wanted - RangeSet(file.period for file in files)
        pages = sum(len(page_ranges(part, plan.step)) for part in remaining)
        a_minute = self._options.requests_per_minute or BINANCE.requests_per_minute
        return Estimate(2 * len(files) + pages, len(files) * _SECONDS_PER_FILE + pages * 60 / a_minute)

    def listed_at(self, series: Series) -> int | None:
        """The open of the first 1m candle, for every timeframe."""
        query: dict[str, str | int] = {
            "symbol": symbol_of(series),
            "interval": Timeframe.M1.value,
            "startTime": 0,
            "limit": 1,
        }
        everything = TimeRange(0, self._clock() + 60 * MICROS_PER_SECOND)
        page = self._klines.fetch([query], [everything], Tally())[0]
        return int(page.candles.ts[0]) if len(page.candles) else None

    def _opens(self, series: Series, window: TimeRange) -> Instants:
        """The opens on the grid in the window, except future ones."""
        end = min(window.end, max(self._clock(), window.start))
        return grid_of(series).opens(TimeRange(window.start, end))

    # --- archives

    def _from_archives(self, plan: _Plan, tally: Tally) -> list[Fetched]:
        """The candles of the plan that the archives have; cut to missing candles, so that deliveries do not overlap."""
        fetched: list[Fetched] = []
        missing = plan.wanted
        while missing and self._archives.available:
            files = choose_files(plan.symbol, plan.series.timeframe, missing, fetched, self._clock())
            if not files:
                break
            fetched += [_cut(one, missing) for one in self._archives.fetch(files, tally)]
            missing = plan.missing(Candles.concat([one.delivery.candles for one in fetched if one.delivery]))
        return fetched

    # --- REST

    def _from_rest(self, plan: _Plan, archived: Candles, covered: RangeSet, tally: Tally) -> list[Delivery]:
        """The missing candles; those missing from the first response too are requested a second time.

        covered: the periods of archive files, which count as the first response.
        """
        missing = plan.missing(archived)
        requested_at = self._clock()
        pages = self._pages(plan, missing, tally)
        blocks = _assemble(pages, missing)
        rows, seams = joined(blocks)
        now = min(page.server_time for page in pages)
        absent = plan.missing(rows)
        unconfirmed = (absent & plan.closed(now) & missing) - covered
        if unconfirmed:
            unconfirmed = self._shortened(plan, unconfirmed, tally)
            again = self._pages(plan, unconfirmed, tally)
            good = rows.take(~absent.contains(rows.ts))
            if any(differing(good, page.candles) for page in again):
                raise self._contradiction(plan)
            # A bad row in both responses is one row for the quarantine.
            blocks += [block.take(~_repeated(block, rows)) for block in _assemble(again, unconfirmed)]
            rows, seams = joined(blocks)
        query = _query(plan.symbol, plan.series.timeframe, missing.hull)
        source = f"{KLINES_PATH}?{urlencode(query)}"
        origin = Origin(NAME, Transport.REST, source, self._host, plan.symbol, requested_at)
        return [Delivery(rows, origin, seams)] if len(rows) else []

    def _shortened(self, plan: _Plan, unconfirmed: RangeSet, tally: Tally) -> RangeSet:
        """`unconfirmed` without the empty beginnings of long ranges, at the cost of one request for one row each.

        Before a listing, whole months are empty; this avoids a second request for all their pages.
        """
        long = [part for part in unconfirmed if part.duration > PAGE_SIZE * plan.step]
        queries = [_query(plan.symbol, plan.series.timeframe, part) | {"limit": 1} for part in long]
        empty = []
        for part, page in zip(long, self._klines.fetch(queries, long, tally), strict=True):
            first = int(page.candles.ts[0]) if len(page.candles) else part.end
            empty.append(TimeRange(part.start, first - (first - part.start) % plan.step))
        return unconfirmed - RangeSet(empty)

    def _pages(self, plan: _Plan, ranges: RangeSet, tally: Tally) -> list[_Page]:
        """The pages over `ranges`; neighbours agree.

        Ranges closer than half a page share a request: the cost of a page does not depend on its size.
        """
        merged = ranges.merge_closer_than(PAGE_SIZE * plan.step // 2)
        windows = [window for part in merged for window in page_ranges(part, plan.step)]
        queries = [_query(plan.symbol, plan.series.timeframe, window) for window in windows]
        pages = self._klines.fetch(queries, windows, tally)
        for _ in range(_ROUNDS):
            wrong = contradicting([page.candles for page in pages])
            if not wrong:
                return pages
            again = self._klines.fetch([queries[i] for i in wrong], [windows[i] for i in wrong], tally)
            for index, page in zip(wrong, again, strict=True):
                pages[index] = page
        if contradicting([page.candles for page in pages]):
            raise self._contradiction(plan)
        return pages

    def _contradiction(self, plan: _Plan) -> Contradiction:
        return Contradiction(
            NAME,
            f"{self._klines.place} returned different values for the same candle of {plan.symbol} "
            f"{plan.series.timeframe}: some pages belong to another market",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """One fetch: the symbol in Binance's notation, and the requested opens."""

    symbol: str
    series: Series
    opens: Instants

    @property
    def step(self) -> int:
        return self.series.timeframe.micros

    @property
    def wanted(self) -> RangeSet:
        return self.missing(Candles.empty())

    def missing(self, rows: Candles) -> RangeSet:
        """The candles without a valid row in `rows`.

        A row with a NaN or off the grid does not count, so that candle is requested from the next source; the bad row
        is delivered nevertheless, to be quarantined with its reason.
        """
        missing = self.opens
        if len(rows) and len(missing):
            window = TimeRange(int(missing[0]), int(missing[-1]) + self.step)
            good = verify(rows, window, grid_of(self.series), window.end).good
            missing = missing[~np.isin(missing, good.ts, assume_unique=True)]
        return RangeSet.from_arrays(missing, missing + self.step)

    def closed(self, now: int) -> RangeSet:
        """The range of candles that are closed at `now`."""
        end = grid_of(self.series).closed_end(now)
        return RangeSet([TimeRange(min(0, end), end)])


def symbol_of(series: Series) -> str:
    """`BTC/USDT` -> `BTCUSDT`, unless set in the settings."""
    return series.provider_symbol(NAME) or series.symbol.replace("/", "")


def _query(symbol: str, timeframe: Timeframe, window: TimeRange) -> dict[str, str | int]:
    """The query; both bounds are inclusive, in milliseconds."""
    return {
        "symbol": symbol,
        "interval": timeframe.value,
        "startTime": window.start // _MILLIS,
        "endTime": window.end // _MILLIS - 1,
        "limit": PAGE_SIZE,
    }


# --- columns --------------------------------------------------------------------------------------


def _cut(fetched: Fetched, missing: RangeSet) -> Fetched:
    """A file's delivery, restricted to missing candles, so that deliveries do not overlap."""
    if fetched.delivery is None:
        return fetched
    candles = fetched.delivery.candles
    kept = candles.take(missing.contains(candles.ts))
    return Fetched(fetched.file, fetched.outcome, fetched.delivery.with_candles(kept), fetched.warning)


def _assemble(pages: Sequence[_Page], wanted: RangeSet) -> list[Candles]:
    """The wanted rows of each page; candles shared by pages only once, in the earlier page.

    Repeated rows inside one page remain: `domain.quality` checks them.
    """
    blocks: list[Candles] = []
    shared = np.empty(0, dtype=np.int64)
    for page in pages:
        fresh = page.candles.take(~among(page.candles.ts, shared))
        blocks.append(fresh.take(wanted.contains(fresh.ts)))
        shared = page.candles.ts
    return blocks


def _repeated(rows: Candles, before: Candles) -> NDArray[np.bool_]:
    """Which of `rows` are in `before` (ascending) with the same values; NaN equals NaN."""
    if not len(before):
        return np.zeros(len(rows), dtype=bool)
    index = np.minimum(np.searchsorted(before.ts, rows.ts), len(before) - 1)
    same = np.ones(len(rows), dtype=bool)
    for mine, theirs in zip(rows.columns(), before.take(index).columns(), strict=True):
        same &= (mine == theirs) | ((mine != mine) & (theirs != theirs))
    return same


def read_page(answer: object, window: TimeRange, now: int, place: str) -> _Page:
    """Klines to columns, without candles that are not closed at the server's `now`.

    A cell that is not a number becomes NaN (a volume: infinite), which the quality rules reject with their reason.
    Raises BadAnswer unless it is a list of klines inside `window`.
    """
    if not isinstance(answer, list):
        raise BadAnswer(NAME, f"{place} returned no list of klines but {_glimpse(answer)}: {_NOT_BINANCE}")
    if not answer:
        return _Page(window, Candles.empty(), now)
    table = _table(answer, place)
    try:
        opens, closes = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64)
        if any(isinstance(at, float) and at % 1 for at in table[:, 0]):
            raise ValueError("part of a millisecond")
    except (TypeError, ValueError, OverflowError):
        raise BadAnswer(NAME, f"{place} returned klines without valid times") from None
    inside = (opens >= window.start // _MILLIS) & (opens < -(-window.end // _MILLIS))
    if (opens[0] < window.start // _MILLIS) or not inside.any():
        raise BadAnswer(NAME, f"{place} returned klines outside of the requested range {window}")
    if (opens[1:] < opens[:-1]).any():
        raise BadAnswer(NAME, f"{place} returned klines that do not ascend")
    if not inside.all():  # some mirrors continue after endTime; the requested part is complete
        table, opens, closes = table[inside], opens[inside], closes[inside]
    columns = _floats(table[:, 1:6])
    # Every candle has a volume: a missing one must not be read as "no volume at this source".
    columns[4][np.isnan(columns[4])] = np.inf
    candles = Candles(opens * _MILLIS, *columns)
    return _Page(window, candles.take(closes < now // _MILLIS), now)


def _table(answer: list[Any], place: str) -> NDArray[np.object_]:
    try:
        table = np.array(answer, dtype=object)
    except ValueError:
        table = np.empty(0, dtype=object)
    if table.ndim != 2 or table.shape[1] != _COLUMNS:
        raise BadAnswer(
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


# --- requests -------------------------------------------------------------------------------------


class _Klines:
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
    ) -> list[_Page]:
        """One page per query, concurrently; each is retried until it is a valid page of its window."""

        def page(item: tuple[Mapping[str, str | int], TimeRange]) -> _Page:
            query, window = item
            return self._client.run(
                lambda: self._once(query, window, tally), tally, weight=BINANCE.request_weight
            )

        return self._client.pool.map(NAME, page, list(zip(queries, windows, strict=True)))

    def _once(self, query: Mapping[str, str | int], window: TimeRange, tally: Tally) -> _Page:
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
            self._limiter.penalise(NAME, seconds_to_next_minute(now))

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
        """The decoded response; the text itself if it is not JSON."""
        self._response = None
        symbol = str(query["symbol"])
        try:
            answer = self._ccxt.public_get_klines(dict(query))
        except self._errors as error:
            raise self._error_of(error, symbol) from None
        except UnicodeDecodeError:  # ccxt decodes the body before it can be checked
            raise BadAnswer(NAME, f"{place_of(self._url)} returned no text: {_NOT_BINANCE}") from None
        if self._response is not None and self._response.status_code != 200:
            raise self._response_error(self._response, symbol)  # ccxt accepts a redirect without a target
        return answer

    def _remember(self, response: requests.Response, *_: object, **__: object) -> None:
        self._response = response
        body = read_body(response, MAX_JSON_BYTES, self._client.response_seconds)
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
        return BadAnswer(NAME, f"{place} returned no klines but {excerpt(body)}")
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
