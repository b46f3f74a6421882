"""Binance spot REST: klines, ping, time and exchangeInfo.

Only the wire format: parameters and their errors, the twelve columns, the weight. Error texts are
those of the official errors.md and of responses quoted in public.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
import orjson

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.faults import Fields
from fks_backfill_dagster.simulator.market import QUOTES, newest, oldest
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply, Rows, dumped

ROWS = Rows(Fields(ts=0, open=1, high=2, low=3, text=True), take=list, put=lambda page, rows: dumped(rows))
DEFAULT_LIMIT, MAX_LIMIT = 500, 1000
_WEIGHTS = {"klines": 2, "exchangeInfo": 20}
_JSON_ROW = '[%d,"%s","%s","%s","%s","%s",%d,"%s",%d,"%s","%s","0"],'
_CSV_ROW = "%d,%s,%s,%s,%s,%s,%d,%s,%d,%s,%s,0\n"


class BadRequest(Exception):
    """A parameter that Binance rejects, with its error code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class KlinesRequest:
    """A klines request after parsing. `start` and `end` (inclusive) are microseconds or None."""

    symbol: str
    timeframe: Timeframe
    start: int | None
    end: int | None
    limit: int


class Binance:
    """GET /api/v3/klines, /ping, /time, /exchangeInfo."""

    name = "binance"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        verdict = self._sandbox.meters["binance"].charge(_WEIGHTS.get(_endpoint(call), 1))
        return None if verdict.status is None else self.error(verdict.status, verdict.retry_after)

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        meter = self._sandbox.meters["binance"]
        if meter.limit is None:  # without a limit, the reported weight would make clients pause
            return ()
        used = str(meter.used)
        return (("x-mbx-used-weight", used), ("x-mbx-used-weight-1m", used))

    def answer(self, call: Call) -> Answer:
        endpoint = _endpoint(call)
        weight = _WEIGHTS.get(endpoint, 1)
        try:
            if call.path == "/api/v3/klines":
                return self._klines(call)
            if call.path == "/api/v3/ping":
                return Answer(Reply(b"{}"), endpoint)
            if call.path == "/api/v3/time":
                return Answer(
                    Reply(orjson.dumps({"serverTime": self._sandbox.clock.now() // 1000})), endpoint
                )
            if call.path == "/api/v3/exchangeInfo":
                return Answer(Reply(self._exchange_info(call.query)), endpoint, weight)
        except BadRequest as error:
            reply = Reply(orjson.dumps({"code": error.code, "msg": str(error)}), status=400)
            return Answer(reply, endpoint, weight, symbol=call.query.get("symbol"))
        return Answer(Reply(b"<html><body><h2>404 Not found</h2></body></html>", 404, "text/html"), "unknown")

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        other = self._sandbox.other_symbol("binance", Instrument(AssetClass.CRYPTO, symbol), other)
        if other is None:
            return self.answer(call)
        query = {**call.query, "symbol": other}
        return self.answer(Call(call.path, query, call.headers, call.base_url))

    def spell(self, plain: str) -> str:
        return plain

    def error(self, status: int, retry_after: int) -> Reply:
        if status in (403, 451):  # returned by a firewall in front of the exchange
            return Reply(b"<html><body>Request blocked.</body></html>", status, "text/html")
        limit = self._sandbox.meters["binance"].limit or self._sandbox.config.weight_per_minute
        until = self._sandbox.clock.now() // 1000 + retry_after * 1000
        code, message = {
            429: (
                -1003,
                f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE. "
                "Please use WebSocket Streams for live updates to avoid polling the API.",
            ),
            418: (
                -1003,
                f"Way too much request weight used; IP banned until {until}. "
                "Please use WebSocket Streams for live updates to avoid bans.",
            ),
            503: (
                -1008,
                "Server is currently overloaded with other requests. Please try again in a few minutes.",
            ),
        }.get(status, (-1000, "An unknown error occurred while processing the request."))
        waits = (("retry-after", str(retry_after)),) if status in (418, 429) else ()
        return Reply(orjson.dumps({"code": code, "msg": message}), status, headers=waits)

    def _klines(self, call: Call) -> Answer:
        request = parse(call.query)
        if not self._sandbox.crypto["binance"].has_symbol(request.symbol):
            raise BadRequest(-1121, "Invalid symbol.")
        request = self._canonical(request)
        body = self._sandbox.prepared.get(request)
        reply = Reply(json_rows(self._page(request), request.timeframe) if body is None else body)
        return Answer(reply, "klines", 2, request.symbol, _span(request), ROWS)

    def prepare(
        self, symbol: str, timeframe: Timeframe, window: TimeRange, limit: int, stride: int
    ) -> tuple[int, int]:
        """Builds pages of `limit` candles, one every `stride` from `window.start` on; returns (pages, bytes).

        Only closed candles: the last page ends before the forming one.
        """
        step = Step.of(timeframe)
        end = min(step.ceil(window.end), step.floor(self._sandbox.clock.now()))
        listed = self._sandbox.crypto["binance"].listing(symbol).start
        start = max(step.ceil(window.start), step.floor(listed))
        pages = size = 0
        for at in range(start, end, stride * step.length):
            last = min(at + limit * step.length, end) - step.length
            request = self._canonical(KlinesRequest(symbol, timeframe, at, last, limit))
            body = json_rows(self._page(request), timeframe)
            self._sandbox.prepared.put(request, body)
            pages, size = pages + 1, size + len(body)
        return pages, size

    def _canonical(self, request: KlinesRequest) -> KlinesRequest:
        """The canonical form of a request: on the grid, with the end that the limit implies.

        A prepared page is then found for any later `endTime` of a client. If an outage overlaps the page,
        the limit reaches further than the grid implies, and the request is unchanged.
        """
        if request.start is None:
            return request
        step = Step.of(request.timeframe)
        listed = self._sandbox.crypto["binance"].listing(request.symbol).start
        start = max(step.ceil(request.start), step.floor(listed))
        full = start + (request.limit - 1) * step.length
        end = full if request.end is None else step.floor(request.end)
        if end <= full and request.end is not None:
            return KlinesRequest(request.symbol, request.timeframe, start, end, MAX_LIMIT)
        page = TimeRange(start, full + step.length)
        absences = self._sandbox.absences("binance", request.symbol)
        if self._sandbox.replays or any(r.intersect(page) for r in absences):
            return KlinesRequest(request.symbol, request.timeframe, start, request.end, request.limit)
        return KlinesRequest(request.symbol, request.timeframe, start, full, MAX_LIMIT)

    def _page(self, request: KlinesRequest) -> Bars:
        step, now = Step.of(request.timeframe), self._sandbox.clock.now()
        listing = self._sandbox.crypto["binance"].listing(request.symbol)
        start = max(request.start or 0, step.floor(listing.start))
        end = min(now, listing.end) if request.end is None else min(request.end, now, listing.end)
        window = TimeRange(start, max(start, end + 1))  # bounds are inclusive, by open time
        read = partial(self._sandbox.bars, "binance", request.symbol, step)
        pick = newest if request.start is None else oldest
        return pick(read, step.length, window, request.limit)

    def _exchange_info(self, query: Mapping[str, str]) -> bytes:
        market = self._sandbox.crypto["binance"]
        symbols = [query["symbol"]] if "symbol" in query else list(market.symbols())
        if not all(map(market.has_symbol, symbols)):
            raise BadRequest(-1121, "Invalid symbol.")
        limit = {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1}
        return orjson.dumps(
            {
                "timezone": "UTC",
                "serverTime": self._sandbox.clock.now() // 1000,
                "rateLimits": [{**limit, "limit": self._sandbox.config.weight_per_minute}],
                "exchangeFilters": [],
                "symbols": [_symbol_info(symbol) for symbol in symbols],
            }
        )


def _endpoint(call: Call) -> str:
    return call.path.removeprefix("/api/v3/")


def _span(request: KlinesRequest) -> TimeRange:
    start = request.start or 0
    return TimeRange(start, max(start, request.end + 1 if request.end is not None else 2**62))


def _symbol_info(symbol: str) -> dict[str, object]:
    quote = next((q for q in QUOTES if symbol.endswith(q)), "USD")
    return {
        "symbol": symbol,
        "status": "TRADING",
        "baseAsset": symbol.removesuffix(quote),
        "baseAssetPrecision": 8,
        "quoteAsset": quote,
        "quotePrecision": 8,
        "quoteAssetPrecision": 8,
        "orderTypes": ["LIMIT", "MARKET"],
        "isSpotTradingAllowed": True,
        "isMarginTradingAllowed": False,
        "filters": [],
        "permissions": [],
        "permissionSets": [["SPOT"]],
    }


def parse(query: Mapping[str, str]) -> KlinesRequest:
    """The parameters of klines. Raises BadRequest with Binance's errors."""
    for name in ("symbol", "interval"):
        if name not in query:
            raise BadRequest(
                -1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed."
            )
        if not query[name]:
            raise BadRequest(-1105, f"Parameter '{name}' was empty.")
    if not re.fullmatch(r"[A-Z0-9-_.]{1,20}", query["symbol"]):
        legal = "legal range is '^[A-Z0-9-_.]{1,20}$'."
        raise BadRequest(-1100, f"Illegal characters found in parameter 'symbol'; {legal}")
    if query["interval"] not in list(Timeframe):
        raise BadRequest(-1120, "Invalid interval.")
    limit = _whole_number(query, "limit")
    if limit == 0:
        raise BadRequest(-1130, "Data sent for parameter 'limit' is not valid.")
    start, end = _whole_number(query, "startTime"), _whole_number(query, "endTime")
    return KlinesRequest(
        query["symbol"],
        Timeframe(query["interval"]),
        None if start is None else start * 1000,
        None if end is None else end * 1000,
        min(DEFAULT_LIMIT if limit is None else limit, MAX_LIMIT),
    )


def _whole_number(query: Mapping[str, str], name: str) -> int | None:
    if name not in query:
        return None
    if not query[name]:
        raise BadRequest(-1105, f"Parameter '{name}' was empty.")
    if not re.fullmatch(r"[0-9]{1,15}", query[name]):
        legal = "legal range is '^[0-9]{1,20}$'."
        raise BadRequest(-1100, f"Illegal characters found in parameter '{name}'; {legal}")
    return int(query[name])


def json_rows(bars: Bars, timeframe: Timeframe) -> bytes:
    """A klines page."""
    if len(bars) == 0:
        return b"[]"
    return f"[{(_JSON_ROW * len(bars) % _cells(bars, timeframe, 1000))[:-1]}]".encode()


def csv_rows(bars: Bars, timeframe: Timeframe, unit: int) -> bytes:
    """Rows of an archive, times in units of `unit` microseconds."""
    return (_CSV_ROW * len(bars) % _cells(bars, timeframe, unit)).encode()


def _cells(bars: Bars, timeframe: Timeframe, unit: int) -> tuple[object, ...]:
    """The first eleven columns of all rows, flat.

    Close time is the last moment of the candle in its unit. Quote volume, trade count and taker
    volumes are derived from close and volume; clients do not use them.
    """
    opened, high, low, close, volume = bars.texts()
    if bars.volume is None:
        volume = ["0"] * len(bars)
    candles = bars.candles()
    quote = np.nan_to_num(candles.close * candles.volume)
    halves = np.nan_to_num(candles.volume) / 2
    trades = np.full(len(bars), 0) if bars.volume is None else bars.volume % 997 + 1
    ts = bars.ts // unit
    columns = (
        ts.tolist(),
        opened,
        high,
        low,
        close,
        volume,
        (ts + timeframe.micros // unit - 1).tolist(),
        _fixed(quote),
        trades.tolist(),
        _fixed(halves),
        _fixed(quote / 2),
    )
    return tuple(chain.from_iterable(zip(*columns, strict=True)))


def _fixed(values: np.typing.NDArray[np.float64]) -> list[str]:
    return ("%.5f " * len(values) % tuple(values.tolist())).split()
