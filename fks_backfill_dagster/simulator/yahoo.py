"""Yahoo's chart: stocks as columns of seconds and split-adjusted prices, and the cookie and crumb before it.

Only the wire format: intervals and how far back they reach, where bars sit, nulls, the latest bar,
events. Descriptions of errors are those quoted in public logs.
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
    """Length of a bar, and how many days before now a request may begin (None: no limit)."""

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
class Ask:
    """A chart request after parsing. `asked` as it stood in the request, in seconds."""

    name: str
    interval: str
    window: TimeRange
    asked: tuple[str, str]
    extended: bool
    splits: bool


class Refused(Exception):
    """A request that Yahoo would refuse."""

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
        return None if verdict.refused is None else self.error(429, verdict.retry_after)

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return ()

    def spell(self, plain: str) -> str:
        return plain.replace(".", "-")

    def error(self, status: int, retry_after: int) -> Reply:
        if status == 429:
            return Reply(b"Edge: Too Many Requests", 429, _TEXT)
        if status == 404:
            return _refusal(_not_found())
        return Reply(b"<html><body>Will be right back...</body></html>", status, _TEXT)

    def answer(self, call: Call) -> Answer:
        if call.path == "/v1/test/getcrumb":
            return Answer(Reply(b"local.market", media_type="text/plain"), "crumb")
        match = _PATH.fullmatch(call.path)
        if match is None:  # fc.yahoo.com answers 404 as well, with the cookie that matters
            cookie = ("set-cookie", "A3=d=local&S=market; Path=/; Max-Age=31536000")
            return Answer(Reply(b"", 404, _TEXT, (cookie,)), "cookie")
        symbol = match["symbol"]
        try:
            what = self._sandbox.find("yahoo", symbol.replace("-", "."))
            if what is None or what.asset_class is not AssetClass.STOCKS:
                raise _not_found()
            ask = parse(what.name, call.query, self._sandbox.clock.now())
        except Refused as refused:
            return Answer(_refusal(refused), "chart", 1, symbol)
        chart = {"result": [self._result(what, ask)], "error": None}
        return Answer(Reply(orjson.dumps({"chart": chart})), "chart", 1, symbol, ask.window, ROWS)

    def impostor(self, call: Call, symbol: str, other: str | None) -> Answer:
        asked = Instrument(AssetClass.STOCKS, symbol.replace("-", "."))
        other = self._sandbox.other_symbol("yahoo", asked, other)
        if other is None:
            return self.answer(call)
        lie = self.answer(Call(f"/v8/finance/chart/{other}", call.query, call.headers, call.base_url))
        page = orjson.loads(lie.reply.body)
        if lie.reply.status == 200:
            page["chart"]["result"][0]["meta"]["symbol"] = symbol
        return Answer(Reply(orjson.dumps(page), lie.reply.status), "chart", 1, symbol, lie.span, lie.rows)

    def _result(self, what: Instrument, ask: Ask) -> dict[str, Any]:
        now = self._sandbox.clock.now()
        frame = _frame(ask, now)
        bars = self._bars(what, ask, frame)
        result: dict[str, Any] = {"meta": self._meta(what, ask, bars, now)}
        quote: dict[str, Any] = {}
        if len(frame):
            result["timestamp"] = (_stamps(frame, ask, now) // MICROS_PER_SECOND).tolist()
            quote = self._columns(bars, frame)
        if ask.splits and (splits := self._splits(what, ask.window)):
            result["events"] = {"splits": splits}
        result["indicators"] = {"quote": [quote]}
        if INTERVALS[ask.interval].length >= MICROS_PER_DAY:
            result["indicators"]["adjclose"] = [{"adjclose": quote["close"]} if quote else {}]
        return result

    def _bars(self, what: Instrument, ask: Ask, frame: Frame) -> Bars:
        """Weeks are made of adjusted days: a split can fall into one."""
        splits = self._sandbox.splits_of(what.name)
        if ask.interval != "1wk":
            return adjusted(self._sandbox.framed("yahoo", what, frame), splits)
        days = adjusted(self._sandbox.framed("yahoo", what, _DAYS.frame(frame.hull)), splits)
        return self._sandbox.held_of("yahoo", what, fill(days, frame), frame)

    def _columns(self, bars: Bars, frame: Frame) -> dict[str, list[float | int | None]]:
        """One value for every bar of the frame, null for those without a trade."""
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
        """Keyed and dated by the open of the session in which they began."""
        opens = stock_sessions().opens
        found = {}
        for split in self._sandbox.splits_of(what.name):
            at = int(opens[np.searchsorted(opens, split.begins)]) // MICROS_PER_SECOND
            if window.contains(at * MICROS_PER_SECOND):
                ratio = {"numerator": split.new, "denominator": split.old}
                found[str(at)] = {"date": at, **ratio, "splitRatio": f"{split.new}:{split.old}"}
        return found

    def _meta(self, what: Instrument, ask: Ask, bars: Bars, now: int) -> dict[str, Any]:
        sessions = stock_sessions().starting_before(now + 1)
        last = stock_sessions().within(TimeRange(int(sessions.pre[-1]), int(sessions.pre[-1]) + 1))
        offset = _offset(now)
        price = float(bars.candles().close[-1]) if len(bars) else None
        intraday = INTERVALS[ask.interval].length < MICROS_PER_DAY
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
            "dataGranularity": ask.interval,
            "range": "",
            "validRanges": list(_VALID_RANGES),
            **({"tradingPeriods": _all_periods(ask)} if intraday else {}),
        }


def parse(name: str, query: Mapping[str, str], now: int) -> Ask:
    """The parameters of a chart. Raises Refused as Yahoo would answer."""
    interval = query.get("interval", "1d")
    if interval not in INTERVALS:
        valid = ", ".join(INTERVALS)
        raise Refused(
            400,
            "Bad Request",
            f"Invalid input - interval={interval} is not supported. Valid intervals: [{valid}]",
        )
    window, asked = _asked(query, now)
    _check_reach(interval, window, asked, now)
    extended = query.get("includePrePost", "false").lower() == "true"
    events = query.get("events", "")
    splits = "split" in events or "history" in events
    intraday = INTERVALS[interval].length < MICROS_PER_DAY
    return Ask(name, interval, window, asked, extended and intraday, splits)


def _asked(query: Mapping[str, str], now: int) -> tuple[TimeRange, tuple[str, str]]:
    if "period1" in query:
        start, end = query["period1"], query.get("period2", str(now // MICROS_PER_SECOND))
        if not (re.fullmatch(r"-?\d{1,11}", start) and re.fullmatch(r"-?\d{1,11}", end)):
            raise Refused(400, "Bad Request", "Invalid input - period1 and period2 are Unix seconds")
        if int(start) > int(end):
            raise Refused(
                400,
                "Bad Request",
                f"Invalid input - start date cannot be after end date. startDate = {start}",
            )
    else:
        name = query.get("range", "1d")
        if name not in _VALID_RANGES:
            raise Refused(
                422, "Unprocessable Entity", f"Invalid range={name}. Valid ranges: {list(_VALID_RANGES)}"
            )
        year = int(np.datetime64(now, "us").astype("datetime64[Y]").astype("datetime64[us]").astype(np.int64))
        first = {"ytd": year, "max": 0}.get(name, now - _RANGE_DAYS.get(name, 0) * MICROS_PER_DAY)
        if name in ("1d", "5d"):  # of sessions, not of days
            opens = stock_sessions().starting_before(now + 1).opens
            first = int(opens[-_RANGE_DAYS[name]])
        start, end = str(first // MICROS_PER_SECOND), str(now // MICROS_PER_SECOND + 1)
    return TimeRange(int(start) * MICROS_PER_SECOND, int(end) * MICROS_PER_SECOND), (start, end)


def _check_reach(interval: str, window: TimeRange, asked: tuple[str, str], now: int) -> None:
    of = INTERVALS[interval]
    where = f"{interval} data not available for startTime={asked[0]} and endTime={asked[1]}."
    if interval == "1m" and window.duration > 8 * MICROS_PER_DAY:
        raise Refused(
            422,
            "Unprocessable Entity",
            f"{where} Only 8 days worth of 1m granularity data are allowed to be fetched per request.",
        )
    if of.reach is not None and window.start < now - of.reach * MICROS_PER_DAY:
        within = f"The requested range must be within the last {of.reach} days."
        raise Refused(422, "Unprocessable Entity", f"{where} {within}")


def _frame(ask: Ask, now: int) -> Frame:
    """The bars that the chart shows: those that began, counted from the session's open."""
    ruler: Ruler = SessionRuler(INTERVALS[ask.interval].length, ask.extended)
    if ask.interval == "1wk":
        ruler = _WEEKS
    return ruler.frame(TimeRange(ask.window.start, max(ask.window.start, min(ask.window.end, now + 1))))


