"""Yahoo's charts: split adjustment, stamps, missing bars, depth, and errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import pytest

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import Reason, verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.providers.base import (
    ActionSource,
    FetchResult,
    InvalidResponse,
    PermanentError,
    Provider,
    ProviderError,
    RateLimited,
    TooOld,
    TransientError,
    Transport,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster.providers.yfinance import symbol_of
from fks_backfill_dagster_tests.domain.builders import read_csv
from fks_backfill_dagster_tests.providers.conformance import ProviderConformance
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    candles_at,
    json_said,
    serve,
    span,
    us,
)

pytestmark = pytest.mark.server

DATA = Path(__file__).resolve().parents[1] / "data"
SHARED = Path(__file__).resolve().parents[2] / "../shared"
APPLE_SPLITS = {us("2014-06-09T13:30"): (7, 1), us("2020-08-31T13:30"): (4, 1)}
SECOND = 1_000_000
DERIVED = {Timeframe(name) for name in ("30m", "1h", "4h", "1w")}


def stock(timeframe: Timeframe, symbol: str = "AAPL") -> Series:
    return Series(symbol, timeframe, AssetClass.STOCKS)


def traded(timeframe: Timeframe, window: TimeRange) -> Candles:
    """The truth: valid candles at all expected opens, prices in cents."""
    made = candles_at(grid_of(stock(timeframe)).opens(window), "AAPL")
    cents = {price: np.round(getattr(made, price) * 1.37, 2) for price in PRICES}
    return replace(made, **cents, volume=np.rint(made.volume * 7 * 28 * 400))


def with_splits(candles: Candles, splits: Mapping[int, tuple[int, int]]) -> Candles:
    """The same market with these splits: prices before each split are of old shares."""
    old = np.ones(len(candles))
    for at, (new, shares) in splits.items():
        old[candles.ts < at // MICROS_PER_DAY * MICROS_PER_DAY] *= new / shares
    prices = {price: np.round(getattr(candles, price) * old, 2) for price in PRICES}
    return replace(candles, **prices, volume=np.rint(candles.volume / old))


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def good(answer: FetchResult, series: Series, window: TimeRange) -> Candles:
    """What the pipeline would store."""
    return verify(of(answer), window, grid_of(series), window.end).good


def session_opens(days: Candles) -> np.ndarray:
    """09:30 New York of each date."""
    halves = grid_of(stock(Timeframe.M30)).opens(
        TimeRange(int(days.ts[0]), int(days.ts[-1]) + MICROS_PER_DAY)
    )
    return halves[np.searchsorted(halves, days.ts)]


def chart(bars: Candles, interval: str, symbol: str = "AAPL", **meta: Any) -> dict[str, Any]:
    """A response without events. NaN becomes null."""
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


def failed(code: str, description: str, status: int) -> Scripted:
    error = {"code": code, "description": description}
    return json_said({"chart": {"result": None, "error": error}}, status)


@dataclass
class SmallYahoo:
    """Adjusts the truth by its splits except the `unapplied` ones, and refuses ranges beyond the depth."""

    truth: Mapping[str, Candles]
    now: int
    splits: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    float32: bool = False
    unapplied: frozenset[int] = frozenset()
    change: Callable[[dict[str, Any]], dict[str, Any]] = lambda honest: honest

    def __call__(self, asked: Received) -> Scripted:
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
            if at <= self.now and at not in self.unapplied:
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

    def market(self, asked: Received) -> Scripted:
        return self.honest(asked)

    def paged(self) -> tuple[Series, TimeRange]:
        return stock(Timeframe.M1), span("2024-05-13", "2024-06-05")

    def disguised(self, asked: Received) -> Scripted:
        made = orjson.loads(self.honest(asked).body)
        quote = made["chart"]["result"][0]["indicators"]["quote"][0]
        for price in PRICES:
            quote[price] = [value * 3 for value in quote[price]]
        return json_said(made)

    def unknown(self, asked: Received) -> Scripted:
        return failed("Not Found", "No data found, symbol may be delisted", 404)

    def window(self, series: Series) -> TimeRange:
        return span("2024-05-13", "2024-05-25" if series.timeframe.minutes >= 240 else "2024-05-15")


def always(answer: Scripted) -> Callable[[Received], Scripted]:
    return lambda _: answer


def clock_at(now: int) -> dict[str, Any]:
    return {"clock": lambda: now, "requests_per_minute": 10_000}


class TestSplits:
    @pytest.mark.parametrize("float32", [True, False])
    @pytest.mark.parametrize("window", [span("2014-05-26", "2014-06-21"), span("2020-08-24", "2020-09-05")])
    def test_days_are_as_traded(self, make: Make, window: TimeRange, float32: bool) -> None:
        now = us("2020-12-01T12:00")
        truth = with_splits(traded(Timeframe.D1, span("2014-01-01", "2020-12-01")), APPLE_SPLITS)
        with serve(SmallYahoo({"1d": truth}, now, APPLE_SPLITS, float32)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window)
            assert len(server.requests) == answer.requests == 1
            assert int(server.requests[0].query["period2"]) * SECOND == now, "later splits are requested"
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
        splits = {at: ratio for at, ratio in APPLE_SPLITS.items() if at < now}
        truth = with_splits(traded(kind, TimeRange(window.start, now)), splits)
        with serve(SmallYahoo({symbol: truth}, now, splits, float32=True)) as server:
            provider = make("yfinance", server.url, **clock_at(now))
            answer = provider.fetch(stock(kind), window)
            assert answer.requests == len(server.requests) == (4 if kind is Timeframe.M1 else 1)
            assert provider.estimate(stock(kind), window).requests == answer.requests
        assert of(answer).equals(truth.within(window))

    def test_a_reverse_split(self, make: Make) -> None:
        now, window = us("2014-06-20T12:00"), span("2014-06-02", "2014-06-12")
        splits = {us("2014-06-09T13:30"): (1, 10)}
        truth = with_splits(traded(Timeframe.D1, window), splits)
        with serve(SmallYahoo({"1d": truth}, now, splits)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.D1), window)
        assert of(answer).equals(truth)

    @pytest.mark.parametrize("kind", [Timeframe.D1, Timeframe.M15, Timeframe.M5])
    @pytest.mark.parametrize("ratio", [(7, 1), (1, 10), (1, 190)])
    def test_a_split_that_is_listed_but_not_applied(
        self, make: Make, kind: Timeframe, ratio: tuple[int, int]
    ) -> None:
        now, window, at = us("2014-06-20T20:30"), span("2014-05-28", "2014-06-14"), us("2014-06-09T13:30")
        truth = with_splits(traded(kind, TimeRange(window.start, now)), {at: ratio})
        market = SmallYahoo({kind.value: truth}, now, {at: ratio}, float32=True, unapplied=frozenset({at}))
        with serve(market) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(stock(kind), window)
        assert of(answer).equals(truth.within(window))

    def test_the_case_of_a_canadian_share(self, make: Make) -> None:
        """1:190 on 2024-03-22, listed but not applied; prices of a real chart (yfinance issue 2002)."""
        days = [18, 19, 20, 21, 22, 25, 26, 27]
        close = [0.021, 0.02, 0.021, 0.019, 2.51, 1.96, 1.75, 1.57]
        open_ = [0.022, 0.021, 0.024, 0.021, 2.5, 2.31, 1.96, 1.75]
        columns = [np.array(column, dtype=np.float32).astype(np.float64) for column in (open_, close)]
        high, low = np.maximum(*columns), np.minimum(*columns)
        ts = np.array([us(f"2024-03-{day}T13:30") for day in days])
        bars = Candles(ts, columns[0], high, low, columns[1], np.arange(8, dtype=np.float64) + 1e6)
        made = chart(bars, "1d")
        split = {"date": int(ts[4]) // SECOND, "numerator": 1.0, "denominator": 190.0}
        made["chart"]["result"][0]["events"] = {"splits": {"1711114200": split}}
        with serve(lambda _: json_said(made)) as server:
            provider = make("yfinance", server.url, **clock_at(us("2024-03-29")))
            got = of(provider.fetch(stock(Timeframe.D1), span("2024-03-18", "2024-03-28")))
        assert got.close.tolist() == close
        assert got.volume.tolist() == bars.volume.tolist()
        assert got.ts.tolist() == [us(f"2024-03-{day}") for day in days]

    def test_candles_before_an_undecided_split_are_declined(self, make: Make) -> None:
        """A split of today before any trade: earlier prices may be adjusted or not."""
        now, at = us("2014-06-09T13:31"), us("2014-06-09T13:30")
        truth = with_splits(traded(Timeframe.D1, span("2014-05-01", "2014-06-20")), {at: (2, 1)})
        for price in PRICES:
            getattr(truth, price)[:] = getattr(truth, price) + 0.0037  # off whole cents, which would decide
        market = SmallYahoo({"1d": truth.take(truth.ts < us("2014-06-09"))}, now, {at: (2, 1)})
        with serve(market) as server:
            provider = make("yfinance", server.url, **clock_at(now))
            with pytest.raises(TooOld, match=r"AAPL before 2014-06-0.* split of 2:1 on 2014-06-09") as caught:
                provider.fetch(stock(Timeframe.D1), span("2014-05-20", "2014-06-10"))
            assert us("2014-06-06") < caught.value.since <= us("2014-06-09")
            newer = provider.fetch(stock(Timeframe.D1), TimeRange(caught.value.since, us("2014-06-10")))
            assert newer.deliveries == ()

    def test_candles_after_an_undecided_split_are_delivered(self, make: Make) -> None:
        now, at = us("2014-07-20T12:00"), us("2014-06-09T13:30")
        truth = with_splits(traded(Timeframe.D1, span("2014-05-01", "2014-07-18")), {at: (105, 100)})
        for price in PRICES:
            getattr(truth, price)[:] = getattr(truth, price) + 0.0037
        with serve(SmallYahoo({"1d": truth}, now, {at: (105, 100)})) as server:
            provider = make("yfinance", server.url, **clock_at(now))
            with pytest.raises(TooOld, match=r"split of 1\.05:1") as caught:
                provider.fetch(stock(Timeframe.D1), span("2014-05-20", "2014-07-01"))
            assert caught.value.since == us("2014-06-09")
            window = TimeRange(caught.value.since, us("2014-07-01"))
            got = of(provider.fetch(stock(Timeframe.D1), window))
        np.testing.assert_allclose(got.close, truth.within(window).close, rtol=1e-12)
        assert np.array_equal(got.ts, truth.within(window).ts)

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


class TestNative:
    """Only native timeframes are fetched; the pipeline derives the others."""

    @pytest.mark.parametrize(("name", "parts"), [("30m", "15m"), ("1h", "15m"), ("4h", "15m"), ("1w", "1d")])
    def test_derived_timeframes_are_declined(self, make: Make, name: str, parts: str) -> None:
        provider = make("yfinance", "http://127.0.0.1:1", **clock_at(us("2015-12-31T12:00")))
        assert provider.capabilities.parts(stock(Timeframe(name))) is Timeframe(parts)
        with pytest.raises(PermanentError, match=f"its {name} candles are derived from {parts}"):
            provider.fetch(stock(Timeframe(name)), span("2015-12-21", "2015-12-29"))

    @pytest.mark.parametrize("name", ["1m", "5m", "15m", "1d"])
    def test_native_timeframes_are_delivered(self, make: Make, name: str) -> None:
        now, window, series = us("2015-12-31T12:00"), span("2015-12-21", "2015-12-30"), stock(Timeframe(name))
        truth = traded(Timeframe(name), TimeRange(window.start, now))
        with serve(SmallYahoo({name: truth}, now)) as server:
            answer = make("yfinance", server.url, **clock_at(now)).fetch(series, window)
        assert of(answer).equals(truth.within(window))
        origin = answer.deliveries[0].origin
        assert (origin.transport, origin.host, origin.instrument, origin.requested_at) == (
            Transport.REST,
            server.url,
            "AAPL",
            now,
        )
        assert f"interval={name}" in origin.source

    def test_null_bars_are_left_out(self, make: Make) -> None:
        now, window = us("2015-12-31T12:00"), span("2015-12-22", "2015-12-23")
        truth = traded(Timeframe.M15, window)
        hole = truth.ts == us("2015-12-22T16:15")
        holey = Candles(truth.ts, *(np.where(hole, np.nan, column) for column in truth.columns()[1:]))
        with serve(SmallYahoo({"15m": holey}, now)) as server:
            quarters = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.M15), window))
        assert quarters.equals(truth.take(~hole))


class TestBars:
    def test_forming_and_live_bars(self, make: Make) -> None:
        """At 15:07 the bars of 15:05 and of the last trade are not closed."""
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

    def test_a_live_bar_on_the_grid(self, make: Make) -> None:
        now, window = us("2015-12-22T15:20"), span("2015-12-22", "2015-12-23")
        bars = traded(Timeframe.M5, window).within(TimeRange(window.start, us("2015-12-22T15:10")))
        last = us("2015-12-22T15:05") // SECOND  # halted since
        with serve(lambda _: json_said(chart(bars, "5m", regularMarketTime=last))) as server:
            got = of(make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.M5), window))
        assert got.equals(bars.take(slice(0, -1)))

    @pytest.mark.parametrize(("now", "last"), [("20:30", "2015-12-22"), ("19:30", "2015-12-21")])
    def test_a_day_with_two_bars(self, make: Make, now: str, last: str) -> None:
        at, window = us(f"2015-12-22T{now}") + MICROS_PER_HOUR, span("2015-12-14", "2015-12-24")
        truth = traded(Timeframe.D1, span("2015-12-14", "2015-12-23"))
        stamped = replace(truth, ts=session_opens(truth))
        older = candles_at(stamped.ts[-1:], "OLD")
        newest = replace(truth.take(slice(-1, None)), ts=np.array([at - 5 * SECOND]))
        bars = Candles.concat([stamped.take(slice(0, -1)), older, newest])
        with serve(lambda _: json_said(chart(bars, "1d"))) as server:
            got = of(make("yfinance", server.url, **clock_at(at)).fetch(stock(Timeframe.D1), window))
        assert got.equals(truth.within(TimeRange(window.start, us(last) + 1)))

    def test_a_bar_with_a_single_null_is_rejected(self, make: Make) -> None:
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


class TestSessions:
    """Days stamped at the open, at midnight, or an hour before it, and bars that fit no session."""

    def days(self, make: Make, stamps: list[str], calendar: str, zone: str, **meta: Any) -> Candles:
        bars = candles_at(np.array([us(stamp) for stamp in stamps]), "X")
        answer = chart(bars, "1d", "X", exchangeTimezoneName=zone, **meta)
        series = Series("X", Timeframe.D1, AssetClass.STOCKS, calendar)
        with serve(lambda _: json_said(answer)) as server:
            provider = make("yfinance", server.url, **clock_at(us("2022-02-01T12:00")))
            return of(provider.fetch(series, span("2022-01-03", "2022-01-13")))

    def test_the_evening_before(self, make: Make) -> None:
        """Sao Paulo, 23:00 of the evening before, Sundays too."""
        stamps = [f"2022-01-{day:02}T02:00" for day in (3, 4, 5, 6, 7, 10, 11, 12)]
        got = self.days(make, stamps, "BVMF", "America/Sao_Paulo")
        assert got.ts.tolist() == [us(stamp[:10]) for stamp in stamps]

    def test_a_bar_of_no_session_is_quarantined(self, make: Make) -> None:
        stamps = ["2022-01-03T14:30", "2022-01-08T14:30", "2022-01-10T14:30"]  # a Saturday between
        got = self.days(make, stamps, "XNYS", "America/New_York")
        assert got.ts.tolist() == [us("2022-01-03"), us("2022-01-08T14:30"), us("2022-01-10")]

    def test_two_bars_of_one_session_are_a_conflict(self, make: Make) -> None:
        stamps = ["2022-01-04T02:00", "2022-01-04T13:00", "2022-01-05T13:00"]
        got = self.days(make, stamps, "BVMF", "America/Sao_Paulo")
        assert got.ts.tolist() == [us("2022-01-04"), us("2022-01-04"), us("2022-01-05")]
        series = Series("X", Timeframe.D1, AssetClass.STOCKS, "BVMF")
        verdict = verify(got, span("2022-01-03", "2022-01-13"), grid_of(series), us("2022-01-20"))
        assert [(part.reason, len(part.candles)) for part in verdict.rejected] == [(Reason.CONFLICT, 2)]

    @pytest.mark.parametrize(("last", "kept"), [(None, 2), ("2022-01-05T13:07:11", 1)])
    def test_the_last_trade_replaces_the_bar_of_the_evening_before(
        self, make: Make, last: str | None, kept: int
    ) -> None:
        stamps = ["2022-01-04T02:00", "2022-01-05T02:00", "2022-01-05T13:07:11"]
        known = {"regularMarketTime": us(last) // SECOND} if last else {}
        got = self.days(make, stamps, "BVMF", "America/Sao_Paulo", **known)
        assert got.ts.tolist() == [us("2022-01-04")] + kept * [us("2022-01-05")]


class TestDepth:
    NOW = us("2015-12-31T12:00")

    @pytest.mark.parametrize(("interval", "days"), [("1m", 30), ("5m", 60), ("15m", 60)])
    def test_requests_are_limited_to_the_depth(self, make: Make, interval: str, days: int) -> None:
        timeframe, window = Timeframe(interval), span("2015-09-01", "2015-12-30")
        truth = traded(timeframe, window)
        with serve(SmallYahoo({interval: truth}, self.NOW)) as server:
            provider = make("yfinance", server.url, **clock_at(self.NOW))
            got = of(provider.fetch(stock(timeframe), window))
        reach = provider.capabilities.reach(timeframe, self.NOW)
        assert reach is not None
        assert 0 < reach - (self.NOW - days * MICROS_PER_DAY) <= MICROS_PER_HOUR
        assert got.equals(truth.take(truth.ts >= reach))

    def test_no_request_beyond_the_depth(self, make: Make) -> None:
        provider = make("yfinance", "http://127.0.0.1:1", **clock_at(self.NOW))
        for timeframe in (Timeframe.M1, Timeframe.M15):
            assert provider.fetch(stock(timeframe), span("2015-09-01", "2015-09-30")) == FetchResult(())
            assert provider.estimate(stock(timeframe), span("2015-09-01", "2015-09-30")).requests == 0
        for window in (span("2015-09-01", "2015-09-01"), span("2016-01-04", "2016-01-09")):
            assert provider.fetch(stock(Timeframe.D1), window) == FetchResult(())

    def test_capabilities(self, make: Make) -> None:
        provider = make("yfinance", "http://127.0.0.1:1")
        assert provider.capabilities.timeframes == {AssetClass.STOCKS: frozenset(Timeframe)}
        assert provider.capabilities.reach(Timeframe.D1, self.NOW) is None
        assert provider.missing_key() is None
        with pytest.raises(PermanentError, match="it has no 1d candles of crypto"):
            provider.fetch(
                Series("BTC/USDT", Timeframe.D1, AssetClass.CRYPTO), span("2015-12-01", "2015-12-02")
            )


class TestRequests:
    def test_pages_have_seams(self, make: Make) -> None:
        now, window = us("2015-12-31T12:00"), span("2015-12-02", "2015-12-31")
        truth = traded(Timeframe.M1, window)
        with serve(SmallYahoo({"1m": truth}, now)) as server:
            (delivery,) = (
                make("yfinance", server.url, **clock_at(now)).fetch(stock(Timeframe.M1), window).deliveries
            )
        starts = sorted(int(asked.query["period1"]) * SECOND for asked in server.requests)[1:]
        assert delivery.seams.tolist() == truth.ts[np.searchsorted(truth.ts, starts)].tolist()
        assert len(starts) == 4

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
        claims = [(345479400, us("1980-12-12T14:30")), (None, None)]
        claims += [(us("2015-12-14T14:30") // SECOND, us("2015-12-14T14:30"))]  # the day of its first bar
        claims += [(us("2015-12-16T14:30") // SECOND, None)]  # contradicted by the bar of the 14th
        for known, expected in claims:
            answer = json_said(chart(days, "1d", firstTradeDate=known))
            with serve(always(answer)) as server:
                assert make("yfinance", server.url).listed_at(stock(Timeframe.H1)) == expected
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


def broken(**changes: Any) -> Scripted:
    made = chart(DAYS, "1d")
    made["chart"]["result"][0].update(changes)
    return json_said(made)


def split_of(**split: Any) -> Scripted:
    return broken(events={"splits": {"1": {"date": 1450103400, "numerator": 4, "denominator": 1, **split}}})


class TestResponses:
    NOW = us("2015-12-31T12:00")

    def fetch(self, make: Make, answer: Scripted) -> Candles:
        with serve(lambda _: answer) as server:
            provider = make("yfinance", server.url, **clock_at(self.NOW), retry_budget_seconds=0.0)
            return of(provider.fetch(stock(Timeframe.D1), WINDOW))

    @pytest.mark.parametrize(
        "answer",
        [
            Scripted(b"<html>will be right back</html>"),
            Scripted(b'{"chart": {"result": [{"meta"'),
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
    def test_garbage(self, make: Make, answer: Scripted) -> None:
        with pytest.raises(InvalidResponse, match="/v8/finance/chart/AAPL"):
            self.fetch(make, answer)

    @pytest.mark.parametrize(
        "answer",
        [
            json_said(chart(Candles.empty(), "1d")),
            failed("Bad Request", "Data doesn't exist for startDate = 1, endDate = 2", 400),
        ],
    )
    def test_no_bars(self, make: Make, answer: Scripted) -> None:
        assert len(self.fetch(make, answer)) == 0

    @pytest.mark.parametrize(
        ("answer", "kind"),
        [
            (failed("Not Found", "No data found, symbol may be delisted", 200), UnknownSymbol),
            (failed("Internal", "try later", 200), TransientError),
            (failed("Unauthorized", "Invalid Crumb", 401), WrongKey),
            (failed("Bad Request", "Invalid input - interval=7m is not supported", 400), PermanentError),
            (Scripted(b"<html>Will be right back</html>", 404), PermanentError),
            (Scripted(b"<html>Will be right back</html>", 502), TransientError),
            (Scripted(b"Request denied", 999), TransientError),
            (Scripted(b"Too Many Requests\r\n", 429), RateLimited),
        ],
    )
    def test_errors(self, make: Make, answer: Scripted, kind: type[ProviderError]) -> None:
        with pytest.raises(kind) as caught:
            self.fetch(make, answer)
        assert type(caught.value) is kind

    @pytest.mark.parametrize("path", [DATA / "wire/errors.jsonl", SHARED / "wire/errors.jsonl"])
    def test_recorded_responses(self, make: Make, path: Path) -> None:
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
                self.fetch(make, Scripted(body, case["status"]))
            assert type(caught.value) is kind


def actions_of(provider: Provider, timeframe: Timeframe = Timeframe.D1) -> ReportedActions:
    assert isinstance(provider, ActionSource)
    return provider.fetch_actions(stock(timeframe))


class TestActions:
    """The splits in the events of a chart, as actions."""

    def test_the_splits_of_a_fetch_are_part_of_its_result(self, make: Make) -> None:
        """Those that Yahoo has not applied to its prices as well, and none of a later date than now."""
        window, now = span("2014-05-01", "2014-07-01"), us("2020-12-01")
        truth = with_splits(traded(Timeframe.D1, TimeRange(window.start, now)), APPLE_SPLITS)
        with serve(SmallYahoo({"1d": truth}, now, APPLE_SPLITS)) as server:
            answer = make("yfinance", server.url, clock=lambda: now).fetch(stock(Timeframe.D1), window)
        assert answer.actions is not None
        assert [(one.symbol, str(one.ex_date), one.ratio) for one in answer.actions.actions] == [
            ("AAPL", "2014-06-09", 7),
            ("AAPL", "2020-08-31", 4),
        ]
        assert (answer.actions.provider, answer.actions.fetched_at) == ("yfinance", now)

    def test_the_whole_history_on_request(self, make: Make) -> None:
        now = us("2020-12-01")
        truth = with_splits(traded(Timeframe.D1, span("2014-05-01", "2020-12-01")), APPLE_SPLITS)
        with serve(SmallYahoo({"1d": truth}, now, APPLE_SPLITS)) as server:
            found = actions_of(make("yfinance", server.url, clock=lambda: now), Timeframe.H1)
            (request,) = server.requests
        assert (request.query["period1"], request.query["interval"]) == ("0", "1d")
        assert [(str(one.ex_date), one.ratio) for one in found.actions] == [
            ("2014-06-09", 7),
            ("2020-08-31", 4),
        ]
        assert found.refused == ()

    @pytest.mark.parametrize(
        ("split", "reason"),
        [
            ({"numerator": 0}, "ratio 0 is not the new shares per old share"),
            ({"numerator": -4}, "ratio -4 is not"),
            ({"denominator": 0}, "a split of another shape"),
            ({"numerator": "four"}, "could not convert string to float"),
            ({"date": None}, "a split of another shape"),
        ],
    )
    def test_a_bad_split_is_refused_and_the_good_one_kept(
        self, make: Make, split: dict[str, Any], reason: str
    ) -> None:
        good = {"date": us("2014-06-09T13:30") // SECOND, "numerator": 7, "denominator": 1}
        bad = {"date": us("2020-08-31T13:30") // SECOND, "numerator": 4, "denominator": 1, **split}
        document = chart(traded(Timeframe.D1, span("2014-06-01", "2014-07-01")), "1d")
        document["chart"]["result"][0]["events"] = {"splits": {"1": bad, "2": good}}
        with serve(lambda _: json_said(document)) as server:
            found = actions_of(make("yfinance", server.url, clock=lambda: us("2021-01-01")))
        assert [(str(one.ex_date), one.ratio) for one in found.actions] == [("2014-06-09", 7)]
        (refused,) = found.refused
        assert refused.startswith("yfinance: AAPL: ")
        assert reason in refused

    def test_another_symbol_and_an_unknown_one(self, make: Make) -> None:
        other = chart(traded(Timeframe.D1, span("2014-06-01", "2014-07-01")), "1d", symbol="MSFT")
        with (
            serve(lambda _: json_said(other)) as server,
            pytest.raises(InvalidResponse, match="another symbol"),
        ):
            actions_of(make("yfinance", server.url, retry_budget_seconds=0))
        unknown = failed("Not Found", "No data found, symbol may be delisted", 404)
        with serve(lambda _: unknown) as server, pytest.raises(UnknownSymbol):
            actions_of(make("yfinance", server.url))

    def test_the_recorded_split_of_apple(self, make: Make) -> None:
        """4:1 on 2020-08-31, from a real response; the tests above have events of the same form."""
        file = SHARED / "wire/recordings/yahoo/chart-AAPL-2020-08-31-to-2020-11-07.json"
        if not file.exists():
            pytest.skip("real candles are not here")
        document = orjson.loads(file.read_bytes())["response"]["bodyJson"]
        with serve(lambda _: json_said(document)) as server:
            found = actions_of(make("yfinance", server.url, clock=lambda: us("2021-01-01")))
        assert [(str(one.ex_date), one.ratio) for one in found.actions] == [("2020-08-31", 4)]
