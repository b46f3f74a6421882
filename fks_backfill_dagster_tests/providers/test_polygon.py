"""Polygon's aggregates: tickers, pages, derived timeframes, the key, and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import Reason, verify
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.known_providers import POLYGON
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    NotEntitled,
    PermanentError,
    ProviderError,
    RateLimited,
    TooOld,
    TransientError,
    Transport,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster.providers.pages import next_page
from fks_backfill_dagster.providers.polygon import ticker_of
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.markets import new_york_midnight
from fks_backfill_dagster_tests.providers.scripted import (
    NO_OUTAGE,
    Received,
    Scripted,
    candles_at,
    crypto,
    json_said,
    serve,
    span,
    us,
)

pytestmark = pytest.mark.server

KEY = "sEcReT-polygon-key"
WINDOW = span("2024-03-01", "2024-03-01T02:00")
WIRE = Path(__file__).resolve().parents[1] / "data/wire/errors.jsonl"
SHARED_WIRE = Path(__file__).resolve().parents[2] / "../shared/wire/errors.jsonl"


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def bars(candles: Candles) -> list[dict[str, float]]:
    keys = ("t", "o", "h", "l", "c", "v")
    columns = [(candles.ts // 1000).tolist(), *(column.tolist() for column in candles.columns()[1:])]
    return [{**dict(zip(keys, row, strict=True)), "vw": 1.0, "n": 3} for row in zip(*columns, strict=True)]


def document(results: list[Any], ticker: str = "X:BTCUSD", **more: Any) -> dict[str, Any]:
    return {"ticker": ticker, "status": "OK", "resultsCount": len(results), "results": results, **more}


def always(answer: Scripted) -> Callable[[Received], Scripted]:
    return lambda _: answer


class SmallPolygon:
    """Honest minutes from 30 before to 30 after the requested range, in pages of 50 bars."""

    page = 50

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda honest: honest) -> None:
        self.change = change
        self.url = ""

    def __call__(self, asked: Received) -> Scripted:
        *_, ticker, _, multiplier, span_name, first, last = asked.path.split("/")
        assert (multiplier, span_name) == ("1", "minute")
        minute = 60_000_000
        everything = np.arange(int(first) * 1000 - 30 * minute, int(last) * 1000 + 30 * minute, minute)
        offset = int(asked.query.get("cursor", 0))
        results = bars(candles_at(everything[offset : offset + self.page], ticker))
        made = document(results, ticker)
        if offset + self.page < len(everything):
            made["next_url"] = f"{self.url}{asked.path}?cursor={offset + self.page}"
        return json_said(self.change(made))


class TestHonest:
    def test_pages_are_followed_within_the_window(self, make: Make) -> None:
        market = SmallPolygon()
        with serve(market) as server:
            market.url = server.url
            answer = make("polygon", server.url, key=KEY, requests_per_minute=1000).fetch(crypto(), WINDOW)
        assert of(answer).equals(candles_at(np.arange(WINDOW.start, WINDOW.end, 60_000_000), "X:BTCUSD"))
        assert answer.requests == len(server.requests) == 4
        first = server.requests[0]
        assert first.path == "/v2/aggs/ticker/X:BTCUSD/range/1/minute/1709251200000/1709258399999"
        assert first.query == {"adjusted": "false", "sort": "asc", "limit": "50000"}
        assert {asked.headers["Authorization"] for asked in server.requests} == {f"Bearer {KEY}"}
        assert KEY not in answer.deliveries[0].origin.source
        # Pages of 50 bars, starting half an hour before the window: the first one has 20 minutes of it.
        assert ((answer.deliveries[0].seams - WINDOW.start) // 60_000_000).tolist() == [20, 70]

    @pytest.mark.parametrize("status", ["OK", "DELAYED"])
    def test_no_bars(self, make: Make, status: str) -> None:
        empty = {
            "ticker": "X:BTCUSD",
            "queryCount": 0,
            "resultsCount": 0,
            "adjusted": False,
            "status": status,
        }
        with serve(lambda _: json_said(empty)) as server:
            answer = make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW)
        assert (answer.deliveries, answer.requests) == ((), 1)

    def test_a_missing_price_becomes_nan(self, make: Make) -> None:
        row = {"t": WINDOW.start // 1000, "o": 1, "h": 2, "l": 1, "v": 3}
        with serve(lambda _: json_said(document([row]))) as server:
            got = of(make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW))
        assert np.isnan(got.close[0])
        assert (got.open[0], got.volume[0]) == (1.0, 3.0)

    def test_the_forming_bar_is_left_out(self, make: Make) -> None:
        window = span("2199-01-01", "2199-01-02")
        rows = bars(candles_at(np.array([window.start]), "X"))
        with serve(lambda _: json_said(document(rows))) as server:
            assert make("polygon", server.url, key=KEY).fetch(crypto(), window).deliveries == ()

    def test_estimate(self, make: Make) -> None:
        provider = make("polygon", "http://127.0.0.1:1", key=KEY)
        estimate = provider.estimate(crypto(), span("2024-01-01", "2024-04-01"))
        assert (estimate.requests, estimate.seconds) == (3, 36.0)

    def test_capabilities(self, make: Make) -> None:
        capabilities = make("polygon", "http://127.0.0.1:1").capabilities
        assert capabilities.timeframes == dict.fromkeys(AssetClass, frozenset(Timeframe))
        assert capabilities.omits_no_trade
        assert not capabilities.adjusted

    def test_the_free_plan_publishes_at_the_end_of_the_day(self, make: Make) -> None:
        def delay(**given: int) -> int:
            return make("polygon", "http://127.0.0.1:1", **given).capabilities.publication_delay

        assert delay() == delay(requests_per_minute=5) == 29 * MICROS_PER_HOUR
        assert delay(requests_per_minute=100) == 0


@pytest.mark.parametrize(
    ("symbol", "ticker"),
    [("BTC/USDT", "X:BTCUSD"), ("BTC/USDC", "X:BTCUSD"), ("BTC/USD", "X:BTCUSD"), ("ETH/BTC", "X:ETHBTC")],
)
def test_tickers(symbol: str, ticker: str) -> None:
    assert ticker_of(crypto(symbol=symbol)) == ticker


def test_tickers_of_other_classes() -> None:
    assert ticker_of(Series("BRK.B", Timeframe.M1, STOCKS)) == "BRK.B"
    assert ticker_of(Series("EUR/USD", Timeframe.M1, FOREX)) == "C:EURUSD"
    with pytest.raises(UnknownSymbol, match="provider_symbols"):
        ticker_of(Series("EURUSD", Timeframe.M1, FOREX))


def test_tickers_by_name() -> None:
    named = Series("BTC", Timeframe.M1, AssetClass.CRYPTO, provider_symbols=(("polygon", "X:XBTUSD"),))
    assert ticker_of(named) == "X:XBTUSD"
    with pytest.raises(UnknownSymbol, match="provider_symbols"):
        ticker_of(crypto(symbol="BTC"))


def series(asset_class: AssetClass, timeframe: Timeframe) -> Series:
    symbol = {AssetClass.CRYPTO: "BTC/USDT", AssetClass.STOCKS: "AAPL", AssetClass.FOREX: "EUR/USD"}
    return Series(symbol[asset_class], timeframe, asset_class)


@dataclass
class WholeMarket:
    """Bars on all clock intervals, also outside the session; days of stocks at 00:00 New York, weekends too.

    Bars outside the session are marked by a high of 9999. stamp: may move the stamps of days.
    """

    of: Series
    quiet: RangeSet = NO_OUTAGE
    refuse: Callable[[TimeRange], Scripted | None] = lambda _: None
    stamp: Callable[[int], int] = new_york_midnight

    def __call__(self, asked: Received) -> Scripted:
        *_, ticker, _, multiplier, span_name, first, last = asked.path.split("/")
        step = int(multiplier) * {"minute": 60, "hour": 3600, "day": 86400}[span_name] * 1_000_000
        window = TimeRange(int(first) * 1000, int(last) * 1000 + 1)
        refused = self.refuse(window)
        if refused:
            return refused
        opens = np.arange(-(-window.start // step) * step - step, window.end, step)
        made = self.bars(opens, Timeframe(_NAMES[step]))
        if self.of.asset_class is STOCKS and span_name == "day":
            made = replace(made, ts=np.array([self.stamp(at) for at in made.ts.tolist()]))
        return json_said(document(bars(made.within(window)), ticker))

    def bars(self, opens: np.ndarray, timeframe: Timeframe) -> Candles:
        made = candles_at(opens, self.of.symbol)
        inside = grid_of(replace(self.of, timeframe=timeframe)).contains(made.ts)
        return replace(made, high=np.where(inside, made.high, 9999.0))


_NAMES = {timeframe.micros: timeframe.value for timeframe in Timeframe}
CRYPTO, STOCKS, FOREX = AssetClass
HALF_DAY = span("2015-12-21", "2015-12-29")  # the 24th ends at 13:00 New York, the 25th is a holiday
SPRING = span("2015-03-02", "2015-03-16")  # daylight saving time from the 8th on


DERIVED = [
    (CRYPTO, "4h", "1h"),
    (CRYPTO, "1w", "1d"),
    (STOCKS, "1h", "30m"),
    (STOCKS, "4h", "30m"),
    (STOCKS, "1w", "1d"),
    (FOREX, "4h", "1h"),
    (FOREX, "1d", "1h"),
    (FOREX, "1w", "1h"),
]


class TestNative:
    @pytest.mark.parametrize(("asset_class", "timeframe", "parts"), DERIVED)
    def test_derived_timeframes_are_declined(
        self, make: Make, asset_class: AssetClass, timeframe: str, parts: str
    ) -> None:
        provider, asked = (
            make("polygon", "http://127.0.0.1:1", key=KEY),
            series(asset_class, Timeframe(timeframe)),
        )
        assert provider.capabilities.parts(asked) is Timeframe(parts)
        with pytest.raises(PermanentError, match=f"its {timeframe} candles are derived from {parts}"):
            provider.fetch(asked, HALF_DAY)

    def test_other_timeframes_are_native(self, make: Make) -> None:
        can = make("polygon", "http://127.0.0.1:1", key=KEY).capabilities
        derived = {(asset_class, Timeframe(name)) for asset_class, name, _ in DERIVED}
        for asset_class, timeframes in can.timeframes.items():
            for timeframe in timeframes:
                is_native = can.parts(series(asset_class, timeframe)) is timeframe
                assert is_native is ((asset_class, timeframe) not in derived)

    @pytest.mark.parametrize("timeframe", ["1m", "5m", "15m", "30m"])
    def test_minutes_of_stocks(self, make: Make, timeframe: str) -> None:
        asked = series(STOCKS, Timeframe(timeframe))
        window = span("2015-12-24", "2015-12-25")
        market = WholeMarket(asked)
        with serve(market) as server:
            answer = make("polygon", server.url, key=KEY).fetch(asked, window)
        good = verify(of(answer), window, grid_of(asked), window.end).good
        assert good.equals(market.bars(grid_of(asked).opens(window), Timeframe(timeframe)))
        assert len(good) == 210 // Timeframe(timeframe).minutes
        assert answer.deliveries[0].origin.transport is Transport.REST

    @pytest.mark.parametrize("timeframe", ["1m", "1h"])
    def test_forex_has_no_volume(self, make: Make, timeframe: str) -> None:
        asked = series(FOREX, Timeframe(timeframe))
        with serve(WholeMarket(asked)) as server:
            got = of(make("polygon", server.url, key=KEY).fetch(asked, span("2015-12-22", "2015-12-23")))
            assert "/ticker/C:EURUSD/" in server.requests[0].path
        assert len(got) == 1440 // Timeframe(timeframe).minutes
        assert np.isnan(got.volume).all()

    def test_estimates_count_base_bars(self, make: Make) -> None:
        provider, year = make("polygon", "http://127.0.0.1:1", key=KEY), span("2015-01-01", "2016-01-01")
        requests = {
            (asset_class.value, name): provider.estimate(series(asset_class, Timeframe(name)), year).requests
            for asset_class, name in [
                (CRYPTO, "1h"),
                (CRYPTO, "1d"),
                (STOCKS, "30m"),
                (STOCKS, "1d"),
                (FOREX, "1h"),
            ]
        }
        assert requests == {
            ("crypto", "1h"): 11,
            ("crypto", "1d"): 1,
            ("stocks", "30m"): 6,
            ("stocks", "1d"): 1,
            ("forex", "1h"): 8,
        }


class TestDaysOfStocks:
    """The official daily bar, stamped 00:00 New York: moved to its session's date, or quarantined."""

    days = series(STOCKS, Timeframe.D1)

    @pytest.mark.parametrize("window", [HALF_DAY, SPRING, span("2015-10-26", "2015-11-09")])
    def test_are_native(self, make: Make, window: TimeRange) -> None:
        market = WholeMarket(self.days)
        with serve(market) as server:
            answer = make("polygon", server.url, key=KEY).fetch(self.days, window)
            (asked,) = server.requests
        verdict = verify(of(answer), window, grid_of(self.days), window.end)
        truth = candles_at(grid_of(self.days).opens(window), "AAPL")
        assert verdict.good.equals(truth)
        assert {part.reason for part in verdict.rejected} == {Reason.OFF_GRID}, "weekends fit no session"
        first, last = (
            new_york_midnight(int(at)) // 1000 for at in (window.start, window.end - MICROS_PER_DAY)
        )
        assert asked.path.startswith(f"/v2/aggs/ticker/AAPL/range/1/day/{first}/")
        assert last <= int(asked.path.rsplit("/", 1)[1]) < last + 86_400_000
        origin = answer.deliveries[0].origin
        assert (origin.transport, origin.host, origin.source.partition("?")[0]) == (
            Transport.REST,
            server.url,
            asked.path,
        )

    def test_eleven_years_are_one_request(self, make: Make) -> None:
        window = span("2015-01-01", "2026-11-01")
        with serve(WholeMarket(self.days)) as server:
            provider = make("polygon", server.url, key=KEY, clock=lambda: us("2026-11-02T03:00"))
            estimate, answer = provider.estimate(self.days, window), provider.fetch(self.days, window)
        assert (estimate.requests, answer.requests, len(server.requests)) == (1, 1, 1)
        assert provider.capabilities.page(Timeframe.D1) > grid_of(self.days).count(window)
        good = verify(of(answer), window, grid_of(self.days), window.end).good
        assert np.array_equal(good.ts, grid_of(self.days).opens(window))
        assert len(good) > 2900

    @pytest.mark.parametrize("hours", [-1, 1, 9.5, -4, -5])
    def test_with_another_stamp_are_not_moved(self, make: Make, hours: float) -> None:
        """-4 and -5 hours are 00:00 UTC of the date, which is the stamp of our grid."""
        market = WholeMarket(self.days, stamp=lambda at: new_york_midnight(at) + int(hours * MICROS_PER_HOUR))
        with serve(market) as server:
            answer = make("polygon", server.url, key=KEY).fetch(self.days, HALF_DAY)
        verdict = verify(of(answer), HALF_DAY, grid_of(self.days), HALF_DAY.end)
        assert len(verdict.good) == 0
        assert sum(len(part.candles) for part in verdict.rejected) >= 7

    @pytest.mark.parametrize(
        ("now", "last"),
        [
            ("2015-12-23T20:59:59", "2015-12-22"),
            ("2015-12-23T21:00:00", "2015-12-23"),
            ("2015-12-24T17:59:59", "2015-12-23"),  # a half-day
            ("2015-12-24T18:00:00", "2015-12-24"),
            ("2015-12-28T05:30:00", "2015-12-24"),  # after midnight in New York, before its session
        ],
    )
    def test_are_closed_with_their_session(self, make: Make, now: str, last: str) -> None:
        with serve(WholeMarket(self.days)) as server:
            got = of(make("polygon", server.url, key=KEY, clock=lambda: us(now)).fetch(self.days, HALF_DAY))
        inside = got.take(grid_of(self.days).contains(got.ts))
        assert inside.ts[-1] == us(last)

    def test_a_window_without_a_date_sends_no_request(self, make: Make) -> None:
        provider = make("polygon", "http://127.0.0.1:1", key=KEY)
        assert provider.fetch(self.days, span("2015-12-21T00:01", "2015-12-21T23:00")) == FetchResult(())

    @pytest.mark.parametrize(
        "window", [span("2015-12-21", "2015-12-21T00:01"), span("2015-12-20T12:00", "2015-12-22")]
    )
    def test_a_part_of_a_day_returns_the_day(self, make: Make, window: TimeRange) -> None:
        with serve(WholeMarket(self.days)) as server:
            got = of(make("polygon", server.url, key=KEY).fetch(self.days, window))
        assert got.ts.tolist() == [us("2015-12-21")]