def _stamps(frame: Frame, ask: Ask, now: int) -> np.typing.NDArray[np.int64]:
    """The opens, but for the latest bar: that one bears the time of the last trade.

    A day keeps that stamp until the next one; shorter bars until they close.
    """
    stamps = frame.opens.copy()
    last, end = int(frame.opens[-1]), int(frame.ends[-1])
    today = bool(local_dates(np.array([last]))[0] == local_dates(np.array([now]))[0])
    if now < end or (ask.interval == "1d" and today):
        stamps[-1] = max(last, min(now, end))
    return stamps


def _offset(now: int) -> int:
    """New York's clock minus UTC."""
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


def _all_periods(ask: Ask) -> Any:
    """The sessions of the chart: a list of regular ones, or of all three kinds with pre- and post-market."""
    of = stock_sessions().within(ask.window)
    rows = [_periods(of, row) for row in range(len(of.dates))]
    if not ask.extended:
        return [[row["regular"]] for row in rows]
    return {name: [[row[name]] for row in rows] for name in ("pre", "regular", "post")}


def _not_found() -> Refused:
    return Refused(404, "Not Found", "No data found, symbol may be delisted")


def _refusal(refused: Refused) -> Reply:
    error = {"code": refused.code, "description": str(refused)}
    return Reply(orjson.dumps({"chart": {"result": None, "error": error}}), refused.status)


def _take(page: Any) -> list[Row]:
    """The columns as rows [seconds, open, high, low, close, volume]; bars without a trade stay out."""
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
