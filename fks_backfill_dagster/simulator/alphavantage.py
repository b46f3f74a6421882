"""Alpha Vantage's time series of stocks: always status 200, New York time, newest first.

Only the wire format: functions, months, free and premium keys, and the messages, which are those quoted in
public. A key that begins with `free` belongs to the free plan; any other key is a premium one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE
from fks_backfill_dagster.simulator.bars import Bars, decimal_texts
from fks_backfill_dagster.simulator.faults import Fields, Row
from fks_backfill_dagster.simulator.frames import SessionRuler, WallRuler, local_dates
from fks_backfill_dagster.simulator.sessions import NEW_YORK, utc, wall
from fks_backfill_dagster.simulator.splits import adjusted
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply, Rows

INTERVALS: Mapping[str, int] = {f"{n}min": n * MICROS_PER_MINUTE for n in (1, 5, 15, 30, 60)}
COMPACT = 100
_TRAILING_DAYS = 30
_FIELDS = ("1. open", "2. high", "3. low", "4. close", "5. volume")
_MAX_HISTORY = 40 * 366 * MICROS_PER_DAY  # before now: longer than any history here
_PREMIUM = (
    "Thank you for using Alpha Vantage! This is a premium endpoint. You may subscribe to any of the premium "
    "plans at https://www.alphavantage.co/premium/ to instantly unlock all premium endpoints"
)
_BURST = (
    "Thank you for using Alpha Vantage! Please consider spreading out your free API requests more sparingly "
    "(1 request per second). You may subscribe to any of the premium plans at "
    "https://www.alphavantage.co/premium/ to lift the free key rate limit (25 requests per day), raise the "
    "per-second burst limit, and instantly unlock all premium endpoints"
)
_BAD_KEY = (
    "the parameter apikey is invalid or missing. Please claim your free API key on "
    "(https://www.alphavantage.co/support/#api-key). It should take less than 20 seconds."
)


class ErrorResponse(Exception):
    """The response in place of a series; `field` is `Error Message` or `Information`."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class AlphaVantage:
    """GET /query?function=TIME_SERIES_INTRADAY|TIME_SERIES_DAILY."""

    name = "alphavantage"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        """Only free keys have limits; a rejection has status 200."""
        key = call.query.get("apikey", "")
        if not _is_free(key):
            return None
        meters = self._sandbox.meters
        if meters["alphavantage_burst"].charge(1).status is not None:
            return _error_reply(ErrorResponse("Information", _BURST))
        if meters["alphavantage"].charge(1).status is not None:
            return _error_reply(ErrorResponse("Information", _daily_limit(key, meters["alphavantage"].limit)))
        return None

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def spell(self, plain: str) -> str:
        return plain

    def error(self, status: int, retry_after: int) -> Reply:
        if status == 429:
            return _error_reply(ErrorResponse("Information", _BURST))
        return Reply(b"<html><body><h1>Service Unavailable</h1></body></html>", status, "text/html")

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        other = self._sandbox.other_symbol("alphavantage", Instrument(AssetClass.STOCKS, symbol), other)
        if other is None:
            return self.answer(call)
        found = self.answer(Call(call.path, {**call.query, "symbol": other}, call.headers, call.base_url))
        body = found.reply.body.replace(f'"2. Symbol":"{other}"'.encode(), f'"2. Symbol":"{symbol}"'.encode())
        return Answer(Reply(body), found.endpoint, 1, symbol, found.span, found.rows)

    def answer(self, call: Call) -> Answer:
        if call.path != "/query":
            return Answer(Reply(b"<html><body>Not Found</body></html>", 404, "text/html"), "unknown")
        function, symbol = call.query.get("function", ""), call.query.get("symbol", "")
        try:
            self._check_key(call.query.get("apikey", ""))
            what = self._sandbox.known("alphavantage", AssetClass.STOCKS, symbol.upper())
            if what is None:
                raise _bad_call(function)
            if function == "TIME_SERIES_DAILY":
                reply, span = self._daily(what, call.query)
            elif function == "TIME_SERIES_INTRADAY":
                reply, span = self._intraday(what, call.query)
            else:
                raise _bad_call(function)
        except ErrorResponse as error:
            return Answer(_error_reply(error), function or "query", 1, symbol)
        return Answer(reply, function, 1, symbol, span, ROWS)

    def _check_key(self, key: str) -> None:
        if not key or key in self._sandbox.config.bad_keys:
            raise ErrorResponse("Error Message", _BAD_KEY)

    def _daily(self, what: Instrument, query: Mapping[str, str]) -> tuple[Reply, TimeRange]:
        """Days of the regular session, as traded, keyed by date; the running day is absent."""
        full = query.get("outputsize") == "full"
        if full and _is_free(query.get("apikey", "")):
            raise ErrorResponse("Information", _PREMIUM)
        now = self._sandbox.clock.now()
        reach = _MAX_HISTORY if full else 2 * COMPACT * MICROS_PER_DAY
        frame = SessionRuler(MICROS_PER_DAY).frame(TimeRange(now - reach, now)).closed(now)
        if not full:
            frame = frame.take(slice(-COMPACT, None))
        bars = self._sandbox.framed("alphavantage", what, frame)
        meta = {
            "1. Information": "Daily Prices (open, high, low, close) and Volumes",
            "2. Symbol": query["symbol"],
            "3. Last Refreshed": _texts(local_dates(bars.ts[-1:]))[0][:10] if len(bars) else None,
            "4. Output Size": "Full size" if full else "Compact",
            "5. Time Zone": "US/Eastern",
        }
        names = [text[:10] for text in _texts(local_dates(bars.ts))]
        return _page(meta, "Time Series (Daily)", names, bars), frame.hull

    def _intraday(self, what: Instrument, query: Mapping[str, str]) -> tuple[Reply, TimeRange]:
        interval = query.get("interval", "")
        if interval not in INTERVALS:
            raise _bad_call("TIME_SERIES_INTRADAY")
        if _is_free(query.get("apikey", "")):
            raise ErrorResponse("Information", _PREMIUM)
        now, length = self._sandbox.clock.now(), INTERVALS[interval]
        window = self._window(query.get("month"), now)
        extended = query.get("extended_hours", "true") != "false"
        frame = WallRuler(length, extended=extended).frame(window).closed(now)
        bars = self._sandbox.framed("alphavantage", what, frame)
        if query.get("outputsize", "compact") != "full":
            bars = bars.take(slice(max(len(bars) - COMPACT, 0), None))
        if query.get("adjusted", "true") != "false":
            bars = adjusted(bars, self._sandbox.splits_of(what.name))
        stamps = bars.ts + (length if self._sandbox.config.close_stamped else 0)
        names = _texts(wall(stamps, NEW_YORK))
        meta = {
            "1. Information": f"Intraday ({interval}) open, high, low, close prices and volume",
            "2. Symbol": query["symbol"],
            "3. Last Refreshed": names[-1] if names else None,
            "4. Interval": interval,
            "5. Output Size": "Full size" if query.get("outputsize") == "full" else "Compact",
            "6. Time Zone": "US/Eastern",
        }
        return _page(meta, f"Time Series ({interval})", names, bars), window

    def _window(self, month: str | None, now: int) -> TimeRange:
        """A New York calendar month, or the trailing days."""
        if month is None:
            return TimeRange(now - _TRAILING_DAYS * MICROS_PER_DAY, now)
        if not re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", month):
            raise _bad_call("TIME_SERIES_INTRADAY")
        first = np.datetime64(month, "M")
        edges = np.array([first, first + 1]).astype("datetime64[us]").view(np.int64)
        return TimeRange(*utc(edges, NEW_YORK).tolist())


