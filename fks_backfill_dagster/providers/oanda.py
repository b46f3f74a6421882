"""OANDA v20 forex candles: all eight timeframes, mid prices.

Belongs here: instruments, alignments, pages, and the meaning of OANDA's responses.
Does not belong here: the hours of the forex market (`domain.grid`), the meaning of a missing candle (`pipeline`).

All eight timeframes are native.

Alignment. Candles up to 1h are always aligned to the hour. Candles from 4h up are aligned to the start of day in the
request; its default, 17:00 New York, varies in UTC with daylight saving time:
  4h   dailyAlignment=0 in UTC: 00, 04, 08 ... UTC all year, as on our grid.
  1d   dailyAlignment=17 in New York, explicitly.
  1w   the same with weeklyAlignment=Sunday. The default, Friday, has the same trades with another stamp.

Prices are mid. The volume counts ticks, not base units, so it is NULL. Intervals without a tick are omitted, and
pages that lost rows look the same: so candles missing from a page are requested a second time, and count as absent if
both responses miss them. The `complete` flag marks closed candles.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import quote, urlencode

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, Timeframe
from fks_backfill_dagster.known_providers import OANDA
from fks_backfill_dagster.providers.base import (
    Capabilities,
    Clocks,
    Contradiction,
    Delivery,
    Estimate,
    FetchResult,
    InvalidResponse,
    Origin,
    PermanentError,
    ProviderError,
    ProviderOptions,
    Transport,
    UnknownSymbol,
    check_served,
)
from fks_backfill_dagster.providers.http.client import HttpClient, Reply
from fks_backfill_dagster.providers.http.errors import host_of, server_time
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.keys import usable_key
from fks_backfill_dagster.providers.pages import agreeing, differing, joined

NAME, KEY_VARIABLE = OANDA.name, OANDA.key_variable
# Two new connections a second are accepted; the third one gets status 429.
SECONDS_PER_CONNECTION = 0.5
# The limit is 5000, weekends included; whether both ends of a window count is not documented.
PAGE_SIZE = 4998
# `to` must not be in the future by OANDA's clock, which may be behind ours.
_CLOCK_SKEW = 5 * MICROS_PER_SECOND
# Before the first candle of any instrument.
_EPOCH_OF_FOREX = "1990-01-01T00:00:00Z"

_NEW_YORK_DAY = {"dailyAlignment": "17", "alignmentTimezone": "America/New_York"}
_GRANULARITIES: Mapping[Timeframe, Mapping[str, str]] = {
    Timeframe.M1: {"granularity": "M1"},
    Timeframe.M5: {"granularity": "M5"},
    Timeframe.M15: {"granularity": "M15"},
    Timeframe.M30: {"granularity": "M30"},
    Timeframe.H1: {"granularity": "H1"},
    Timeframe.H4: {"granularity": "H4", "dailyAlignment": "0", "alignmentTimezone": "UTC"},
    Timeframe.D1: {"granularity": "D", **_NEW_YORK_DAY},
    Timeframe.W1: {"granularity": "W", **_NEW_YORK_DAY, "weeklyAlignment": "Sunday"},
}
_CANDLE = pa.struct(
    [
        ("complete", pa.bool_()),
        ("time", pa.string()),
        ("mid", pa.struct([(price, pa.string()) for price in "ohlc"])),
    ]
)


class Oanda:
    """Implements `Provider`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.FOREX: frozenset(_GRANULARITIES)},
        page_size=PAGE_SIZE,
        needs_key=KEY_VARIABLE,
        has_volume=False,
        omits_no_trade=True,
        confirms_absence=True,
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
        self._connections = _Connections(pool)

    def missing_key(self) -> str | None:
        return None if self._options.key else KEY_VARIABLE

    def listed_at(self, series: Series) -> int | None:
        """The open of the first daily candle."""
        check_served(self, series)
        instrument, first_day = instrument_of(series), {"from": _EPOCH_OF_FOREX, "count": "1"}
        candles = self._page(instrument, Timeframe.D1, first_day, Tally())
        return int(candles.ts[0]) if len(candles) else None

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        """Assumes that no page has missing candles."""
        opens = self._opens(series, window)
        requests = len(_pages(_ranges(opens, grid_of(series)), series.timeframe.micros))
        a_minute = self._options.requests_per_minute or OANDA.requests_per_minute
        return Estimate(requests, requests * 60 / a_minute)

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        check_served(self, series)
        with counted() as tally:
            return self._fetch(series, window, tally)

    def _fetch(self, series: Series, window: TimeRange, tally: Tally) -> FetchResult:
        instrument, grid = instrument_of(series), grid_of(series)
        requested_at = self._clock()
        opens = self._opens(series, window)
        if len(opens) == 0:
            return FetchResult(())
        wanted = _ranges(opens, grid)
        pages = self._fetch_pages(instrument, series.timeframe, wanted, tally)
        candles = Candles.concat(pages)
        missing = _ranges(_missing(opens, candles, grid), grid)
        if missing:
            again = self._fetch_pages(instrument, series.timeframe, missing, tally)
            known = candles.take(~missing.contains(candles.ts)).sorted()
            if any(differing(known, page) for page in again):
                raise _contradiction(instrument, series.timeframe)
            pages += [page.take(missing.contains(page.ts)) for page in again]
        candles, seams = joined(pages)
        source = f"{_path(instrument)}?{urlencode(self._query(series.timeframe, wanted.hull))}"
        origin = Origin(NAME, Transport.REST, source, host_of(self._base_url), instrument, requested_at)
        deliveries = (Delivery(candles, origin, seams),) if len(candles) else ()
        return FetchResult(deliveries, tally.count, clocks=tally.clocks)

    def instrument(self, series: Series) -> str:
        return instrument_of(series)

    def _opens(self, series: Series, window: TimeRange) -> Instants:
        """The opens of the closed candles of the window."""
        grid = grid_of(series)
        end = min(window.end, grid.closed_end(self._clock() - _CLOCK_SKEW))
        return grid.opens(TimeRange(window.start, max(window.start, end)))

    def _fetch_pages(
        self, instrument: str, timeframe: Timeframe, ranges: RangeSet, tally: Tally
    ) -> list[Candles]:
        """The rows of each page over `ranges`, each row once; only closed candles.

        Responses include the candle that covers `from` and may include the one at `to`: neighbouring pages can
        overlap.
        """

        def page(window: TimeRange) -> Candles:
            self._connections.wait()
            return self._page(instrument, timeframe, self._query(timeframe, window), tally).sorted()

        pages = _pages(ranges, timeframe.micros)
        rows = agreeing(pages, lambda some: self._client.pool.map(NAME, page, some))
        if rows is None:
            raise _contradiction(instrument, timeframe)
        return [block.within(window) for block, window in zip(rows, pages, strict=True)]

    def _query(self, timeframe: Timeframe, window: TimeRange) -> dict[str, str]:
        # The end of a candle that has just closed by our clock may be in the future by OANDA's.
        until = min(window.end, self._clock() - _CLOCK_SKEW)
        bounds = {"from": _rfc3339(window.start), "to": _rfc3339(max(until, window.start))}
        return {"price": "M", **_GRANULARITIES[timeframe], **bounds}

    def _page(
        self, instrument: str, timeframe: Timeframe, window: Mapping[str, str], tally: Tally
    ) -> Candles:
        query = {"price": "M", **_GRANULARITIES[timeframe], **window}
        url = self._base_url + _path(instrument)

        def attempt() -> Candles:
            reply = self._client.exchange(url, query)
            tally.closed_by(
                reply.headers, self._clock()
            )  # records the clocks only: closed candles have a flag
            if reply.status != 200:
                raise self._failure(reply, instrument)
            return self._read(reply, instrument, query["granularity"])

        return self._client.run(attempt, tally)

    def _failure(self, reply: Reply, instrument: str) -> ProviderError:
        message = _message(reply.body)
        if reply.status in (400, 404) and "'instrument'" in message:
            return UnknownSymbol(
                NAME,
                f"it has no instrument {instrument}: correct the symbol, or set OANDA's own in provider_symbols",
            )
        if "in the future" in message:
            theirs = server_time(reply.headers)
            clocks = f" ({Clocks(theirs, self._clock())})" if theirs is not None else ""
            text = f"{reply.place} returned: {message}: this machine's clock is ahead{clocks}: correct it"
            return PermanentError(NAME, text)
        return self._client.failure(reply)

    def _read(self, reply: Reply, instrument: str, granularity: str) -> Candles:
        """The complete candles of a response. A missing price becomes NaN."""
        document = self._client.json(reply)
        rows = document.get("candles") if isinstance(document, dict) else None
        if not isinstance(document, dict) or not isinstance(rows, list):
            raise InvalidResponse(NAME, f"{reply.place} returned no list of candles")
        if (document.get("instrument"), document.get("granularity")) != (instrument, granularity):
            raise InvalidResponse(
                NAME, f"{reply.place} returned another instrument or granularity than requested"
            )
        try:
            complete, opened, mid = pa.array(rows, type=_CANDLE).flatten()
            ts = opened.cast(pa.timestamp("ns", "UTC")).cast(pa.timestamp("us", "UTC")).cast(pa.int64())
            prices = [price.cast(pa.float64()).to_numpy(zero_copy_only=False) for price in mid.flatten()]
        except (pa.ArrowException, TypeError, OverflowError):
            raise InvalidResponse(NAME, f"{reply.place} returned candles of another shape") from None
        if ts.null_count or complete.null_count:
            raise InvalidResponse(NAME, f"{reply.place} returned candles without a time or a complete flag")
        candles = Candles(ts.to_numpy(), *[*prices, np.full(len(rows), np.nan)])
        mask: NDArray[np.bool_] = complete.to_numpy(zero_copy_only=False).astype(bool)
        return candles.take(mask)


