"""Yahoo's charts of stocks, by plain HTTP (reasons: docs/adr/0009-yahoo-by-plain-http.md).

Belongs here: symbols, the chart endpoint, the removal of split adjustment, and the meaning of Yahoo's responses.
Does not belong here: rows outside the session (`quality`), dividends.

Native timeframes are 1m, 5m, 15m and 1d; 30m, 1h and 4h are derived from 15m (native hours start at half hours, and
native half hours are reported to contain whole ones), 1w from 1d. Four differences from the stored candles:

splits       prices and volumes are adjusted by every later split. Each response lists the splits of its own range, so
             the responses of a fetch together extend to now, and the adjustment is undone as far as the prices show it
             (`splits.py`): some listed splits have not been applied. Candles before a split that the prices do not
             decide are declined, with TooOld. The listed splits are part of the result, as actions.
days         are stamped at the session's open, at midnight, or an hour before it: moved to the session's date
             (`sessions.py`).
latest bar   is stamped with the last trade, and still forming: dropped by the clock.
nulls        mark missing bars.

No key is needed. The limits are not published; clients that do not identify as a browser are blocked sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_SECOND,
    MICROS_PER_WEEK,
    Timeframe,
    iso,
)
from fks_backfill_dagster.known_providers import YFINANCE
from fks_backfill_dagster.providers.base import (
    Capabilities,
    Delivery,
    Estimate,
    FetchResult,
    InvalidResponse,
    Origin,
    ProviderError,
    ProviderOptions,
    TooOld,
    TransientError,
    Transport,
    UnknownSymbol,
    check_served,
)
from fks_backfill_dagster.providers.http.client import HttpClient, Reply
from fks_backfill_dagster.providers.http.errors import host_of
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.numbers import to_floats, to_instant, to_instants
from fks_backfill_dagster.providers.pages import joined
from fks_backfill_dagster.providers.sessions import session_dates, wall_clock
from fks_backfill_dagster.providers.splits import as_traded
from fks_backfill_dagster.providers.yahoo_events import NO_EVENTS, Events, dated, read_events

NAME = YFINANCE.name

T = TypeVar("T")

_BROWSER = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0 Safari/537.36"
_PARTS: Mapping[Timeframe, Timeframe] = {
    Timeframe.M30: Timeframe.M15,
    Timeframe.H1: Timeframe.M15,
    Timeframe.H4: Timeframe.M15,
    Timeframe.W1: Timeframe.D1,
}
# A request beyond 30 or 60 days is refused as a whole. An hour less, because it may wait for a permit.
_MINUTES_DEPTH = 30 * MICROS_PER_DAY - MICROS_PER_HOUR
_INTRADAY_DEPTH = 60 * MICROS_PER_DAY - MICROS_PER_HOUR
# The limit is eight days of minutes per request; whether dates are counted is unknown.
_MINUTES_SPAN = 7 * MICROS_PER_DAY
_US_CALENDARS = frozenset({"XNYS", "XNAS"})


@dataclass(frozen=True, slots=True)
class _Chart:
    """One response: bars as stamped and adjusted by Yahoo, and the ratio of each split by its instant.

    zone: of the exchange. now: the time of the response. first_trade, last_trade: of the symbol; None if missing in the
    response.
    """

    bars: Candles
    splits: Mapping[int, float]
    zone: ZoneInfo | None
    now: int
    last_trade: int | None = None
    first_trade: int | None = None


class YFinance:
    """Implements `Provider` and `ActionSource`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.STOCKS: frozenset(Timeframe)},
        page_size=7 * 390,  # minutes of a week's sessions: the smallest page
        adjusted=True,
        omits_no_trade=True,
        derived={AssetClass.STOCKS: _PARTS},
        depth={
            timeframe: _MINUTES_DEPTH if timeframe is Timeframe.M1 else _INTRADAY_DEPTH
            for timeframe in Timeframe
            if timeframe.is_intraday
        },
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
        self._client = HttpClient(NAME, options, pool, limiter, headers={"User-Agent": _BROWSER})

    def missing_key(self) -> str | None:
        return None

    def listed_at(self, series: Series) -> int | None:
        """The first trade according to Yahoo; None if it is missing or contradicted by older bars."""
        symbol, now = symbol_of(series), self._clock()
        path = _range_path(
            symbol, Timeframe.D1, TimeRange(now - MICROS_PER_WEEK, now)
        )  # any chart contains it
        chart = self._charts(symbol, Timeframe.D1, [path], Tally())[0]
        first_trade, bars = chart.first_trade, chart.bars.ts
        contradicted = (
            first_trade is not None and len(bars) and first_trade > int(bars.min()) + MICROS_PER_DAY
        )
        return None if contradicted else first_trade

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        requests = len(_pages(self._request_range(series, window, self._clock()), series.timeframe))
        a_minute = self._options.requests_per_minute or YFINANCE.requests_per_minute
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        check_served(self, series)
        with counted() as tally:
            return self._fetch(series, window, tally)

    def _fetch(self, series: Series, window: TimeRange, tally: Tally) -> FetchResult:
        symbol, now = symbol_of(series), self._clock()
        requested, native = self._request_range(series, window, now), series.timeframe
        pages = _pages(requested, native)
        if not pages:
            return FetchResult(())
        paths = [_range_path(symbol, native, page) for page in pages]
        charts = self._charts(symbol, native, paths, tally)
        candles, seams, doubt = _candles(charts, pages, series)
        candles = candles.take((candles.ts >= window.start) & (candles.ts < window.end))
        if doubt is not None and (candles.ts < doubt.since).any():
            raise TooOld(NAME, f"{symbol} before {iso(doubt.since)} is declined: {doubt.reason}", doubt.since)
        origin = Origin(
            NAME, Transport.REST, _range_path(symbol, native, requested), host_of(self._base_url), symbol, now
        )
        seams = seams[(seams > window.start) & (seams < window.end)]
        deliveries = (Delivery(candles, origin, seams),) if len(candles) else ()
        zone = next((chart.zone for chart in charts if chart.zone), None)
        happened = _ratios(charts, min(chart.now for chart in charts))
        actions = ReportedActions(NAME, now, dated(happened, series, zone))
        return FetchResult(deliveries, tally.count, clocks=tally.clocks, actions=actions)

    def fetch_actions(self, series: Series) -> ReportedActions:
        """The splits of the whole history, from the events of one chart of days."""
        symbol, now = symbol_of(series), self._clock()
        path = _range_path(symbol, Timeframe.D1, TimeRange(0, now))
        with counted() as tally:

            def attempt() -> Events:
                return self._answer(symbol, path, tally, partial(_events, symbol), lambda _: NO_EVENTS)

            (events,) = self._client.pool.map(NAME, lambda one: self._client.run(one, tally), [attempt])
        return ReportedActions(NAME, now, dated(events.splits, series, events.zone), events.refused)

    def instrument(self, series: Series) -> str:
        return symbol_of(series)

    def _request_range(self, series: Series, window: TimeRange, now: int) -> TimeRange:
        """The range to request: from the start of the window, limited by Yahoo's depth, up to now."""
        reach = self.capabilities.reach(series.timeframe, now)
        start = window.start if reach is None else max(window.start, reach)
        if series.timeframe is Timeframe.D1:
            start -= MICROS_PER_DAY  # east of Greenwich a session opens before its date begins in UTC
        return TimeRange(start, now if window and start < min(window.end, now) else start)

    def _charts(self, symbol: str, interval: Timeframe, paths: Sequence[str], tally: Tally) -> list[_Chart]:
        def fetch(path: str) -> _Chart:
            return self._client.run(lambda: self._chart(symbol, interval, path, tally), tally)

        return self._client.pool.map(NAME, fetch, paths)

    def _chart(self, symbol: str, interval: Timeframe, path: str, tally: Tally) -> _Chart:
        return self._answer(
            symbol,
            path,
            tally,
            lambda result, now: _read(result, symbol, interval, now),
            lambda now: _Chart(Candles.empty(), {}, None, now),
        )

    def _answer(
        self,
        symbol: str,
        path: str,
        tally: Tally,
        read: Callable[[Any, int], T],
        empty: Callable[[int], T],
    ) -> T:
        """One exchange and the parsing of its response, by `read`; `empty` makes the result of an empty range."""
        reply = self._client.exchange(f"{self._base_url}{path}")
        result = self._result(reply, symbol)
        now = tally.closed_by(reply.headers, self._clock())
        if result is None:
            return empty(now)
        try:
            return read(result, now)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            problem = error if isinstance(error, _Invalid) else "a chart of another shape"
            raise InvalidResponse(NAME, f"{reply.place} returned {problem}") from None

    def _result(self, reply: Reply, symbol: str) -> object:
        """The chart's result; None if the range is empty. Raises the error in the response."""
        try:
            document = self._client.json(reply)
            chart = document.get("chart") if isinstance(document, dict) else None
        except InvalidResponse:
            if reply.status == 200:
                raise
            chart = None  # a page of the edge servers
        error = chart.get("error") if isinstance(chart, dict) else None
        if isinstance(error, dict):
            refusal = self._refusal(reply, symbol, error)
            if refusal is None:
                return None
            raise refusal
        if reply.status != 200:
            raise self._client.failure(reply)
        results = chart.get("result") if isinstance(chart, dict) else None
        if not isinstance(results, list) or len(results) != 1:
            raise InvalidResponse(NAME, f"{reply.place} returned no chart")
        return results[0]

    def _refusal(self, reply: Reply, symbol: str, error: dict[str, object]) -> ProviderError | None:
        """The error for an error in the chart; None if it means an empty range."""
        message = f"{error.get('code')}: {error.get('description')}"[:200]
        if "Data doesn't exist for startDate" in message:
            return None
        if error.get("code") == "Not Found":
            return UnknownSymbol(NAME, f"it does not know {symbol} ({message})")
        if reply.status == 200:
            return TransientError(NAME, f"{reply.place} returned {message}")
        return self._client.failure(reply)


