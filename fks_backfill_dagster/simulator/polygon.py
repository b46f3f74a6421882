"""Polygon's aggregates: `X:BTCUSD` is the market of BTC/USDT, `C:EURUSD` a currency pair, `AAPL` a stock.

Only the wire format: the path, the key, bar alignment, snapping, base-bar limits and cursors. Minutes and
hours of stocks contain pre- and post-market trades; hours are clock hours. A stock's day is the official
one, stamped at 00:00 New York, and weeks are aggregated from such days. A pair's days are UTC days,
Saturdays included.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from itertools import chain
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import orjson

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)
from fks_backfill_dagster.simulator.bars import SUNDAY_WEEKS, Bars, Step, decimal_texts
from fks_backfill_dagster.simulator.config import instant, plain_symbol
from fks_backfill_dagster.simulator.faults import Fields
from fks_backfill_dagster.simulator.frames import EvenRuler, Ruler, WallRuler, WeekRuler, ceil, floor
from fks_backfill_dagster.simulator.market import newest, oldest
from fks_backfill_dagster.simulator.polygon_splits import PATH as SPLITS
from fks_backfill_dagster.simulator.polygon_splits import splits_cursor, splits_reply
from fks_backfill_dagster.simulator.sessions import NEW_YORK, utc
from fks_backfill_dagster.simulator.splits import adjusted
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply, Rows, dumped


def _put(page: Any, rows: list[Any]) -> bytes:
    if "results" in page:
        page |= {"results": rows, "resultsCount": len(rows)}
    return dumped(page)


ROWS = Rows(
    Fields(ts="t", open="o", high="h", low="l", text=False),
    take=lambda page: list(page.get("results", [])),
    put=_put,
)
DEFAULT_LIMIT, MAX_LIMIT = 5000, 50_000
UNITS: Mapping[str, int] = {
    "minute": MICROS_PER_MINUTE,
    "hour": MICROS_PER_HOUR,
    "day": MICROS_PER_DAY,
    "week": SUNDAY_WEEKS.length,
}
_PATH = re.compile(
    r"/v2/aggs/ticker/(?P<ticker>[^/]+)/range/(?P<mult>\d{1,4})/(?P<unit>\w+)/(?P<start>[^/]+)/(?P<end>[^/]+)"
)
_ROW = '{"v":%s,"vw":%s,"o":%s,"c":%s,"h":%s,"l":%s,"t":%d,"n":%d},'


@dataclass(frozen=True, slots=True)
class AggregatesRequest:
    """An aggregates request after parsing; `window` is snapped outwards to whole bars."""

    ticker: str
    mult: int
    unit: str
    step: Ruler
    base: Ruler
    window: TimeRange
    end: str
    limit: int
    descending: bool
    adjusted: bool


class BadRequest(Exception):
    """A request that Polygon rejects with 400."""


class Polygon:
    """GET /v2/aggs/ticker/{T}/range/{mult}/{minute|hour|day|week}/{from}/{to}."""

    name = "polygon"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        verdict = self._sandbox.meters["polygon"].charge(1)
        return None if verdict.status is None else self.error(verdict.status, verdict.retry_after)

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def error(self, status: int, retry_after: int) -> Reply:
        if status == 403:
            message = (
                "You are not entitled to this data. Please upgrade your plan at https://massive.com/pricing"
            )
            return _json({"status": "NOT_AUTHORIZED", "message": message}, 403)
        if status == 429:
            message = (
                "You've exceeded the maximum requests per minute, please wait or upgrade your subscription "
                "to continue. https://massive.com/pricing"
            )
            return _json({"status": "ERROR", "error": message}, 429)
        return _json({"status": "ERROR", "error": "An error occurred. Please try again."}, status)

    def spell(self, plain: str) -> str:
        found = self._sandbox.find("polygon", plain)
        return plain if found is None else _ticker(found.asset_class, plain)

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        requested = self._instrument(symbol)
        other = None if requested is None else self._sandbox.other_symbol("polygon", requested, other)
        if requested is None or other is None:
            return self.answer(call)
        ticker = _ticker(requested.asset_class, other)
        path = call.path.replace(f"/ticker/{symbol}/", f"/ticker/{ticker}/")
        answer = self.answer(Call(path, call.query, call.headers, call.base_url))
        body = answer.reply.body.replace(ticker.encode(), symbol.encode())
        return Answer(Reply(body), answer.endpoint, 1, symbol, answer.span, answer.rows)

    def answer(self, call: Call) -> Answer:
        if (rejection := self._unauthorised(call)) is not None:
            return Answer(rejection, "aggs")
        if call.path == SPLITS:
            return self._splits(call)
        match = _PATH.fullmatch(call.path)
        if match is None:
            return Answer(_json({"status": "NOT_FOUND", "message": "404 page not found"}, 404), "unknown")
        try:
            request = parse(match, call.query)
        except BadRequest as error:
            return Answer(_json({"status": "ERROR", "error": str(error)}, 400), "aggs", 1, match["ticker"])
        key = (request, call.base_url)
        body = self._sandbox.prepared.get(key)
        if body is None:
            body = self._page(request, call.base_url)[0]
        return Answer(Reply(body), "aggs", 1, request.ticker, request.window, ROWS)

    def _splits(self, call: Call) -> Answer:
        """The splits of a ticker; the local market needs one."""
        ticker = call.query.get("ticker") or splits_cursor(call.query).get("ticker", "")
        known = self._sandbox.splits_of(ticker)
        return Answer(splits_reply(known, call.query, call.base_url), "splits", 1, ticker or None)

    def prepare(self, ticker: str, timeframe: Timeframe, window: TimeRange, base_url: str) -> tuple[int, int]:
        """Builds the pages of a client that requests all of `window` with the maximum limit.

        `next_url` contains the host, so pages are stored per `base_url`.
        """
        pages = size = 0
        unit, mult = _unit_of(timeframe)
        end = min(window.end, self._sandbox.clock.now()) // 1000 - 1
        at: int | None = window.start // 1000
        while at is not None:
            path = f"/v2/aggs/ticker/{ticker}/range/{mult}/{unit}/{at}/{end}"
            match = _PATH.fullmatch(path)
            assert match is not None
            request = parse(match, {"limit": str(MAX_LIMIT), "adjusted": "false"})
            body, at = self._page(request, base_url)
            self._sandbox.prepared.put((request, base_url), body)
            pages, size = pages + 1, size + len(body)
        return pages, size

    def _unauthorised(self, call: Call) -> Reply | None:
        key = call.headers.get("authorization", "").removeprefix("Bearer").strip() or call.query.get("apiKey")
        if not key:
            return _json({"status": "ERROR", "error": "API Key was not provided"}, 401)
        if key in self._sandbox.config.bad_keys:
            return _json({"status": "ERROR", "error": "Unknown API Key"}, 401)
        return None

    def _instrument(self, ticker: str) -> Instrument | None:
        """Polygon has no USDT pairs: `X:BTCUSDT` is unknown."""
        if ticker.startswith("X:") and ticker.endswith("USDT"):
            return None
        return self._sandbox.known("polygon", _asset_class(ticker), plain_symbol(ticker))

    def _page(self, request: AggregatesRequest, base_url: str) -> tuple[bytes, int | None]:
        """The page's body, and the start of the next page in milliseconds."""
        symbol = self._instrument(request.ticker)
        head = {
            "ticker": request.ticker,
            "adjusted": request.adjusted,
            "status": "OK",
            "request_id": _request_id(request),
        }
        if symbol is None:
            return orjson.dumps({**head, "queryCount": 0, "resultsCount": 0}), None
        parts, bars, rest = self._cut(request, symbol)
        if len(bars) == 0:
            return orjson.dumps({**head, "queryCount": 0, "resultsCount": 0}), None
        head |= {"queryCount": parts, "resultsCount": len(bars), "count": len(bars)}
        at = None
        if rest:
            head["next_url"] = _next_url(request, rest, base_url)
            at = rest.start // 1000
        if request.descending:
            bars = bars.take(slice(None, None, -1))
        return orjson.dumps(head)[:-1] + b',"results":' + _rows(bars) + b"}", at

    def _cut(self, request: AggregatesRequest, what: Instrument) -> tuple[int, Bars, TimeRange]:
        """The number of base bars of the page, its bars, and the remaining window.

        A page contains whole bars: at least one, otherwise as many as `limit` base bars fill.
        """
        read_base = partial(self._read, what, request.base)
        listing = self._sandbox.listing("polygon", what)
        window = request.window.intersect(
            TimeRange(floor(request.step, listing.start), min(listing.end, self._sandbox.clock.now() + 1))
        )
        pick = newest if request.descending else oldest
        base = pick(read_base, request.base.length, window, request.limit)
        page, rest = window, TimeRange(window.end, window.end)
        if len(base) == request.limit and request.descending:
            cut = max(ceil(request.step, int(base.ts[0])), window.start)
            cut = cut if cut < window.end else floor(request.step, window.end - 1)
            page, rest = TimeRange(cut, window.end), TimeRange(window.start, max(cut, window.start))
        elif len(base) == request.limit:
            cut = floor(request.step, int(base.ts[-1]) + request.base.length)
            cut = min(max(cut, ceil(request.step, window.start + 1)), request.window.end)
            page, rest = TimeRange(window.start, cut), TimeRange(min(cut, window.end), window.end)
        bars = base.within(page) if request.step == request.base else self._read(what, request.step, page)
        if request.adjusted and what.asset_class is AssetClass.STOCKS:
            bars = adjusted(bars, self._sandbox.splits_of(what.name))
        return len(base), bars, rest

    def _read(self, what: Instrument, ruler: Ruler, window: TimeRange) -> Bars:
        if isinstance(ruler, EvenRuler) and what.asset_class is AssetClass.CRYPTO:
            return self._sandbox.bars("polygon", what.name, ruler.step, window)
        return self._sandbox.framed("polygon", what, ruler.frame(window))