class _Connections:
    """Spaces the first requests of the threads: each thread opens a connection and keeps it."""

    def __init__(self, pool: RequestPool) -> None:
        self._pool = pool
        self._lock = threading.Lock()
        self._local = threading.local()
        self._next = 0.0

    def wait(self) -> None:
        if getattr(self._local, "connected", False):
            return
        with self._lock:
            now = time.monotonic()
            start = max(now, self._next)
            self._next = start + SECONDS_PER_CONNECTION
        self._pool.sleep(start - now)
        self._local.connected = True


def instrument_of(series: Series) -> str:
    """`EUR/USD` -> `EUR_USD`, unless set in the settings. Raises UnknownSymbol."""
    named = series.provider_symbol(NAME)
    if named:
        return named
    base, slash, quoted = series.symbol.partition("/")
    if not (base and slash and quoted):
        raise UnknownSymbol(
            NAME, f"{series.symbol} is not a pair like EUR/USD: set its instrument in provider_symbols"
        )
    return f"{base}_{quoted}"


def _path(instrument: str) -> str:
    return f"/v3/instruments/{quote(instrument, safe='')}/candles"


def _rfc3339(micros: int) -> str:
    return f"{np.datetime64(micros // MICROS_PER_SECOND, 's')}Z"


def _ranges(opens: Instants, grid: Grid) -> RangeSet:
    """The ranges of these candles."""
    return RangeSet.from_arrays(opens, grid.closes(opens))


def _pages(ranges: RangeSet, step: int) -> list[TimeRange]:
    """Windows of at most PAGE_SIZE intervals; ranges closer than half a page share one."""
    size = PAGE_SIZE * step
    return [
        TimeRange(start, min(start + size, part.end))
        for part in ranges.merge_closer_than(size // 2)
        for start in range(part.start, part.end, size)
    ]


def _missing(opens: Instants, candles: Candles, grid: Grid) -> Instants:
    """The opens without a valid row."""
    window = TimeRange(int(opens[0]), int(opens[-1]) + 1)
    good = verify(candles, window, grid, window.end).good
    return opens[~np.isin(opens, good.ts, assume_unique=True)]


def _contradiction(instrument: str, timeframe: Timeframe) -> Contradiction:
    return Contradiction(
        NAME,
        f"it returned different values for the same candle of {instrument} {timeframe}: some pages belong to another "
        "instrument",
    )


def _message(body: bytes) -> str:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return ""
    return str(document.get("errorMessage", "")) if isinstance(document, dict) else ""
