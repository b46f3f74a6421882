"""Minimal honest versions of OANDA, Alpha Vantage, CoinGecko and Polygon; SmallBinance is in scripted.py.

Each has every candle of the expected grid. Prices depend on the open and the symbol only (`candles_at`); coarser bars
are aggregated from finer ones in plain Python: slow, obvious, and independent of the tested code.

Belongs here: honest wire formats. Does not belong here: faults; each test plants its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime, to_micros
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, candles_at, json_said

NEW_YORK = ZoneInfo("America/New_York")
Bar = tuple[float, float, float, float, float]


def bars_of(candles: Candles) -> list[tuple[int, Bar]]:
    """(open, (open, high, low, close, volume)) of each candle."""
    ts, *columns = (column.tolist() for column in candles.columns())
    return list(zip(ts, zip(*columns, strict=True), strict=True))


def aggregate(parts: list[tuple[int, Bar]], bucket: Callable[[int], int]) -> list[tuple[int, Bar]]:
    """Bars of the parts that share a bucket, stamped with it."""
    made: dict[int, Bar] = {}
    for at, (o, h, low, c, v) in parts:
        key = bucket(at)
        if key in made:
            first, high, lowest, _, volume = made[key]
            made[key] = (first, max(high, h), min(lowest, low), c, volume + v)
        else:
            made[key] = (o, h, low, c, v)
    return sorted(made.items())


def candles_of(bars: list[tuple[int, Bar]], *, volume: bool = True) -> Candles:
    """The bars as Candles, as expected from a provider with or without volumes."""
    ts = np.array([at for at, _ in bars], dtype=np.int64)
    table = np.array([values for _, values in bars], dtype=np.float64).reshape(-1, 5).T.copy()
    if not volume:
        table[4] = np.nan
    return Candles(ts, *table)


# --- OANDA ------------------------------------------------------------------------------------------

_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_FINE = {"M1": "1m", "M5": "5m", "M15": "15m", "M30": "30m", "H1": "1h"}
_LENGTHS = {
    **{name: Timeframe(value).minutes for name, value in _FINE.items()},
    "H4": 240,
    "D": 1440,
    "W": 10080,
}


@dataclass
class SmallOanda:
    """missing: the opens (of any granularity) to omit. change: may replace a response."""

    now: int
    token: str
    missing: frozenset[int] = frozenset()
    change: Callable[[Received, Scripted], Scripted] = lambda _, honest: honest

    def __call__(self, asked: Received) -> Scripted:
        return self.change(asked, self._answer(asked))

    def _answer(self, asked: Received) -> Scripted:
        query = asked.query
        if asked.headers.get("Authorization") != f"Bearer {self.token}":
            return json_said({"errorMessage": "Insufficient authorization to perform request."}, 401)
        instrument = asked.path.split("/")[3]
        if instrument not in ("EUR_USD", "USD_JPY"):
            return json_said({"errorMessage": "Invalid value specified for 'instrument'"}, 400)
        start = micros_of(query["from"])
        minutes = _LENGTHS[query["granularity"]]
        if "count" in query:
            start = max(start, micros_of("2005-01-02T22:00:00Z"))
            end = start + int(query["count"]) * minutes * 60_000_000
        else:
            end = micros_of(query["to"])
            if end > self.now:
                return json_said(
                    {"errorMessage": "Invalid value specified for 'to'. Time is in the future"}, 400
                )
            if (end - start) // (minutes * 60_000_000) > 5000:
                return json_said({"errorMessage": "Maximum value for 'count' exceeded"}, 400)
        bars = self.bars(instrument, TimeRange(start, end), query)
        rows = [
            {
                "complete": at + minutes * 60_000_000 <= self.now,
                "volume": 7,
                "time": f"{np.datetime64(at, 'us')}000Z",
                "mid": dict(zip("ohlc", map(str, bar), strict=False)),
            }
            for at, bar in bars
            if at not in self.missing
        ]
        return json_said({"instrument": instrument, "granularity": query["granularity"], "candles": rows})

    def bars(self, instrument: str, window: TimeRange, query: Mapping[str, str]) -> list[tuple[int, Bar]]:
        """From the bar that covers the start to the one that covers the end."""
        granularity = query["granularity"]
        series = Series("EUR/USD", Timeframe(_FINE.get(granularity, "1h")), AssetClass.FOREX)
        if granularity in _FINE:
            first = window.start - window.start % series.timeframe.micros
            opens = grid_of(series).opens(TimeRange(first, window.end + 1))
            return bars_of(candles_at(opens, instrument))
        wide = TimeRange(window.start - 8 * 86_400_000_000, window.end + 8 * 86_400_000_000)
        hours = bars_of(candles_at(grid_of(series).opens(wide), instrument))
        hours = [(at, bar) for at, bar in hours if at < self.now]
        made = aggregate(hours, lambda at: aligned(at, query))
        covering = aligned(window.start, query)
        return [(at, bar) for at, bar in made if covering <= at <= window.end]


def micros_of(text: str) -> int:
    return to_micros(datetime.fromisoformat(text.replace("Z", "+00:00")))


def aligned(at: int, query: Mapping[str, str]) -> int:
    """The start of the H4, D or W bar that an instant belongs to; defaults as documented."""
    zone = ZoneInfo(query.get("alignmentTimezone", "America/New_York"))
    moment = to_datetime(at).astimezone(zone)
    day = moment.replace(hour=int(query.get("dailyAlignment", "17")), minute=0, second=0)
    if day > moment:
        day = day - timedelta(days=1)
    if query["granularity"] == "H4":
        begin = to_micros(day.astimezone(UTC))
        return begin + (at - begin) // 14_400_000_000 * 14_400_000_000
    if query["granularity"] == "W":
        weekday = _WEEKDAYS.index(query.get("weeklyAlignment", "Friday"))
        day = day - timedelta(days=(day.weekday() - weekday) % 7)
    return to_micros(day.astimezone(UTC))


# --- Alpha Vantage ----------------------------------------------------------------------------------


@dataclass
class SmallAlphaVantage:
    """stamps: open or close. free: the key has compact days only."""

    now: int
    stamps: str = "open"
    free: bool = False
    change: Callable[[Received, Scripted], Scripted] = lambda _, honest: honest

    def __call__(self, asked: Received) -> Scripted:
        return self.change(asked, self._answer(asked))

    def _answer(self, asked: Received) -> Scripted:
        query = asked.query
        assert asked.path == "/query"
        if query["symbol"] not in ("AAPL", "BRK.B"):
            function = query["function"]
            return json_said(
                {"Error Message": f"Invalid API call. Please retry or visit the docs for {function}."}
            )
        if query["function"] == "TIME_SERIES_DAILY":
            return self._daily(query)
        assert (query["adjusted"], query["extended_hours"], query["outputsize"]) == ("false", "false", "full")
        if self.free:
            return json_said(
                {"Information": "Thank you for using Alpha Vantage! This is a premium endpoint. You may"}
            )
        return self._intraday(query)

    def _daily(self, query: Mapping[str, str]) -> Scripted:
        full = query["outputsize"] == "full"
        if full and self.free:
            text = (
                "The outputsize=full parameter value is a premium feature for the TIME_SERIES_DAILY endpoint."
            )
            return json_said({"Information": f"Thank you for using Alpha Vantage! {text}"})
        days = self.truth(
            Timeframe.D1, TimeRange(micros_of("2010-01-01T00:00:00Z"), self.now), query["symbol"]
        )
        days = days if full else days[-100:]
        about = {"1. Information": "Daily Prices", "2. Symbol": query["symbol"], "5. Time Zone": "US/Eastern"}
        return self._table(
            about, "Time Series (Daily)", [(f"{to_datetime(at):%Y-%m-%d}", bar) for at, bar in days]
        )

    def _intraday(self, query: Mapping[str, str]) -> Scripted:
        timeframe = Timeframe(query["interval"].removesuffix("in"))
        year, number = map(int, query["month"].split("-"))
        begin = datetime(year, number, 1, tzinfo=NEW_YORK)
        end = datetime(year + number // 12, number % 12 + 1, 1, tzinfo=NEW_YORK)
        month = TimeRange(to_micros(begin), min(to_micros(end), self.now))
        bars = self.truth(timeframe, month, query["symbol"])
        shift = timedelta(minutes=timeframe.minutes if self.stamps == "close" else 0)
        stamped = [
            (f"{(to_datetime(at) + shift).astimezone(NEW_YORK):%Y-%m-%d %H:%M:%S}", bar) for at, bar in bars
        ]
        about = {"2. Symbol": query["symbol"], "4. Interval": query["interval"], "6. Time Zone": "US/Eastern"}
        return self._table(about, f"Time Series ({query['interval']})", stamped)

    def _table(self, about: dict[str, str], name: str, stamped: list[tuple[str, Bar]]) -> Scripted:
        names = ("1. open", "2. high", "3. low", "4. close", "5. volume")
        rows = {stamp: dict(zip(names, map(str, bar), strict=True)) for stamp, bar in reversed(stamped)}
        return json_said({"Meta Data": about, name: rows})

    def truth(self, timeframe: Timeframe, window: TimeRange, symbol: str) -> list[tuple[int, Bar]]:
        series = Series(symbol, timeframe, AssetClass.STOCKS)
        return bars_of(candles_at(grid_of(series).opens(window), symbol))


# --- CoinGecko --------------------------------------------------------------------------------------


@dataclass
class SmallCoinGecko:
    """Automatic granularity as documented; the last row is the forming candle, stamped now."""

    now: int
    change: Callable[[Received, Scripted], Scripted] = lambda _, honest: honest

    def __call__(self, asked: Received) -> Scripted:
        return self.change(asked, self._answer(asked))

    def _answer(self, asked: Received) -> Scripted:
        coin, query = asked.path.split("/")[4], asked.query
        if coin not in ("bitcoin", "ethereum"):
            return json_said({"error": "coin not found"}, 404)
        assert query["vs_currency"] == "usd"
        if asked.path.endswith("/ohlc/range"):
            step = {"hourly": 3600, "daily": 86_400}[query["interval"]]
            first, last = int(query["from"]), int(query["to"])
            if (last - first) // step > {"hourly": 744, "daily": 180}[query["interval"]]:
                return json_said({"error": "the range is too long"}, 400)
            return json_said(self._rows(coin, TimeRange(first * 10**6, last * 10**6), step * 10**6))
        days = int(query["days"])
        step = 1800 if days <= 2 else 14_400 if days <= 30 else 4 * 86_400
        rows = self._rows(coin, TimeRange(self.now - days * 86_400_000_000, self.now), step * 10**6)
        forming = [self.now // 1000, 1.0, 2.0, 0.5, 1.0]
        return json_said([*rows, forming])

    def _rows(self, coin: str, closes: TimeRange, step: int) -> list[list[float]]:
        """The candles that close in the range, both ends included."""
        first = -(-closes.start // step) * step - step
        opens = np.arange(first, min(closes.end, self.now) - step + 1, step)
        return [[(at + step) // 1000, *bar[:4]] for at, bar in self.truth(coin, opens)]

    def truth(self, coin: str, opens: np.ndarray) -> list[tuple[int, Bar]]:
        return bars_of(candles_at(opens, coin))


# --- Polygon ----------------------------------------------------------------------------------------


POLYGON_PAGE = 1000  # bars; more than that continue at next_url


def small_polygon(asked: Received) -> Scripted:
    """Aggregates of regular sessions only, any ticker; days of stocks are stamped 00:00 New York."""
    *_, ticker, _, multiplier, unit, first, last = asked.path.split("/")
    timeframe = Timeframe(f"{multiplier}{unit[0]}")
    asset_class = {"X:": AssetClass.CRYPTO, "C:": AssetClass.FOREX}.get(ticker[:2], AssetClass.STOCKS)
    window = TimeRange(int(first) * 1000, int(last) * 1000 + 1)
    grid = grid_of(Series(ticker, timeframe, asset_class))
    if asset_class is AssetClass.STOCKS and timeframe is Timeframe.D1:
        opens = grid.opens(TimeRange(window.start - 86_400_000_000, window.end))
        stamps = np.array([new_york_midnight(at) for at in opens.tolist()], dtype=np.int64)
        asked_for = (stamps >= window.start) & (stamps < window.end)
        opens, stamps = opens[asked_for], stamps[asked_for]
    else:
        opens = stamps = grid.opens(window)
    skip = int(asked.query.get("cursor", 0))
    page = slice(skip, skip + POLYGON_PAGE)
    results = [
        {"t": at // 1000, **dict(zip("ohlcv", bar, strict=True))}
        for at, (_, bar) in zip(stamps[page].tolist(), bars_of(candles_at(opens[page], ticker)), strict=True)
    ]
    made = {"ticker": ticker, "status": "OK", "resultsCount": len(results), "results": results}
    if page.stop < len(opens):
        made["next_url"] = f"http://{asked.headers['Host']}{asked.path}?cursor={page.stop}"
    return json_said(made)


def new_york_midnight(date: int) -> int:
    """Of a date at 00:00 UTC."""
    return to_micros(to_datetime(date).replace(tzinfo=NEW_YORK))
