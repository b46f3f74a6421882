"""Polygon (Massive) aggregates of crypto pairs: the fallback behind Binance, for now.

Belongs here: tickers, the paging of aggregates, and what Polygon's answers mean.
Does not belong here: stocks and forex (their sessions need rules of their own), splices with another
market's candles.

Left out on purpose: 1w, whose weeks start on Sunday there and so are not on our grid; 4h, because it
is not verified that its windows sit on UTC multiples of four hours. Both derive from finer ones.
Prices are asked with adjusted=false. Intervals without a trade are omitted. A crypto ticker quotes
the fiat dollar, so for BTC/USDT this is another market that lies close.
"""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import quote, urlsplit

import numpy as np
import pyarrow as pa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.providers.base import (
    Answer,
    BadAnswer,
    Capabilities,
    Delivery,
    Estimate,
    NotEntitled,
    PermanentError,
    ProviderError,
    ProviderOptions,
    RateLimited,
    TransientError,
    Transport,
    UnknownSymbol,
)
from fks_backfill_dagster.providers.http import (
    HttpClient,
    Limiter,
    Reply,
    RequestPool,
    Tally,
    redact,
    retry_after,
    server_time,
    system_micros,
    usable_key,
)

NAME = "polygon"
DEFAULT_BASE_URL = "https://api.polygon.io"
KEY_VARIABLE = "POLYGON_API_KEY"
REQUESTS_PER_MINUTE = 5  # of the free plan

# The most a request may ask for. It counts the minutes behind the bars, not the bars.
LIMIT = 50_000
_SPANS = {
    Timeframe.M1: (1, "minute"),
    Timeframe.M5: (5, "minute"),
    Timeframe.M15: (15, "minute"),
    Timeframe.M30: (30, "minute"),
    Timeframe.H1: (1, "hour"),
    Timeframe.D1: (1, "day"),
}
_DOLLARS = frozenset({"USD", "USDT", "USDC"})
_BAR = pa.struct(
    [("t", pa.int64())] + [(name, pa.float64()) for name in ("o", "h", "l", "c", "v")],
)


