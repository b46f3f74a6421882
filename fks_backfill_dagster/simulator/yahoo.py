"""Yahoo's chart: stocks as columns of seconds and split-adjusted prices, and the cookie and crumb.

Only the wire format: intervals and their depth, bar alignment, nulls, the latest bar, events. Error
descriptions are those quoted in public logs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    MICROS_PER_SECOND,
)
from fks_backfill_dagster.simulator.bars import Bars
from fks_backfill_dagster.simulator.faults import Fields, Row
from fks_backfill_dagster.simulator.frames import Frame, Ruler, SessionRuler, WeekRuler, fill, local_dates
from fks_backfill_dagster.simulator.sessions import NEW_YORK, Sessions, stock_sessions, wall
from fks_backfill_dagster.simulator.splits import adjusted
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply, Rows, dumped

_COLUMNS = ("open", "high", "low", "close", "volume")
_PATH = re.compile(r"/v8/finance/chart/(?P<symbol>[^/]+)")
_DAYS = SessionRuler(MICROS_PER_DAY)
_WEEKS = WeekRuler(weekday=0)
_VALID_RANGES = ("1d", "5d", "1mo", "3mo", "6mo", "1y", "2y", "5y", "10y", "ytd", "max")
_RANGE_DAYS = {"1d": 1, "5d": 5, "1mo": 30, "3mo": 91, "6mo": 182, "1y": 365, "2y": 730, "5y": 1826}
_RANGE_DAYS |= {"10y": 3652}
_TEXT = "text/html"


@dataclass(frozen=True, slots=True)
class Interval:
    """Length of a bar, and the maximum age of a request's start in days (None: no limit)."""

    length: int
    reach: int | None = None


_MINUTE = MICROS_PER_MINUTE
INTERVALS: Mapping[str, Interval] = {
    "1m": Interval(_MINUTE, 30),
    "2m": Interval(2 * _MINUTE, 60),
    "5m": Interval(5 * _MINUTE, 60),
    "15m": Interval(15 * _MINUTE, 60),
    "30m": Interval(30 * _MINUTE, 60),
    "60m": Interval(MICROS_PER_HOUR, 730),
    "90m": Interval(90 * _MINUTE, 60),
    "1h": Interval(MICROS_PER_HOUR, 730),
    "1d": Interval(MICROS_PER_DAY),
    "1wk": Interval(7 * MICROS_PER_DAY),
}


@dataclass(frozen=True, slots=True)
class ChartRequest:
    """A chart request after parsing. `bounds` as given in the request, in seconds."""

    name: str
    interval: str
    window: TimeRange
    bounds: tuple[str, str]
    extended: bool
    splits: bool


class BadRequest(Exception):
    """A request that Yahoo rejects."""

    def __init__(self, status: int, code: str, description: str) -> None:
        super().__init__(description)
        self.status = status
        self.code = code