def _asset_class(ticker: str) -> AssetClass:
    prefixes = {"X:": AssetClass.CRYPTO, "C:": AssetClass.FOREX}
    return prefixes.get(ticker[:2], AssetClass.STOCKS)


def _ticker(asset_class: AssetClass, plain: str) -> str:
    match asset_class:
        case AssetClass.CRYPTO:
            return f"X:{plain.removesuffix('T') if plain.endswith('USDT') else plain}"
        case AssetClass.FOREX:
            return f"C:{plain}"
        case AssetClass.STOCKS:
            return plain


def _ruler(unit: str, mult: int, asset_class: AssetClass) -> Ruler:
    """Bar alignment: crypto and currencies by UTC, stocks by New York; weeks begin on Sunday.

    Days and weeks of stocks are official days, without pre- and post-market trades.
    """
    length = UNITS[unit] * mult
    extended = length < MICROS_PER_DAY or asset_class is not AssetClass.STOCKS
    if asset_class is not AssetClass.STOCKS or (length < MICROS_PER_HOUR):
        return EvenRuler(Step(length, SUNDAY_WEEKS.origin if unit == "week" else 0), extended=True)
    if unit == "week" and mult == 1:
        return WeekRuler(weekday=6, extended=extended)
    if MICROS_PER_DAY % length == 0:
        return WallRuler(length, extended=extended)
    raise BadRequest("The local market supports for stocks only multiples that divide a day, and weeks.")


