"""One market in the wire formats of Binance and Polygon, scriptable per candle: hours and minutes of BTC.

Belongs here: correct wire formats of both over the same candles, and the changes that a test makes to either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, json_said, klines


@dataclass
class Quotes:
    """The deviations of one provider from the market. `prices`: (open, high, low, close) by open."""

    prices: dict[int, tuple[float, float, float, float]] = field(default_factory=dict)
    missing: set[int] = field(default_factory=set)
    broken: bool = False


@dataclass
class TwoMarkets:
    """Every candle of the requested timeframe from `listed` to `now`."""

    now: int
    listed: int = 0
    binance: Quotes = field(default_factory=Quotes)
    polygon: Quotes = field(default_factory=Quotes)

    def __call__(self, asked: Received) -> Scripted:
        quotes = self.polygon if asked.path.startswith("/polygon") else self.binance
        if quotes.broken:
            return json_said({"error": "down"}, 500)
        if asked.path.startswith("/polygon"):
            *_, ticker, _, multiplier, unit, first, last = asked.path.split("/")
            timeframe = Timeframe(f"{multiplier}{unit[0]}")
            found = self.given(quotes, timeframe, int(first) * 1000, int(last) * 1000 + 1)
            names = ("o", "h", "l", "c", "v")
            rows = [
                {"t": ts // 1000, **dict(zip(names, bar, strict=True))}
                for ts, *bar in zip(*(column.tolist() for column in found.columns()), strict=True)
            ]
            return json_said({"ticker": ticker, "status": "OK", "resultsCount": len(rows), "results": rows})
        query = asked.query
        if not asked.path.endswith("/klines"):
            return Scripted(b"", 404)
        timeframe = Timeframe(query["interval"])
        start = max(int(query.get("startTime", 0)) * 1000, self.listed)
        end = int(query.get("endTime", self.now // 1000)) * 1000 + 1
        found = self.given(quotes, timeframe, start, min(end, start + 1000 * timeframe.micros))
        return json_said(klines(found.take(slice(0, int(query["limit"]))), timeframe))

    def given(self, quotes: Quotes, timeframe: Timeframe, start: int, end: int) -> Candles:
        step = timeframe.micros
        start, end = -(-max(start, self.listed) // step) * step, min(end, self.now)
        opens = np.arange(start, max(end, start), step, dtype=np.int64)
        opens = opens[~np.isin(opens, list(quotes.missing))] if quotes.missing else opens
        found = traded(opens)
        for ts, prices in quotes.prices.items():
            for column, price in zip(found.columns()[1:5], prices, strict=True):
                column[opens == ts] = price
        return found


def traded(opens: Instants) -> Candles:
    """The market's candles, at about 500."""
    low = 499.0 + opens // 3_600_000_000 % 7 / 8
    return Candles(opens, low + 1, low + 2, low, low + 1.5, 3.0 + low * 0)


def level(factor: float, ts: int) -> tuple[float, float, float, float]:
    """The candle at another level."""
    candle = traded(np.array([ts], dtype=np.int64))
    one, two, three, four = (round(float(column[0]) * factor, 6) for column in candle.columns()[1:5])
    return one, two, three, four
