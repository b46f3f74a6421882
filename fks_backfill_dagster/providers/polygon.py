"""Polygon (Massive) aggregates: stocks, currency pairs and crypto pairs.

Belongs here: tickers, the paging of aggregates, and the meaning of Polygon's responses.
Does not belong here: rows of splits (`polygon_splits`), splices with candles of another market, rows outside the
session (`quality`).

Bars are aligned to clock intervals, independently of the session. So not all of them are on our grid:

crypto   native up to 1h and 1d (a UTC day). Weeks start on Sunday, and it is not verified that 4h is aligned to UTC
         multiples of four hours: both are derived.
stocks   native up to 30m: such a bar lies inside or outside the regular session, never both, because the session
         opens at 09:30 and closes at 16:00 or 13:00 New York. The hour bar at 09:00 includes pre-market: 1h and 4h
         are derived from 30m. 1d is native: the official daily bar, open and close of the auctions, consolidated
         volume. It is stamped 00:00 New York and moved to the date of its session; a bar of any other stamp stays
         off the grid. 1w is derived from 1d.
forex    native up to 1h, where the session's edges are edges of bars. Days start at 00:00 UTC and exist on weekends:
         4h, 1d and 1w are derived from 1h. The volume counts ticks, so it is not stored.

A day of a stock counts as closed when its session is over by both clocks (13:00 on a half-day). Trades after hours
and late reports still change its volume, and the official close may be published some minutes later: the responses
of a live account between the close and the next morning are untested.

Prices are requested with adjusted=false. Intervals without a trade are omitted. A crypto ticker quotes the fiat
dollar, so for BTC/USDT this is another market with similar prices. The available history depends on the plan, which
no endpoint returns: older data get NOT_AUTHORIZED. In that case the plan's edge is searched once per asset class, with
a dozen requests for one day each, instead of a refusal for each of hundreds of pages.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
    iso,
    to_datetime,
    to_micros,
)
from fks_backfill_dagster.known_providers import POLYGON
from fks_backfill_dagster.providers.base import (
    Capabilities,
    Delivery,
    Estimate,
    FetchResult,
    InvalidResponse,
    NotEntitled,
    Origin,
    ProviderError,
    ProviderOptions,
    RateLimited,
    TooOld,
    TransientError,
    Transport,
    UnknownSymbol,
    WrongKey,
    check_served,
)
from fks_backfill_dagster.providers.http.client import HttpClient, Reply
from fks_backfill_dagster.providers.http.errors import host_of, place_of, retry_after
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.keys import redact, usable_key
from fks_backfill_dagster.providers.numbers import bounded, to_double, to_instants
from fks_backfill_dagster.providers.pages import Chain, joined, next_page
from fks_backfill_dagster.providers.polygon_splits import MOST_PAGES, read_splits, rows_of, splits_url
from fks_backfill_dagster.providers.sessions import midnight_dates

NAME, KEY_VARIABLE = POLYGON.name, POLYGON.key_variable

# The maximum `limit` of a request. It counts base bars: minutes (also for hours) or days.
LIMIT = 50_000
_SPANS = {
    Timeframe.M1: (1, "minute"),
    Timeframe.M5: (5, "minute"),
    Timeframe.M15: (15, "minute"),
    Timeframe.M30: (30, "minute"),
    Timeframe.H1: (1, "hour"),
    Timeframe.D1: (1, "day"),
}
_MINUTES = frozenset({Timeframe.M1, Timeframe.M5, Timeframe.M15, Timeframe.M30})
_NATIVE: Mapping[AssetClass, frozenset[Timeframe]] = {
    AssetClass.CRYPTO: _MINUTES | {Timeframe.H1, Timeframe.D1},
    AssetClass.STOCKS: _MINUTES | {Timeframe.D1},
    AssetClass.FOREX: _MINUTES | {Timeframe.H1},
}
# The native timeframe of each derived one.
_PARTS: Mapping[AssetClass, Mapping[Timeframe, Timeframe]] = {
    AssetClass.CRYPTO: {Timeframe.H4: Timeframe.H1, Timeframe.W1: Timeframe.D1},
    AssetClass.STOCKS: {
        Timeframe.H1: Timeframe.M30,
        Timeframe.H4: Timeframe.M30,
        Timeframe.W1: Timeframe.D1,
    },
    AssetClass.FOREX: dict.fromkeys((Timeframe.H4, Timeframe.D1, Timeframe.W1), Timeframe.H1),
}
_ZONE = ZoneInfo("America/New_York")  # zone of stock stamps
# The share of a week's minutes that may have a bar: stocks 04:00 to 20:00 on weekdays, forex five of seven days.
_TRADED: Mapping[AssetClass, float] = {
    AssetClass.CRYPTO: 1.0,
    AssetClass.STOCKS: 5 * 16 / (7 * 24),
    AssetClass.FOREX: 5 / 7,
}
_DOLLARS = frozenset({"USD", "USDT", "USDC"})
_BAR = pa.struct(
    [("t", pa.int64())] + [(name, pa.float64()) for name in ("o", "h", "l", "c", "v")],
)


# Text of the refusal of the current day on end-of-day plans, and how long after its close a candle of that day may
# be refused (see `_today`).
_TODAY = "before end of day"
_END_OF_DAY_DELAY = MICROS_PER_DAY + 5 * MICROS_PER_HOUR


class _BeyondPlan(NotEntitled):
    """The plan does not cover this data, possibly because of its age."""


class Polygon:
    """Implements `Provider` and `ActionSource`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {asset_class: native | _PARTS[asset_class].keys() for asset_class, native in _NATIVE.items()},
        page_size=LIMIT,
        page_sizes={
            timeframe: LIMIT * MICROS_PER_MINUTE // timeframe.micros
            for timeframe in Timeframe
            if timeframe.is_intraday
        },
        needs_key=KEY_VARIABLE,
        omits_no_trade=True,
        derived=_PARTS,
    )

    def __init__(
        self,
        options: ProviderOptions,
        pool: RequestPool,
        limiter: Limiter,
        clock: Callable[[], int] = system_micros,
    ) -> None:
        self._options = options
        if options.requests_per_minute in (
            None,
            POLYGON.requests_per_minute,
        ):  # the free plan is an end-of-day plan
            self.capabilities = replace(self.capabilities, publication_delay=_END_OF_DAY_DELAY)
        self._clock = clock
        self._base_url = options.base_url.rstrip("/")
        self._host = host_of(self._base_url)
        key = usable_key(NAME, options.key, KEY_VARIABLE) if options.key else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._client = HttpClient(NAME, options, pool, limiter, headers=headers)
        self._edges: dict[AssetClass, int] = {}
        self._edge_search = threading.Lock()

    def missing_key(self) -> str | None:
        return None if self._options.key else KEY_VARIABLE

    def listed_at(self, series: Series) -> int | None:
        """Unknown: the depth depends on the plan, so the first bar is not the listing."""
        return None

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        base = series.timeframe.micros if series.timeframe is Timeframe.D1 else MICROS_PER_MINUTE
        requests = math.ceil(window.duration / base * _TRADED[series.asset_class] / LIMIT)
        a_minute = self._options.requests_per_minute or POLYGON.requests_per_minute
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        check_served(self, series)
        if not window or not _request_range(series, window):
            return FetchResult(())
        edge = self._edges.get(series.asset_class, window.start)
        if window.start < edge:
            raise _beyond(edge)
        with counted() as tally:
            return self._fetch(series, window, tally)

    def _fetch(self, series: Series, window: TimeRange, tally: Tally) -> FetchResult:
        covered, requested_at = window, self._clock()
        warnings: tuple[str, ...] = ()
        try:
            bars = self._bars(series, covered, tally)
        except _BeyondPlan as refused:
            error = self._too_old(series, covered.start, tally)
            raise error or NotEntitled(NAME, str(refused).removeprefix(f"{NAME}: ")) from None
        except NotEntitled as refused:
            # An end-of-day plan refuses the whole range because of its last day.
            if _TODAY not in str(refused) or not covered.start < self._today() < covered.end:
                raise
            covered = TimeRange(covered.start, self._today())
            warnings = (f"{refused} (so only candles before {iso(covered.end)} were requested)",)
            bars = self._bars(series, covered, tally)

        candles, seams = joined(bars)
        if series.asset_class is AssetClass.FOREX:
            candles = replace(candles, volume=np.full(len(candles), np.nan))
        source = self._url(series, covered).removeprefix(self._base_url)
        origin = Origin(NAME, Transport.REST, source, self._host, self.instrument(series), requested_at)
        deliveries = (Delivery(candles, origin, seams),) if len(candles) else ()
        return FetchResult(deliveries, tally.count, warnings, tally.clocks)

    def instrument(self, series: Series) -> str:
        return ticker_of(series)

    def fetch_actions(self, series: Series) -> ReportedActions:
        """Every split of a stock, announced ones included."""
        if self.missing_key() is not None:
            raise WrongKey(NAME, f"it needs a key: set {KEY_VARIABLE}")
        requested_at, ticker = self._clock(), self.instrument(series)
        following: str | None = splits_url(self._base_url, ticker)
        rows = list[object]()
        with counted() as tally:
            for _ in range(MOST_PAGES):
                page, following = self._splits_page(following or "", tally)
                rows += page
                if following is None:
                    return ReportedActions(
                        NAME, requested_at, *read_splits(rows, NAME, series.symbol, ticker)
                    )
        raise InvalidResponse(
            NAME, f"its splits of {ticker} link page after page: more than {MOST_PAGES} pages"
        )

    def _splits_page(self, url: str, tally: Tally) -> tuple[list[object], str | None]:
        """The rows of one page of splits, and the URL of the next one."""

        def attempt() -> tuple[list[object], str | None]:
            reply = self._client.exchange(url)
            document = self._document(reply)
            return rows_of(document, NAME, reply.place), next_page(NAME, document.get("next_url"), url)

        return self._client.pool.map(NAME, lambda one: self._client.run(one, tally), [attempt])[0]

    def _too_old(self, series: Series, refused: int, tally: Tally) -> TooOld | None:
        """The error with the plan's edge; None for a plan without any day of these bars.

        refused: an instant beyond the edge. The edge is found by bisection, to the day.
        """

        def entitled(day: int) -> bool:
            try:
                self._bars(series, TimeRange(day, day + MICROS_PER_DAY), tally)
            except _BeyondPlan:
                return False
            return True

        with self._edge_search:
            known = self._edges.get(series.asset_class)
            if known is not None and known > refused:
                return _beyond(known)
            beyond = refused // MICROS_PER_DAY
            within = self._today() // MICROS_PER_DAY - 1
            if beyond >= within or not entitled(within * MICROS_PER_DAY):
                return None
            while within - beyond > 1:
                middle = (beyond + within) // 2
                if entitled(middle * MICROS_PER_DAY):
                    within = middle
                else:
                    beyond = middle
            self._edges[series.asset_class] = edge = within * MICROS_PER_DAY
            return _beyond(edge)

    def _today(self) -> int:
        """An instant at which today has begun both in UTC and in New York."""
        return (self._clock() - 5 * MICROS_PER_HOUR) // MICROS_PER_DAY * MICROS_PER_DAY

    def _bars(self, series: Series, window: TimeRange, tally: Tally) -> list[Candles]:
        """The closed bars of each page that open in `window`."""
        url = self._url(series, window)
        chain = Chain(NAME, place_of(url), window, window.duration // series.timeframe.micros, LIMIT)
        following: str | None = url
        blocks = list[Candles]()
        while following:
            page, stamps, following = self._page(following, series, tally)
            # Polygon widens the requested range to whole intervals.
            blocks.append(page.sorted().within(window))
            if chain.is_done(stamps):
                break
        return blocks

    def _url(self, series: Series, window: TimeRange) -> str:
        multiplier, span = _SPANS[series.timeframe]
        requested = _request_range(series, window)
        first, last = requested.start // 1000, requested.end // 1000 - 1  # both inclusive
        ticker = quote(self.instrument(series), safe=":")
        path = f"/v2/aggs/ticker/{ticker}/range/{multiplier}/{span}/{first}/{last}"
        return f"{self._base_url}{path}?adjusted=false&sort=asc&limit={LIMIT}"

    def _page(self, url: str, series: Series, tally: Tally) -> tuple[Candles, Instants, str | None]:
        """The candles of one page, the stamps of all its bars, and the URL of the next one."""

        def attempt() -> tuple[Candles, Instants, str | None]:
            reply = self._client.exchange(url)
            document = self._document(reply, self.instrument(series))
            now, bars = tally.closed_by(reply.headers, self._clock()), _bars_of(document, reply.place)
            return _closed(bars, series, now), bars.ts, next_page(NAME, document.get("next_url"), url)

        return self._client.pool.map(NAME, lambda one: self._client.run(one, tally), [attempt])[0]

    def _document(self, reply: Reply, ticker: str | None = None) -> dict[str, object]:
        """The decoded response, of `ticker` if it names one. Raises the error it stands for."""
        if reply.status != 200:
            failure = self._client.failure(reply)
            is_plan = reply.status == 403 and b"NOT_AUTHORIZED" in reply.body
            raise _refusal_of_plan(str(failure)) if is_plan else failure
        document = self._client.json(reply)
        if not isinstance(document, dict):
            raise InvalidResponse(NAME, f"{reply.place} returned no object")
        if document.get("status") not in ("OK", "DELAYED"):
            raise self._refusal(document, reply)
        if ticker is not None and document.get("ticker") != ticker:
            raise InvalidResponse(NAME, f"{reply.place} returned another ticker than {ticker}")
        return document

    def _refusal(self, document: dict[str, object], reply: Reply) -> ProviderError:
        """The error in a response with status 200."""
        message = str(document.get("error") or document.get("message") or document.get("status"))
        text = f"{reply.place} returned: {redact(message, self._options.key)[:200]}"
        if document.get("status") == "NOT_AUTHORIZED":
            return _refusal_of_plan(text)
        if "API Key" in message:
            return WrongKey(NAME, text)
        if "maximum requests" in message:
            return RateLimited(NAME, text, retry_after=retry_after(reply.headers))
        return TransientError(NAME, text)


def _has_own_days(series: Series) -> bool:
    """Whether the bars are days of an exchange, stamped with their date in New York."""
    return series.asset_class is AssetClass.STOCKS and series.timeframe is Timeframe.D1


def _request_range(series: Series, window: TimeRange) -> TimeRange:
    """The range to request for the candles that open in `window`.

    Polygon stamps a stock's day 00:00 New York, our grid 00:00 UTC. So the range starts at midnight in New York of the
    first date, and ends with the last date in UTC, which is the evening of that date in New York.
    """
    if not _has_own_days(series):
        return window
    start, end = (-(-edge // MICROS_PER_DAY) * MICROS_PER_DAY for edge in (window.start, window.end))
    midnight = to_micros(to_datetime(start).replace(tzinfo=_ZONE))
    return TimeRange(midnight, max(end, midnight))


def _bars_of(document: dict[str, object], place: str) -> Candles:
    """The bars of a response, by stamp. A missing price becomes NaN."""
    results = document.get("results") or []
    if not isinstance(results, list) or document.get("resultsCount", len(results)) != len(results):
        raise InvalidResponse(NAME, f"{place} returned another number of bars than its resultsCount")
    try:
        t, *columns = _columns(results)
        ts = to_instants(t, 1000)
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        raise InvalidResponse(NAME, f"{place} returned bars of another shape") from None
    return Candles(ts, *(bounded(column) for column in columns))


def _columns(bars: list[Any]) -> list[pa.Array]:
    """The columns of _BAR. Raises pa.ArrowException, TypeError or OverflowError for another shape."""
    try:
        return pa.array(bars, type=_BAR).flatten()  # type: ignore[no-any-return]
    except pa.ArrowInvalid:  # for example an integer that no double represents
        if not all(isinstance(bar, dict) for bar in bars):
            raise
        rounded = [{**bar, **{name: to_double(bar.get(name)) for name in "ohlcv"}} for bar in bars]
        return pa.array(rounded, type=_BAR).flatten()  # type: ignore[no-any-return]


def _closed(bars: Candles, series: Series, now: int) -> Candles:
    """The candles of these bars that are closed at `now`."""
    if not _has_own_days(series):
        return bars.take(bars.ts + series.timeframe.micros <= now)
    dated = replace(bars, ts=midnight_dates(bars.ts, series, _ZONE))
    return dated.take(dated.ts < grid_of(series).closed_end(now))


def _refusal_of_plan(text: str) -> NotEntitled:
    kind = NotEntitled if _TODAY in text else _BeyondPlan
    return kind(NAME, text.removeprefix(f"{NAME}: "))


def _beyond(edge: int) -> TooOld:
    return TooOld(NAME, f"the plan covers nothing before {iso(edge)}", edge)


def ticker_of(series: Series) -> str:
    """`AAPL`, `C:EURUSD`, `X:BTCUSD` (dollar coins count as the dollar), unless set in the settings.
    Raises UnknownSymbol for a symbol that is not a pair."""
    named = series.provider_symbol(NAME)
    if named:
        return named
    if series.asset_class is AssetClass.STOCKS:
        return series.symbol
    base, slash, quoted = series.symbol.partition("/")
    if not (base and slash and quoted):
        raise UnknownSymbol(
            NAME, f"{series.symbol} is not a pair like BTC/USDT: set its ticker in provider_symbols"
        )
    if series.asset_class is AssetClass.FOREX:
        return f"C:{base}{quoted}"
    return f"X:{base}{'USD' if quoted in _DOLLARS else quoted}"
