"""Yahoo's charts of stocks, by plain HTTP (docs/adr/0009-yahoo-by-plain-http.md says why).

Belongs here: symbols, the chart endpoint, un-adjusting by splits, and what Yahoo's answers mean.
Does not belong here: rows outside the session (`quality`), dividends.

Native are 1m, 5m, 15m and 1d; 30m, 1h and 4h are made from 15m (its hours sit on half hours, and its half
hours are said to hold whole ones), 1w from 1d. What Yahoo gives is not what we store, in four ways:

splits       prices and volumes are adjusted by every split since. Each answer names the splits of its own
             range, so all answers of a fetch together reach up to now, and the adjustment is undone
             as far as the prices show it (`splits.py`): some named splits have not been applied. What lies
             before a split that the prices do not decide is declined, with TooOld.
days         are stamped at the session's open, or at midnight, or an hour before it: moved to the session's
             date (`sessions.py`).
latest bar   is stamped with the last trade, and still forming: dropped by the clock.
nulls        stand for bars that it does not have.

It asks for no key. Its limits are not published; a client that says it is no browser is shut out sooner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote, urlencode
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

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
from fks_backfill_dagster.providers.base import (
    Answer,
    BadAnswer,
    Capabilities,
    Delivery,
    Estimate,
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

NAME = "yfinance"
DEFAULT_BASE_URL = "https://query2.finance.yahoo.com"
REQUESTS_PER_MINUTE = 60  # ours: Yahoo publishes none

_BROWSER = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/131.0 Safari/537.36"
_PARTS: Mapping[Timeframe, Timeframe] = {
    Timeframe.M30: Timeframe.M15,
    Timeframe.H1: Timeframe.M15,
    Timeframe.H4: Timeframe.M15,
    Timeframe.W1: Timeframe.D1,
}
# Beyond 30 and 60 days a request is refused as a whole. An hour less, for it may wait for its turn.
_MINUTES_DEPTH = 30 * MICROS_PER_DAY - MICROS_PER_HOUR
_INTRADAY_DEPTH = 60 * MICROS_PER_DAY - MICROS_PER_HOUR
# At most eight days of minutes a request; whether that is counted in dates is not known.
_MINUTES_SPAN = 7 * MICROS_PER_DAY
_US_CALENDARS = frozenset({"XNYS", "XNAS"})


@dataclass(frozen=True, slots=True)
class _Chart:
    """One answer: bars as stamped and adjusted by Yahoo, and the ratio of each split by its instant.

    `zone` is the exchange's, `now` when it was answered, `first_trade` and `last_trade` are all that
    Yahoo knows of the symbol; None where it does not tell.
    """

    bars: Candles
    splits: Mapping[int, float]
    zone: ZoneInfo | None
    now: int
    last_trade: int | None = None
    first_trade: int | None = None


class YFinance:
    """Implements `Provider`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.STOCKS: frozenset(Timeframe)},
        page_size=7 * 390,  # minutes of a week's sessions: the shortest of its pages
        adjusted=True,
        omits_quiet=True,
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
        """The first trade that Yahoo names; None where it names none, or where its own bars refute it."""
        symbol, now = symbol_of(series), self._clock()
        path = _range_path(symbol, Timeframe.D1, TimeRange(now - MICROS_PER_WEEK, now))  # any chart tells it
        chart = self._charts(symbol, Timeframe.D1, [path], Tally())[0]
        claimed, bars = chart.first_trade, chart.bars.ts
        refuted = claimed is not None and len(bars) and claimed > int(bars.min()) + MICROS_PER_DAY
        return None if refuted else claimed

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        requests = len(_pages(self._asked(series, window, self._clock()), series.timeframe))
        a_minute = self._options.requests_per_minute or REQUESTS_PER_MINUTE
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> Answer:
        check_served(self, series)
        with counted() as tally:
            return self._fetch(series, window, tally)

    def _fetch(self, series: Series, window: TimeRange, tally: Tally) -> Answer:
        symbol, now = symbol_of(series), self._clock()
        asked, native = self._asked(series, window, now), series.timeframe
        pages = _pages(asked, native)
        if not pages:
            return Answer(())
        paths = [_range_path(symbol, native, page) for page in pages]
        charts = self._charts(symbol, native, paths, tally)
        candles, seams, doubt = _candles(charts, pages, series)
        candles = candles.take((candles.ts >= window.start) & (candles.ts < window.end))
        if doubt is not None and (candles.ts < doubt.since).any():
            raise TooOld(NAME, f"{symbol} before {iso(doubt.since)} is declined: {doubt.why}", doubt.since)
        origin = Origin(
            NAME, Transport.REST, _range_path(symbol, native, asked), host_of(self._base_url), symbol, now
        )
        seams = seams[(seams > window.start) & (seams < window.end)]
        deliveries = (Delivery(candles, origin, seams),) if len(candles) else ()
        return Answer(deliveries, tally.count, clocks=tally.clocks)

    def instrument(self, series: Series) -> str:
        return symbol_of(series)

    def _asked(self, series: Series, window: TimeRange, now: int) -> TimeRange:
        """Where to request bars: from the window on, as far as Yahoo reaches back, up to now."""
        reach = self.capabilities.reach(series.timeframe, now)
        start = window.start if reach is None else max(window.start, reach)
        if series.timeframe is Timeframe.D1:
            start -= MICROS_PER_DAY  # east of Greenwich a session opens before its date begins in UTC
        return TimeRange(start, now if window and start < min(window.end, now) else start)

    def _charts(self, symbol: str, interval: Timeframe, paths: Sequence[str], tally: Tally) -> list[_Chart]:
        def ask(path: str) -> _Chart:
            return self._client.run(lambda: self._chart(symbol, interval, path, tally), tally)

        return self._client.pool.map(NAME, ask, paths)

    def _chart(self, symbol: str, interval: Timeframe, path: str, tally: Tally) -> _Chart:
        """One exchange, and the reading of its answer."""
        reply = self._client.exchange(f"{self._base_url}{path}")
        result = self._result(reply, symbol)
        now = tally.closed_by(reply.headers, self._clock())
        if result is None:
            return _Chart(Candles.empty(), {}, None, now)
        try:
            return _read(result, symbol, interval, now)
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            said = error if isinstance(error, _Odd) else "a chart of another shape"
            raise BadAnswer(NAME, f"{reply.place} answered {said}") from None

    def _result(self, reply: Reply, symbol: str) -> object:
        """The chart's result, None when there is nothing in the range; otherwise raises its error."""
        try:
            document = self._client.json(reply)
            chart = document.get("chart") if isinstance(document, dict) else None
        except BadAnswer:
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
            raise BadAnswer(NAME, f"{reply.place} answered no chart")
        return results[0]

    def _refusal(self, reply: Reply, symbol: str, error: dict[str, object]) -> ProviderError | None:
        """What an error in the chart means; None for one that says that there is nothing."""
        said = f"{error.get('code')}: {error.get('description')}"[:200]
        if "Data doesn't exist for startDate" in said:
            return None
        if error.get("code") == "Not Found":
            return UnknownSymbol(NAME, f"it does not know {symbol} ({said})")
        if reply.status == 200:
            return TransientError(NAME, f"{reply.place} answered {said}")
        return self._client.failure(reply)