class TestEndOfDayPlan:
    NOW = us("2015-12-23T19:00")

    def fetch(self, make: Make, timeframe: str, window: TimeRange) -> tuple[FetchResult, list[Received]]:
        """From a plan that refuses every range that includes the 23rd in New York."""
        asked = series(STOCKS, Timeframe(timeframe))
        message = "Attempted to request today's data before end of day. Please upgrade your plan"
        refused = json_said({"status": "NOT_AUTHORIZED", "message": message}, 403)
        market = WholeMarket(asked, refuse=lambda r: refused if r.end > us("2015-12-23T05:00") else None)
        with serve(market) as server:
            provider = make("polygon", server.url, key=KEY, clock=lambda: self.NOW, requests_per_minute=99)
            return provider.fetch(asked, window), server.requests

    @pytest.mark.parametrize("timeframe", ["5m", "30m", "1d"])
    def test_returns_the_days_before(self, make: Make, timeframe: str) -> None:
        window = span("2015-12-21", "2015-12-24")
        answer, requests = self.fetch(make, timeframe, window)
        asked = series(STOCKS, Timeframe(timeframe))
        good = verify(of(answer), window, grid_of(asked), window.end).good
        assert np.array_equal(good.ts, grid_of(asked).opens(span("2015-12-21", "2015-12-23")))
        assert answer.requests == len(requests) == 2
        assert "2015-12-23T00:00:00+00:00" in answer.warnings[0]

    def test_no_refusal_for_the_margin(self, make: Make) -> None:
        answer, requests = self.fetch(make, "1d", span("2015-12-21", "2015-12-23"))
        assert (len(of(answer)), len(requests), answer.warnings) == (2, 1, ())

    def test_today_alone(self, make: Make) -> None:
        with pytest.raises(NotEntitled, match="before end of day"):
            self.fetch(make, "5m", span("2015-12-23", "2015-12-24"))


