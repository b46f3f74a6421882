"""CoinGecko's OHLC of coins, as far as it lies on our grid, which depends on the key.

Belongs here: coin ids, the two OHLC endpoints, close stamps, and the meaning of CoinGecko's responses.
Does not belong here: the comparison with the prices of an exchange (splices, in `pipeline`): CoinGecko quotes an
average over many exchanges, in dollars also for USDT and USDC.

A demo key (public host) has `/ohlc?days=N` only, with automatic granularity:
  1 day        30m native; 1h is derived from it
  7 .. 30 days 4h native; 1d and 1w are derived from it
  beyond       4 days, which is not a supported timeframe.
A paid key (base_url on the host pro-api...) also has `/ohlc/range`: 1h and 1d native since 2018-02-09, 4h derived
from 1h and 1w from 1d. There is nothing below 30m, and no volume: `total_volumes` of another endpoint covers a
rolling day.

Rows are stamped at the close, so they are moved to the open. The response does not contain its granularity, and four
days fit the grid of 4h: so the distance of the rows is checked. It does not contain the coin either, but neighbouring
ranges overlap by an interval, which must be equal in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

import numpy as np
import orjson

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_MINUTE,
    MICROS_PER_SECOND,
    Timeframe,
)
from fks_backfill_dagster.known_providers import COINGECKO
from fks_backfill_dagster.providers.base import (
    Capabilities,
    Contradiction,
    Delivery,
    Estimate,
    FetchResult,
    InvalidResponse,
    NotEntitled,
    Origin,
    ProviderError,
    ProviderOptions,
    RateLimited,
    Transport,
    UnknownSymbol,
    WrongKey,
    check_served,
)
from fks_backfill_dagster.providers.http.client import HttpClient, Reply
from fks_backfill_dagster.providers.http.errors import excerpt, host_of, retry_after
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.keys import usable_key
from fks_backfill_dagster.providers.pages import agreeing, joined

NAME, KEY_VARIABLE = COINGECKO.name, COINGECKO.key_variable

_PRO_HOST = "pro-api"
_RANGE_START = 1_518_134_400 * MICROS_PER_SECOND  # 2018-02-09
_LATEST_MS = 1e14  # after any valid time
_EXACT = 2.0**53  # from here on a double may be a rounded integer
# Error codes: invalid key or wrong host for it; data that the plan does not cover.
_KEY_CODES = frozenset({10002, 10010, 10011})
_PLAN_CODES = frozenset({10005, 10006, 10012})

COINS: Mapping[str, str] = {
    "AAVE": "aave",
    "ADA": "cardano",
    "ALGO": "algorand",
    "APT": "aptos",
    "ARB": "arbitrum",
    "ATOM": "cosmos",
    "AVAX": "avalanche-2",
    "BCH": "bitcoin-cash",
    "BNB": "binancecoin",
    "BTC": "bitcoin",
    "DOGE": "dogecoin",
    "DOT": "polkadot",
    "ETC": "ethereum-classic",
    "ETH": "ethereum",
    "FIL": "filecoin",
    "HBAR": "hedera-hashgraph",
    "ICP": "internet-computer",
    "LINK": "chainlink",
    "LTC": "litecoin",
    "MKR": "maker",
    "NEAR": "near",
    "OP": "optimism",
    "PEPE": "pepe",
    "SHIB": "shiba-inu",
    "SOL": "solana",
    "SUI": "sui",
    "TON": "the-open-network",
    "TRX": "tron",
    "UNI": "uniswap",
    "USDC": "usd-coin",
    "USDT": "tether",
    "VET": "vechain",
    "XLM": "stellar",
    "XMR": "monero",
    "XRP": "ripple",
    "XTZ": "tezos",
}
"""CoinGecko's symbols are not unique; these are the coins of the same symbol on exchanges."""

_DOLLARS = frozenset({"USD", "USDT", "USDC"})