def symbol_of(series: Series) -> str:
    """`AAPL`; `BRK.B` -> `BRK-B` in New York, elsewhere a dot marks the exchange; unless set in the settings."""
    named = series.provider_symbol(NAME)
    if named:
        return named
    return series.symbol.replace(".", "-") if series.calendar in _US_CALENDARS else series.symbol


def _range_path(symbol: str, interval: Timeframe, window: TimeRange) -> str:
    parameters = {
        "period1": window.start // MICROS_PER_SECOND,
        "period2": -(-window.end // MICROS_PER_SECOND),
        "interval": interval.value,
        "events": "div,splits",
        "includePrePost": "false",
    }
    return f"/v8/finance/chart/{quote(symbol, safe='=^')}?{urlencode(parameters, safe=',')}"


def _pages(window: TimeRange, interval: Timeframe) -> list[TimeRange]:
    """The ranges of the requests, ascending."""
    length = _MINUTES_SPAN if interval is Timeframe.M1 else max(window.duration, 1)
    starts = range(window.start, window.end, length)
    return [TimeRange(start, min(start + length, window.end)) for start in starts]


@dataclass(frozen=True, slots=True)
class _Doubt:
    """Candles that open before `since` are not certain; `reason` is a sentence without the symbol."""

    since: int
    reason: str


def _candles(
    charts: Sequence[_Chart], pages: Sequence[TimeRange], series: Series
) -> tuple[Candles, Instants, _Doubt | None]:
    """The closed bars of all pages as traded, ascending, days moved to their date; and the seams."""
    bars, seams = joined([c.bars.sorted().within(page) for c, page in zip(charts, pages, strict=True)])
    zone = next((chart.zone for chart in charts if chart.zone), None)
    if zone is None or not len(bars):
        return Candles.empty(), seams, None
    now, last_trade = min(chart.now for chart in charts), charts[-1].last_trade
    ratios = _ratios(charts, now)
    at = np.array(list(ratios), dtype=np.int64)
    split_dates = session_dates(at, series.at(Timeframe.D1), zone)
    local = wall_clock(bars.ts, zone) // MICROS_PER_DAY * MICROS_PER_DAY
    daily = series.timeframe is Timeframe.D1
    dates = session_dates(bars.ts, series, zone, last_trade) if daily else local
    factors = np.array(list(ratios.values()))
    traded = as_traded(bars, np.maximum.accumulate(dates), split_dates, factors)
    moved = dates if daily else bars.ts
    doubt = None
    if traded.doubt:
        doubt = _Doubt(int(moved[traded.first] if traded.first < len(moved) else moved[-1] + 1), traded.doubt)
    seams = moved[np.isin(bars.ts, seams)]
    kept = _kept(bars.ts, dates, local, last_trade) if daily else _whole(bars.ts, last_trade, series)
    candles = replace(traded.bars, ts=moved).take(kept)
    return candles.take(candles.ts < grid_of(series).closed_end(now)), seams, doubt


def _ratios(charts: Sequence[_Chart], now: int) -> dict[int, float]:
    """The ratio of each split that has begun by its instant, ascending."""
    found = {at: ratio for chart in charts for at, ratio in chart.splits.items() if at <= now}
    return dict(sorted(found.items()))


def _kept(stamps: Instants, dates: Instants, local: Instants, last_trade: int | None) -> NDArray[np.intp]:
    """The indices of daily bars to keep: all but the older bar of a last day that has two, at its open and at its last
    trade. Other duplicates of a session stay: which one is right is unknown, so `quality` rejects them as a conflict.
    """
    twice = len(dates) > 1 and dates[-1] == dates[-2] and stamps[-1] != stamps[-2]
    newer = twice and (local[-1] == local[-2] or int(stamps[-1]) == last_trade)
    return np.delete(np.arange(len(dates)), -2) if newer else np.arange(len(dates))


def _whole(stamps: Instants, last_trade: int | None, series: Series) -> NDArray[np.intp]:
    """The indices of complete intraday bars: all but a last bar stamped with the last trade."""
    latest = int(stamps[-1]) == last_trade or not grid_of(series).contains(stamps[-1:])[0]
    return np.arange(len(stamps) - latest)


class _Invalid(ValueError):
    """The problem of a chart, as the end of a sentence."""


def _read(result: Any, symbol: str, interval: Timeframe, now: int) -> _Chart:
    """Raises _Invalid, or for another shape the exceptions that `_chart` handles."""
    meta = result["meta"]
    _check_symbol(meta, symbol)
    if meta.get("dataGranularity", interval) != interval:
        raise _Invalid(f"bars of {meta['dataGranularity']} for {interval}")
    zone = ZoneInfo(meta["exchangeTimezoneName"])
    bars = _bars(result.get("timestamp") or [], result["indicators"]["quote"][0])
    last_trade, first_trade = _instant(meta.get("regularMarketTime")), _instant(meta.get("firstTradeDate"))
    return _Chart(bars, _splits(result), zone, now, last_trade, first_trade)


def _instant(seconds: Any) -> int | None:
    return None if seconds is None else to_instant(seconds, MICROS_PER_SECOND)


def _bars(stamps: Any, quote: Any) -> Candles:
    """The bars that have a price. A single null price becomes NaN."""
    if not stamps:
        return Candles.empty()
    ts = to_instants(stamps, MICROS_PER_SECOND)
    columns = [to_floats(quote[name]) for name in (*PRICES, "volume")]
    if any(len(column) != len(ts) for column in columns):
        raise _Invalid("columns of different lengths")
    priced = ~np.isnan(np.stack(columns[:4])).all(axis=0)
    return Candles(ts, *columns).take(np.flatnonzero(priced))


def _events(symbol: str, result: Any, _: int) -> Events:
    """The splits of a chart, without its bars."""
    _check_symbol(result["meta"], symbol)
    return read_events(result, NAME, symbol)


def _check_symbol(meta: Any, symbol: str) -> None:
    if str(meta["symbol"]).upper() != symbol.upper():
        raise _Invalid(f"another symbol than {symbol}")


def _splits(result: Any) -> dict[int, float]:
    """The ratio (4.0 for 4:1) of each split by its instant."""
    splits = (result.get("events") or {}).get("splits") or {}
    found = {
        to_instant(split["date"], MICROS_PER_SECOND): float(split["numerator"]) / float(split["denominator"])
        for split in splits.values()
    }
    if not all(0 < ratio < np.inf for ratio in found.values()):
        raise _Invalid("a split of an impossible ratio")
    return found