class TestLimitedPlan:
    NOW = us("2015-12-23T19:00")
    EDGE = us("2013-12-23")

    def test_the_edge_is_searched_once(self, make: Make) -> None:
        asked = series(STOCKS, Timeframe.M5)
        message = "Your plan doesn't include this data timeframe. Please upgrade your plan"
        refused = json_said({"status": "NOT_AUTHORIZED", "message": message}, 403)
        market = WholeMarket(asked, refuse=lambda r: refused if r.start < self.EDGE else None)
        with serve(market) as server:
            provider = make("polygon", server.url, key=KEY, clock=lambda: self.NOW, requests_per_minute=99)
            with pytest.raises(TooOld, match=r"nothing before 2013-12-23") as caught:
                provider.fetch(asked, span("2005-01-03", "2005-02-03"))
            assert caught.value.since == self.EDGE
            assert 10 < len(server.requests) < 16, "bisection"
            before = len(server.requests)
            with pytest.raises(TooOld):
                provider.fetch(series(STOCKS, Timeframe.D1), span("2013-01-03", "2014-02-03"))
            assert len(server.requests) == before, "the edge is known for every stock"
            inside = TimeRange(self.EDGE, us("2013-12-28"))
            good = verify(of(provider.fetch(asked, inside)), inside, grid_of(asked), inside.end).good
            assert np.array_equal(good.ts, grid_of(asked).opens(inside))
            assert len(server.requests) == before + 1

    def test_a_plan_without_any_data_is_not_too_old(self, make: Make) -> None:
        refused = json_said(
            {"status": "NOT_AUTHORIZED", "message": "You are not entitled to this data."}, 403
        )
        with serve(lambda _: refused) as server:
            provider = make("polygon", server.url, key=KEY, clock=lambda: self.NOW, requests_per_minute=99)
            with pytest.raises(NotEntitled, match="not entitled") as caught:
                provider.fetch(series(STOCKS, Timeframe.M5), span("2005-01-03", "2005-02-03"))
            assert type(caught.value) is NotEntitled
            assert len(server.requests) == 2