def symbol_of(series: Series) -> str:
    """`AAPL`; `BRK.B` -> `BRK-B` in New York, elsewhere a dot is the exchange's; or as the settings name it."""
    named = series.provider_symbol(NAME)
    if named:
        return named
    return series.symbol.replace(".", "-") if series.calendar in _US_CALENDARS else series.symbol


def _range_path(symbol: str, interval: Timeframe, window: TimeRange) -> str:
    asked = {
        "period1": window.start // MICROS_PER_SECOND,
        "period2": -(-window.end // MICROS_PER_SECOND),
        "interval": interval.value,
        "events": "div,splits",
        "includePrePost": "false",
    }
    return f"/v8/finance/chart/{quote(symbol, safe='=^')}?{urlencode(asked, safe=',')}"


def _pages(window: TimeRange, interval: Timeframe) -> list[TimeRange]:
    """One request each, ascending."""
    length = _MINUTES_SPAN if interval is Timeframe.M1 else max(window.duration, 1)
    starts = range(window.start, window.end, length)
    return [TimeRange(start, min(start + length, window.end)) for start in starts]


@dataclass(frozen=True, slots=True)
class _Doubt:
    """What opens before `since` is not certain; `why` is a sentence without its subject's symbol."""

    since: int
    why: str


def _candles(
    charts: Sequence[_Chart], pages: Sequence[TimeRange], series: Series
) -> tuple[Candles, Instants, _Doubt | None]:
    """The closed bars of all pages as they were traded, ascending, days moved to their date; and the seams."""
    bars, seams = joined([c.bars.sorted().within(page) for c, page in zip(charts, pages, strict=True)])
    zone = next((chart.zone for chart in charts if chart.zone), None)
    if zone is None or not len(bars):
        return Candles.empty(), seams, None
    now, last_trade = min(chart.now for chart in charts), charts[-1].last_trade
    ratios = {at: ratio for chart in charts for at, ratio in chart.splits.items() if at <= now}
    at = np.array(sorted(ratios), dtype=np.int64)
    split_dates = session_dates(at, replace(series, timeframe=Timeframe.D1), zone)
    local = wall_clock(bars.ts, zone) // MICROS_PER_DAY * MICROS_PER_DAY
    daily = series.timeframe is Timeframe.D1
    dates = session_dates(bars.ts, series, zone, last_trade) if daily else local
    factors = np.array([ratios[n] for n in at.tolist()])
    traded = as_traded(bars, np.maximum.accumulate(dates), split_dates, factors)
    moved = dates if daily else bars.ts
    doubt = None
    if traded.doubt:
        doubt = _Doubt(int(moved[traded.first] if traded.first < len(moved) else moved[-1] + 1), traded.doubt)
    seams = moved[np.isin(bars.ts, seams)]
    kept = _kept(bars.ts, dates, local, last_trade) if daily else _whole(bars.ts, last_trade, series)
    candles = replace(traded.bars, ts=moved).take(kept)
    return candles.take(candles.ts < grid_of(series).closed_end(now)), seams, doubt


def _kept(stamps: Instants, dates: Instants, local: Instants, last_trade: int | None) -> NDArray[np.intp]:
    """Of day bars: all but the older one of a last day that is there twice, at its open and at its last trade.

    Any others of one session stay: which of them is right is not known, so `quality` rejects them as a conflict.
    """
    twice = len(dates) > 1 and dates[-1] == dates[-2] and stamps[-1] != stamps[-2]
    newer = twice and (local[-1] == local[-2] or int(stamps[-1]) == last_trade)
    return np.delete(np.arange(len(dates)), -2) if newer else np.arange(len(dates))


def _whole(stamps: Instants, last_trade: int | None, series: Series) -> NDArray[np.intp]:
    """Of intraday bars: all but a last one that is stamped with the last trade."""
    latest = int(stamps[-1]) == last_trade or not grid_of(series).contains(stamps[-1:])[0]
    return np.arange(len(stamps) - latest)


class _Odd(ValueError):
    """What is wrong with a chart, as the end of a sentence."""


def _read(result: Any, symbol: str, interval: Timeframe, now: int) -> _Chart:
    """Raises _Odd, or whatever another shape leads to."""
    meta = result["meta"]
    if str(meta["symbol"]).upper() != symbol.upper():
        raise _Odd(f"for another symbol than {symbol}")
    if meta.get("dataGranularity", interval) != interval:
        raise _Odd(f"bars of {meta['dataGranularity']} for {interval}")
    zone = ZoneInfo(meta["exchangeTimezoneName"])
    bars = _bars(result.get("timestamp") or [], result["indicators"]["quote"][0])
    last_trade, first_trade = _instant(meta.get("regularMarketTime")), _instant(meta.get("firstTradeDate"))
    return _Chart(bars, _splits(result), zone, now, last_trade, first_trade)


def _instant(seconds: Any) -> int | None:
    return None if seconds is None else to_instant(seconds, MICROS_PER_SECOND)


def _bars(stamps: Any, quote: Any) -> Candles:
    """The bars that have a price. A single price that is null becomes NaN."""
    if not stamps:
        return Candles.empty()
    ts = to_instants(stamps, MICROS_PER_SECOND)
    columns = [to_floats(quote[name]) for name in (*PRICES, "volume")]
    if any(len(column) != len(ts) for column in columns):
        raise _Odd("columns of different lengths")
    priced = ~np.isnan(np.stack(columns[:4])).all(axis=0)
    return Candles(ts, *columns).take(np.flatnonzero(priced))


def _splits(result: Any) -> dict[int, float]:
    """The ratio (4.0 for 4:1) of each split by its instant."""
    splits = (result.get("events") or {}).get("splits") or {}
    found = {
        to_instant(split["date"], MICROS_PER_SECOND): float(split["numerator"]) / float(split["denominator"])
        for split in splits.values()
    }
    if not all(0 < ratio < np.inf for ratio in found.values()):
        raise _Odd("a split of an impossible ratio")
    return found