def parse(match: re.Match[str], query: Mapping[str, str]) -> AggregatesRequest:
    """A path and its parameters; a cursor supplies the ones that are not given. Raises BadRequest."""
    if match["unit"] not in UNITS:
        raise BadRequest(f"Could not parse the time parameter: 'timespan'. Use one of {', '.join(UNITS)}.")
    mult = int(match["mult"])
    if mult == 0:
        raise BadRequest("The parameter 'multiplier' must be greater than 0.")
    options = {**_cursor(query.get("cursor", "")), **query}
    limit = options.get("limit", str(DEFAULT_LIMIT))
    if not limit.isascii() or not limit.isdigit() or not 0 < int(limit) <= MAX_LIMIT:
        raise BadRequest(f"The parameter 'limit' must be between 1 and {MAX_LIMIT}.")
    if (sort := options.get("sort", "asc")) not in ("asc", "desc"):
        raise BadRequest("The parameter 'sort' must be 'asc' or 'desc'.")
    asset_class = _asset_class(match["ticker"])
    step = _ruler(match["unit"], mult, asset_class)
    zone = NEW_YORK if asset_class is AssetClass.STOCKS else "UTC"
    start, end = _moment(match["start"], "from", zone), _moment(match["end"], "to", zone)
    if start > end:
        raise BadRequest("The parameter 'to' cannot be a time that occurs before 'from'.")
    window = TimeRange(floor(step, start), ceil(step, end + 1))
    base = _ruler("minute" if UNITS[match["unit"]] < MICROS_PER_DAY else "day", 1, asset_class)
    adjusted = options.get("adjusted", "true") != "false"
    return AggregatesRequest(
        match["ticker"],
        mult,
        match["unit"],
        step,
        base,
        window,
        match["end"],
        int(limit),
        sort == "desc",
        adjusted,
    )


