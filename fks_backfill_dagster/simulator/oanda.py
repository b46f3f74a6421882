"""OANDA's candles of currency pairs: strings, a flag for the forming one, alignment by request parameters.

Only the wire format: parameters and their errors, alignment, page limit, authorisation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import orjson

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_MINUTE
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.config import instant, plain_symbol
from fks_backfill_dagster.simulator.faults import Fields, Row
from fks_backfill_dagster.simulator.frames import EvenRuler, Frame, Ruler, WallRuler, WeekRuler, floor
from fks_backfill_dagster.simulator.market import newest, oldest
from fks_backfill_dagster.simulator.sessions import NEW_YORK
from fks_backfill_dagster.simulator.state import Instrument, Sandbox
from fks_backfill_dagster.simulator.wire import Answer, Call, Reply, Rows, dumped

DEFAULT_COUNT, MAX_COUNT = 500, 5000
_PATH = re.compile(r"/v3/instruments/(?P<instrument>[^/]+)/candles")
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_UP_TO_AN_HOUR = {f"M{n}": n * MICROS_PER_MINUTE for n in (1, 2, 4, 5, 10, 15, 30)} | {"H1": MICROS_PER_HOUR}
_HOURS = {f"H{n}": n * MICROS_PER_HOUR for n in (2, 3, 4, 6, 8, 12)}


class BadRequest(Exception):
    """A request that OANDA rejects with 400."""


@dataclass(frozen=True, slots=True)
class CandlesRequest:
    """A candles request after parsing; `start` and `end` (exclusive) in microseconds or None."""

    granularity: str
    ruler: Ruler
    start: int | None
    end: int | None
    count: int
    unix: bool


class Oanda:
    """GET /v3/instruments/{EUR_USD}/candles."""

    name = "oanda"

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def charge(self, call: Call) -> Reply | None:
        verdict = self._sandbox.meters["oanda"].charge(1)
        return None if verdict.status is None else self.error(verdict.status, verdict.retry_after)

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        return (("requestid", "42359180358046734"),)

    def spell(self, plain: str) -> str:
        return f"{plain[:3]}_{plain[3:]}"

    def error(self, status: int, retry_after: int) -> Reply:
        messages = {
            401: "Insufficient authorization to perform request.",
            429: "Rate limit violation of too many requests.",
        }
        return _error_reply(
            messages.get(status, "The server encountered an error processing the request."), status
        )

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        requested = Instrument(AssetClass.FOREX, plain_symbol(symbol))
        other = self._sandbox.other_symbol("oanda", requested, other)
        if other is None:
            return self.answer(call)
        path = call.path.replace(f"/{symbol}/", f"/{self.spell(other)}/")
        found = self.answer(Call(path, call.query, call.headers, call.base_url))
        body = found.reply.body.replace(f'"{self.spell(other)}"'.encode(), f'"{symbol}"'.encode())
        return Answer(Reply(body, found.reply.status), "candles", 1, symbol, found.span, found.rows)

    def answer(self, call: Call) -> Answer:
        match = _PATH.fullmatch(call.path)
        if match is None:
            return Answer(_error_reply("Unrecognized endpoint", 404), "unknown")
        name = match["instrument"]
        key = call.headers.get("authorization", "").removeprefix("Bearer").strip()
        if not key or key in self._sandbox.config.bad_keys:
            return Answer(self.error(401, 0), "candles", 1, name)
        try:
            what = None
            if re.fullmatch(r"[A-Z]{3}_[A-Z]{3}", name):
                what = self._sandbox.known("oanda", AssetClass.FOREX, plain_symbol(name))
            if what is None:
                raise BadRequest("Invalid value specified for 'instrument'")
            request = parse(call.query, call.headers, self._sandbox.clock.now())
        except BadRequest as error:
            return Answer(_error_reply(str(error), 400), "candles", 1, name)
        bars = self._bars(what, request)
        head = {"instrument": name, "granularity": request.granularity}
        body = orjson.dumps({**head, "candles": self._candles(bars, request)})
        span = TimeRange(
            request.start or 0, max(request.start or 0, request.end or self._sandbox.clock.now())
        )
        return Answer(Reply(body), "candles", 1, name, span, _rows_of(request.unix))

    def _bars(self, what: Instrument, request: CandlesRequest) -> Bars:
        """Candles that open in `[start, end)`: the first `count`, or the last ones without a start."""
        listing, now = self._sandbox.listing("oanda", what), self._sandbox.clock.now()
        first = floor(request.ruler, listing.start)
        start = first if request.start is None else max(request.start, first)
        end = min(now + 1, listing.end if request.end is None else min(request.end, listing.end))
        window = TimeRange(start, max(start, end))
        pick = newest if request.start is None else oldest
        return pick(partial(self._read, what, request.ruler), request.ruler.length, window, request.count)

    def _read(self, what: Instrument, ruler: Ruler, window: TimeRange) -> Bars:
        return self._sandbox.framed("oanda", what, ruler.frame(window))

    def _candles(self, bars: Bars, request: CandlesRequest) -> list[dict[str, Any]]:
        """Without a volume (replayed files) the tick count is derived from the price."""
        ticks = bars.close % 997 + 1 if bars.volume is None else bars.volume
        ends = _ends(request.ruler, bars)
        complete = (ends <= self._sandbox.clock.now()).tolist()
        times = _times(bars.ts, request.unix)
        return [
            {"complete": done, "volume": volume, "time": time, "mid": {"o": o, "h": h, "l": low, "c": c}}
            for done, volume, time, o, h, low, c in zip(
                complete, ticks.tolist(), times, *bars.texts()[:4], strict=True
            )
        ]


def parse(query: Mapping[str, str], headers: Mapping[str, str], now: int) -> CandlesRequest:
    """The parameters of a candles request. Raises BadRequest with OANDA's errors."""
    if query.get("price", "M") != "M":
        raise BadRequest("Invalid value specified for 'price'")
    granularity = query.get("granularity", "S5")
    ruler = _ruler(granularity, query)
    start, end = _time(query, "from"), _time(query, "to")
    for name, moment in (("from", start), ("to", end)):
        if moment is not None and moment > now:
            raise BadRequest(f"Invalid value specified for '{name}'. Time is in the future")
    if start is not None and end is not None:
        if "count" in query:
            raise BadRequest("'count' cannot be specified when 'to' and 'from' parameters are set")
        if start > end:
            raise BadRequest("Invalid value specified for 'to'. Time is before 'from'")
        if end - start > MAX_COUNT * ruler.length:
            raise BadRequest("Maximum value for 'count' exceeded")
    count = query.get("count", str(DEFAULT_COUNT))
    if not count.isascii() or not count.isdigit() or int(count) == 0:
        raise BadRequest("Invalid value specified for 'count'")
    if int(count) > MAX_COUNT:
        raise BadRequest("Maximum value for 'count' exceeded")
    if start is not None:
        # The candle that contains `from` is included, unless includeFirst=false.
        covered = floor(ruler, start)
        start = covered if query.get("includeFirst", "true").lower() != "false" else covered + 1
    whole = start is not None and end is not None
    unix = headers.get("accept-datetime-format", "").upper() == "UNIX"
    return CandlesRequest(granularity, ruler, start, end, MAX_COUNT + 1 if whole else int(count), unix)


