"""Effects of outages and halts: the rule, every wire format, the truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.absence import missing_rows
from fks_backfill_dagster.simulator.config import Absence, Outage, instant
from fks_backfill_dagster.simulator.frames import local_dates
from fks_backfill_dagster_tests.simulator.wire import (
    aggs,
    archive,
    candles,
    chart,
    klines,
    of_aggs,
    of_candles,
    of_chart,
    of_klines,
    of_ohlc,
    of_series,
    ohlc,
    span,
    unzipped,
    vantage,
    window,
)

# --- the rule ---

RANGES = st.lists(st.tuples(st.integers(0, 7_000), st.integers(1, 1_500)), max_size=4)


def ranges(pairs: list[tuple[int, int]], unit: int) -> RangeSet:
    return RangeSet(TimeRange(start * unit, (start + length) * unit) for start, length in pairs)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 90)), min_size=1, max_size=12),
    RANGES,
    st.none() | RANGES,
)
def test_a_row_is_missing_if_it_contains_a_trading_minute_of_the_outage(
    lengths: list[tuple[int, int]], outage: list[tuple[int, int]], hours: list[tuple[int, int]] | None
) -> None:
    """Outages begin at any second, rows and trading hours at whole minutes."""
    edges = np.cumsum(lengths).reshape(-1, 2) * MICROS_PER_MINUTE
    lost = ranges(outage, MICROS_PER_MINUTE // 60)
    trading = None if hours is None else ranges([(a // 60, b // 60 + 1) for a, b in hours], MICROS_PER_MINUTE)
    found = missing_rows(edges[:, 0], edges[:, 1], lost, trading)
    for (start, end), taken in zip(edges.tolist(), found.tolist(), strict=True):
        minutes = np.arange(start, end, MICROS_PER_MINUTE)
        out = lost.contains(minutes)
        counts = out if trading is None else out & trading.contains(minutes)
        assert taken == (bool(counts.any()) or bool(out.all()))


# --- every wire format ---


@dataclass(frozen=True)
class Wire:
    """One route to one timeframe of a provider; `served` returns its bars of `window` by open time."""

    provider: str
    symbol: str
    timeframe: Timeframe
    window: TimeRange
    served: Callable[[LocalMarket, TimeRange], Candles]

    def __str__(self) -> str:
        return f"{self.provider} {self.symbol} {self.timeframe}"


def binance(interval: str) -> Callable[[LocalMarket, TimeRange], Candles]:
    return lambda market, of: of_klines(klines(market, interval=interval, limit=1000, **span(of)).json())


def archived(market: LocalMarket, of: TimeRange) -> Candles:
    body = archive(market, "monthly/klines/BTCUSDT/4h/BTCUSDT-4h-2025-01.zip").content
    return of_klines(unzipped(body), 1).within(of)


def polygon(ticker: str, bars: str, dates: bool = False) -> Callable[[LocalMarket, TimeRange], Candles]:
    def served(market: LocalMarket, of: TimeRange) -> Candles:
        path = f"{ticker}/range/{bars}/{of.start // 1000}/{of.end // 1000 - 1}"
        found = of_aggs(aggs(market, path, limit=50000, adjusted="false").json().get("results", []))
        return Candles(local_dates(found.ts), *found.columns()[1:]) if dates else found

    return served


def yahoo(interval: str) -> Callable[[LocalMarket, TimeRange], Candles]:
    def served(market: LocalMarket, of: TimeRange) -> Candles:
        found = of_chart(chart(market, interval=interval, of=of))
        return found if interval == "5m" else Candles(local_dates(found.ts), *found.columns()[1:])

    return served


def daily(market: LocalMarket, of: TimeRange) -> Candles:
    return of_series(vantage(market, "TIME_SERIES_DAILY")).within(of)


def intraday(market: LocalMarket, of: TimeRange) -> Candles:
    return of_series(vantage(market, "TIME_SERIES_INTRADAY", interval="30min", month="2025-02")).within(of)


def oanda(granularity: str) -> Callable[[LocalMarket, TimeRange], Candles]:
    """Without the first candle, which contains the start."""
    return lambda market, of: of_candles(
        candles(market, granularity=granularity, of=of, weeklyAlignment="Sunday")
    ).within(of)


def coingecko(market: LocalMarket, of: TimeRange) -> Candles:
    """By the close time of the bars."""
    requested = {"from": of.start // 1_000_000, "to": of.end // 1_000_000}
    return of_ohlc(ohlc(market, "bitcoin/ohlc/range", pro="any", interval="hourly", **requested), 0)


FEBRUARY = window("2025-02-03", "2025-02-24")
TWO_DAYS = window("2025-02-10", "2025-02-12")
JANUARY = window("2025-01-06", "2025-01-27")
DOWN = window("2025-02-10T15:00", "2025-02-10T18:00")  # within a session of New York
WIRES = [
    Wire("binance", "BTC/USDT", Timeframe.M5, TWO_DAYS, binance("5m")),
    Wire("binance", "BTC/USDT", Timeframe.H4, TWO_DAYS, binance("4h")),
    Wire("binance", "BTC/USDT", Timeframe.D1, FEBRUARY, binance("1d")),
    Wire("binance", "BTC/USDT", Timeframe.W1, FEBRUARY, binance("1w")),
    Wire("binance", "BTC/USDT", Timeframe.H4, JANUARY, archived),
    Wire("polygon", "BTC/USDT", Timeframe.H1, TWO_DAYS, polygon("X:BTCUSD", "1/hour")),
    Wire("polygon", "BTC/USDT", Timeframe.D1, FEBRUARY, polygon("X:BTCUSD", "1/day")),
    Wire("polygon", "AAPL", Timeframe.D1, FEBRUARY, polygon("AAPL", "1/day", dates=True)),
    Wire("polygon", "EUR/USD", Timeframe.H1, TWO_DAYS, polygon("C:EURUSD", "1/hour")),
    Wire("yahoo", "AAPL", Timeframe.M5, TWO_DAYS, yahoo("5m")),
    Wire("yahoo", "AAPL", Timeframe.D1, FEBRUARY, yahoo("1d")),
    Wire("yahoo", "AAPL", Timeframe.W1, FEBRUARY, yahoo("1wk")),
    Wire("alphavantage", "AAPL", Timeframe.M30, TWO_DAYS, intraday),
    Wire("alphavantage", "AAPL", Timeframe.D1, FEBRUARY, daily),
    Wire("oanda", "EUR/USD", Timeframe.M30, TWO_DAYS, oanda("M30")),
    Wire("oanda", "EUR/USD", Timeframe.D1, FEBRUARY, oanda("D")),
    Wire("oanda", "EUR/USD", Timeframe.W1, FEBRUARY, oanda("W")),
]
ASSET_CLASSES = {"BTC/USDT": AssetClass.CRYPTO, "AAPL": AssetClass.STOCKS, "EUR/USD": AssetClass.FOREX}


def outage_of(wire: Wire) -> TimeRange:
    return DOWN if wire.window != JANUARY else window("2025-01-14T15:00", "2025-01-14T18:00")


def overlapping(wire: Wire, whole: Candles, by: TimeRange) -> np.ndarray:
    """Reference implementation: the candles of which any expected minute opens in `by`."""
    of = ASSET_CLASSES[wire.symbol]
    closes = grid_of(Series("", wire.timeframe, of)).closes(whole.ts)
    minutes = grid_of(Series("", Timeframe.M1, of))
    return np.array(
        [minutes.count(TimeRange(a, b).intersect(by)) > 0 for a, b in zip(whole.ts, closes, strict=True)]
    )


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_an_outage_removes_every_candle_it_overlaps(market: LocalMarket, wire: Wire) -> None:
    whole = market.truth(wire.provider, wire.symbol, wire.timeframe, wire.window)
    assert wire.served(market, wire.window).ts.tolist() == whole.ts.tolist()
    outage = outage_of(wire)
    market.plant_outage(wire.provider, outage, wire.symbol)
    truth = market.truth(wire.provider, wire.symbol, wire.timeframe, wire.window)
    hit = overlapping(wire, whole, outage)
    assert 0 < hit.sum() < len(whole)
    assert truth.equals(whole.take(~hit))
    served = wire.served(market, wire.window)
    assert served.ts.tolist() == truth.ts.tolist()
    assert served.close.tolist() == truth.close.tolist()


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_halt_keeps_the_remaining_trades(market: LocalMarket, wire: Wire) -> None:
    whole = market.truth(wire.provider, wire.symbol, wire.timeframe, wire.window)
    halt = outage_of(wire)
    market.plant_halt(halt, wire.symbol)
    truth = market.truth(wire.provider, wire.symbol, wire.timeframe, wire.window)
    closes = grid_of(Series("", wire.timeframe, ASSET_CLASSES[wire.symbol])).closes(whole.ts)
    covered = (whole.ts >= halt.start) & (closes <= halt.end)
    assert truth.ts.tolist() == whole.ts[~covered].tolist()
    hit = overlapping(wire, whole, halt)[~covered]
    rest = whole.take(~covered)
    assert truth.take(~hit).equals(rest.take(~hit))
    if wire.symbol != "EUR/USD":
        assert (truth.volume[hit] < rest.volume[hit]).all()
    served = wire.served(market, wire.window)
    assert served.ts.tolist() == truth.ts.tolist()
    assert served.close.tolist() == truth.close.tolist()


@pytest.mark.parametrize("planted", ["outage", "halt"])
def test_coingecko_stamps_bars_with_their_close(market: LocalMarket, planted: str) -> None:
    of = window("2025-02-10T12:00", "2025-02-10T20:00")
    market.post(
        "/sim/outages", kind=planted, provider="coingecko", start="2025-02-10T15:10", end="2025-02-10T17:00"
    )
    truth = market.truth("coingecko", "BTC/USDT", Timeframe.H1, of)
    lost = (15, 16) if planted == "outage" else (16,)
    assert [ts // MICROS_PER_HOUR % 24 for ts in truth.ts.tolist()] == [
        h for h in range(12, 20) if h not in lost
    ]
    assert coingecko(market, of).ts.tolist() == (truth.ts + MICROS_PER_HOUR).tolist()


def test_an_outage_overnight_or_on_a_weekend_affects_no_day(market: LocalMarket) -> None:
    night, weekend = (
        window("2025-02-10T21:00", "2025-02-11T14:30"),
        window("2025-02-14T22:00", "2025-02-16T22:00"),
    )
    days = {s: market.truth("polygon", s, Timeframe.D1, FEBRUARY) for s in ("AAPL", "EUR/USD")}
    market.plant_outage("polygon", night, "AAPL")
    market.plant_outage("polygon", weekend, "EUR/USD")
    for symbol, before in days.items():
        assert market.truth("polygon", symbol, Timeframe.D1, FEBRUARY).equals(before)
    assert polygon("AAPL", "1/day", dates=True)(market, FEBRUARY).equals(days["AAPL"])
    hours = polygon("AAPL", "1/hour")(market, window("2025-02-10T14:00", "2025-02-12"))
    assert not RangeSet([night]).contains(hours.ts).any(), "pre- and post-market rows are missing"
    pairs = polygon("C:EURUSD", "1/day")(market, window("2025-02-13", "2025-02-18"))
    assert [ts // (24 * MICROS_PER_HOUR) % 7 for ts in pairs.ts.tolist()] == [
        0,
        1,
        3,
        4,
    ]  # no Saturday's ticks


def test_an_outage_after_the_clock_has_no_effect(market: LocalMarket) -> None:
    now = instant("2025-02-10T15:20")
    market.set_clock(now)
    market.plant_outage("all", window("2025-02-10T15:21", "2025-02-10T16:00"))
    of = window("2025-02-10", "2025-02-11")
    assert binance("1h")(market, of).ts[-1] == instant("2025-02-10T15:00")
    market.set_clock(now + 2 * MICROS_PER_MINUTE)
    assert binance("1h")(market, of).ts[-1] == instant("2025-02-10T14:00")


def test_an_outage_of_all_applies_to_each_provider(market: LocalMarket) -> None:
    requested = {"binance": "BTC/USDT", "polygon": "AAPL", "oanda": "EUR/USD"}
    before = {name: market.truth(name, symbol, Timeframe.D1, FEBRUARY) for name, symbol in requested.items()}
    market.plant_outage("all", DOWN)
    for name, symbol in requested.items():
        assert not RangeSet([DOWN]).contains(market.truth(name, symbol, Timeframe.M1, TWO_DAYS).ts).any()
        assert len(market.truth(name, symbol, Timeframe.D1, FEBRUARY)) == len(before[name]) - 1


def test_text_forms_of_outages_and_halts() -> None:
    halt = Outage.parse("all@AAPL=2024-01-05T15:00/2024-01-05T16:00", Absence.HALT)
    assert halt == Outage("all", window("2024-01-05T15:00", "2024-01-05T16:00"), "AAPL", kind=Absence.HALT)
    with pytest.raises(ValueError, match="halt 'some' is not PROVIDER"):
        Outage.parse("some", Absence.HALT)
    with pytest.raises(ValueError, match="cannot be published late"):
        Outage("all", DOWN, published=1, kind=Absence.HALT)


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ({"kind": "strike"}, "kind is one of outage, halt, not 'strike'"),
        ({"kind": "halt", "published": "2025-02-11"}, "cannot be published late"),
        ({"provider": "kraken"}, "outage of 'kraken': the provider is one of binance, .*, all"),
    ],
)
def test_an_invalid_outage_is_rejected(market: LocalMarket, document: dict[str, str], sentence: str) -> None:
    whole = {"provider": "binance", "start": "2025-02-10", "end": "2025-02-11"} | document
    with pytest.raises(ValueError, match=sentence):
        market.post("/sim/outages", **whole)
