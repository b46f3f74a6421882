"""Klines: pages and their overlap, invalid responses, limits and errors."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    PermanentError,
    ProviderError,
    RateLimited,
    TransientError,
    Transport,
    UnknownSymbol,
)
from fks_backfill_dagster.providers.binance import page_ranges
from fks_backfill_dagster.providers.binance_klines import binance_error, read_page
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    SmallBinance,
    candles_at,
    crypto,
    json_said,
    klines,
    serve,
    span,
    us,
)

pytestmark = pytest.mark.server

WINDOW = span("2024-03-01", "2024-03-03")  # 2880 minutes: three pages
WIRE = Path(__file__).resolve().parents[1] / "data/wire/errors.jsonl"
SHARED_WIRE = Path(__file__).resolve().parents[2] / "../shared/wire/errors.jsonl"


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def spoil(response: Scripted, change: Any) -> Scripted:
    """The honest response with its rows changed by `change(rows) -> rows`."""
    return json_said(change(orjson.loads(response.body)))


@given(st.integers(0, 12_000), st.integers(2, 1000))
def test_pages_cover_the_window_and_share_one_candle(count: int, size: int) -> None:
    window = TimeRange(7 * MICROS_PER_MINUTE, (7 + count) * MICROS_PER_MINUTE)
    pages = page_ranges(window, MICROS_PER_MINUTE, size)
    assert RangeSet(pages) == RangeSet([window])
    assert all(0 < page.duration <= size * MICROS_PER_MINUTE for page in pages)
    assert all(b.start == a.end - MICROS_PER_MINUTE for a, b in pairwise(pages))
    assert len(pages) == (0 if count == 0 else 1 if count <= size else 1 + -(-(count - size) // (size - 1)))


class TestHonest:
    @pytest.mark.parametrize("timeframe", list(Timeframe))
    def test_every_timeframe(self, make: Make, timeframe: Timeframe) -> None:
        market, series = SmallBinance(), crypto(timeframe)
        start = us("2024-01-01")
        window = TimeRange(start, start + 2500 * timeframe.micros)
        if timeframe is Timeframe.W1:
            window = span("2017-08-07", "2024-01-01")
        elif timeframe is Timeframe.D1:
            window = span("2018-01-01", "2024-01-01")
        elif timeframe is Timeframe.H4:
            window = span("2023-01-01", "2024-01-01")
        with serve(market) as server:
            answer = make("binance", server.url).fetch(series, window)
        assert of(answer).equals(market.truth(series, window))
        assert answer.requests == len(server.requests)
        assert all(asked.path == "/api/v3/klines" for asked in server.requests)
        assert all(int(asked.query["limit"]) <= 1000 for asked in server.requests)

    def test_a_delivery_has_its_origin(self, make: Make) -> None:
        with serve(SmallBinance()) as server:
            (delivery,) = make("binance", server.url).fetch(crypto(), WINDOW).deliveries
        assert delivery.origin.transport is Transport.REST
        assert delivery.origin.sha256 is None
        assert delivery.origin.source.startswith(
            "/api/v3/klines?symbol=BTCUSDT&interval=1m&startTime=1709251200000"
        )

    def test_seams_are_first_rows_of_responses(self, make: Make) -> None:
        """A candle shared by pages belongs to the earlier one; a second request that returns rows has its own seams."""
        shortened = Once(lambda response: rows_of(response)[:300] + rows_of(response)[310:])
        for market, missing in ((SmallBinance(), []), (SmallBinance(rest=shortened), [1299, 1309])):
            with serve(market) as server:
                (delivery,) = make("binance", server.url).fetch(crypto(), WINDOW).deliveries
            minutes = ((delivery.seams - WINDOW.start) // MICROS_PER_MINUTE).tolist()
            assert minutes == sorted([1000, 1999, *missing])

    def test_an_outage_is_requested_twice_and_stays_absent(self, make: Make) -> None:
        market = SmallBinance(outage=RangeSet([span("2024-03-01T03:00", "2024-03-01T04:10")]))
        with serve(market) as server:
            answer = make("binance", server.url).fetch(crypto(), WINDOW)
        assert of(answer).equals(market.truth(crypto(), WINDOW))
        assert answer.requests == 3 + 1

    def test_years_before_the_listing_cost_one_more_request(self, make: Make) -> None:
        market = SmallBinance(listed=us("2024-02-28T12:34"))
        window = span("2024-02-20", "2024-03-01")
        with serve(market) as server:
            answer = make("binance", server.url).fetch(crypto(), window)
        assert of(answer).equals(market.truth(crypto(), window))
        assert answer.requests <= len(page_ranges(window, MICROS_PER_MINUTE)) + 2

    def test_no_candles(self, make: Make) -> None:
        with serve(SmallBinance(listed=us("2025-01-01"))) as server:
            assert make("binance", server.url).fetch(crypto(), WINDOW).deliveries == ()

    def test_empty_and_future_windows_send_no_request(self, make: Make) -> None:
        with serve(SmallBinance()) as server:
            provider = make("binance", server.url)
            assert provider.fetch(crypto(), TimeRange(WINDOW.start, WINDOW.start)) == FetchResult(())
            assert provider.fetch(crypto(), span("2190-01-01", "2190-02-01")) == FetchResult(())
            assert server.requests == []

    def test_the_forming_candle_is_left_out_by_the_servers_clock(self) -> None:
        window = span("2024-03-01T12:00", "2024-03-01T12:40")
        opens = np.arange(window.start, window.end, MICROS_PER_MINUTE)
        rows = klines(candles_at(opens, "X"), Timeframe.M1)
        for server_time, last in [
            ("2024-03-01T12:30:59", "2024-03-01T12:29"),
            ("2024-03-01T12:31:00", "2024-03-01T12:30"),
        ]:
            assert read_page(rows, window, us(server_time), "place").candles.ts[-1] == us(last)

    def test_running_minute_is_not_delivered(self, make: Make) -> None:
        now = time.time_ns() // 1000
        minute = now - now % MICROS_PER_MINUTE
        with serve(SmallBinance()) as server:
            answer = make("binance", server.url).fetch(
                crypto(), TimeRange(minute - 60 * MICROS_PER_MINUTE, minute + MICROS_PER_DAY)
            )
        assert len(of(answer)) in (60, 61)  # 61 when the minute ends during the test
        assert int(of(answer).ts[-1]) + MICROS_PER_MINUTE <= time.time_ns() // 1000

    def test_listed_at(self, make: Make) -> None:
        market = SmallBinance(listed=us("2017-08-17T04:00"))
        with serve(market) as server:
            assert make("binance", server.url).listed_at(crypto(Timeframe.D1)) == us("2017-08-17T04:00")
            assert server.requests[0].query["startTime"] == "0"
            assert len(server.requests) == 1

    def test_symbols(self, make: Make) -> None:
        series = Series(
            "BTC/USDT", Timeframe.H1, AssetClass.CRYPTO, provider_symbols=(("binance", "BTCFDUSD"),)
        )
        with serve(SmallBinance()) as server:
            provider = make("binance", server.url)
            provider.fetch(series, WINDOW)
            provider.fetch(crypto(Timeframe.H1, "ETH/BTC"), WINDOW)
        assert [asked.query["symbol"] for asked in server.requests] == ["BTCFDUSD", "ETHBTC"]

    def test_estimate(self, make: Make) -> None:
        with serve(SmallBinance()) as server:
            provider = make("binance", server.url)
            requests = provider.fetch(crypto(), WINDOW).requests
            estimate = provider.estimate(crypto(), WINDOW)
            assert estimate.requests == requests
            assert estimate.seconds == pytest.approx(requests * 60 / 3000)


class Once:
    """Changes the page that begins at an instant, a number of times."""

    def __init__(self, change: Any, times: int = 1, start: str = "2024-03-01T16:39") -> None:
        self.change, self.times, self.start = change, times, us(start) // 1000

    def __call__(self, asked: Received, honest: Scripted) -> Scripted:
        if self.times and int(asked.query["startTime"]) == self.start:
            self.times -= 1
            changed = self.change(honest)
            return changed if isinstance(changed, Scripted) else json_said(changed)
        return honest


def rows_of(response: Scripted) -> list[list[Any]]:
    rows: list[list[Any]] = orjson.loads(response.body)
    return rows


REPAIRED = {
    "html": lambda response: Scripted(b"<html>maintenance</html>", 200, {"Content-Type": "text/html"}),
    "truncated json": lambda response: Scripted(
        response.body[:-300], 200, {"Content-Type": "application/json"}
    ),
    "cut connection": lambda response: Scripted(response.body, cut=2000),
    "nothing at all": lambda response: Scripted(b"", cut=0),
    "empty page": lambda response: [],
    "short page": lambda response: rows_of(response)[:500],
    "inner rows missing": lambda response: rows_of(response)[:300] + rows_of(response)[310:],
    "rows of NaN": lambda response: [[r[0], *["NaN"] * 5, *r[6:]] for r in rows_of(response)],
    "null cells": lambda response: [[r[0], *[None] * 5, *r[6:]] for r in rows_of(response)],
    "eleven columns": lambda response: [r[:11] for r in rows_of(response)],
    "objects": lambda response: [{"openTime": r[0]} for r in rows_of(response)],
    "nulls": lambda response: [None for _ in rows_of(response)],
    "descending": lambda response: rows_of(response)[::-1],
    "other times": lambda response: [[r[0] + 86_400_000 * 9, *r[1:]] for r in rows_of(response)],
    "no times": lambda response: [[None, *r[1:]] for r in rows_of(response)],
    "an object": lambda response: {"rows": []},
    "server error": lambda response: Scripted(b"oops", 502),
    "overload": lambda response: json_said({"code": -1008, "msg": "overloaded"}, 503),
    "bad gzip": lambda response: Scripted(b"not gzip", 200, {"Content-Encoding": "gzip"}),
    "another symbol": lambda response: [[r[0], *["7.0"] * 5, *r[6:]] for r in rows_of(response)],
}


class TestInvalidResponses:
    @pytest.mark.parametrize("name", REPAIRED)
    def test_an_invalid_page_is_requested_again(self, make: Make, name: str) -> None:
        market = SmallBinance(rest=Once(REPAIRED[name]))
        with serve(market) as server:
            answer = make("binance", server.url).fetch(crypto(), WINDOW)
        got = of(answer)
        sane = got.take(np.isfinite(got.close))
        assert sane.equals(market.truth(crypto(), WINDOW))
        assert answer.requests == len(server.requests) > 3

    @pytest.mark.parametrize("name", ["html", "truncated json", "eleven columns", "other times", "an object"])
    def test_persistent_garbage_is_a_bad_answer(self, make: Make, name: str) -> None:
        with serve(SmallBinance(rest=Once(REPAIRED[name], times=-1))) as server:
            provider = make("binance", server.url, retry_budget_seconds=0.6)
            with pytest.raises(InvalidResponse, match="/api/v3/klines returned"):
                provider.fetch(crypto(), WINDOW)

    def test_another_market_in_the_second_request(self, make: Make) -> None:
        """A second request for missing candles includes known candles, which then differ."""
        seen: list[Received] = []

        def rest(asked: Received, honest: Scripted) -> Scripted:
            seen.append(asked)
            rows = rows_of(honest)
            if len(seen) == 1:
                return json_said([row for row in rows if row[0] // 60_000 % 60 not in (7, 40)])
            return json_said([[row[0], *["7.0"] * 5, *row[6:]] for row in rows])

        window = span("2024-03-01", "2024-03-01T10:00")
        with serve(SmallBinance(rest=rest)) as server, pytest.raises(InvalidResponse, match="another market"):
            make("binance", server.url).fetch(crypto(), window)
        assert len(seen) == 2

    def test_persistent_pages_of_another_market_are_rejected(self, make: Make) -> None:
        market = SmallBinance(rest=Once(REPAIRED["another symbol"], times=-1))
        with serve(market) as server, pytest.raises(InvalidResponse, match="another market"):
            make("binance", server.url).fetch(crypto(), WINDOW)

    def test_off_grid_rows_are_delivered_with_the_true_ones(self, make: Make) -> None:
        def shift(response: Scripted) -> Any:
            return [[r[0] + (7000 if 10 <= i < 20 else 0), *r[1:]] for i, r in enumerate(rows_of(response))]

        market = SmallBinance(rest=Once(shift))
        with serve(market) as server:
            got = of(make("binance", server.url).fetch(crypto(), WINDOW))
        on_grid = got.ts % MICROS_PER_MINUTE == 0
        assert got.take(on_grid).equals(market.truth(crypto(), WINDOW))
        assert (~on_grid).sum() == 10

    def test_a_bad_row_in_both_responses_is_delivered_once(self, make: Make) -> None:
        def spoiled(response: Scripted) -> Any:
            return [[r[0], "NaN" if r[0] % 3_600_000 == 0 else r[1], *r[2:]] for r in rows_of(response)]

        market = SmallBinance(rest=lambda _, honest: json_said(spoiled(honest)))
        window = span("2024-03-01", "2024-03-01T10:00")
        with serve(market) as server:
            answer = make("binance", server.url).fetch(crypto(), window)
        assert answer.requests == 2, "missing candles are requested twice"
        got = of(answer)
        assert np.isnan(got.open).sum() == 10
        assert len(got) == 600

    def test_a_mirror_that_continues_after_the_end(self, make: Make) -> None:
        def endless(asked: Received, honest: Scripted) -> Scripted:
            opens = np.arange(int(asked.query["startTime"]), us("2024-04-01") // 1000, 60_000)[:1000] * 1000
            return json_said(klines(candles_at(opens, asked.query["symbol"]), Timeframe.M1))

        market = SmallBinance(rest=endless)
        with serve(market) as server:
            answer = make("binance", server.url).fetch(crypto(), WINDOW)
        assert of(answer).equals(market.truth(crypto(), WINDOW))

    @pytest.mark.parametrize("body", [b'"\\ud800"', b"[" * 100_000, b"\x00\xff" * 500, b"NaN", b"[[NaN]]"])
    def test_odd_garbage_is_a_bad_answer(self, make: Make, body: bytes) -> None:
        response = Scripted(body, 200, {"Content-Type": "application/json"})
        with (
            serve(lambda _: response) as server,
            pytest.raises(InvalidResponse, match="/api/v3/klines") as caught,
        ):
            make("binance", server.url, retry_budget_seconds=0.2).fetch(crypto(), WINDOW)
        assert str(caught.value).isprintable()

    def test_invalid_cells_become_rejectable(self) -> None:
        window = span("2024-03-01", "2024-03-01T00:04")
        rows = klines(candles_at(np.arange(window.start, window.end, MICROS_PER_MINUTE), "X"), Timeframe.M1)
        rows[0][1], rows[1][2], rows[2][5] = "abc", [], "abc"
        got = read_page(rows, window, window.end, "place").candles
        assert np.isnan(got.open[0])
        assert np.isnan(got.high[1])
        assert np.isinf(got.volume[2]), "NaN would mean a source without volumes"
        assert np.isfinite(np.stack(got.columns()[1:])[:, 3]).all()

    @given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=5, max_size=5))
    def test_numbers_are_rounded_exactly(self, values: list[float]) -> None:
        row = [0, *map(repr, values), 59_999, "0", 1, "0", "0", "0"]
        got = read_page([row], TimeRange(0, MICROS_PER_MINUTE), MICROS_PER_MINUTE, "place").candles
        assert [float(column[0]) for column in got.columns()[1:]] == values


class TestLimits:
    def test_a_limit_is_waited_for(self, make: Make) -> None:
        refusals = [json_said({"code": -1003, "msg": "Too much"}, 429, {"Retry-After": "0.5"})]
        market = SmallBinance(rest=lambda _, honest: refusals.pop() if refusals else honest)
        with serve(market) as server:
            answer = make("binance", server.url).fetch(crypto(), span("2024-03-01", "2024-03-01T06:00"))
            assert server.requests[1].at - server.requests[0].at >= 0.45
        assert len(of(answer)) == 360
        assert answer.requests == 2

    @pytest.mark.parametrize("header", [{"Retry-After": "120"}, {}])
    def test_a_ban_is_raised_immediately_and_respected(self, make: Make, header: dict[str, str]) -> None:
        until = time.time_ns() // 1_000_000 + 120_000
        body = {"code": -1003, "msg": f"Way too much request weight used; IP banned until {until}. Please."}
        with serve(lambda _: json_said(body, 418, header)) as server:
            provider = make("binance", server.url)
            began = time.monotonic()
            for _ in range(3):
                with pytest.raises(RateLimited) as caught:
                    provider.fetch(crypto(Timeframe.D1), WINDOW)
                assert caught.value.retry_after == pytest.approx(120, abs=3)
            assert len(server.requests) == 1
            assert time.monotonic() - began < 60

    def test_nearly_used_up_weight_pauses_until_the_next_minute(self, make: Make) -> None:
        def answer(_: Received, honest: Scripted) -> Scripted:
            return Scripted(honest.body, 200, {"X-MBX-USED-WEIGHT-1M": "5800"})

        with serve(SmallBinance(rest=answer)) as server:
            provider = make("binance", server.url, retry_budget_seconds=0.0, longest_wait_seconds=0.0)
            assert len(of(provider.fetch(crypto(Timeframe.D1), WINDOW))) == 2
            with pytest.raises(RateLimited) as caught:
                provider.fetch(crypto(Timeframe.D1), WINDOW)
            assert caught.value.retry_after is not None
            assert caught.value.retry_after <= 60
            assert len(server.requests) == 1

    @pytest.mark.parametrize("until", ["4102444800000", "9" * 400, "1" * 14, "0", "\u0669" * 13, "-1", "nan"])
    def test_a_ban_is_over_after_a_day(self, make: Make, until: str) -> None:
        """The year 2100, and invalid times."""
        body = {"code": -1003, "msg": f"Way too much request weight used; IP banned until {until}. Please."}
        with serve(lambda _: json_said(body, 418)) as server:
            provider = make("binance", server.url, retry_budget_seconds=0.0)
            with pytest.raises(RateLimited) as caught:
                provider.fetch(crypto(Timeframe.D1), WINDOW)
        wait = caught.value.retry_after
        assert wait in (None, 0, LONGEST_WAIT)
        assert (wait == LONGEST_WAIT) == (until in ("4102444800000", "9" * 400, "1" * 14))

    @pytest.mark.parametrize("used", ["9" * 400, "9" * 20_000, "\u0669" * 5, "-1", "1e300", "nan"])
    def test_an_invalid_weight(self, make: Make, used: str) -> None:
        def answer(_: Received, honest: Scripted) -> Scripted:
            headers = {"X-MBX-USED-WEIGHT-1M": used.encode().decode("latin-1")}
            return Scripted(honest.body, 200, headers)

        with serve(SmallBinance(rest=answer)) as server:
            provider = make("binance", server.url, retry_budget_seconds=0.0, longest_wait_seconds=0.0)
            assert len(of(provider.fetch(crypto(Timeframe.D1), WINDOW))) == 2

    def test_a_configured_limit_replaces_the_default(self, make: Make) -> None:
        def answer(_: Received, honest: Scripted) -> Scripted:
            return Scripted(honest.body, 200, {"X-MBX-USED-WEIGHT-1M": "90000"})

        with serve(SmallBinance(rest=answer)) as server:
            provider = make("binance", server.url, requests_per_minute=1_000_000)
            for _ in range(3):
                provider.fetch(crypto(Timeframe.D1), WINDOW)
            assert len(server.requests) == 3


class TestErrors:
    def test_unknown_symbol(self, make: Make) -> None:
        with serve(lambda _: json_said({"code": -1121, "msg": "Invalid symbol."}, 400)) as server:
            provider = make("binance", server.url)
            for request in (lambda: provider.fetch(crypto(), WINDOW), lambda: provider.listed_at(crypto())):
                with pytest.raises(UnknownSymbol, match=r"no symbol BTCUSDT.*provider_symbols"):
                    request()

    @pytest.mark.parametrize(
        ("status", "text"), [(403, "firewall"), (451, "country"), (404, "returned 404"), (301, "base_url")]
    )
    def test_permanent_for_this_run(self, make: Make, status: int, text: str) -> None:
        with serve(lambda _: Scripted(b"<html>no</html>", status)) as server:
            with pytest.raises(PermanentError, match=text):
                make("binance", server.url).fetch(crypto(Timeframe.D1), WINDOW)
            assert len(server.requests) == 1

    def test_redirections_are_not_followed(self, make: Make) -> None:
        with serve(lambda _: Scripted(b"", 302, {"Location": "/elsewhere"})) as server:
            with pytest.raises(PermanentError, match=r"moved: correct providers\.binance\.base_url"):
                make("binance", server.url).fetch(crypto(Timeframe.D1), WINDOW)
            assert len(server.requests) == 1

    def test_connection_refused(self, make: Make) -> None:
        with serve(lambda _: Scripted()) as server:
            url = server.url
        with pytest.raises(TransientError, match=r"no connection .*refused"):
            make("binance", url, retry_budget_seconds=0.3).fetch(crypto(Timeframe.D1), WINDOW)

    def test_a_response_timeout(self, make: Make) -> None:
        with serve(lambda _: Scripted(b"[]", delay=0.6)) as server:
            provider = make("binance", server.url, timeout_seconds=0.2, retry_budget_seconds=0.3)
            with pytest.raises(TransientError, match="in time"):
                provider.fetch(crypto(Timeframe.D1), WINDOW)

    @pytest.mark.parametrize("path", [WIRE, SHARED_WIRE], ids=["own", "shared"])
    def test_recorded_responses(self, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        expected: dict[str, type[ProviderError]] = {
            "bad symbol": UnknownSymbol,
            "bad interval": PermanentError,
            "rate limit": RateLimited,
            "ip ban": RateLimited,
            "overload": TransientError,
        }
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "binance"}
        assert set(cases) == {*expected, "no data"}
        for name, kind in expected.items():
            case = cases[name]
            body = orjson.dumps(case["body"])
            error = binance_error(case["status"], case.get("headers", {}), body, "http://h/p", "X")
            assert type(error) is kind, name
