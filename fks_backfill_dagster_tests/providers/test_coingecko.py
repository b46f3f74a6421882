"""CoinGecko's OHLC: close stamps, automatic granularity, demo and paid keys."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    NotEntitled,
    PermanentError,
    ProviderError,
    RateLimited,
    Transport,
    UnknownSymbol,
)
from fks_backfill_dagster.providers.coingecko import coin_of, currency_of, is_spaced, read_rows
from fks_backfill_dagster_tests.providers.conformance_base import KEY
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.markets import SmallCoinGecko, bars_of, candles_of
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    Server,
    always,
    candles_at,
    crypto,
    json_said,
    serve,
    span,
    us,
)

pytestmark = pytest.mark.server

WIRE = Path(__file__).resolve().parents[1] / "data/wire/errors.jsonl"
SHARED_WIRE = Path(__file__).resolve().parents[2] / "../shared/wire/errors.jsonl"
NOW = us("2024-06-05T12:07")
LATELY = TimeRange(NOW - 40 * MICROS_PER_DAY, NOW + MICROS_PER_DAY)


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def fetch(
    make: Make,
    answer: Callable[[Received], Scripted],
    window: TimeRange,
    timeframe: Timeframe = Timeframe.H4,
    host: str = "",
    **given: object,
) -> tuple[FetchResult, Server]:
    given = {"key": KEY, "clock": lambda: NOW, "requests_per_minute": 10**6, **given}
    with serve(answer) as server:
        url = server.url.replace("127.0.0.1", host) if host else server.url
        return make("coingecko", url, **given).fetch(crypto(timeframe), window), server


def truth(timeframe: Timeframe, window: TimeRange) -> Candles:
    opens = grid_of(crypto(timeframe)).opens(window)
    return candles_of(bars_of(candles_at(opens, "bitcoin")), volume=False)


def check_declined(make: Make, host: str, derived: dict[str, str]) -> None:
    provider = make("coingecko", host, key=KEY)
    for name, parts in derived.items():
        assert provider.capabilities.parts(crypto(Timeframe(name))) is Timeframe(parts)
        with pytest.raises(PermanentError, match=f"its {name} candles are derived from {parts}"):
            provider.fetch(crypto(Timeframe(name)), LATELY)


class TestDemo:
    @pytest.mark.parametrize(
        ("timeframe", "first", "end"),
        [("30m", "2024-06-04T12:30", "2024-06-05T12:00"), ("4h", "2024-05-06T16:00", "2024-06-05T12:00")],
    )
    def test_the_whole_depth(self, make: Make, timeframe: str, first: str, end: str) -> None:
        answer, server = fetch(make, SmallCoinGecko(NOW), LATELY, Timeframe(timeframe))
        assert of(answer).equals(truth(Timeframe(timeframe), span(first, end)))
        assert answer.requests == len(server.requests) == 1
        (delivery,) = answer.deliveries
        assert (delivery.origin.transport, delivery.origin.instrument) == (Transport.REST, "bitcoin")
        assert delivery.seams.tolist() == []

    def test_derived_timeframes_are_declined(self, make: Make) -> None:
        check_declined(make, "http://127.0.0.1:1", {"1h": "30m", "1d": "4h", "1w": "4h"})

    @pytest.mark.parametrize(("back", "days"), [(1, "7"), (7, "7"), (8, "14"), (15, "30"), (35, "30")])
    def test_days(self, make: Make, back: int, days: str) -> None:
        window = TimeRange(NOW - back * MICROS_PER_DAY, NOW)
        answer, server = fetch(make, SmallCoinGecko(NOW), window)
        asked = server.requests[0]
        assert asked.path == "/api/v3/coins/bitcoin/ohlc"
        assert asked.query == {"vs_currency": "usd", "days": days}
        assert asked.headers["x-cg-demo-api-key"] == KEY
        assert answer.deliveries[0].origin.source == f"{asked.path}?vs_currency=usd&days={days}"

    def test_no_request_beyond_the_depth(self, make: Make) -> None:
        answer, server = fetch(make, SmallCoinGecko(NOW), span("2024-01-01", "2024-02-01"))
        assert (answer, server.requests) == (FetchResult(()), [])

    def test_a_first_row_that_is_incomplete_after_a_wait(self, make: Make) -> None:
        """At the time of the request the row was whole; the response is a minute later."""
        edge = us("2024-05-06T12:00")
        early = edge + 30 * MICROS_PER_DAY - 10_000_000
        clock = iter([early])
        later = early + 60_000_000
        result, _ = fetch(
            make, SmallCoinGecko(later), TimeRange(edge, early), clock=lambda: next(clock, later)
        )
        got = of(result)
        assert got.ts.min() == edge + Timeframe.H4.micros

    def test_capabilities(self, make: Make) -> None:
        can = make("coingecko", "https://api.coingecko.com").capabilities
        names = {timeframe.value for timeframe in can.timeframes[AssetClass.CRYPTO]}
        assert names == {"30m", "1h", "4h", "1d", "1w"}
        assert {at.value: depth // MICROS_PER_DAY for at, depth in can.depth.items()} == {
            "30m": 1,
            "1h": 1,
            "4h": 30,
            "1d": 30,
            "1w": 30,
        }
        assert can.publication_delay == 35 * MICROS_PER_MINUTE


@pytest.fixture
def pro_host(monkeypatch: pytest.MonkeyPatch) -> str:
    """A host name like that of the paid API, resolved to loopback."""
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **more: Any) -> Any:
        return real("127.0.0.1" if host == "pro-api.example" else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    return "pro-api.example"


class TestPaid:
    @pytest.mark.parametrize(("timeframe", "interval", "requests"), [("1h", "hourly", 4), ("1d", "daily", 3)])
    def test_ranges(self, make: Make, pro_host: str, timeframe: str, interval: str, requests: int) -> None:
        window = span("2024-01-01", "2024-04-15") if timeframe == "1h" else span("2023-01-01", "2024-04-15")
        answer, server = fetch(make, SmallCoinGecko(NOW), window, Timeframe(timeframe), pro_host)
        assert of(answer).equals(truth(Timeframe(timeframe), window))
        assert answer.requests == len(server.requests) == requests
        assert {asked.path for asked in server.requests} == {"/api/v3/coins/bitcoin/ohlc/range"}
        assert {asked.query["interval"] for asked in server.requests} == {interval}
        assert {asked.headers["x-cg-pro-api-key"] for asked in server.requests} == {KEY}
        starts = sorted(int(asked.query["from"]) * 10**6 for asked in server.requests)
        assert answer.deliveries[0].seams.tolist() == starts[1:]

    def test_derived_timeframes_are_declined(self, make: Make) -> None:
        check_declined(make, "http://pro-api.example:1", {"4h": "1h", "1w": "1d"})

    @pytest.mark.parametrize("which", range(4))
    @pytest.mark.parametrize("times", [1, 99])
    def test_a_page_of_another_coin(self, make: Make, pro_host: str, which: int, times: int) -> None:
        """Responses contain no coin, but neighbouring ranges overlap: repaired if once, rejected if always."""
        window, remaining = span("2024-01-01", "2024-04-15"), [times]
        start = str((window.start + which * 742 * Timeframe.H1.micros) // 10**6)

        def answer(asked: Received) -> Scripted:
            if asked.query["from"] == start and remaining[0]:
                remaining[0] -= 1
                asked = replace(asked, path=asked.path.replace("bitcoin", "ethereum"))
            return SmallCoinGecko(NOW)(asked)

        if times == 1:
            got = of(fetch(make, answer, window, Timeframe.H1, pro_host)[0])
            assert got.equals(truth(Timeframe.H1, window))
        else:
            with pytest.raises(InvalidResponse, match="different values for the same candle of bitcoin"):
                fetch(make, answer, window, Timeframe.H1, pro_host)

    def test_the_newest_and_the_oldest(self, make: Make, pro_host: str) -> None:
        recent = TimeRange(us("2024-06-05T00:00"), NOW + MICROS_PER_DAY)
        got = of(fetch(make, SmallCoinGecko(NOW), recent, Timeframe.H1, pro_host)[0])
        assert got.equals(truth(Timeframe.H1, span("2024-06-05", "2024-06-05T12:00")))
        old = span("2018-02-01", "2018-02-12")
        got = of(fetch(make, SmallCoinGecko(NOW), old, Timeframe.D1, pro_host)[0])
        assert got.equals(truth(Timeframe.D1, span("2018-02-09", "2018-02-12")))

    def test_capabilities(self, make: Make) -> None:
        can = make("coingecko", "https://pro-api.coingecko.com").capabilities
        names = {timeframe.value for timeframe in can.timeframes[AssetClass.CRYPTO]}
        assert names == {"30m", "1h", "4h", "1d", "1w"}
        assert {at.value: depth // MICROS_PER_DAY for at, depth in can.depth.items()} == {"30m": 1}


class TestInvalidResponses:
    def test_another_granularity(self, make: Make) -> None:
        """Four days fit the grid of 4h: such rows would be stored as 4h candles."""
        day = us("2024-05-10") // 1000
        coarse = [[day + i * 4 * 86_400_000, 1.0, 2.0, 0.5, 1.0] for i in range(5)]
        for rows in (coarse, [[day + i * 1_800_000, 1.0, 2.0, 0.5, 1.0] for i in range(9)]):
            with pytest.raises(InvalidResponse, match="240 minutes apart"):
                fetch(make, always(json_said(rows)), LATELY, retry_budget_seconds=0.0)
        alone, _ = fetch(make, lambda _: json_said(coarse[:1]), LATELY)
        assert alone.deliveries == (), "the granularity of a single row is unknown"

    @pytest.mark.parametrize(
        "rows",
        [
            {"prices": []},
            [[1, 2, 3]],
            [[1, 2, 3, 4, 5], [1, 2]],
            [["soon", 1, 1, 1, 1]],
            [[None, None, None, None, None]],
            [[1e20, 1, 1, 1, 1]],
            [{"t": 1}],
            [1, 2, 3, 4, 5],
            {"status": "down"},
        ],
    )
    def test_garbage(self, make: Make, rows: object) -> None:
        with pytest.raises(InvalidResponse):
            fetch(make, lambda _: json_said(rows), LATELY, retry_budget_seconds=0.0)

    def test_a_missing_price_becomes_nan(self) -> None:
        got = read_rows([[14_400_000, 1, None, 1, 1], [28_800_000, 1, 2, 1, 1]], 14_400_000_000, "here")
        assert got.ts.tolist() == [0, 14_400_000_000]
        assert np.isnan(got.high).tolist() == [True, False]
        assert np.isnan(got.volume).all()

    def test_holes_and_repetitions_do_not_change_the_granularity(self) -> None:
        hour, hours = 3_600_000_000, [4, 8, 8, 12, 24, 28, 31, 32]
        rows = [[at * 3_600_000, 1, 2, 1, 1] for at in reversed(hours)]
        opens = read_rows(rows, 4 * hour, "here").ts
        assert (opens // hour).tolist() == [0, 4, 4, 8, 20, 24, 27, 28]
        assert is_spaced(opens, 4 * hour)
        assert not is_spaced(opens, 8 * hour)
        assert not is_spaced(opens, hour)

    def test_a_closed_and_a_forming_row(self, make: Make, pro_host: str) -> None:
        """Two rows, minutes apart: the forming one is stamped now and does not show the granularity."""
        closed = us("2024-06-05T12:00")
        rows = [[closed // 1000, 1, 2, 1, 1], [NOW // 1000, 1, 2, 1, 1]]
        window = TimeRange(closed - Timeframe.H1.micros, closed)
        got = of(fetch(make, lambda _: json_said(rows), window, Timeframe.H1, pro_host)[0])
        assert got.ts.tolist() == [window.start]


class TestErrors:
    @pytest.mark.parametrize("path", [WIRE, SHARED_WIRE], ids=["own", "shared"])
    def test_recorded_responses(self, make: Make, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        expected: dict[str, tuple[type[ProviderError], str]] = {
            "rate limit": (RateLimited, "Rate Limit"),
            "outside 365d on demo/keyless": (NotEntitled, "past 365 days"),
            "plan restricted": (NotEntitled, "PRO API"),
            "bad coin id": (UnknownSymbol, r"set provider_symbols\.coingecko"),
        }
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "coingecko"}
        assert set(cases) == set(expected)
        for name, (kind, text) in expected.items():
            # A recording has the same body with status 200.
            for status in (cases[name]["status"], 200):
                answer = json_said(cases[name]["body"], status, cases[name].get("headers"))
                with pytest.raises(kind, match=text) as caught:
                    fetch(make, always(answer), LATELY, retry_budget_seconds=0.0)
                assert type(caught.value) is kind
                if kind is RateLimited:
                    assert caught.value.retry_after == 7.0  # type: ignore[attr-defined]


class TestSymbols:
    def test_coins(self) -> None:
        known = {"BTC": "bitcoin", "ETH": "ethereum", "SOL": "solana", "BNB": "binancecoin", "XRP": "ripple"}
        for base, coin in {**known, "ADA": "cardano", "DOGE": "dogecoin"}.items():
            assert coin_of(crypto(symbol=f"{base}/USDT")) == coin

    def test_override_and_unknown(self) -> None:
        named = Series(
            "NEW/USDT", Timeframe.H4, AssetClass.CRYPTO, provider_symbols=(("coingecko", "new-2"),)
        )
        assert coin_of(named) == "new-2"
        with pytest.raises(UnknownSymbol, match=r"set provider_symbols\.coingecko of NEW/USDT"):
            coin_of(crypto(symbol="NEW/USDT"))

    @pytest.mark.parametrize(
        ("symbol", "currency"),
        [
            ("BTC/USDT", "usd"),
            ("BTC/USDC", "usd"),
            ("BTC/USD", "usd"),
            ("BTC/EUR", "eur"),
            ("ETH/BTC", "btc"),
        ],
    )
    def test_currencies(self, symbol: str, currency: str) -> None:
        assert currency_of(crypto(symbol=symbol)) == currency

    def test_not_a_pair(self) -> None:
        with pytest.raises(UnknownSymbol, match="not a pair"):
            currency_of(crypto(symbol="BTC"))
