"""Polygon's crypto aggregates: tickers, pages, the key, and what its answers mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers.base import (
    Answer,
    BadAnswer,
    NotEntitled,
    PermanentError,
    ProviderError,
    RateLimited,
    TransientError,
    UnknownSymbol,
)
from fks_backfill_dagster.providers.polygon import ticker_of
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import (
    Asked,
    Said,
    candles_at,
    crypto,
    json_said,
    serve,
    span,
    us,
)

KEY = "sEcReT-polygon-key"
WINDOW = span("2024-03-01", "2024-03-01T02:00")
WIRE = Path(__file__).resolve().parents[1] / "data/wire/errors.jsonl"
SHARED_WIRE = Path(__file__).resolve().parents[2] / "../shared/wire/errors.jsonl"


def of(answer: Answer) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def bars(candles: Candles) -> list[dict[str, float]]:
    keys = ("t", "o", "h", "l", "c", "v")
    columns = [(candles.ts // 1000).tolist(), *(column.tolist() for column in candles.columns()[1:])]
    return [{**dict(zip(keys, row, strict=True)), "vw": 1.0, "n": 3} for row in zip(*columns, strict=True)]


def document(results: list[Any], ticker: str = "X:BTCUSD", **more: Any) -> dict[str, Any]:
    return {"ticker": ticker, "status": "OK", "resultsCount": len(results), "results": results, **more}


def always(answer: Said) -> Callable[[Asked], Said]:
    return lambda _: answer


class SmallPolygon:
    """Honest minutes from 30 before to 30 after what was asked, in pages of 50 bars."""

    page = 50

    def __init__(self, change: Callable[[dict[str, Any]], dict[str, Any]] = lambda honest: honest) -> None:
        self.change = change
        self.url = ""

    def __call__(self, asked: Asked) -> Said:
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
    def test_follows_its_pages_and_keeps_to_the_window(self, make: Make) -> None:
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
        assert KEY not in answer.deliveries[0].source

    @pytest.mark.parametrize("status", ["OK", "DELAYED"])
    def test_nothing_there(self, make: Make, status: str) -> None:
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

    def test_an_absent_price_becomes_nan(self, make: Make) -> None:
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
        served = {timeframe for timeframe in Timeframe if capabilities.serve(crypto(timeframe))}
        assert served == {Timeframe(name) for name in ("1m", "5m", "15m", "30m", "1h", "1d")}
        assert not capabilities.serve(Series("AAPL", Timeframe.M1, AssetClass.STOCKS))


@pytest.mark.parametrize(
    ("symbol", "ticker"),
    [("BTC/USDT", "X:BTCUSD"), ("BTC/USDC", "X:BTCUSD"), ("BTC/USD", "X:BTCUSD"), ("ETH/BTC", "X:ETHBTC")],
)
def test_tickers(symbol: str, ticker: str) -> None:
    assert ticker_of(crypto(symbol=symbol)) == ticker


def test_tickers_by_name() -> None:
    named = Series("BTC", Timeframe.M1, AssetClass.CRYPTO, provider_symbols=(("polygon", "X:XBTUSD"),))
    assert ticker_of(named) == "X:XBTUSD"
    with pytest.raises(UnknownSymbol, match="provider_symbols"):
        ticker_of(crypto(symbol="BTC"))


class TestKey:
    def test_missing(self, make: Make) -> None:
        provider = make("polygon", "http://127.0.0.1:1")
        assert provider.missing_key() == "POLYGON_API_KEY"
        with pytest.raises(NotEntitled, match="set POLYGON_API_KEY"):
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

    def test_echoed_keys_are_blanked(self, make: Make) -> None:
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


class TestLies:
    @pytest.mark.parametrize(
        "answer",
        [
            Said(b"<html>maintenance</html>"),
            Said(b'{"ticker": "X:BTCUSD", "results": ['),
            json_said([]),
            json_said(document([], "X:ETHUSD")),
            json_said(document([], resultsCount=5)),
            json_said(document([{"o": 1.0}])),
            json_said(document([{"t": "soon"}])),
            json_said(document([1, 2])),
            json_said({"ticker": "X:BTCUSD", "status": "OK", "results": {"t": 1}}),
        ],
    )
    def test_garbage(self, make: Make, answer: Said) -> None:
        with serve(lambda _: answer) as server:
            provider = make(
                "polygon", server.url, key=KEY, requests_per_minute=1000, retry_budget_seconds=0.3
            )
            with pytest.raises(BadAnswer):
                provider.fetch(crypto(), WINDOW)
            assert len(server.requests) > 1, "garbage may pass: it is asked again"

    def test_a_circle_of_pages(self, make: Make) -> None:
        market = SmallPolygon(
            lambda honest: {**honest, "next_url": f"{market.url}/v2/aggs/ticker/X/1/1/minute/0/9"}
        )

        def same(asked: Asked) -> Said:
            rows = bars(candles_at(np.array([WINDOW.start]), "X"))
            return json_said(document(rows, next_url=f"{market.url}{asked.path}?cursor=1"))

        with serve(same) as server:
            market.url = server.url
            with pytest.raises(BadAnswer, match="circle"):
                make("polygon", server.url, key=KEY, requests_per_minute=1000).fetch(crypto(), WINDOW)


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
    def test_recorded_answers(self, make: Make, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        expected: dict[str, type[ProviderError]] = {
            "missing key": NotEntitled,
            "bad key": NotEntitled,
            "plan": NotEntitled,
            "timeframe outside plan": NotEntitled,
            "today before EOD": NotEntitled,
            "rate limit": RateLimited,
        }
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "massive"}
        assert set(cases) == {*expected, "bad ticker / no data"}
        for name, kind in expected.items():
            # Some fixtures claim that the same bodies come with status 200.
            for status in (cases[name]["status"], 200):
                self._raises(make, kind, json_said(cases[name]["body"], status))
        nothing = {**cases["bad ticker / no data"]["body"], "ticker": "X:BTCUSD"}
        with serve(lambda _: json_said(nothing)) as server:
            assert make("polygon", server.url, key=KEY).fetch(crypto(), WINDOW).deliveries == ()

    def _raises(self, make: Make, kind: type[ProviderError], answer: Said) -> None:
        with serve(lambda _: answer) as server:
            provider = make(
                "polygon", server.url, key=KEY, requests_per_minute=1000, retry_budget_seconds=0.0
            )
            with pytest.raises(kind) as caught:
                provider.fetch(crypto(), WINDOW)
            assert type(caught.value) is kind

    def test_an_unclear_refusal_may_pass(self, make: Make) -> None:
        self._raises(make, TransientError, json_said({"status": "ERROR", "error": "internal"}))

    def test_empty_windows_ask_nobody(self, make: Make) -> None:
        provider = make("polygon", "http://127.0.0.1:1", key=KEY)
        assert provider.fetch(crypto(), TimeRange(us("2024-01-01"), us("2024-01-01"))) == Answer(())