class TestKey:
    def test_missing(self, make: Make) -> None:
        provider = make("polygon", "http://127.0.0.1:1")
        assert provider.missing_key() == "POLYGON_API_KEY"
        with pytest.raises(WrongKey, match="set POLYGON_API_KEY"):
            provider.fetch(crypto(), WINDOW)
        assert make("polygon", "http://127.0.0.1:1", key=KEY).missing_key() is None

    @pytest.mark.parametrize(
        "elsewhere", ["http://127.0.0.2:9/x", "https://127.0.0.1/x", "//evil/x", "file:///x"]
    )
    def test_is_sent_to_no_other_host(self, make: Make, elsewhere: str) -> None:
        rows = bars(candles_at(np.array([WINDOW.start]), "X"))
        with serve(lambda _: json_said(document(rows, next_url=elsewhere))) as server:
            with pytest.raises(PermanentError, match=r"providers\.polygon\.base_url"):
                make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW)
            assert len(server.requests) == 1

    @pytest.mark.parametrize("written", ["default port", "relative", "capitals"])
    def test_other_ways_to_write_the_configured_host(self, written: str) -> None:
        url = f"{POLYGON.base_url}/v2/aggs/x?limit=9"
        following = {
            "default port": "https://api.massive.com:443/v2/aggs/x?cursor=1",
            "relative": "?cursor=1",
            "capitals": "HTTPS://API.Massive.com/v2/aggs/x?cursor=1",
        }[written]
        assert next_page("polygon", following, url) == f"{POLYGON.base_url}/v2/aggs/x?cursor=1"

    @pytest.mark.parametrize(
        "elsewhere",
        [
            "https://api.massive.com:8443/x",
            "http://api.massive.com/x",
            "https://api.massive.com.evil.example/x",
            "https://me@api.massive.com/x",
            "https://api.massive.com@evil.example/x",
            "https:\\\\evil.example/x",
            "//evil.example:443/x",
        ],
    )
    def test_is_not_sent_to_a_similar_host(self, elsewhere: str) -> None:
        try:
            found = next_page("polygon", elsewhere, f"{POLYGON.base_url}/v2/x")
        except ProviderError:
            return
        assert str(found).startswith(f"{POLYGON.base_url}/")

    def test_pages_at_a_relative_address(self, make: Make) -> None:
        market = SmallPolygon()
        with serve(market) as server:
            answer = make("polygon", server.url, key=KEY, requests_per_minute=1000).fetch(crypto(), WINDOW)
        assert of(answer).equals(candles_at(np.arange(WINDOW.start, WINDOW.end, 60_000_000), "X:BTCUSD"))
        assert market.url == "", "the next_url is relative"

    def test_echoed_keys_are_redacted(self, make: Make) -> None:
        for status in (200, 401, 500):
            answer = json_said({"status": "ERROR", "error": f"bad {KEY}"}, status)
            with serve(always(answer)) as server:
                provider = make(
                    "polygon", server.url, key=KEY, requests_per_minute=1000, retry_budget_seconds=0.1
                )
                with pytest.raises(ProviderError, match=r"\*\*\*") as caught:
                    provider.fetch(crypto(), WINDOW)
            assert KEY not in str(caught.value)
            assert KEY not in repr(caught.value)