@dataclass(frozen=True, slots=True)
class _Endpoint:
    """How to request a timeframe.

    fine: the native timeframe. days: the valid values of `/ohlc?days=`, ascending; empty for `/ohlc/range`, which has
    an `interval` and at most `page` candles of `fine` per request.
    """

    fine: Timeframe
    days: tuple[int, ...] = ()
    interval: str = ""
    page: int = 0

    def pages(self, span: TimeRange, now: int) -> list[TimeRange]:
        """The range of each request; the whole span where the granularity depends on its age."""
        start = max(span.start, now - self.days[-1] * MICROS_PER_DAY if self.days else _RANGE_START)
        end = min(span.end, now)
        if start >= end:
            return []
        size = self.page * self.fine.micros if self.interval else end - start
        return [TimeRange(first, min(first + size, end)) for first in range(start, end, size)]

    def request(self, page: TimeRange, now: int) -> tuple[str, dict[str, str | int]]:
        """The end of the path and the parameters."""
        if self.interval:
            # Whether `to` limits opens or closes is not documented: an additional interval covers both.
            until = min(page.end + self.fine.micros, now)
            bounds = {"from": page.start // MICROS_PER_SECOND, "to": until // MICROS_PER_SECOND}
            return "/ohlc/range", {**bounds, "interval": self.interval}
        age = -((page.start - now) // MICROS_PER_DAY)
        return "/ohlc", {"days": next(days for days in self.days if days >= age)}


_DAY, _MONTH = (1,), (7, 14, 30)
# The limit is 744 hours or 180 days per request; minus two, because both bounds may count.
_HOURLY, _DAILY = (
    _Endpoint(Timeframe.H1, interval="hourly", page=742),
    _Endpoint(Timeframe.D1, interval="daily", page=178),
)
_DEMO = {
    Timeframe.M30: _Endpoint(Timeframe.M30, _DAY),
    Timeframe.H1: _Endpoint(Timeframe.M30, _DAY),
    Timeframe.H4: _Endpoint(Timeframe.H4, _MONTH),
    Timeframe.D1: _Endpoint(Timeframe.H4, _MONTH),
    Timeframe.W1: _Endpoint(Timeframe.H4, _MONTH),
}
_PRO = {
    Timeframe.M30: _Endpoint(Timeframe.M30, _DAY),
    Timeframe.H1: _HOURLY,
    Timeframe.H4: _HOURLY,
    Timeframe.D1: _DAILY,
    Timeframe.W1: _DAILY,
}


# Documentation: the last UTC day is complete at 00:35.
_PUBLICATION_DELAY = 35 * MICROS_PER_MINUTE


class CoinGecko:
    """Implements `Provider`; safe to call from several threads. The capabilities depend on the host."""

    name = NAME

    def __init__(
        self,
        options: ProviderOptions,
        pool: RequestPool,
        limiter: Limiter,
        clock: Callable[[], int] = system_micros,
    ) -> None:
        self._options = options
        self._clock = clock
        self._base_url = options.base_url.rstrip("/")
        pro = (urlsplit(self._base_url).hostname or "").startswith(_PRO_HOST)
        self._endpoints = _PRO if pro else _DEMO
        self.capabilities = Capabilities(
            {AssetClass.CRYPTO: frozenset(self._endpoints)},
            page_size=max(
                one.page or one.days[-1] * MICROS_PER_DAY // one.fine.micros
                for one in self._endpoints.values()
            ),
            needs_key=KEY_VARIABLE,
            has_volume=False,
            derived={
                AssetClass.CRYPTO: {at: one.fine for at, one in self._endpoints.items() if at is not one.fine}
            },
            depth={at: one.days[-1] * MICROS_PER_DAY for at, one in self._endpoints.items() if one.days},
            publication_delay=_PUBLICATION_DELAY,
        )
        key = usable_key(NAME, options.key, KEY_VARIABLE) if options.key else None
        header = "x-cg-pro-api-key" if pro else "x-cg-demo-api-key"
        self._client = HttpClient(NAME, options, pool, limiter, headers={header: key} if key else {})

    def missing_key(self) -> str | None:
        return None if self._options.key else KEY_VARIABLE

    def listed_at(self, series: Series) -> int | None:
        """Unknown: the available history is limited by the key, not by the age of the coin."""
        return None

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        requests = len(self._endpoints[series.timeframe].pages(window, self._clock()))
        a_minute = self._options.requests_per_minute or COINGECKO.requests_per_minute
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        check_served(self, series)
        query = _Query(coin_of(series), currency_of(series), self._endpoints[series.timeframe])
        with counted() as tally:
            return self._fetch(query, window, tally)

    def _fetch(self, query: _Query, window: TimeRange, tally: Tally) -> FetchResult:
        now = self._clock()
        pages = query.endpoint.pages(window, now)
        if not window or not pages:
            return FetchResult(())

        def request(some: Sequence[TimeRange]) -> list[Candles]:
            return self._client.pool.map(NAME, lambda page: self._request(query, page, now, tally), some)

        blocks = agreeing(pages, request)
        if blocks is None:
            raise Contradiction(
                NAME,
                f"it returned different values for the same candle of {query.coin} in neighbouring ranges",
            )
        rows, seams = joined([block.within(page) for block, page in zip(blocks, pages, strict=True)])
        path, parameters = query.request(TimeRange(pages[0].start, pages[-1].end), now)
        source = f"{path}?{urlencode(parameters)}"
        origin = Origin(NAME, Transport.REST, source, host_of(self._base_url), query.coin, now)
        deliveries = (Delivery(rows, origin, seams),) if len(rows) else ()
        return FetchResult(deliveries, tally.count, clocks=tally.clocks)

    def instrument(self, series: Series) -> str:
        return coin_of(series)

    def _request(self, query: _Query, page: TimeRange, now: int, tally: Tally) -> Candles:
        """The closed candles of `page` and others returned with them, ascending."""
        path, parameters = query.request(page, now)
        url, step = self._base_url + path, query.endpoint.fine.micros

        def attempt() -> Candles:
            reply = self._client.exchange(url, parameters)
            rows = read_rows(self._document(reply, query), step, reply.place)
            closed_by = tally.closed_by(reply.headers, self._clock())
            # A forming row may be stamped with the current time.
            rows = rows.take(rows.ts + step <= closed_by // step * step)
            if not is_spaced(rows.ts, step):
                raise InvalidResponse(
                    NAME,
                    f"{reply.place} returned rows that are not {step // MICROS_PER_MINUTE} minutes apart",
                )
            if query.endpoint.days:
                if len(rows) == 1:
                    return Candles.empty()  # the granularity of a single row is unknown
                # The first row may cover only the part of its interval inside the requested days.
                rows = rows.take(rows.ts >= closed_by - int(parameters["days"]) * MICROS_PER_DAY)
            return rows

        return self._client.run(attempt, tally)

    def _document(self, reply: Reply, query: _Query) -> object:
        """The decoded response. Raises the error it stands for, also with status 200."""
        document = self._client.json(reply) if reply.status == 200 else None
        if reply.status != 200 or (isinstance(document, dict) and {"error", "status"} & set(document)):
            raise self._failure(reply, query)
        return document

    def _failure(self, reply: Reply, query: _Query) -> ProviderError:
        code, message = _code_and_message(reply.body)
        text = f"{reply.place} returned {reply.status}: {excerpt((message or 'nothing').encode(), self._options.key)}"
        if "coin not found" in message.lower():
            return UnknownSymbol(
                NAME,
                f"it has no coin {query.coin}: set provider_symbols.coingecko of the symbol to its id",
            )
        if "vs_currency" in message:
            return UnknownSymbol(NAME, f"it has no prices in {query.currency}")
        if code == 429:
            return RateLimited(NAME, text, retry_after=retry_after(reply.headers))
        if code in _KEY_CODES | _PLAN_CODES:
            kind = WrongKey if code in _KEY_CODES else NotEntitled
            return kind(NAME, f"{text} (a paid key needs a base_url on the host {_PRO_HOST}...)")
        if reply.status == 200:
            return InvalidResponse(
                NAME, f"{reply.place} returned no rows but {excerpt(reply.body, self._options.key)}"
            )
        return self._client.failure(reply)


@dataclass(frozen=True, slots=True)
class _Query:
    """The coin, its currency and the endpoint."""

    coin: str
    currency: str
    endpoint: _Endpoint

    def request(self, page: TimeRange, now: int) -> tuple[str, dict[str, str]]:
        """The path and the parameters."""
        end, parameters = self.endpoint.request(page, now)
        path = f"/api/v3/coins/{quote(self.coin, safe='')}{end}"
        return path, {
            "vs_currency": self.currency,
            **{name: str(value) for name, value in parameters.items()},
        }


def coin_of(series: Series) -> str:
    """`BTC/USDT` -> `bitcoin`, unless set in the settings. Raises UnknownSymbol."""
    base = series.symbol.partition("/")[0]
    coin = series.provider_symbol(NAME) or COINS.get(base)
    if coin is None:
        raise UnknownSymbol(
            NAME,
            f"no coin id is known for {base}: set provider_symbols.coingecko of {series.symbol} to the id "
            "on the coin's CoinGecko page, such as bitcoin",
        )
    return coin


def currency_of(series: Series) -> str:
    """`BTC/USDT` -> `usd`; dollar coins count as the dollar. Raises UnknownSymbol."""
    quoted = series.symbol.partition("/")[2]
    if not quoted:
        raise UnknownSymbol(NAME, f"{series.symbol} is not a pair like BTC/USDT")
    return "usd" if quoted in _DOLLARS else quoted.lower()


def read_rows(answer: object, step: int, place: str) -> Candles:
    """Rows `[closeMs, o, h, l, c]` to columns, stamped at the open, ascending; `step` in microseconds.

    A missing price becomes NaN. Raises InvalidResponse for another shape.
    """
    if not isinstance(answer, list):
        raise InvalidResponse(NAME, f"{place} returned no list of rows")
    if not answer:
        return Candles.empty()
    try:
        table = np.array(answer, dtype=np.float64)
    except (TypeError, ValueError):
        table = np.empty(0)
    times = table[:, 0] if table.ndim == 2 and table.shape[1] == 5 else np.array([np.nan])
    if not ((np.abs(times) < _LATEST_MS) & (times % 1 == 0)).all():
        raise InvalidResponse(NAME, f"{place} returned rows that are not [time, open, high, low, close]")
    ts = table[:, 0].astype(np.int64) * 1000 - step
    prices = np.ascontiguousarray(table[:, 1:].T)
    prices[np.abs(prices) >= _EXACT] = np.inf
    columns = [*prices, np.full(len(ts), np.nan)]
    return Candles(ts, *columns).sorted()


def is_spaced(ts: Instants, step: int) -> bool:
    """Whether most neighbours are one step apart; `quality` checks the others."""
    distances, times = np.unique(np.diff(np.unique(ts)), return_counts=True)
    return len(distances) == 0 or bool(distances[np.argmax(times)] == step)


def _code_and_message(body: bytes) -> tuple[int, str]:
    """Reads the three error shapes: {"status": {...}}, {"error": {"status": {...}}} and {"error": "text"}."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return 0, ""
    error = document.get("error", document) if isinstance(document, dict) else None
    if isinstance(error, str):
        return 0, error
    status = error.get("status") if isinstance(error, dict) else None
    if not isinstance(status, dict):
        return 0, ""
    code = status.get("error_code")
    return code if isinstance(code, int) else 0, str(status.get("error_message", ""))