def _ruler(granularity: str, query: Mapping[str, str]) -> Ruler:
    """Candles up to an hour are aligned to the hour, longer ones to the day defined by the request."""
    if granularity in _UP_TO_AN_HOUR:
        return EvenRuler(Step(_UP_TO_AN_HOUR[granularity]))
    hour, zone = query.get("dailyAlignment", "17"), query.get("alignmentTimezone", NEW_YORK)
    if not hour.isascii() or not hour.isdigit() or int(hour) > 23:
        raise BadRequest("Invalid value specified for 'dailyAlignment'")
    try:
        ZoneInfo(zone)
    except (ZoneInfoNotFoundError, ValueError):
        raise BadRequest("Invalid value specified for 'alignmentTimezone'") from None
    if granularity in _HOURS:
        return WallRuler(_HOURS[granularity], zone, int(hour))
    if granularity == "D":
        return WallRuler(MICROS_PER_DAY, zone, int(hour))
    if granularity == "W":
        weekday = query.get("weeklyAlignment", "Friday")
        if weekday not in _WEEKDAYS:
            raise BadRequest("Invalid value specified for 'weeklyAlignment'")
        return WeekRuler(_WEEKDAYS.index(weekday), zone, int(hour))
    raise BadRequest("Invalid value specified for 'granularity'")


def _time(query: Mapping[str, str], name: str) -> int | None:
    """RFC 3339 with up to nine decimals, or Unix seconds."""
    if name not in query:
        return None
    text = query[name]
    try:
        if re.fullmatch(r"\d+(\.\d+)?", text):
            seconds, _, fraction = text.partition(".")
            return int(seconds) * 1_000_000 + int(fraction.ljust(6, "0")[:6] or 0)
        return instant(re.sub(r"(\.\d{6})\d*", r"\1", text))
    except ValueError:
        raise BadRequest(f"Invalid value specified for '{name}'") from None


def _ends(ruler: Ruler, bars: Bars) -> np.typing.NDArray[np.int64]:
    if len(bars) == 0:
        return bars.ts
    frame: Frame = ruler.frame(TimeRange(int(bars.ts[0]), int(bars.ts[-1]) + 1))
    ends: np.typing.NDArray[np.int64] = frame.ends[np.searchsorted(frame.opens, bars.ts)]
    return ends


def _times(ts: np.typing.NDArray[np.int64], unix: bool) -> list[str]:
    if unix:
        return [f"{moment // 1_000_000}.{moment % 1_000_000:06d}000" for moment in ts.tolist()]
    return [f"{text}000Z" for text in ts.view("datetime64[us]").astype(str).tolist()]


def _error_reply(message: str, status: int) -> Reply:
    return Reply(orjson.dumps({"errorMessage": message}), status)


def _rows_of(unix: bool) -> Rows:
    """Rows [microseconds, open, high, low, original candle]."""

    def take(page: Any) -> list[Row]:
        return [
            [_time({"time": c["time"]}, "time"), c["mid"]["o"], c["mid"]["h"], c["mid"]["l"], c]
            for c in page["candles"]
        ]

    def put(page: Any, rows: list[Row]) -> bytes:
        times = _times(np.array([row[0] for row in rows], dtype=np.int64), unix)
        page["candles"] = [
            {**candle, "time": time, "mid": {"o": o, "h": h, "l": low, "c": candle["mid"]["c"]}}
            for time, (_, o, h, low, candle) in zip(times, rows, strict=True)
        ]
        return dumped(page)

    return Rows(Fields(ts=0, open=1, high=2, low=3, text=True), take, put, 1)