class Yahoo:
    """GET /v8/finance/chart/{symbol}, /v1/test/getcrumb; every other page sets the cookie."""

    name = "yahoo"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        verdict = self._sandbox.meters["yahoo"].charge(1)
        return None if verdict.status is None else self.error(429, verdict.retry_after)

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def spell(self, plain: str) -> str:
        return plain.replace(".", "-")

    def error(self, status: int, retry_after: int) -> Reply:
        if status == 429:
            return Reply(b"Edge: Too Many Requests", 429, _TEXT)
        if status == 404:
            return _error_reply(_not_found())
        return Reply(b"<html><body>Will be right back...</body></html>", status, _TEXT)

    def answer(self, call: Call) -> Answer:
        if call.path == "/v1/test/getcrumb":
            return Answer(Reply(b"local.market", media_type="text/plain"), "crumb")
        match = _PATH.fullmatch(call.path)
        if match is None:  # fc.yahoo.com also responds with 404 and sets the cookie
            cookie = ("set-cookie", "A3=d=local&S=market; Path=/; Max-Age=31536000")
            return Answer(Reply(b"", 404, _TEXT, (cookie,)), "cookie")
        symbol = match["symbol"]
        try:
            what = self._sandbox.find("yahoo", symbol.replace("-", "."))
            if what is None or what.asset_class is not AssetClass.STOCKS:
                raise _not_found()
            request = parse(what.name, call.query, self._sandbox.clock.now())
        except BadRequest as error:
            return Answer(_error_reply(error), "chart", 1, symbol)
        chart = {"result": [self._result(what, request)], "error": None}
        return Answer(Reply(orjson.dumps({"chart": chart})), "chart", 1, symbol, request.window, ROWS)

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        requested = Instrument(AssetClass.STOCKS, symbol.replace("-", "."))
        other = self._sandbox.other_symbol("yahoo", requested, other)
        if other is None:
            return self.answer(call)
        found = self.answer(Call(f"/v8/finance/chart/{other}", call.query, call.headers, call.base_url))
        page = orjson.loads(found.reply.body)
        if found.reply.status == 200:
            page["chart"]["result"][0]["meta"]["symbol"] = symbol
        return Answer(
            Reply(orjson.dumps(page), found.reply.status), "chart", 1, symbol, found.span, found.rows
        )

    def _result(self, what: Instrument, request: ChartRequest) -> dict[str, Any]:
        now = self._sandbox.clock.now()
        frame = _frame(request, now)
        bars = self._bars(what, request, frame)
        result: dict[str, Any] = {"meta": self._meta(what, request, bars, now)}
        quote: dict[str, Any] = {}
        if len(frame):
            result["timestamp"] = (_stamps(frame, request, now) // MICROS_PER_SECOND).tolist()
            quote = self._columns(bars, frame)
        if request.splits and (splits := self._splits(what, request.window)):
            result["events"] = {"splits": splits}
        result["indicators"] = {"quote": [quote]}
        if INTERVALS[request.interval].length >= MICROS_PER_DAY:
            result["indicators"]["adjclose"] = [{"adjclose": quote["close"]} if quote else {}]
        return result

    def _bars(self, what: Instrument, request: ChartRequest, frame: Frame) -> Bars:
        """Weeks are aggregated from adjusted days, because a week can contain a split."""
        splits = self._sandbox.splits_of(what.name)
        if request.interval != "1wk":
            return adjusted(self._sandbox.framed("yahoo", what, frame), splits)
        days = adjusted(self._sandbox.framed("yahoo", what, _DAYS.frame(frame.hull)), splits)
        return self._sandbox.framed_without_outages("yahoo", what, fill(days, frame), frame)

    def _columns(self, bars: Bars, frame: Frame) -> dict[str, list[float | int | None]]:
        """One value for every bar of the frame, null for those without trades."""
        rows = np.searchsorted(frame.opens, bars.ts)
        columns: dict[str, list[float | int | None]] = {}
        for name, values in zip(_COLUMNS, bars.candles().columns()[1:], strict=True):
            if name == "volume":
                values = np.nan_to_num(values).astype(np.int64).astype(np.object_)
            elif self._sandbox.config.single_precision:
                values = values.astype(np.float32).astype(np.float64)
            column = np.full(len(frame), None, dtype=np.object_)
            column[rows] = values.astype(np.object_)
            columns[name] = column.tolist()
        return columns

    def _splits(self, what: Instrument, window: TimeRange) -> dict[str, Any]:
        """Keyed and dated by the open of the session in which they take effect."""
        opens = stock_sessions().opens
        found = {}
        for split in self._sandbox.splits_of(what.name):
            at = int(opens[np.searchsorted(opens, split.begins)]) // MICROS_PER_SECOND
            if window.contains(at * MICROS_PER_SECOND):
                ratio = {"numerator": split.new, "denominator": split.old}
                found[str(at)] = {"date": at, **ratio, "splitRatio": f"{split.new}:{split.old}"}
        return found

    def _meta(self, what: Instrument, request: ChartRequest, bars: Bars, now: int) -> dict[str, Any]:
        sessions = stock_sessions().starting_before(now + 1)
        last = stock_sessions().within(TimeRange(int(sessions.pre[-1]), int(sessions.pre[-1]) + 1))
        offset = _offset(now)
        price = float(bars.candles().close[-1]) if len(bars) else None
        intraday = INTERVALS[request.interval].length < MICROS_PER_DAY
        periods = _periods(last, 0)
        return {
            "currency": "USD",
            "symbol": self.spell(what.name),
            "exchangeName": "NMS",
            "instrumentType": "EQUITY",
            "firstTradeDate": self._sandbox.listing("yahoo", what).start // MICROS_PER_SECOND,
            "regularMarketTime": min(now, int(last.closes[0])) // MICROS_PER_SECOND,
            "gmtoffset": offset // MICROS_PER_SECOND,
            "timezone": "EST" if offset == -5 * MICROS_PER_HOUR else "EDT",
            "exchangeTimezoneName": NEW_YORK,
            "regularMarketPrice": price,
            "chartPreviousClose": price,
            "priceHint": 2,
            "currentTradingPeriod": periods,
            "dataGranularity": request.interval,
            "range": "",
            "validRanges": list(_VALID_RANGES),
            **({"tradingPeriods": _all_periods(request)} if intraday else {}),
        }


def parse(name: str, query: Mapping[str, str], now: int) -> ChartRequest:
    """The parameters of a chart. Raises BadRequest with Yahoo's errors."""
    interval = query.get("interval", "1d")
    if interval not in INTERVALS:
        valid = ", ".join(INTERVALS)
        raise BadRequest(
            400,
            "Bad Request",
            f"Invalid input - interval={interval} is not supported. Valid intervals: [{valid}]",
        )
    window, bounds = _window(query, now)
    _check_reach(interval, window, bounds, now)
    extended = query.get("includePrePost", "false").lower() == "true"
    events = query.get("events", "")
    splits = "split" in events or "history" in events
    intraday = INTERVALS[interval].length < MICROS_PER_DAY
    return ChartRequest(name, interval, window, bounds, extended and intraday, splits)


def _window(query: Mapping[str, str], now: int) -> tuple[TimeRange, tuple[str, str]]:
    if "period1" in query:
        start, end = query["period1"], query.get("period2", str(now // MICROS_PER_SECOND))
        if not (re.fullmatch(r"-?\d{1,11}", start) and re.fullmatch(r"-?\d{1,11}", end)):
            raise BadRequest(400, "Bad Request", "Invalid input - period1 and period2 are Unix seconds")
        if int(start) > int(end):
            raise BadRequest(
                400,
                "Bad Request",
                f"Invalid input - start date cannot be after end date. startDate = {start}",
            )
    else:
        name = query.get("range", "1d")
        if name not in _VALID_RANGES:
            raise BadRequest(
                422, "Unprocessable Entity", f"Invalid range={name}. Valid ranges: {list(_VALID_RANGES)}"
            )
        year = int(np.datetime64(now, "us").astype("datetime64[Y]").astype("datetime64[us]").astype(np.int64))
        first = {"ytd": year, "max": 0}.get(name, now - _RANGE_DAYS.get(name, 0) * MICROS_PER_DAY)
        if name in ("1d", "5d"):  # counts sessions
            opens = stock_sessions().starting_before(now + 1).opens
            first = int(opens[-_RANGE_DAYS[name]])
        start, end = str(first // MICROS_PER_SECOND), str(now // MICROS_PER_SECOND + 1)
    return TimeRange(int(start) * MICROS_PER_SECOND, int(end) * MICROS_PER_SECOND), (start, end)


def _check_reach(interval: str, window: TimeRange, bounds: tuple[str, str], now: int) -> None:
    of = INTERVALS[interval]
    where = f"{interval} data not available for startTime={bounds[0]} and endTime={bounds[1]}."
    if interval == "1m" and window.duration > 8 * MICROS_PER_DAY:
        raise BadRequest(
            422,
            "Unprocessable Entity",
            f"{where} Only 8 days worth of 1m granularity data are allowed to be fetched per request.",
        )
    if of.reach is not None and window.start < now - of.reach * MICROS_PER_DAY:
        within = f"The requested range must be within the last {of.reach} days."
        raise BadRequest(422, "Unprocessable Entity", f"{where} {within}")


def _frame(request: ChartRequest, now: int) -> Frame:
    """The bars of the chart that have opened, counted from the session's open."""
    ruler: Ruler = SessionRuler(INTERVALS[request.interval].length, request.extended)
    if request.interval == "1wk":
        ruler = _WEEKS
    return ruler.frame(
        TimeRange(request.window.start, max(request.window.start, min(request.window.end, now + 1)))
    )


def _stamps(frame: Frame, request: ChartRequest, now: int) -> np.typing.NDArray[np.int64]:
    """The opens, except for the latest bar, which is stamped with the time of the last trade.

    A day keeps this stamp until the next day; shorter bars until they close.
    """
    stamps = frame.opens.copy()
    last, end = int(frame.opens[-1]), int(frame.ends[-1])
    today = bool(local_dates(np.array([last]))[0] == local_dates(np.array([now]))[0])
    if now < end or (request.interval == "1d" and today):
        stamps[-1] = max(last, min(now, end))
    return stamps


def _offset(now: int) -> int:
    """New York local time minus UTC."""
    return int(wall(np.array([now], dtype=np.int64), NEW_YORK)[0]) - now


def _periods(of: Sessions, row: int) -> dict[str, dict[str, Any]]:
    edges = [int(column[row]) for column in (of.pre, of.opens, of.closes, of.post)]
    return {
        name: _period(start, end)
        for name, start, end in zip(("pre", "regular", "post"), edges[:-1], edges[1:], strict=True)
    }


def _period(start: int, end: int) -> dict[str, Any]:
    offset = _offset(start)
    return {
        "timezone": "EST" if offset == -5 * MICROS_PER_HOUR else "EDT",
        "start": start // MICROS_PER_SECOND,
        "end": end // MICROS_PER_SECOND,
        "gmtoffset": offset // MICROS_PER_SECOND,
    }


def _all_periods(request: ChartRequest) -> Any:
    """The sessions of the chart: regular ones, or all three kinds with pre- and post-market."""
    of = stock_sessions().within(request.window)
    rows = [_periods(of, row) for row in range(len(of.dates))]
    if not request.extended:
        return [[row["regular"]] for row in rows]
    return {name: [[row[name]] for row in rows] for name in ("pre", "regular", "post")}


def _not_found() -> BadRequest:
    return BadRequest(404, "Not Found", "No data found, symbol may be delisted")


def _error_reply(error: BadRequest) -> Reply:
    document = {"code": error.code, "description": str(error)}
    return Reply(orjson.dumps({"chart": {"result": None, "error": document}}), error.status)


def _take(page: Any) -> list[Row]:
    """The columns as rows [seconds, open, high, low, close, volume]; bars without trades are omitted."""
    result = page["chart"]["result"][0]
    if "timestamp" not in result:
        return []
    quote = result["indicators"]["quote"][0]
    columns = [result["timestamp"], *(quote[name] for name in _COLUMNS)]
    return [list(row) for row in zip(*columns, strict=True) if row[1] is not None]


def _put(page: Any, rows: list[Row]) -> bytes:
    result = page["chart"]["result"][0]
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[] for _ in range(6)]
    quote = dict(zip(_COLUMNS, columns[1:], strict=True))
    result["timestamp"], result["indicators"]["quote"] = columns[0], [quote]
    if "adjclose" in result["indicators"]:
        result["indicators"]["adjclose"] = [{"adjclose": quote["close"]}]
    return dumped(page)


ROWS = Rows(Fields(ts=0, open=1, high=2, low=3, text=False), _take, _put, MICROS_PER_SECOND)
