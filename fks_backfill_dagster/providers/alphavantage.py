"""Alpha Vantage stock candles: days, and months of intraday bars for premium keys.

Belongs here: the API's functions, New York stamps, and the meaning of responses (always status 200).
Does not belong here: sessions (`domain.grid`), splits: prices are requested as traded.

Requests:
  1d                native, TIME_SERIES_DAILY: the last 100 days, or the whole history (premium); once the history
                    was refused, only the last days are requested. Stamped by date
  1w                derived from 1d
  1m 5m 15m 30m     native, TIME_SERIES_INTRADAY by New York month since 2000-01 (premium), regular session only
  1h 4h             derived from 30m: native hours begin at 09:30 or 09:00, which is not documented, and may contain
                    pre-market trades; a half hour lies inside or outside the session.

Stamps are New York wall time without a zone, and recordings disagree on whether they are opens or closes. This is
inferred from the edges of the sessions: 09:30 can only be an open, 16:00 only a close. A month with both or neither
is rejected.

Whether intervals without a trade are omitted or filled is not documented, so they count as omitted: the rule for
no-trade intervals then requires a second source (`pipeline`).
A free key has 25 requests a day: so no request is tried more than ATTEMPTS times, and months are requested
one after another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_datetime, to_micros
from fks_backfill_dagster.known_providers import ALPHAVANTAGE
from fks_backfill_dagster.providers.base import (
    Capabilities,
    Delivery,
    Estimate,
    FetchResult,
    InvalidResponse,
    NotEntitled,
    Origin,
    PermanentError,
    ProviderError,
    ProviderOptions,
    RateLimited,
    TooOld,
    Transport,
    UnknownSymbol,
    WrongKey,
    check_served,
)
from fks_backfill_dagster.providers.http.client import HttpClient, Reply
from fks_backfill_dagster.providers.http.errors import host_of
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.keys import redact, usable_key
from fks_backfill_dagster.providers.pages import joined

NAME, KEY_VARIABLE = ALPHAVANTAGE.name, ALPHAVANTAGE.key_variable
ATTEMPTS = 3

PAGE_SIZE = 23 * 390  # minutes of a month with 23 sessions; more than the days of any history
_MONTHS = {  # one request returns one month, whatever its number of candles
    timeframe: 23 * -(-390 // timeframe.minutes) for timeframe in Timeframe if timeframe.is_intraday
}
_COMPACT_DAYS = 100
_FIRST_MONTH = "2000-01"
_NEW_YORK = ZoneInfo("America/New_York")
_ZONES = ("US/Eastern", "America/New_York")
# The timeframe to request for each timeframe.
_FINE = {
    Timeframe.M1: Timeframe.M1,
    Timeframe.M5: Timeframe.M5,
    Timeframe.M15: Timeframe.M15,
    Timeframe.M30: Timeframe.M30,
    Timeframe.H1: Timeframe.M30,
    Timeframe.H4: Timeframe.M30,
    Timeframe.D1: Timeframe.D1,
    Timeframe.W1: Timeframe.D1,
}
# The share of rows at session edges that may contradict the others: a stray bar after the close of a half-day.
# Such rows lie outside the session and are dropped later.
_STRAYS = 0.1
_COLUMNS = ("1. open", "2. high", "3. low", "4. close", "5. volume")
_ROW = pa.struct([(name, pa.string()) for name in _COLUMNS])


class _Burst(RateLimited):
    """More than one request a second; premium functions return the same text for free keys."""


class _Premium(NotEntitled):
    """Data that only a premium key covers."""


class AlphaVantage:
    """Implements `Provider`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.STOCKS: frozenset(_FINE)},
        page_size=PAGE_SIZE,
        page_sizes=_MONTHS,
        needs_key=KEY_VARIABLE,
        omits_no_trade=True,
        derived={AssetClass.STOCKS: {at: fine for at, fine in _FINE.items() if at is not fine}},
    )

    def __init__(
        self,
        options: ProviderOptions,
        pool: RequestPool,
        limiter: Limiter,
        clock: Callable[[], int] = system_micros,
    ) -> None:
        self._key = usable_key(NAME, options.key, KEY_VARIABLE) if options.key else None
        self._options = replace(options, key=self._key)
        self._clock = clock
        self._url = f"{options.base_url.rstrip('/')}/query"
        self._history_refusal: str | None = None  # the text of the response
        self._client = HttpClient(NAME, self._options, pool, limiter)

    def missing_key(self) -> str | None:
        return None if self._key else KEY_VARIABLE

    def listed_at(self, series: Series) -> int | None:
        """Unknown: the whole history is premium."""
        return None

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        requests = len(self._queries(series, window))
        a_minute = self._options.requests_per_minute or ALPHAVANTAGE.requests_per_minute
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        check_served(self, series)
        queries = self._queries(series, window)
        if not queries:
            return FetchResult(())
        with counted() as tally:
            return self._fetch(series, window, queries, tally)

    def _fetch(
        self, series: Series, window: TimeRange, queries: list[dict[str, str]], tally: Tally
    ) -> FetchResult:
        now = self._clock()
        read = self._bars if series.timeframe.is_intraday else self._days
        pages = [page.sorted().within(window) for page in read(series, queries, tally)]
        ours = self._clock()
        end = grid_of(series).closed_end(min(tally.clocks.theirs, ours) if tally.clocks else ours)
        closed, seams = joined([page.take(page.ts < end) for page in pages])
        origin = Origin(NAME, Transport.REST, _source(queries), host_of(self._url), symbol_of(series), now)
        deliveries = (Delivery(closed, origin, seams),) if len(closed) else ()
        return FetchResult(deliveries, tally.count, clocks=tally.clocks)

    def instrument(self, series: Series) -> str:
        return symbol_of(series)

    def _queries(self, series: Series, span: TimeRange) -> list[dict[str, str]]:
        """The requests for the candles that open in `span` and before now: one for days, or one per New York month."""
        grid, now = grid_of(series), self._clock()
        opens = grid.opens(TimeRange(span.start, max(span.start, min(span.end, now))))
        if len(opens) == 0:
            return []
        if not series.timeframe.is_intraday:
            recent = grid.count(TimeRange(int(opens[0]), now)) <= _COMPACT_DAYS
            return [_daily_query(series, "compact" if recent else "full")]
        first, last = (
            np.datetime64(f"{to_datetime(int(at)).astimezone(_NEW_YORK):%Y-%m}", "M") for at in opens[[0, -1]]
        )
        months = np.arange(max(first, np.datetime64(_FIRST_MONTH)), last + 1)
        return [_intraday_query(series, str(month)) for month in months]

    def _days(self, series: Series, queries: list[dict[str, str]], tally: Tally) -> list[Candles]:
        (query,) = queries
        if query["outputsize"] == "full" and self._history_refusal is not None:
            raise self._without_history(series, self._history_refusal)
        return [self._request(series, query, tally, premium=query["outputsize"] == "full")]

    def _bars(self, series: Series, queries: list[dict[str, str]], tally: Tally) -> list[Candles]:
        """The bars of each month, stamped at their open."""
        blocks, refused = list[Candles](), False
        for query in queries:
            try:
                rows = self._request(series, query, tally, premium=True)
            except UnknownSymbol:
                refused = True  # unknown symbol, or a month before its listing: the same text for both
                continue
            opens = to_opens(rows.ts, grid_of(series), series.timeframe.micros)
            if opens is None:
                raise PermanentError(
                    NAME,
                    f"its {series} of {query['month']}: the stamps may be opens or closes",
                )
            blocks.append(replace(rows, ts=opens))
        if refused and not blocks:
            self._request(series, _daily_query(series, "compact"), tally, premium=False)
        return blocks

    # --- requests ---

    def _request(self, series: Series, query: Mapping[str, str], tally: Tally, *, premium: bool) -> Candles:
        """The rows of one response with stamps in UTC, not moved. `premium`: free keys do not cover it."""

        def attempt() -> Candles:
            reply = self._client.exchange(self._url, {**query, "apikey": self._key or ""})
            tally.closed_by(reply.headers, self._clock())
            return self._read(reply, series, query)

        # In a thread of this provider's lane, which keeps its connection.
        def run(_: None) -> Candles:
            return self._client.run(attempt, tally, attempts=ATTEMPTS)

        try:
            return self._client.pool.map(NAME, run, [None])[0]
        except _Premium as error:
            if not premium or series.timeframe.is_intraday:
                raise
            self._history_refusal = str(error).removeprefix(f"{NAME}: ")
            raise self._without_history(series, self._history_refusal) from None
        except _Burst as error:
            if not premium:
                raise
            text = (
                f"{query['function']} was refused repeatedly for exceeding the rate limit, which is also the response "
                f"for a key that does not cover it ({error})"
            )
            if series.timeframe.is_intraday:
                raise NotEntitled(NAME, text) from None
            raise self._without_history(series, text) from None

    def _without_history(self, series: Series, why: str) -> TooOld:
        now = self._clock()
        recent = grid_of(series).opens(TimeRange(now - 2 * _COMPACT_DAYS * MICROS_PER_DAY, now))
        since = int(recent[-_COMPACT_DAYS:][0])
        return TooOld(NAME, f"the key covers the last {_COMPACT_DAYS} days only: {why}", since)

    def _read(self, reply: Reply, series: Series, query: Mapping[str, str]) -> Candles:
        if reply.status != 200:
            raise self._client.failure(reply)
        document = self._client.json(reply)
        if not isinstance(document, dict):
            raise InvalidResponse(NAME, f"{reply.place} returned no object")
        about = document.get("Meta Data")
        if not isinstance(about, dict):
            raise self._refusal(document, reply, query)
        if str(about.get("2. Symbol", "")).upper() != query["symbol"].upper():
            raise InvalidResponse(NAME, f"{reply.place} returned another symbol than {query['symbol']}")
        if "interval" in query and about.get("4. Interval") != query["interval"]:
            raise InvalidResponse(NAME, f"{reply.place} returned another interval than {query['interval']}")
        zone = next((value for name, value in about.items() if name.endswith("Time Zone")), None)
        if "interval" in query and zone not in _ZONES:
            raise InvalidResponse(NAME, f"{reply.place} returned stamps in another zone than New York")
        table = next((value for name, value in document.items() if name.startswith("Time Series")), None)
        return read_table(table, reply.place, intraday="interval" in query)

    def _refusal(self, document: dict[str, object], reply: Reply, query: Mapping[str, str]) -> ProviderError:
        """The error for a response without data, from its text."""
        message = " ".join(
            str(document.get(key, "")) for key in ("Error Message", "Information", "Note")
        ).strip()
        text = f"{reply.place} returned: {redact(message, self._key)[:200]}"
        if "Error Message" in document and "Invalid API call" in message:
            return UnknownSymbol(
                NAME,
                f"it has no {query['symbol']}: correct the symbol, or set Alpha Vantage's own in provider_symbols",
            )
        if "apikey is invalid" in message or "claim your free API key" in message:
            return WrongKey(NAME, f"{text} (check {KEY_VARIABLE})")
        if "1 request per second" in message or "sparingly" in message:
            return _Burst(NAME, text, retry_after=1.0)
        if re.search(r"premium (endpoint|feature)", message):
            return _Premium(NAME, text)
        if re.search(r"(calls|requests) per minute", message):
            return RateLimited(NAME, text, retry_after=60.0)
        if re.search(r"(calls|requests) per day", message):
            return RateLimited(NAME, text, retry_after=seconds_to_tomorrow(self._clock()))
        return InvalidResponse(NAME, text if message else f"{reply.place} returned neither data nor a reason")