class Polygon:
    """Implements `Provider`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.CRYPTO: frozenset(_SPANS)}, page_size=LIMIT, needs_key=KEY_VARIABLE
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
        self._base_url = options.base_url.rstrip("/")
        key = usable_key(NAME, options.key, KEY_VARIABLE) if options.key else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = HttpClient(NAME, options, pool, limiter, headers=headers)

    def missing_key(self) -> str | None:
        return None if self._options.key else KEY_VARIABLE

    def listed_at(self, series: Series) -> int | None:
        """Not told: the depth depends on the plan, so the first bar is no listing."""
        return None

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        requests = -(-window.duration // (LIMIT * MICROS_PER_MINUTE))
        a_minute = self._options.requests_per_minute or REQUESTS_PER_MINUTE
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> Answer:
        if self.missing_key():
            raise NotEntitled(NAME, f"it needs a key: set {KEY_VARIABLE}")
        if series.timeframe not in _SPANS:
            raise PermanentError(NAME, f"it has no {series.timeframe} candles on our grid")
        ticker, tally = ticker_of(series), Tally()
        if not window:
            return Answer(())
        url = self._url(ticker, series.timeframe, window)
        place, blocks, seen = url.partition("?")[0], list[Candles](), set[str]()
        following: str | None = url
        while following:
            seen.add(following)
            candles, following = self._page(following, ticker, series.timeframe, tally)
            blocks.append(candles)
            if following in seen:
                raise BadAnswer(NAME, f"{place} leads from page to page in a circle")
        # Polygon widens the asked range to whole intervals.
        candles = Candles.concat(blocks).sorted().within(window)
        source = url.removeprefix(self._base_url)
        return Answer((Delivery(candles, Transport.REST, source),) if len(candles) else (), tally.count)

    def _url(self, ticker: str, timeframe: Timeframe, window: TimeRange) -> str:
        multiplier, span = _SPANS[timeframe]
        first, last = window.start // 1000, window.end // 1000 - 1  # both inclusive
        path = f"/v2/aggs/ticker/{quote(ticker, safe=':')}/range/{multiplier}/{span}/{first}/{last}"
        return f"{self._base_url}{path}?adjusted=false&sort=asc&limit={LIMIT}"

    def _page(self, url: str, ticker: str, timeframe: Timeframe, tally: Tally) -> tuple[Candles, str | None]:
        """The candles of one page, and the URL of the next one."""

        def attempt() -> tuple[Candles, str | None]:
            reply = self._client.exchange(url)
            document = self._document(reply, ticker)
            ours = self._clock()
            now = min(server_time(reply.headers) or ours, ours)  # closed is what both clocks call so
            return self._candles(document, timeframe, now, reply.place), self._next_url(document)

        return self._client.pool.map(NAME, lambda ask: self._client.run(ask, tally), [attempt])[0]

    def _document(self, reply: Reply, ticker: str) -> dict[str, object]:
        """The answer, if it is one; otherwise the error it stands for."""
        document: object = None
        if reply.status != 200:
            raise self._client.failure(reply)
        document = self._client.json(reply)
        if not isinstance(document, dict):
            raise BadAnswer(NAME, f"{reply.place} answered no object")
        if document.get("status") not in ("OK", "DELAYED"):
            raise self._refusal(document, reply)
        if document.get("ticker") != ticker:
            raise BadAnswer(NAME, f"{reply.place} answered for another ticker than {ticker}")
        return document

    def _refusal(self, document: dict[str, object], reply: Reply) -> ProviderError:
        """An error that came with status 200."""
        said = str(document.get("error") or document.get("message") or document.get("status"))
        text = f"{reply.place} answered: {redact(said, self._options.key)[:200]}"
        if document.get("status") == "NOT_AUTHORIZED" or "API Key" in said:
            return NotEntitled(NAME, text)
        if "maximum requests" in said:
            return RateLimited(NAME, text, retry_after=retry_after(reply.headers))
        return TransientError(NAME, text)

    def _candles(self, document: dict[str, object], timeframe: Timeframe, now: int, place: str) -> Candles:
        """The bars that are closed by the server's clock. A price that is absent becomes NaN."""
        results = document.get("results") or []
        if not isinstance(results, list) or document.get("resultsCount", len(results)) != len(results):
            raise BadAnswer(NAME, f"{place} answered another number of bars than it says")
        try:
            bars = pa.array(results, type=_BAR)
            t, *columns = bars.flatten()
            ts = t.to_numpy() * 1000
        except (pa.ArrowException, TypeError, OverflowError):
            raise BadAnswer(NAME, f"{place} answered bars of another shape") from None
        candles = Candles(ts, *(column.to_numpy(zero_copy_only=False) for column in columns))
        return candles.take(np.asarray(ts + timeframe.micros <= now))

    def _next_url(self, document: dict[str, object]) -> str | None:
        """Only on the configured host: any other would be sent the key."""
        following = document.get("next_url")
        if not following:
            return None
        theirs, ours = urlsplit(str(following)), urlsplit(self._base_url)
        if (theirs.scheme, theirs.netloc) != (ours.scheme, ours.netloc):
            raise PermanentError(
                NAME,
                f"it continues its answer at {theirs.scheme}://{theirs.netloc}, which is not the configured "
                f"host: set providers.polygon.base_url to that if you trust it",
            )
        return str(following)


def ticker_of(series: Series) -> str:
    """`BTC/USDT` -> `X:BTCUSD` (dollar coins count as the dollar), unless the settings name it."""
    named = series.provider_symbol(NAME)
    if named:
        return named
    base, slash, quoted = series.symbol.partition("/")
    if not (base and slash and quoted):
        raise UnknownSymbol(
            NAME, f"{series.symbol} is no pair like BTC/USDT: name its ticker in provider_symbols"
        )
    return f"X:{base}{'USD' if quoted in _DOLLARS else quoted}"