def _moment(text: str, name: str, zone: str) -> int:
    """Milliseconds, or a date of `zone`: its first moment, or for `to` its last one."""
    if re.fullmatch(r"\d{9,15}", text):
        return int(text) * 1000
    try:
        if not re.fullmatch(r"\d{4}-\d\d-\d\d", text):
            raise ValueError
        date = instant(text)
    except ValueError:
        raise BadRequest(
            f"Could not parse the time parameter: '{name}'. Use YYYY-MM-DD or Unix MS."
        ) from None
    first, next_first = utc(np.array([date, date + MICROS_PER_DAY]), zone).tolist()
    return int(first if name == "from" else next_first - 1)


def _cursor(text: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(base64.b64decode(text, altchars=b"-_", validate=True).decode()))
    except (binascii.Error, UnicodeDecodeError):
        raise BadRequest("Could not parse the cursor.") from None


def _next_url(request: AggregatesRequest, rest: TimeRange, base_url: str) -> str:
    """On the host of the request; ascending pages advance `from`, descending ones decrease `to`."""
    order = "desc" if request.descending else "asc"
    options = f"adjusted={str(request.adjusted).lower()}&limit={request.limit}&sort={order}"
    cursor = base64.urlsafe_b64encode(options.encode()).decode()
    end = f"{rest.end // 1000 - 1}" if request.descending else request.end
    span = f"{rest.start // 1000}/{end}"
    return f"{base_url}/v2/aggs/ticker/{request.ticker}/range/{request.mult}/{request.unit}/{span}?cursor={cursor}"


def _unit_of(timeframe: Timeframe) -> tuple[str, int]:
    unit = next(u for u in reversed(list(UNITS)) if timeframe.micros % UNITS[u] == 0)
    return unit, timeframe.micros // UNITS[unit]


def _rows(bars: Bars) -> bytes:
    """The results array. The decimal texts are used as JSON numbers, without rounding."""
    opened, high, low, close, volume = bars.texts()
    average = decimal_texts((bars.high + bars.low + bars.close) // 3, bars.scale.price)
    none = bars.volume is None
    columns = (
        ["0"] * len(bars) if none else volume,
        average,
        opened,
        close,
        high,
        low,
        (bars.ts // 1000).tolist(),
        (np.ones(len(bars), np.int64) if bars.volume is None else bars.volume % 997 + 1).tolist(),
    )
    cells = tuple(chain.from_iterable(zip(*columns, strict=True)))
    return f"[{(_ROW * len(bars) % cells)[:-1]}]".encode()


def _request_id(request: AggregatesRequest) -> str:
    return blake2b(repr(request).encode(), digest_size=16).hexdigest()


def _json(document: dict[str, Any], status: int) -> Reply:
    text = orjson.dumps(
        {**document, "request_id": blake2b(repr(document).encode(), digest_size=16).hexdigest()}
    )
    return Reply(text, status)