def symbol_of(series: Series) -> str:
    """The ticker itself, unless set in the settings."""
    return series.provider_symbol(NAME) or series.symbol


def _daily_query(series: Series, size: str) -> dict[str, str]:
    return {"function": "TIME_SERIES_DAILY", "symbol": symbol_of(series), "outputsize": size}


def _intraday_query(series: Series, month: str) -> dict[str, str]:
    return {
        "function": "TIME_SERIES_INTRADAY",
        "symbol": symbol_of(series),
        "interval": f"{series.timeframe.minutes}min",
        "month": month,
        "outputsize": "full",
        "adjusted": "false",
        "extended_hours": "false",
    }


def _source(queries: list[dict[str, str]]) -> str:
    """The request; with the first and the last month if there are several."""
    months = sorted({query["month"] for query in (queries[0], queries[-1]) if "month" in query})
    return f"/query?{urlencode({**queries[0], **({'month': '..'.join(months)} if months else {})})}"


def read_table(table: object, place: str, *, intraday: bool) -> Candles:
    """`{"2024-01-31 15:55:00": {"1. open": "...", ...}}` to columns.

    Stamps of bars become UTC instants, those of days 00:00 UTC of the date. Raises InvalidResponse.
    """
    if not isinstance(table, dict):
        raise InvalidResponse(NAME, f"{place} returned no time series")
    try:
        cells = pa.array(list(table.values()), type=_ROW).flatten()
        columns = [cell.cast(pa.float64()).to_numpy(zero_copy_only=False) for cell in cells]
        wall = pa.array(list(table), type=pa.string()).cast(pa.timestamp("us")).to_numpy()
        ts = _utc(wall) if intraday else wall.astype("datetime64[us]").view(np.int64)
    except (pa.ArrowException, TypeError, ValueError):
        raise InvalidResponse(NAME, f"{place} returned rows of another shape") from None
    # Every candle has a volume: a missing one must not be read as "no volume at this source".
    columns[4] = np.where(np.isnan(columns[4]), np.inf, columns[4])
    return Candles(ts, *columns)