class TestInvalidResponses:
    @pytest.mark.parametrize(
        "answer",
        [
            Scripted(b"<html>maintenance</html>"),
            Scripted(b'{"ticker": "X:BTCUSD", "results": ['),
            json_said([]),
            json_said(document([], "X:ETHUSD")),
            json_said(document([], resultsCount=5)),
            json_said(document([{"o": 1.0}])),
            json_said(document([{"t": "soon"}])),
            json_said(document([1, 2])),
            json_said({"ticker": "X:BTCUSD", "status": "OK", "results": {"t": 1}}),
        ],
    )
    def test_garbage(self, make: Make, answer: Scripted) -> None:
        with serve(lambda _: answer) as server:
            provider = make(
                "polygon", server.url, key=KEY, requests_per_minute=1000, retry_budget_seconds=0.3
            )
            with pytest.raises(InvalidResponse):
                provider.fetch(crypto(), WINDOW)
            assert len(server.requests) > 1, "invalid responses are retried"

    @pytest.mark.parametrize("cursor", ["1", None], ids=["a circle", "another address every time"])
    def test_pages_without_an_end(self, make: Make, cursor: str | None) -> None:
        """Repeated bars (polygon-io issue 289)."""
        rows = bars(candles_at(np.arange(WINDOW.start, WINDOW.start + 600_000_000, 60_000_000), "X"))

        def same(asked: Received) -> Scripted:
            following = cursor or f"c{len(server.requests)}"
            return json_said(document(rows, next_url=f"{server.url}{asked.path}?cursor={following}"))

        with serve(same) as server:
            provider = make("polygon", server.url, key=KEY, requests_per_minute=1000)
            with pytest.raises(InvalidResponse, match="the last 4 of 5 pages had no newer bar") as caught:
                provider.fetch(crypto(), WINDOW)
            assert caught.value.requests == len(server.requests) == 5

    def test_an_empty_page_in_between(self, make: Make) -> None:
        """Empty pages are followed too."""
        rows = bars(candles_at(np.array([WINDOW.start, WINDOW.start + 60_000_000]), "X:BTCUSD"))

        def gappy(asked: Received) -> Scripted:
            at = int(asked.query.get("cursor", 0))
            made = {0: rows[:1], 3: rows[1:]}.get(at, [])
            more = {"next_url": f"{server.url}{asked.path}?cursor={at + 1}"} if at < 3 else {}
            return json_said(document(made, **more))

        with serve(gappy) as server:
            got = of(make("polygon", server.url, key=KEY, requests_per_minute=1000).fetch(crypto(), WINDOW))
        assert len(got) == 2

    @pytest.mark.parametrize("following", ["http://127.0.0.1:x/", "http://[::1", 7, ["x"]], ids=str)
    def test_an_invalid_next_page(self, make: Make, following: object) -> None:
        rows = bars(candles_at(np.array([WINDOW.start]), "X"))
        with serve(lambda _: json_said(document(rows, next_url=following))) as server:
            provider = make(
                "polygon", server.url, key=KEY, requests_per_minute=1000, retry_budget_seconds=0.0
            )
            with pytest.raises(InvalidResponse, match=r"not an address|newer bar|returned"):
                provider.fetch(crypto(), WINDOW)
            assert {asked.headers["Authorization"] for asked in server.requests} == {f"Bearer {KEY}"}


