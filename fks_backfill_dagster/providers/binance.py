"""Binance spot candles: REST klines through ccxt's raw call, and the public archives.

Belongs here: pages, the reading and checking of klines, Binance's errors, and the order in which a
range is served: monthly archives, daily archives, REST for what is left.
Does not belong here: the archive files themselves (`binance_archive.py`), which of the rows are good
candles (`domain.quality`), what an absent candle means (`pipeline`).

How a lie is noticed. Neighbouring pages overlap by one candle, which must be the same in both: a page
of another market differs there. A row that does not belong to the asked times, or is out of order,
spoils its page. What a page lacks is asked for a second time: absent is what two answers lack, so a
short or empty page heals, and a real outage costs one more request. A spoiled page is asked again
within the retry budget; then BadAnswer is raised and nothing of the range is delivered.
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
    host_of,
    network_error,
    place_of,
    retry_after,
    said_in,
    seconds_to_next_minute,
    server_time,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.pages import contradicting, differing, joined

NAME = "binance"
DEFAULT_BASE_URL = "https://api.binance.com"
DEFAULT_ARCHIVE_URL = "https://data.binance.vision"

PAGE_SIZE = 1000
KLINES_PATH = "/api/v3/klines"
KLINES_WEIGHT = 2
REQUESTS_PER_MINUTE = 3000  # 6000 weight a minute per address
# From this share of the weight on the rest of the minute is waited for; others may be in flight.
_PAUSE_AT = 0.95
# Rounds of asking again for pages that contradict their neighbours.
_ROUNDS = 4
_COLUMNS = 12
_NOT_BINANCE = "run it again later, or correct providers.binance.base_url"
_MILLIS = 1000
# What a download costs in an estimate; the archives have no rate limit.
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
    """The closed candles of one answer, ascending, and the server's clock when it gave them."""

    asked: TimeRange
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
        deliveries = [seen.delivery for seen in fetched if seen.delivery and len(seen.delivery.candles)]
        have = Candles.concat([delivery.candles for delivery in deliveries])
        if plan.lacking(have):
            witnessed = RangeSet(seen.file.period for seen in fetched if seen.delivery)
            deliveries += self._from_rest(plan, have, witnessed, tally)
        warnings = tuple(seen.warning for seen in fetched if seen.warning)
        return Answer(tuple(deliveries), tally.count, warnings, tally.clocks)

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        """As if every archive file that can be there were there and complete."""
        plan = _Plan(symbol_of(series), series, self._opens(series, window))
        files: list[ArchiveFile] = []
        if self._archives.available:
            files = choose_files(plan.symbol, series.timeframe, plan.wanted, (), self._clock())
        rest = plan.wanted - RangeSet(file.period for file in files)
        pages = sum(len(page_ranges(part, plan.step)) for part in rest)
        a_minute = self._options.requests_per_minute or REQUESTS_PER_MINUTE
        return Estimate(2 * len(files) + pages, len(files) * _SECONDS_PER_FILE + pages * 60 / a_minute)

    def listed_at(self, series: Series) -> int | None:
        """The open of the first 1m candle: the true beginning, whatever the timeframe."""
        query: dict[str, str | int] = {
            "symbol": symbol_of(series),
            "interval": Timeframe.M1.value,
            "startTime": 0,
            "limit": 1,
        }
        everything = TimeRange(0, self._clock() + 60 * MICROS_PER_SECOND)
        page = self._klines.ask([query], [everything], Tally())[0]
        return int(page.candles.ts[0]) if len(page.candles) else None

    def _opens(self, series: Series, window: TimeRange) -> Instants:
        """The opens on the grid that lie in the window and not in the future."""
        end = min(window.end, max(self._clock(), window.start))
        return grid_of(series).opens(TimeRange(window.start, end))

    # --- archives

    def _from_archives(self, plan: _Plan, tally: Tally) -> list[Fetched]:
        """What the archives have of the plan; cut to what was lacking, so deliveries do not overlap."""
        fetched: list[Fetched] = []
        lacking = plan.wanted
        while lacking and self._archives.available:
            files = choose_files(plan.symbol, plan.series.timeframe, lacking, fetched, self._clock())
            if not files:
                break
            fetched += [_cut(seen, lacking) for seen in self._archives.fetch(files, tally)]
            lacking = plan.lacking(Candles.concat([s.delivery.candles for s in fetched if s.delivery]))
        return fetched

    # --- REST

    def _from_rest(self, plan: _Plan, have: Candles, witnessed: RangeSet, tally: Tally) -> list[Delivery]:
        """The lacking candles, and once more those that nobody has confirmed to be absent.

        An archive file that covers a lacking candle is a first witness of its absence.
        """
        lacking = plan.lacking(have)
        requested_at = self._clock()
        pages = self._ask(plan, lacking, tally)
        blocks = _assemble(pages, lacking)
        rows, seams = joined(blocks)
        now = min(page.server_time for page in pages)
        absent = plan.lacking(rows)
        doubtful = (absent & plan.closed(now) & lacking) - witnessed
        if doubtful:
            doubtful = self._shortened(plan, doubtful, tally)
            again = self._ask(plan, doubtful, tally)
            good = rows.take(~absent.contains(rows.ts))
            if any(differing(good, page.candles) for page in again):
                raise self._another_market(plan)
            # A bad row that came twice is one row for the quarantine.
            blocks += [block.take(~_repeated(block, rows)) for block in _assemble(again, doubtful)]
            rows, seams = joined(blocks)
        query = _query(plan.symbol, plan.series.timeframe, lacking.hull)
        source = f"{KLINES_PATH}?{urlencode(query)}"
        origin = Origin(NAME, Transport.REST, source, self._host, plan.symbol, requested_at)
        return [Delivery(rows, origin, seams)] if len(rows) else []

    def _shortened(self, plan: _Plan, doubtful: RangeSet, tally: Tally) -> RangeSet:
        """`doubtful` without the long empty beginning of a range, at one request of one row each.

        Before a listing whole months are empty; asking for all their pages twice would be a waste.
        """
        long = [part for part in doubtful if part.duration > PAGE_SIZE * plan.step]
        queries = [_query(plan.symbol, plan.series.timeframe, part) | {"limit": 1} for part in long]
        empty = []
        for part, page in zip(long, self._klines.ask(queries, long, tally), strict=True):
            first = int(page.candles.ts[0]) if len(page.candles) else part.end
            empty.append(TimeRange(part.start, first - (first - part.start) % plan.step))
        return doubtful - RangeSet(empty)

    def _ask(self, plan: _Plan, ranges: RangeSet, tally: Tally) -> list[_Page]:
        """The pages over `ranges`, neighbours agreeing.

        Ranges closer than half a page are asked together: a page costs the same, however full it is.
        """
        merged = ranges.merge_closer_than(PAGE_SIZE * plan.step // 2)
        asked = [page for part in merged for page in page_ranges(part, plan.step)]
        queries = [_query(plan.symbol, plan.series.timeframe, page) for page in asked]
        pages = self._klines.ask(queries, asked, tally)
        for _ in range(_ROUNDS):
            wrong = contradicting([page.candles for page in pages])
            if not wrong:
                return pages
            again = self._klines.ask([queries[i] for i in wrong], [asked[i] for i in wrong], tally)
            for index, page in zip(wrong, again, strict=True):
                pages[index] = page
        if contradicting([page.candles for page in pages]):
            raise self._another_market(plan)
        return pages

    def _another_market(self, plan: _Plan) -> Contradiction:
        return Contradiction(
            NAME,
            f"{self._klines.place} gives different values for the same candle of {plan.symbol} "
            f"{plan.series.timeframe}: pages of another market are among its answers",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """One fetch: the symbol as Binance writes it, and the opens that are asked for."""

    symbol: str
    series: Series
    opens: Instants

    @property
    def step(self) -> int:
        return self.series.timeframe.micros

    @property
    def wanted(self) -> RangeSet:
        return self.lacking(Candles.empty())

    def lacking(self, have: Candles) -> RangeSet:
        """The candles of which `have` holds no row that could be stored.

        A row with a NaN or off the grid does not count, so the next source is asked for that candle;
        the bad row is delivered all the same, to be quarantined with its reason.
        """
        missing = self.opens
        if len(have) and len(missing):
            window = TimeRange(int(missing[0]), int(missing[-1]) + self.step)
            good = verify(have, window, grid_of(self.series), window.end).good
            missing = missing[~np.isin(missing, good.ts, assume_unique=True)]
        return RangeSet.from_arrays(missing, missing + self.step)

    def closed(self, now: int) -> RangeSet:
        """Until where candles are closed at `now`."""
        end = grid_of(self.series).closed_end(now)
        return RangeSet([TimeRange(min(0, end), end)])


def symbol_of(series: Series) -> str:
    """`BTC/USDT` -> `BTCUSDT`, unless the settings name it."""
    return series.provider_symbol(NAME) or series.symbol.replace("/", "")


def _query(symbol: str, timeframe: Timeframe, asked: TimeRange) -> dict[str, str | int]:
    """Binance takes both bounds as inclusive, in milliseconds."""
    return {
        "symbol": symbol,
        "interval": timeframe.value,
        "startTime": asked.start // _MILLIS,
        "endTime": asked.end // _MILLIS - 1,
        "limit": PAGE_SIZE,
    }


# --- columns --------------------------------------------------------------------------------------


def _cut(seen: Fetched, lacking: RangeSet) -> Fetched:
    """A file's delivery without the rows that were not lacking, so that deliveries do not overlap."""
    if seen.delivery is None:
        return seen
    candles = seen.delivery.candles
    kept = candles.take(lacking.contains(candles.ts))
    return Fetched(seen.file, seen.outcome, seen.delivery.with_candles(kept), seen.warning)


def _assemble(pages: Sequence[_Page], wanted: RangeSet) -> list[Candles]:
    """The rows of each page that are wanted; candles that pages share once, in the earlier one.

    Rows that repeat inside one page stay: judging them is not this module's business.
    """
    blocks: list[Candles] = []
    shared = np.empty(0, dtype=np.int64)
    for page in pages:
        fresh = page.candles.take(~among(page.candles.ts, shared))
        blocks.append(fresh.take(wanted.contains(fresh.ts)))
        shared = page.candles.ts
    return blocks


def _repeated(rows: Candles, before: Candles) -> NDArray[np.bool_]:
    """Which of `rows` stand in `before` (ascending) with the same values; a NaN equals a NaN."""
    if not len(before):
        return np.zeros(len(rows), dtype=bool)
    index = np.minimum(np.searchsorted(before.ts, rows.ts), len(before) - 1)
    same = np.ones(len(rows), dtype=bool)
    for mine, theirs in zip(rows.columns(), before.take(index).columns(), strict=True):
        same &= (mine == theirs) | ((mine != mine) & (theirs != theirs))
    return same


def read_page(answer: object, asked: TimeRange, now: int, place: str) -> _Page:
    """Klines to columns, without the candles that are not closed at the server's `now`.

    A cell that is no number becomes NaN (a volume: infinite), which the quality rules reject with
    their reason. Raises BadAnswer for what is no list of klines, or one of other times than asked.
    """
    if not isinstance(answer, list):
        raise BadAnswer(NAME, f"{place} answered no list of klines but {_glimpse(answer)}: {_NOT_BINANCE}")
    if not answer:
        return _Page(asked, Candles.empty(), now)
    table = _table(answer, place)
    try:
        opens, closes = table[:, 0].astype(np.int64), table[:, 6].astype(np.int64)
        if any(isinstance(at, float) and at % 1 for at in table[:, 0]):
            raise ValueError("part of a millisecond")
    except (TypeError, ValueError, OverflowError):
        raise BadAnswer(NAME, f"{place} answered klines without valid times") from None
    inside = (opens >= asked.start // _MILLIS) & (opens < -(-asked.end // _MILLIS))
    if (opens[0] < asked.start // _MILLIS) or not inside.any():
        raise BadAnswer(NAME, f"{place} answered klines outside of {asked}, which was asked for")
    if (opens[1:] < opens[:-1]).any():
        raise BadAnswer(NAME, f"{place} answered klines that do not ascend")
    if not inside.all():  # it runs on behind endTime, as some mirrors do: the asked part is whole
        table, opens, closes = table[inside], opens[inside], closes[inside]
    columns = _floats(table[:, 1:6])
    # Binance has a volume for every candle: one that is absent must not pass as "source has none".
    columns[4][np.isnan(columns[4])] = np.inf
    candles = Candles(opens * _MILLIS, *columns)
    return _Page(asked, candles.take(closes < now // _MILLIS), now)


def _table(answer: list[Any], place: str) -> NDArray[np.object_]:
    try:
        table = np.array(answer, dtype=object)
    except ValueError:
        table = np.empty(0, dtype=object)
    if table.ndim != 2 or table.shape[1] != _COLUMNS:
        raise BadAnswer(
            NAME, f"{place} answered rows that are no klines of {_COLUMNS} columns: {_NOT_BINANCE}"
        )
    return table


def _floats(cells: NDArray[np.object_]) -> list[Floats]:
    """Text cells (n, 5) to five contiguous float64 columns, rounded as float() rounds."""
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
    return said_in((answer if isinstance(answer, str) else repr(answer)).encode(errors="replace"))


# --- asking ---------------------------------------------------------------------------------------


class _Klines:
    """Asks for klines through ccxt, with limiter, slots and retries of HttpClient."""

    def __init__(
        self, options: ProviderOptions, pool: RequestPool, limiter: Limiter, clock: Callable[[], int]
    ) -> None:
        self.url = options.base_url.rstrip("/") + KLINES_PATH
        self.place = place_of(self.url)
        self._client = HttpClient(NAME, options, pool, limiter)
        self._limiter = limiter
        self._clock = clock
        self._pause_at = _PAUSE_AT * KLINES_WEIGHT * (options.requests_per_minute or REQUESTS_PER_MINUTE)
        self._local = threading.local()

    def ask(
        self, queries: Sequence[Mapping[str, str | int]], asked: Sequence[TimeRange], tally: Tally
    ) -> list[_Page]:
        """One page per query, side by side; each is retried until it is a valid page for its range."""

        def page(item: tuple[Mapping[str, str | int], TimeRange]) -> _Page:
            query, window = item
            return self._client.run(lambda: self._once(query, window, tally), tally, weight=KLINES_WEIGHT)

        return self._client.pool.map(NAME, page, list(zip(queries, asked, strict=True)))

    def _once(self, query: Mapping[str, str | int], asked: TimeRange, tally: Tally) -> _Page:
        market = self._market()
        answer = market.klines(query)
        now = tally.closed_by(market.headers, self._clock())
        self._heed_weight(market.headers, now)
        return read_page(answer, asked, now, self.place)

    def _heed_weight(self, headers: Mapping[str, str], now: int) -> None:
        """Stops everybody until the next minute when the address's weight is nearly spent: not by us alone."""
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
    """One thread's ccxt instance (3 ms to make), and the head of its last answer.

    ccxt tells no status, and Retry-After only beside its exceptions; so a hook on the session it uses
    keeps each response. Its own limiter and retries are off: they know nothing of ours.
    """

    def __init__(self, client: HttpClient, url: str) -> None:
        import ccxt  # here, because it takes a third of a second and most commands ask nobody

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
        """The decoded answer; the text itself where it is no JSON."""
        self._response = None
        symbol = str(query["symbol"])
        try:
            answer = self._ccxt.public_get_klines(dict(query))
        except self._errors as error:
            raise self._meaning(error, symbol) from None
        except UnicodeDecodeError:  # ccxt decodes the body before anybody can judge it
            raise BadAnswer(NAME, f"{place_of(self._url)} answered no text: {_NOT_BINANCE}") from None
        if self._response is not None and self._response.status_code != 200:
            raise self._said(self._response, symbol)  # a redirection to nowhere is no error to ccxt
        return answer

    def _remember(self, response: requests.Response, *_: object, **__: object) -> None:
        self._response = response
        body = read_body(response, MAX_JSON_BYTES, self._client.answer_seconds)
        response.raw = io.BytesIO(body)  # where requests takes the content from, once the hooks are done

    def _meaning(self, error: Exception, symbol: str) -> ProviderError:
        cause = error.__cause__
        broken = isinstance(cause, requests.RequestException) and not isinstance(cause, requests.HTTPError)
        if self._response is None or broken:
            return network_error(NAME, cause or error, place_of(self._url))
        return self._said(self._response, symbol)

    def _said(self, response: requests.Response, symbol: str) -> ProviderError:
        place = place_of(self._url)
        return binance_error(response.status_code, response.headers, response.content, place, symbol)


def binance_error(
    status: int, headers: Mapping[str, str], body: bytes, place: str, symbol: str
) -> ProviderError:
    """What Binance means by an answer that is no list of klines."""
    code, message = _code_and_message(body)
    if code == -1121:
        return UnknownSymbol(
            NAME,
            f"it has no symbol {symbol}: correct the symbol, or name Binance's own in provider_symbols",
        )
    if code == -1003 or status in (418, 429):
        told = retry_after(headers)
        return RateLimited(
            NAME,
            f"{place} answered {status}: {said_in(body)}",
            retry_after=told if told is not None else _seconds_of_ban(message, headers),
        )
    if status == 403:
        return PermanentError(NAME, f"{place} answered 403: its firewall refuses this machine's address")
    if status == 200:
        return BadAnswer(NAME, f"{place} answered no klines but {said_in(body)}")
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