def _utc(wall: np.ndarray[tuple[int], np.dtype[np.datetime64]]) -> Instants:
    """New York wall time to instants. Raises ValueError for an ambiguous or nonexistent time."""
    import pandas as pd

    zoned = pd.DatetimeIndex(wall).tz_localize(_NEW_YORK, ambiguous="raise", nonexistent="raise")
    return zoned.tz_convert("UTC").tz_localize(None).to_numpy().astype("datetime64[us]").view(np.int64)


def to_opens(stamps: Instants, grid: Grid, step: int) -> Instants | None:
    """The opens of bars that are stamped at the open or at the close; None if that cannot be decided.

    A stamp at the beginning of a session can only be an open, one at its end only a close.
    """
    is_open, would_be_close = grid.contains(stamps), grid.contains(stamps - step)
    opening = int(np.count_nonzero(is_open & ~would_be_close))
    closing = int(np.count_nonzero(would_be_close & ~is_open))
    if len(stamps) == 0 or closing < opening * _STRAYS:
        return stamps
    if opening < closing * _STRAYS:
        return stamps - step
    return None


def seconds_to_tomorrow(now: int) -> float:
    """From an instant to the next midnight of New York, when the daily budget is assumed to restart."""
    local = to_datetime(now).astimezone(_NEW_YORK)
    tomorrow = datetime(local.year, local.month, local.day, tzinfo=_NEW_YORK) + timedelta(days=1)
    return (to_micros(tomorrow) - now) / 1_000_000