class TestNumbers:
    @pytest.mark.parametrize(
        ("volume", "reason"),
        [
            (2**53 - 1, None),
            (2**53 + 1, Reason.BAD_VOLUME),
            (2**63 + 1, Reason.BAD_VOLUME),
            (10**30, Reason.BAD_VOLUME),
        ],
    )
    def test_a_volume_that_does_not_fit_a_double_rejects_one_row(
        self, make: Make, volume: int, reason: Reason | None
    ) -> None:
        rows = bars(candles_at(np.arange(WINDOW.start, WINDOW.start + 600_000_000, 60_000_000), "X:BTCUSD"))
        rows[3]["v"] = volume
        body = orjson.dumps(document([{**row, "v": 0} if row is rows[3] else row for row in rows]))
        body = body.replace(b'"v":0,', b'"v":%d,' % volume)
        with serve(lambda _: Scripted(body)) as server:
            got = of(make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW))
        assert len(got) == 10
        verdict = verify(got, WINDOW, grid_of(crypto()), WINDOW.end)
        assert [(part.reason, len(part.candles)) for part in verdict.rejected] == (
            [(reason, 1)] if reason else []
        )
        if reason is None:
            assert int(got.volume[3]) == volume

    @pytest.mark.parametrize("stamp", [WINDOW.start // 1000 + 2**61, -(2**61), 2**63, 10**30, 2**53 + 1])
    def test_an_invalid_time_does_not_wrap_around(self, make: Make, stamp: int) -> None:
        """1000 x 2^61 is a multiple of 2^64: a wrapped product would be a valid time."""
        rows = bars(candles_at(np.array([WINDOW.start]), "X:BTCUSD"))
        body = orjson.dumps(document(rows)).replace(b'"t":%d' % rows[0]["t"], b'"t":%d' % stamp)
        with serve(lambda _: Scripted(body)) as server:
            provider = make("polygon", server.url, key=KEY, retry_budget_seconds=0.0)
            with pytest.raises(InvalidResponse, match="another shape"):
                provider.fetch(crypto(), WINDOW)


class TestErrors:
    def test_a_limit_is_waited_for(self, make: Make) -> None:
        answers = [
            json_said({"status": "ERROR", "error": "slow"}, 429, {"Retry-After": "0.4"}),
            json_said(document([])),
        ]
        with serve(lambda _: answers.pop(0)) as server:
            assert make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW).requests == 2
            assert server.requests[1].at - server.requests[0].at >= 0.38

    @pytest.mark.parametrize("path", [WIRE, SHARED_WIRE], ids=["own", "shared"])
    def test_recorded_responses(self, make: Make, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        expected: dict[str, type[ProviderError]] = {
            "missing key": WrongKey,
            "bad key": WrongKey,
            "plan": NotEntitled,
            "timeframe outside plan": NotEntitled,
            "today before EOD": NotEntitled,
            "rate limit": RateLimited,
        }
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "massive"}
        assert set(cases) == {*expected, "bad ticker / no data"}
        for name, kind in expected.items():
            # Some fixtures have the same bodies with status 200.
            for status in (cases[name]["status"], 200):
                self._raises(make, kind, json_said(cases[name]["body"], status))
        nothing = {**cases["bad ticker / no data"]["body"], "ticker": "X:BTCUSD"}
        with serve(lambda _: json_said(nothing)) as server:
            assert make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW).deliveries == ()

    def _raises(self, make: Make, kind: type[ProviderError], answer: Scripted) -> None:
        with serve(lambda _: answer) as server:
            provider = make(
                "polygon", server.url, key=KEY, requests_per_minute=1000, retry_budget_seconds=0.0
            )
            with pytest.raises(kind) as caught:
                provider.fetch(crypto(), WINDOW)
            assert type(caught.value) is kind

    def test_an_unclear_refusal_is_transient(self, make: Make) -> None:
        self._raises(make, TransientError, json_said({"status": "ERROR", "error": "internal"}))

    def test_empty_windows_send_no_request(self, make: Make) -> None:
        provider = make("polygon", "http://127.0.0.1:1", key=KEY)
        assert provider.fetch(crypto(), TimeRange(us("2024-01-01"), us("2024-01-01"))) == FetchResult(())