def _is_free(key: str) -> bool:
    return key.lower().startswith("free")


def _bad_call(function: str) -> ErrorResponse:
    docs = "(https://www.alphavantage.co/documentation/)"
    return ErrorResponse(
        "Error Message", f"Invalid API call. Please retry or visit the documentation {docs} for {function}."
    )


def _daily_limit(key: str, limit: int | None) -> str:
    return (
        f"We have detected your API key as {key} and our standard API rate limit is {limit} requests per day. "
        "Please subscribe to any of the premium plans at https://www.alphavantage.co/premium/ to instantly "
        "remove all daily rate limits."
    )


def _error_reply(error: ErrorResponse) -> Reply:
    return Reply(orjson.dumps({error.field: str(error)}))


def _texts(walls: np.typing.NDArray[np.int64]) -> list[str]:
    """`2024-01-05 09:30:00`."""
    texts = walls.view("datetime64[us]").astype("datetime64[s]").astype(str)
    return [text.replace("T", " ") for text in texts.tolist()]


def _page(meta: Mapping[str, str | None], key: str, names: Sequence[str], bars: Bars) -> Reply:
    """Newest first. Prices have at least four decimals, more if the source has more."""
    *prices, volume = bars.texts()
    if bars.scale.price < 4:
        raised = 10 ** (4 - bars.scale.price)
        columns = (bars.open, bars.high, bars.low, bars.close)
        prices = [decimal_texts(column * raised, 4) for column in columns]
    rows = [[name, *cells] for name, *cells in zip(names, *prices, volume, strict=True)]
    return Reply(_written(meta, key, rows[::-1]))


def _written(meta: Mapping[str, Any], key: str, rows: Sequence[Row]) -> bytes:
    """Written without a dict: the fault `duplicated` needs pages with a repeated key."""
    series = ",".join(
        f"{orjson.dumps(name).decode()}:{orjson.dumps(dict(zip(_FIELDS, cells, strict=True))).decode()}"
        for name, *cells in rows
    )
    head = orjson.dumps({"Meta Data": meta}).decode()[:-1]
    return f"{head},{orjson.dumps(key).decode()}:{{{series}}}}}".encode()


def _series_key(page: Any) -> str:
    return next(key for key in map(str, page) if key.startswith("Time Series"))


def _take(page: Any) -> list[Row]:
    """Rows [microseconds, open, high, low, close, volume], newest first."""
    series = page[_series_key(page)]
    walls = np.array([np.datetime64(name, "us") for name in series], dtype="datetime64[us]").view(np.int64)
    stamps = utc(walls, NEW_YORK).tolist() if len(walls) else []
    return [[ts, *cells.values()] for ts, cells in zip(stamps, series.values(), strict=True)]


def _put(page: Any, rows: list[Row]) -> bytes:
    """Daily pages keep dates as keys."""
    key = _series_key(page)
    names = _texts(wall(np.array([row[0] for row in rows], dtype=np.int64), NEW_YORK)) if rows else []
    if key == "Time Series (Daily)":
        names = [name.removesuffix(" 00:00:00") for name in names]
    return _written(page["Meta Data"], key, [[n, *row[1:]] for n, row in zip(names, rows, strict=True)])


ROWS = Rows(Fields(ts=0, open=1, high=2, low=3, text=True), _take, _put, 1)
