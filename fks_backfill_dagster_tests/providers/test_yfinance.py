"""Yahoo's charts: un-adjusting, stamps, the bars it lacks, its depth, and what its answers mean."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import pytest

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.derive import derive
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.providers.base import (
    Answer,
    BadAnswer,
    PermanentError,
    ProviderError,
    RateLimited,
    TransientError,
    Transport,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster.providers.yfinance import symbol_of
from fks_backfill_dagster_tests.domain.builders import read_csv
from fks_backfill_dagster_tests.providers.conformance import ProviderConformance
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import Asked, Said, candles_at, json_said, serve, span, us

DATA = Path(__file__).resolve().parents[1] / "data"
SHARED = Path(__file__).resolve().parents[2] / "../shared"
APPLE_SPLITS = {us("2014-06-09T13:30"): (7, 1), us("2020-08-31T13:30"): (4, 1)}
SECOND = 1_000_000
DERIVED = {Timeframe(name) for name in ("30m", "1h", "4h", "1w")}


def stock(timeframe: Timeframe, symbol: str = "AAPL") -> Series:
    return Series(symbol, timeframe, AssetClass.STOCKS)


def traded(timeframe: Timeframe, window: TimeRange) -> Candles:
    """The truth: sane candles at all expected opens, prices in cents."""
    made = candles_at(grid_of(stock(timeframe)).opens(window), "AAPL")
    cents = {price: np.round(getattr(made, price) * 1.37, 2) for price in PRICES}
    return replace(made, **cents, volume=np.rint(made.volume * 7 * 28 * 400))


def of(answer: Answer) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def good(answer: Answer, series: Series, window: TimeRange) -> Candles:
    """What the pipeline would store."""
    return verify(of(answer), window, grid_of(series), window.end).good


def session_opens(days: Candles) -> np.ndarray:
    """09:30 New York of each date."""
    halves = grid_of(stock(Timeframe.M30)).opens(
        TimeRange(int(days.ts[0]), int(days.ts[-1]) + MICROS_PER_DAY)
    )
    return halves[np.searchsorted(halves, days.ts)]


def chart(bars: Candles, interval: str, symbol: str = "AAPL", **meta: Any) -> dict[str, Any]:
    """An answer without events. NaN becomes null."""
    quote = {
        name: [None if np.isnan(value) else value for value in getattr(bars, name).tolist()]
        for name in (*PRICES, "volume")
    }
    known = {
        "symbol": symbol,
        "dataGranularity": interval,
        "exchangeTimezoneName": "America/New_York",
        "regularMarketTime": us("2015-12-24T18:00:02") // SECOND,
        "firstTradeDate": us("1980-12-12T14:30") // SECOND,
    }
    result: dict[str, Any] = {
        "meta": {**known, **meta},
        "indicators": {"quote": [quote if len(bars) else {}]},
    }
    if len(bars):
        result["timestamp"] = (bars.ts // SECOND).tolist()
    return {"chart": {"result": [result], "error": None}}


def failed(code: str, description: str, status: int) -> Said:
    error = {"code": code, "description": description}
    return json_said({"chart": {"result": None, "error": error}}, status)


@dataclass
class SmallYahoo:
    """Adjusts an honest truth by its splits, and refuses what lies too far back."""

    truth: Mapping[str, Candles]
    now: int
    splits: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    float32: bool = False
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda honest: honest

    def __call__(self, asked: Asked) -> Said:
        q = asked.query
        assert asked.path == "/v8/finance/chart/AAPL"
        assert q["events"] == "div,splits"
        interval, start, end = q["interval"], int(q["period1"]) * SECOND, int(q["period2"]) * SECOND
        assert end <= self.now + SECOND, "there is nothing in the future"
        days = {"1m": 30, "1d": 10**6}.get(interval, 60)
        if start < self.now - days * MICROS_PER_DAY or (
            interval == "1m" and end - start > 8 * MICROS_PER_DAY
        ):
            return failed("Unprocessable Entity", f"{interval} data not available", 422)
        truth = self.truth[interval]
        bars = replace(truth, ts=session_opens(truth)) if interval == "1d" else truth
        bars = self._adjusted(bars).within(TimeRange(start, end))
        made = chart(bars.take(bars.ts <= self.now), interval)
        known = {at: ratio for at, ratio in self.splits.items() if start <= at < end}
        if known:
            made["chart"]["result"][0]["events"] = {
                "dividends": {"1402320600": {"amount": 0.1, "date": 1402320600}},
                "splits": {
                    str(at // SECOND): {
                        "date": at // SECOND,
                        "numerator": new,
                        "denominator": old,
                        "splitRatio": f"{new}:{old}",
                    }
                    for at, (new, old) in known.items()
                },
            }
        return json_said(self.change(made))

    def _adjusted(self, bars: Candles) -> Candles:
        factor = np.ones(len(bars))
        for at, (new, old) in self.splits.items():
            if at <= self.now:
                factor[bars.ts < at] *= new / old
        prices = {price: getattr(bars, price) / factor for price in PRICES}
        if self.float32:
            prices = {name: price.astype(np.float32).astype(np.float64) for name, price in prices.items()}
        return replace(bars, **prices, volume=bars.volume * factor)


class TestConformance(ProviderConformance):
    name = "yfinance"
    symbols: ClassVar = {AssetClass.STOCKS: "AAPL"}
    honest: ClassVar = SmallYahoo(
        {t.value: traded(t, span("2024-05-01", "2024-06-05")) for t in Timeframe if t not in DERIVED},
        ProviderConformance.now,
    )

    def market(self, asked: Asked) -> Said:
        return self.honest(asked)

    def unknown(self, asked: Asked) -> Said:
        return failed("Not Found", "No data found, symbol may be delisted", 404)

    def window(self, series: Series) -> TimeRange:
        return span("2024-05-13", "2024-05-25" if series.timeframe.minutes >= 240 else "2024-05-15")


def always(answer: Said) -> Callable[[Asked], Said]:
    return lambda _: answer


def clock_at(now: int) -> dict[str, Any]:
    return {"clock": lambda: now, "requests_per_minute": 10_000}


class TestSplits:
    @pytest.mark.parametrize("float32", [True, False])
    @pytest.mark.parametrize("window", [span("2014-05-26", "2014-06-21"), span("2020-08-24", "2020-09-05")])
    def test_days_are_as_traded(self, make: Make, window: TimeRange, float32: bool) -> None:
        now = us("2020-12-01T12:00")
        truth = traded(Timeframe.D1, span("2014-01-01", "2020-12-01"))
        with serve(SmallYahoo({"1d": truth}, now, APPLE_SPLITS, float32)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window)
            assert len(server.requests) == answer.requests == 1
            assert int(server.requests[0].query["period2"]) * SECOND == now, "later splits are asked for"
        assert of(answer).equals(truth.within(window))
        assert answer.deliveries[0].origin.transport is Transport.REST

    def test_a_split_of_the_future_has_not_happened(self, make: Make) -> None:
        now, window = us("2020-08-20T12:00"), span("2020-08-03", "2020-08-20")
        truth = traded(Timeframe.D1, window)
        market = SmallYahoo({"1d": truth}, now, APPLE_SPLITS)

        def announced(honest: dict[str, Any]) -> dict[str, Any]:
            split = {"date": us("2020-08-31T13:30") // SECOND, "numerator": 4, "denominator": 1}
            honest["chart"]["result"][0]["events"] = {"splits": {"1598880600": split}}
            return honest

        market.change = announced
        with serve(market) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window)
        assert of(answer).equals(truth)

    @pytest.mark.parametrize(("symbol", "kind"), [("15m", Timeframe.M15), ("1m", Timeframe.M1)])
    def test_intraday(self, make: Make, symbol: str, kind: Timeframe) -> None:
        """On the day of the split itself, and with the split in a later page than the candles."""
        now, window = us("2014-06-20T20:30"), span("2014-05-28", "2014-06-11")
        truth = traded(kind, TimeRange(window.start, now))
        with serve(SmallYahoo({symbol: truth}, now, APPLE_SPLITS, float32=True)) as server:
            provider = make("yfinance", server.url, **clock_at(now))
            answer = provider.fetch(stock(kind), window)
            assert answer.requests == len(server.requests) == (4 if kind is Timeframe.M1 else 1)
            assert provider.estimate(stock(kind), window).requests == answer.requests
        assert of(answer).equals(truth.within(window))

    def test_a_reverse_split(self, make: Make) -> None:
        now, window = us("2014-06-20T12:00"), span("2014-06-02", "2014-06-12")
        truth = traded(Timeframe.D1, window)
        with serve(SmallYahoo({"1d": truth}, now, {us("2014-06-09T13:30"): (1, 10)})) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window)
        assert of(answer).equals(truth)

    def test_real_days_of_apple(self, make: Make) -> None:
        if not SHARED.exists():
            pytest.skip("the real files are only there beside the shared folder")
        now, window = us("2021-03-31T12:00"), span("2013-01-01", "2021-03-31")
        truth = read_csv(SHARED / "data/equity/AAPL-1d.csv.gz").within(window)
        with serve(SmallYahoo({"1d": truth}, now, APPLE_SPLITS, float32=True)) as server:
            got = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window))
        assert np.array_equal(got.ts, truth.ts)
        assert np.allclose(got.volume, truth.volume, atol=0.51, rtol=0)
        for price in PRICES:
            np.testing.assert_allclose(getattr(got, price), getattr(truth, price), rtol=3e-7)
        assert (got.close == truth.close).mean() > 0.99


class TestDerived:
    @pytest.mark.parametrize("timeframe", [Timeframe.M30, Timeframe.H1, Timeframe.H4])
    @pytest.mark.parametrize(
        ("window", "now"),
        [
            (span("2015-12-21", "2015-12-30"), us("2015-12-31T12:00")),  # a half-day on the 24th
            (span("2015-03-04", "2015-03-13"), us("2015-03-20T12:00")),  # summer time from the 8th on
        ],
    )
    def test_intraday_from_15m(self, make: Make, timeframe: Timeframe, window: TimeRange, now: int) -> None:
        truth = traded(Timeframe.M15, TimeRange(window.start - 7 * MICROS_PER_DAY, now))
        series = stock(timeframe)
        expected = derive(truth, grid_of(stock(Timeframe.M15)), grid_of(series), window, quiet_ok=False)
        with serve(SmallYahoo({"15m": truth}, now)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(series, window)
        assert of(answer).equals(expected)
        assert np.array_equal(expected.ts, grid_of(series).opens(window))
        assert answer.deliveries[0].origin.transport is Transport.DERIVED
        assert "interval=15m" in answer.deliveries[0].origin.source

    def test_weeks_from_days(self, make: Make) -> None:
        now, window = us("2015-12-31T12:00"), span("2015-11-02", "2015-12-29")
        truth, series = traded(Timeframe.D1, span("2015-10-01", "2016-01-10")), stock(Timeframe.W1)
        expected = derive(truth, grid_of(stock(Timeframe.D1)), grid_of(series), window, quiet_ok=False)
        with serve(SmallYahoo({"1d": truth}, now)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(series, window)
        # The week of the 28th is not over yet.
        assert of(answer).equals(expected.take(slice(0, -1)))
        assert len(of(answer)) == 8

    def test_nothing_is_derived_over_nulls(self, make: Make) -> None:
        now, window = us("2015-12-31T12:00"), span("2015-12-22", "2015-12-23")
        truth = traded(Timeframe.M15, window)
        hole = truth.ts == us("2015-12-22T16:15")
        holey = Candles(truth.ts, *(np.where(hole, np.nan, column) for column in truth.columns()[1:]))
        with serve(SmallYahoo({"15m": holey}, now)) as server:
            hours = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.H1), window))
            quarters = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.M15), window))
        assert us("2015-12-22T16:00") not in hours.ts
        assert len(hours) == 6
        assert quarters.equals(truth.take(~hole))


class TestBars:
    def test_forming_and_live_bars(self, make: Make) -> None:
        """At 15:07 the bars of 15:05 and of the last trade are no candles yet."""
        now, window = us("2015-12-22T15:07"), span("2015-12-22", "2015-12-23")
        truth = traded(Timeframe.M5, window)
        live = candles_at(np.array([us("2015-12-22T15:06:41")]), "AAPL")
        market = SmallYahoo({"5m": Candles.concat([truth, live]).sorted()}, now)
        with serve(market) as server:
            got = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.M5), window))
        assert got.equals(truth.take(truth.ts < us("2015-12-22T15:05")))

    def test_a_live_bar_after_the_close(self, make: Make) -> None:
        now, window = us("2015-12-24T19:00"), span("2015-12-24", "2015-12-25")
        truth = traded(Timeframe.M15, window)
        live = candles_at(np.array([us("2015-12-24T18:00:02")]), "AAPL")
        with serve(SmallYahoo({"15m": Candles.concat([truth, live])}, now)) as server:
            provider = make("yfinance", server.url, **clock_at(now))
            assert of(provider.fetch(stock(Timeframe.M15), window)).equals(truth)
            assert len(of(provider.fetch(stock(Timeframe.H4), window))) == 2

    def test_a_live_bar_on_the_grid(self, make: Make) -> None:
        now, window = us("2015-12-22T15:20"), span("2015-12-22", "2015-12-23")
        bars = traded(Timeframe.M5, window).within(TimeRange(window.start, us("2015-12-22T15:10")))
        last = us("2015-12-22T15:05") // SECOND  # halted since
        with serve(lambda _: json_said(chart(bars, "5m", regularMarketTime=last))) as server:
            got = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.M5), window))
        assert got.equals(bars.take(slice(0, -1)))

    @pytest.mark.parametrize(("now", "last"), [("20:30", "2015-12-22"), ("19:30", "2015-12-21")])
    def test_a_day_that_is_there_twice(self, make: Make, now: str, last: str) -> None:
        at, window = us(f"2015-12-22T{now}") + MICROS_PER_HOUR, span("2015-12-14", "2015-12-24")
        truth = traded(Timeframe.D1, span("2015-12-14", "2015-12-23"))
        stamped = replace(truth, ts=session_opens(truth))
        older = candles_at(stamped.ts[-1:], "OLD")
        newest = replace(truth.take(slice(-1, None)), ts=np.array([at - 5 * SECOND]))
        bars = Candles.concat([stamped.take(slice(0, -1)), older, newest])
        with serve(lambda _: json_said(chart(bars, "1d"))) as server:
            got = of(make("yfinance", server.url, **clock_at(at)).fetch(stock(Timeframe.D1), window))
        assert got.equals(truth.within(TimeRange(window.start, us(last) + 1)))

    def test_a_single_null_is_for_the_quarantine(self, make: Make) -> None:
        now, window = us("2015-12-31T12:00"), span("2015-12-14", "2015-12-16")
        truth = traded(Timeframe.D1, window)
        truth.close[0] = np.nan
        truth.volume[1] = np.nan
        with serve(SmallYahoo({"1d": truth}, now)) as server:
            got = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window))
        assert np.isnan(got.close).tolist() == [True, False]
        assert np.isnan(got.volume).tolist() == [False, True]
        assert len(verify(got, window, grid_of(stock(Timeframe.D1)), window.end).rejected) == 1

    def test_days_east_of_greenwich(self, make: Make) -> None:
        """The Sydney session of the 24th opens at 23:00 UTC of the 23rd."""
        now = us("2015-12-31T12:00")
        bars = candles_at(np.array([us("2015-11-23T23:00"), us("2015-11-24T23:00")]), "BHP")
        answer = chart(bars, "1d", "BHP.AX", exchangeTimezoneName="Australia/Sydney")
        series = Series("BHP.AX", Timeframe.D1, AssetClass.STOCKS, "XASX")
        with serve(lambda _: json_said(answer)) as server:
            got = of(
                make("yfinance", server.url, **clock_at(now)).fetch(series, span("2015-11-24", "2015-11-26"))
            )
            assert int(server.requests[0].query["period1"]) * SECOND <= bars.ts[0]
        assert got.ts.tolist() == [us("2015-11-24"), us("2015-11-25")]


class TestDepth:
    NOW = us("2015-12-31T12:00")

    @pytest.mark.parametrize(("interval", "days"), [("1m", 30), ("5m", 60), ("15m", 60)])
    def test_asks_for_what_there_is(self, make: Make, interval: str, days: int) -> None:
        timeframe, window = Timeframe(interval), span("2015-09-01", "2015-12-30")
        truth = traded(timeframe, window)
        with serve(SmallYahoo({interval: truth}, self.NOW)) as server:
            provider = make("yfinance", server.url, **clock_at(self.NOW))
            got = of(provider.fetch(stock(timeframe), window))
        reach = provider.capabilities.reach(timeframe, self.NOW)
        assert reach is not None
        assert 0 < reach - (self.NOW - days * MICROS_PER_DAY) <= MICROS_PER_HOUR
        assert got.equals(truth.take(truth.ts >= reach))

    def test_an_hour_that_reaches_beyond_is_not_made(self, make: Make) -> None:
        now, window = us("2015-12-29T16:20"), span("2015-10-29", "2015-10-31")
        truth = traded(Timeframe.M15, TimeRange(window.start, now))
        with serve(SmallYahoo({"15m": truth}, now)) as server:
            got = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.H1), window))
        # 59 days and 23 hours before: 2015-10-30T17:20.
        assert got.ts[0] == us("2015-10-30T18:00")

    def test_beyond_it_nobody_is_asked(self, make: Make) -> None:
        provider = make("yfinance", "http://127.0.0.1:1", **clock_at(self.NOW))
        for timeframe in (Timeframe.M1, Timeframe.H4):
            assert provider.fetch(stock(timeframe), span("2015-09-01", "2015-09-30")) == Answer(())
            assert provider.estimate(stock(timeframe), span("2015-09-01", "2015-09-30")).requests == 0
        for window in (span("2015-09-01", "2015-09-01"), span("2016-01-04", "2016-01-09")):
            assert provider.fetch(stock(Timeframe.D1), window) == Answer(())
            assert provider.fetch(stock(Timeframe.W1), window) == Answer(())

    def test_capabilities(self, make: Make) -> None:
        provider = make("yfinance", "http://127.0.0.1:1")
        assert provider.capabilities.timeframes == {AssetClass.STOCKS: frozenset(Timeframe)}
        assert provider.capabilities.reach(Timeframe.D1, self.NOW) is None
        assert provider.missing_key() is None
        with pytest.raises(PermanentError, match="it has no 1d candles of crypto"):
            provider.fetch(
                Series("BTC/USDT", Timeframe.D1, AssetClass.CRYPTO), span("2015-12-01", "2015-12-02")
            )


class TestAsking:
    def test_the_request(self, make: Make) -> None:
        now, window = us("2015-12-31T12:00"), span("2015-12-14", "2015-12-16")
        with serve(SmallYahoo({"1d": traded(Timeframe.D1, window)}, now)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window)
            asked = server.requests[0]
        assert answer.deliveries[0].origin.source == (
            "/v8/finance/chart/AAPL?period1=1449964800&period2=1451563200&interval=1d&events=div,splits"
            "&includePrePost=false"
        )
        assert asked.headers["User-Agent"].startswith("Mozilla/5.0")

    def test_the_listing(self, make: Make) -> None:
        days = traded(Timeframe.D1, span("2015-12-14", "2015-12-15"))
        for known, told in ((345479400, us("1980-12-12T14:30")), (None, None)):
            answer = json_said(chart(days, "1d", firstTradeDate=known))
            with serve(always(answer)) as server:
                assert make("yfinance", server.url).listed_at(stock(Timeframe.H1)) == told
                assert server.requests[0].query["interval"] == "1d"

    @pytest.mark.parametrize(
        ("symbol", "calendar", "theirs"),
        [("AAPL", "XNYS", "AAPL"), ("BRK.B", "XNYS", "BRK-B"), ("VOD.L", "XLON", "VOD.L")],
    )
    def test_symbols(self, symbol: str, calendar: str, theirs: str) -> None:
        assert symbol_of(Series(symbol, Timeframe.D1, AssetClass.STOCKS, calendar)) == theirs

    def test_symbols_by_name(self) -> None:
        named = (("yfinance", "BRK-A"),)
        assert symbol_of(replace(stock(Timeframe.D1, "BERKSHIRE"), provider_symbols=named)) == "BRK-A"


WINDOW = span("2015-12-14", "2015-12-16")
DAYS = replace(traded(Timeframe.D1, WINDOW), ts=session_opens(traded(Timeframe.D1, WINDOW)))


def broken(**changes: Any) -> Said:
    made = chart(DAYS, "1d")
    made["chart"]["result"][0].update(changes)
    return json_said(made)


def split_of(**split: Any) -> Said:
    return broken(events={"splits": {"1": {"date": 1450103400, "numerator": 4, "denominator": 1, **split}}})


class TestAnswers:
    NOW = us("2015-12-31T12:00")

    def ask(self, make: Make, answer: Said) -> Candles:
        with serve(lambda _: answer) as server:
            provider = make("yfinance", server.url, **clock_at(self.NOW), retry_budget_seconds=0.0)
            return of(provider.fetch(stock(Timeframe.D1), WINDOW))

    @pytest.mark.parametrize(
        "answer",
        [
            Said(b"<html>will be right back</html>"),
            Said(b'{"chart": {"result": [{"meta"'),
            json_said([]),
            json_said({"chart": None}),
            json_said({"chart": {"result": None, "error": None}}),
            json_said(chart(DAYS, "1d", "MSFT")),
            json_said(chart(DAYS, "5d")),
            json_said(chart(DAYS, "1d", exchangeTimezoneName="Mars/Olympus")),
            json_said(chart(DAYS, "1d", exchangeTimezoneName=None)),
            broken(meta=None),
            broken(timestamp=[1450103400]),
            broken(timestamp=["soon", "later"]),
            broken(indicators={"quote": [{"open": [1.0, 2.0]}]}),
            broken(indicators={"quote": []}),
            split_of(numerator=0),
            split_of(denominator=0),
            split_of(numerator="four"),
            broken(events={"splits": [4]}),
        ],
    )
    def test_garbage(self, make: Make, answer: Said) -> None:
        with pytest.raises(BadAnswer, match="/v8/finance/chart/AAPL"):
            self.ask(make, answer)

    @pytest.mark.parametrize(
        "answer",
        [
            json_said(chart(Candles.empty(), "1d")),
            failed("Bad Request", "Data doesn't exist for startDate = 1, endDate = 2", 400),
        ],
    )
    def test_nothing_there(self, make: Make, answer: Said) -> None:
        assert len(self.ask(make, answer)) == 0

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (failed("Not Found", "No data found, symbol may be delisted", 200), UnknownSymbol),
            (failed("Internal", "try later", 200), TransientError),
            (failed("Unauthorized", "Invalid Crumb", 401), WrongKey),
            (failed("Bad Request", "Invalid input - interval=7m is not supported", 400), PermanentError),
            (Said(b"<html>Will be right back</html>", 404), PermanentError),
            (Said(b"<html>Will be right back</html>", 502), TransientError),
            (Said(b"Request denied", 999), TransientError),
            (Said(b"Too Many Requests\r\n", 429), RateLimited),
        ],
    )
    def test_errors(self, make: Make, answer: Said, kind: type[ProviderError]) -> None:
        with pytest.raises(kind) as caught:
            self.ask(make, answer)
        assert type(caught.value) is kind

    @pytest.mark.parametrize("path", [DATA / "wire/errors.jsonl", SHARED / "wire/errors.jsonl"])
    def test_recorded_answers(self, make: Make, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        expected: dict[str, type[ProviderError]] = {
            "bad symbol": UnknownSymbol,
            "too old": PermanentError,
            "1m span": PermanentError,
            "rate limit": RateLimited,
        }
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "yahoo"}
        assert set(cases) == set(expected)
        for name, kind in expected.items():
            case = cases[name]
            body = orjson.dumps(case["body"]) if "body" in case else case["body_text"].encode()
            with pytest.raises(kind) as caught:
                self.ask(make, Said(body, case["status"]))
            assert type(caught.value) is kind
