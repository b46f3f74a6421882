"""Alpha Vantage's stocks: stamps, months, the regular session, and responses that all have status 200."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers.alphavantage import (
    ATTEMPTS,
    AlphaVantage,
    seconds_to_tomorrow,
    symbol_of,
    to_opens,
)
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    NotEntitled,
    PermanentError,
    ProviderError,
    RateLimited,
    TooOld,
    Transport,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster_tests.providers.conformance_base import KEY
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.markets import SmallAlphaVantage
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    Server,
    always,
    candles_at,
    json_said,
    serve,
    span,
    us,
)

pytestmark = pytest.mark.server

WIRE = Path(__file__).resolve().parents[1] / "data/wire/errors.jsonl"
SHARED_WIRE = Path(__file__).resolve().parents[2] / "../shared/wire/errors.jsonl"
NOW = us("2024-06-05T16:10")
# NOVEMBER contains the half-day of 2023-11-24 and the end of daylight saving time, MARCH its beginning.
NOVEMBER, MARCH = span("2023-11-01", "2023-12-01"), span("2024-03-01", "2024-04-01")


def stock(timeframe: Timeframe = Timeframe.M30, symbol: str = "AAPL") -> Series:
    return Series(symbol, timeframe, AssetClass.STOCKS)


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def fetch(
    make: Make,
    answer: Callable[[Received], Scripted],
    window: TimeRange,
    timeframe: Timeframe = Timeframe.M30,
    **given: object,
) -> tuple[FetchResult, Server]:
    given = {"key": KEY, "clock": lambda: NOW, "requests_per_minute": 10**6, **given}
    with serve(answer) as server:
        return make("alphavantage", server.url, **given).fetch(stock(timeframe), window), server


def truth(timeframe: Timeframe, window: TimeRange) -> Candles:
    return candles_at(grid_of(stock(timeframe)).opens(window), "AAPL")


DERIVED = {Timeframe.H1: Timeframe.M30, Timeframe.H4: Timeframe.M30, Timeframe.W1: Timeframe.D1}
NATIVE = [timeframe for timeframe in Timeframe if timeframe not in DERIVED]


class TestHonest:
    @pytest.mark.parametrize("timeframe", NATIVE)
    @pytest.mark.parametrize("stamps", ["open", "close"])
    def test_all_native_timeframes_and_both_stamps(
        self, make: Make, timeframe: Timeframe, stamps: str
    ) -> None:
        for window in (NOVEMBER, MARCH):
            answer, _ = fetch(make, SmallAlphaVantage(NOW, stamps), window, timeframe)
            assert of(answer).equals(truth(timeframe, window))
            assert answer.deliveries[0].origin.transport is Transport.REST

    @pytest.mark.parametrize(("timeframe", "parts"), DERIVED.items())
    def test_derived_timeframes_are_declined(
        self, make: Make, timeframe: Timeframe, parts: Timeframe
    ) -> None:
        assert AlphaVantage.capabilities.parts(stock(timeframe)) is parts
        with pytest.raises(PermanentError, match=f"its {timeframe} candles are derived from {parts}"):
            fetch(make, SmallAlphaVantage(NOW), MARCH, timeframe)

    def test_months_have_seams(self, make: Make) -> None:
        answer, _ = fetch(make, SmallAlphaVantage(NOW), span("2024-01-20", "2024-04-10"))
        expected = [us("2024-02-01T14:30"), us("2024-03-01T14:30"), us("2024-04-01T13:30")]
        assert answer.deliveries[0].seams.tolist() == expected

    def test_requests(self, make: Make) -> None:
        answer, server = fetch(make, SmallAlphaVantage(NOW), span("2023-12-20", "2024-02-05"), Timeframe.M5)
        assert [asked.query["month"] for asked in server.requests] == ["2023-12", "2024-01", "2024-02"]
        assert server.requests[0].query == {
            "function": "TIME_SERIES_INTRADAY",
            "symbol": "AAPL",
            "interval": "5min",
            "month": "2023-12",
            "outputsize": "full",
            "adjusted": "false",
            "extended_hours": "false",
            "apikey": KEY,
        }
        assert "month=2023-12..2024-02" in answer.deliveries[0].origin.source
        assert answer.requests == 3

    def test_before_2000_there_are_no_bars(self, make: Make) -> None:
        answer, server = fetch(make, SmallAlphaVantage(NOW), span("1999-11-01", "2000-01-01"))
        assert (answer, server.requests) == (FetchResult(()), [])

    def test_forming_candles_are_left_out(self, make: Make) -> None:
        window = span("2024-06-03", "2024-06-10")
        for timeframe, last in ((Timeframe.M30, "2024-06-05T15:30"), (Timeframe.D1, "2024-06-04")):
            got = of(fetch(make, SmallAlphaVantage(NOW), window, timeframe)[0])
            assert got.ts.max() == us(last)

    @pytest.mark.parametrize(("start", "size"), [("2024-01-12", "compact"), ("2024-01-11", "full")])
    def test_a_hundred_days_are_compact(self, make: Make, start: str, size: str) -> None:
        window = span(start, "2024-02-01")
        answer, server = fetch(make, SmallAlphaVantage(NOW), window, Timeframe.D1)
        assert [asked.query["outputsize"] for asked in server.requests] == [size]
        assert of(answer).equals(truth(Timeframe.D1, window))

    def test_a_free_key(self, make: Make) -> None:
        market = SmallAlphaVantage(NOW, free=True)
        recent = span("2024-05-01", "2024-05-30")
        assert of(fetch(make, market, recent, Timeframe.D1)[0]).equals(truth(Timeframe.D1, recent))
        for timeframe in (Timeframe.M1, Timeframe.M30, Timeframe.D1):
            with pytest.raises(NotEntitled, match="premium"):
                fetch(make, market, NOVEMBER, timeframe)

    def test_a_free_key_covers_the_last_hundred_days_and_is_refused_the_history_once(
        self, make: Make
    ) -> None:
        with serve(SmallAlphaVantage(NOW, free=True)) as server:
            provider = make("alphavantage", server.url, key=KEY, clock=lambda: NOW, requests_per_minute=99)
            for window in (NOVEMBER, span("2010-01-01", "2024-05-30")):
                with pytest.raises(TooOld, match=r"the last 100 days only: .*premium") as caught:
                    provider.fetch(stock(Timeframe.D1), window)
            assert [asked.query["outputsize"] for asked in server.requests] == ["full"]
            newer = TimeRange(caught.value.since, us("2024-05-30"))
            assert of(provider.fetch(stock(Timeframe.D1), newer)).equals(truth(Timeframe.D1, newer))
            assert [asked.query["outputsize"] for asked in server.requests] == ["full", "compact"]
            with pytest.raises(TooOld):
                provider.fetch(stock(Timeframe.D1), TimeRange(caught.value.since - 86_400_000_000, newer.end))


class TestStamps:
    @pytest.mark.parametrize("timeframe", [Timeframe.M1, Timeframe.M5, Timeframe.M15, Timeframe.M30])
    def test_one_whole_day_is_enough(self, timeframe: Timeframe) -> None:
        grid = grid_of(stock(timeframe))
        opens = grid.opens(span("2023-11-24", "2023-11-25"))
        for stamps in (opens, opens + timeframe.micros):
            found = to_opens(stamps, grid, timeframe.micros)
            assert found is not None
            assert np.array_equal(found, opens)

    def test_ambiguous_stamps(self) -> None:
        grid, step = grid_of(stock()), Timeframe.M30.micros
        opens = grid.opens(span("2024-03-04", "2024-03-05"))
        assert to_opens(opens[1:], grid, step) is None  # neither 09:30 nor 16:00
        assert to_opens(np.append(opens, opens[-1] + step), grid, step) is None  # both
        nothing = to_opens(opens[:0], grid, step)
        assert nothing is not None
        assert len(nothing) == 0

    def test_ambiguous_stamps_are_rejected_with_the_reason(self, make: Make) -> None:
        def with_pre_market(_: Received, honest: Scripted) -> Scripted:
            """Extended hours despite the request: both 16:00 and 09:30 are stamped."""
            document = orjson.loads(honest.body)
            table = document["Time Series (30min)"]
            some = next(iter(table.values()))
            days = {stamp[:10] for stamp in table}
            table |= {
                f"{day} {clock}:00": some for day in days for clock in ("04:00", "09:00", "16:00", "19:30")
            }
            return json_said(document)

        with pytest.raises(PermanentError, match="the stamps may be opens or closes") as caught:
            fetch(make, SmallAlphaVantage(NOW, change=with_pre_market), MARCH)
        assert "2024-03" in str(caught.value)

    def test_a_stray_bar_after_a_half_day_is_not_ambiguous(self, make: Make) -> None:
        def stray(_: Received, honest: Scripted) -> Scripted:
            document = orjson.loads(honest.body)
            table = document["Time Series (30min)"]
            table["2023-11-24 13:00:00"] = next(iter(table.values()))
            return json_said(document)

        got = of(fetch(make, SmallAlphaVantage(NOW, change=stray), NOVEMBER)[0])
        inside = got.take(grid_of(stock()).contains(got.ts))
        assert inside.equals(truth(Timeframe.M30, NOVEMBER))


class TestBeforeListing:
    def test_a_refused_month_is_empty_if_another_one_has_bars(self, make: Make) -> None:
        def listed_in_december(asked: Received, honest: Scripted) -> Scripted:
            refused = asked.query.get("month") == "2023-11"
            return json_said({"Error Message": "Invalid API call. Please retry"}) if refused else honest

        market = SmallAlphaVantage(NOW, change=listed_in_december)
        answer, _ = fetch(make, market, span("2023-11-01", "2024-01-01"))
        assert of(answer).equals(truth(Timeframe.M30, span("2023-12-01", "2024-01-01")))
        answer, server = fetch(make, market, NOVEMBER)
        assert answer.deliveries == ()
        assert server.requests[-1].query["function"] == "TIME_SERIES_DAILY", (
            "the days show that the symbol exists"
        )


def series_of(**about: str) -> dict[str, Any]:
    meta = {"2. Symbol": "AAPL", "4. Interval": "30min", "6. Time Zone": "US/Eastern", **about}
    cells = {"1. open": "2", "2. high": "3", "3. low": "1", "4. close": "2", "5. volume": "10"}
    return {"Meta Data": meta, "Time Series (30min)": {"2024-03-06 09:30:00": cells}}


class TestInvalidResponses:
    @pytest.mark.parametrize(
        "answer",
        [
            {},
            {"Information": "A new kind of message"},
            {"Meta Data": {"2. Symbol": "AAPL", "4. Interval": "30min", "6. Time Zone": "US/Eastern"}},
            series_of(**{"2. Symbol": "MSFT"}),
            series_of(**{"4. Interval": "5min"}),
            series_of(**{"6. Time Zone": "Asia/Tokyo"}),
            {**series_of(), "Time Series (30min)": []},
            {**series_of(), "Time Series (30min)": {"soon": {}}},
            {**series_of(), "Time Series (30min)": {"2024-03-06 09:30:00": None}} | {"Meta Data": []},
            {**series_of(), "Time Series (30min)": {"2024-03-06 09:30:00": {"1. open": "dear"}}},
            {**series_of(), "Time Series (30min)": {"2024-03-10 02:30:00": {}}},  # nonexistent
            {**series_of(), "Time Series (30min)": {"2024-11-03 01:30:00": {}}},  # ambiguous
        ],
    )
    def test_garbage(self, make: Make, answer: dict[str, Any]) -> None:
        with pytest.raises(InvalidResponse):
            fetch(make, lambda _: json_said(answer), MARCH, retry_budget_seconds=0.0)

    def test_attempts_are_limited(self, make: Make) -> None:
        with serve(lambda _: Scripted(b"<html>")) as server:
            provider = make("alphavantage", server.url, key=KEY, retry_budget_seconds=60.0)
            with pytest.raises(InvalidResponse):
                provider.fetch(stock(), MARCH)
            assert len(server.requests) == ATTEMPTS

    def test_a_missing_price_or_volume_is_visible(self, make: Make) -> None:
        def spoil(_: Received, honest: Scripted) -> Scripted:
            document = orjson.loads(honest.body)
            document["Time Series (30min)"]["2024-03-06 09:30:00"] |= {"2. high": None, "5. volume": None}
            return json_said(document)

        got = of(fetch(make, SmallAlphaVantage(NOW, change=spoil), MARCH)[0])
        assert (
            np.flatnonzero(np.isnan(got.high)).tolist() == np.flatnonzero(np.isinf(got.volume)).tolist() != []
        )


class TestErrors:
    expected: ClassVar[dict[str, tuple[type[ProviderError], float | None]]] = {
        "bad key": (WrongKey, None),
        "bad symbol/function": (UnknownSymbol, None),
        "daily limit": (RateLimited, 42_600.0),  # from 12:10 to midnight in New York
        "burst limit": (RateLimited, 1.0),
        "premium endpoint": (NotEntitled, None),
        "legacy rate limit": (RateLimited, 60.0),
    }

    @pytest.mark.parametrize("path", [WIRE, SHARED_WIRE], ids=["own", "shared"])
    def test_recorded_responses(self, make: Make, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "alpha_vantage"}
        assert set(cases) == set(self.expected)
        for name, (kind, retry_after) in self.expected.items():
            answer = json_said(cases[name]["body"], cases[name]["status"])
            with pytest.raises(kind) as caught:
                fetch(
                    make,
                    always(answer),
                    span("2024-05-01", "2024-05-30"),
                    Timeframe.D1,
                    longest_wait_seconds=0.0,
                )
            assert getattr(caught.value, "retry_after", None) == retry_after, name

    def test_the_daily_limit_echoes_the_key(self, make: Make) -> None:
        text = (
            f"We have detected your API key as {KEY} and our standard API rate limit is 25 requests per day."
        )
        with pytest.raises(RateLimited, match=r"\*\*\*") as caught:
            fetch(make, lambda _: json_said({"Information": text}), MARCH)
        assert KEY not in str(caught.value)

    def test_premium_with_the_text_of_the_burst_limit(self, make: Make) -> None:
        text = "Please consider spreading out your free API requests more sparingly (1 request per second)."
        with serve(lambda _: json_said({"Information": text})) as server:
            given = {"key": KEY, "clock": lambda: NOW, "longest_wait_seconds": 10.0}
            provider = make("alphavantage", server.url, requests_per_minute=10**6, **given)
            with pytest.raises(NotEntitled, match="does not cover it"):
                provider.fetch(stock(), MARCH)
            assert len(server.requests) == ATTEMPTS


def test_tomorrow_in_new_york() -> None:
    assert seconds_to_tomorrow(us("2024-01-15T04:59:30")) == 30.0
    assert seconds_to_tomorrow(us("2024-03-10T05:00")) == 23 * 3600.0
    assert seconds_to_tomorrow(us("2024-11-03T04:00")) == 25 * 3600.0


def test_symbols(make: Make) -> None:
    assert symbol_of(stock(symbol="BRK.B")) == "BRK.B"
    named = Series("VOD", Timeframe.D1, AssetClass.STOCKS, provider_symbols=(("alphavantage", "VOD.LON"),))
    assert symbol_of(named) == "VOD.LON"


def test_a_request_is_a_month_for_every_timeframe() -> None:
    """Larger pages would be many requests, all lost if the daily budget ends within a page."""
    page = AlphaVantage.capabilities.page
    frames = (Timeframe.M1, Timeframe.M5, Timeframe.M15, Timeframe.M30, Timeframe.H1)
    assert [page(frame) for frame in frames] == [23 * bars for bars in (390, 78, 26, 13, 7)]
