"""OANDA's forex candles: alignment with daylight saving time, pages, the complete flag, and errors."""

from __future__ import annotations

import time
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
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    PermanentError,
    ProviderError,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster.providers.oanda import PAGE_SIZE, SECONDS_PER_CONNECTION, instrument_of
from fks_backfill_dagster_tests.providers.conformance_base import KEY
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.markets import SmallOanda, bars_of, candles_of, micros_of
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
NOW = us("2024-12-04T10:20")
SPRING, AUTUMN = span("2024-03-03", "2024-03-24"), span("2024-10-27", "2024-11-17")
WEEK = span("2024-05-05", "2024-05-12")


def forex(timeframe: Timeframe = Timeframe.H1, symbol: str = "EUR/USD") -> Series:
    return Series(symbol, timeframe, AssetClass.FOREX)


def of(answer: FetchResult) -> Candles:
    return Candles.concat([delivery.candles for delivery in answer.deliveries])


def fetch(
    make: Make,
    answer: Callable[[Received], Scripted],
    window: TimeRange,
    timeframe: Timeframe = Timeframe.H1,
    **given: object,
) -> tuple[FetchResult, Server]:
    given = {"key": KEY, "clock": lambda: NOW, "requests_per_minute": 10**6, **given}
    with serve(answer) as server:
        return make("oanda", server.url, **given).fetch(forex(timeframe), window), server


def truth(timeframe: Timeframe, window: TimeRange) -> Candles:
    """Candles from 4h up are aggregated from the hours between open and close; finer ones are given."""
    opens = grid_of(forex(timeframe)).opens(window)
    if timeframe.minutes <= 60:
        return candles_of(bars_of(candles_at(opens, "EUR_USD")), volume=False)
    closes = (
        opens + timeframe.micros if timeframe is Timeframe.H4 else grid_of(forex(timeframe)).closes(opens)
    )
    made = []
    for start, end in zip(opens.tolist(), closes.tolist(), strict=True):
        hours = bars_of(candles_at(grid_of(forex()).opens(TimeRange(start, end)), "EUR_USD"))
        columns = list(zip(*(bar for _, bar in hours), strict=True))
        made.append((start, (columns[0][0], max(columns[1]), min(columns[2]), columns[3][-1], 0.0)))
    return candles_of(made, volume=False)


class TestHonest:
    @pytest.mark.parametrize("timeframe", list(Timeframe))
    @pytest.mark.parametrize("window", [SPRING, AUTUMN], ids=["spring", "autumn"])
    def test_all_timeframes_across_daylight_saving_time(
        self, make: Make, timeframe: Timeframe, window: TimeRange
    ) -> None:
        if timeframe.minutes < 30:
            window = TimeRange(
                window.start + 6 * 24 * MICROS_PER_HOUR, window.start + 9 * 24 * MICROS_PER_HOUR
            )
        answer, _ = fetch(make, SmallOanda(NOW, KEY), window, timeframe)
        assert of(answer).equals(truth(timeframe, window))
        assert len(of(answer)) >= 3

    def test_4h_stays_on_utc_multiples(self, make: Make) -> None:
        for window in (SPRING, AUTUMN):
            opens = of(fetch(make, SmallOanda(NOW, KEY), window, Timeframe.H4)[0]).ts
            assert set((opens // MICROS_PER_HOUR % 24).tolist()) == {0, 4, 8, 12, 16, 20}

    def test_requests(self, make: Make) -> None:
        expected = {
            Timeframe.H1: {"granularity": "H1"},
            Timeframe.H4: {"granularity": "H4", "dailyAlignment": "0", "alignmentTimezone": "UTC"},
            Timeframe.D1: {
                "granularity": "D",
                "dailyAlignment": "17",
                "alignmentTimezone": "America/New_York",
            },
            Timeframe.W1: {
                "granularity": "W",
                "dailyAlignment": "17",
                "alignmentTimezone": "America/New_York",
                "weeklyAlignment": "Sunday",
            },
        }
        for timeframe, query in expected.items():
            answer, server = fetch(make, SmallOanda(NOW, KEY), WEEK, timeframe)
            asked = server.requests[0]
            assert asked.path == "/v3/instruments/EUR_USD/candles"
            assert {name: asked.query[name] for name in asked.query if name not in ("from", "to")} == {
                "price": "M",
                **query,
            }
            assert asked.headers["Authorization"] == f"Bearer {KEY}"
            assert answer.deliveries[0].origin.source.startswith("/v3/instruments/EUR_USD/candles?price=M&")

    def test_pages(self, make: Make) -> None:
        window = span("2024-05-06", "2024-05-18")
        answer, server = fetch(make, SmallOanda(NOW, KEY), window, Timeframe.M1)
        assert of(answer).equals(truth(Timeframe.M1, window))
        assert answer.requests == len(server.requests) == 4
        for asked in server.requests:
            length = micros_of(asked.query["to"]) - micros_of(asked.query["from"])
            assert 0 < length <= PAGE_SIZE * Timeframe.M1.micros

    def test_an_uneven_window(self, make: Make) -> None:
        window = span("2024-05-07T09:20", "2024-05-07T12:40")
        answer, _ = fetch(make, SmallOanda(NOW, KEY), window)
        assert of(answer).equals(truth(Timeframe.H1, window))
        assert len(of(answer)) == 3

    def test_a_weekend_sends_no_request(self, make: Make) -> None:
        answer, server = fetch(make, SmallOanda(NOW, KEY), span("2024-05-11", "2024-05-12"))
        assert (answer, server.requests) == (FetchResult(()), [])

    def test_the_forming_candle_and_the_future(self, make: Make) -> None:
        window = TimeRange(NOW - 6 * MICROS_PER_HOUR, NOW + 48 * MICROS_PER_HOUR)
        answer, server = fetch(make, SmallOanda(NOW, KEY), window)
        assert of(answer).equals(truth(Timeframe.H1, TimeRange(window.start, us("2024-12-04T10:00"))))
        assert all(micros_of(asked.query["to"]) <= NOW for asked in server.requests)

    def test_the_flag_decides(self, make: Make) -> None:
        late = us("2024-05-07T12:00")

        def unfinished(_: Received, honest: Scripted) -> Scripted:
            document = orjson.loads(honest.body)
            for row in document["candles"]:
                row["complete"] = micros_of(row["time"][:19] + "Z") != late
            return json_said(document)

        answer, _ = fetch(make, SmallOanda(NOW, KEY, change=unfinished), WEEK)
        assert len(of(answer)) == 119
        assert late not in of(answer).ts

    def test_listed_at(self, make: Make) -> None:
        with serve(SmallOanda(NOW, KEY)) as server:
            provider = make("oanda", server.url, key=KEY)
            assert provider.listed_at(forex(Timeframe.M1)) == us("2005-01-02T22:00")
            assert len(server.requests) == 1
            with pytest.raises(UnknownSymbol):
                provider.listed_at(forex(symbol="EUR/XXX"))

    def test_new_connections_are_spaced(self, make: Make) -> None:
        def slow(_: Received, honest: Scripted) -> Scripted:
            return Scripted(honest.body, honest.status, honest.headers, delay=0.3)

        window = span("2024-05-06", "2024-05-18")  # four pages, four threads
        began = time.monotonic()
        _, server = fetch(make, SmallOanda(NOW, KEY, change=slow), window, Timeframe.M1)
        assert len(server.requests) == 4
        assert max(asked.at for asked in server.requests) - began >= 3 * SECONDS_PER_CONNECTION


class TestAnotherInstrument:
    """A page of another pair under the requested name: pages share a candle, which differs."""

    WINDOW = span("2024-05-06", "2024-05-18")  # four pages of minutes

    def disguised(self, times: int) -> Callable[[Received], Scripted]:
        remaining = [times]

        def answer(asked: Received) -> Scripted:
            if asked.query["from"] == "2024-05-06T00:00:00Z" and remaining[0]:
                remaining[0] -= 1
                other = SmallOanda(NOW, KEY)(replace(asked, path=asked.path.replace("EUR_USD", "USD_JPY")))
                return replace(other, body=other.body.replace(b"USD_JPY", b"EUR_USD"))
            return SmallOanda(NOW, KEY)(asked)

        return answer

    def test_once_is_repaired(self, make: Make) -> None:
        answer, server = fetch(make, self.disguised(1), self.WINDOW, Timeframe.M1)
        assert of(answer).equals(truth(Timeframe.M1, self.WINDOW))
        assert len(server.requests) == 4 + 2

    def test_always_is_rejected(self, make: Make) -> None:
        with pytest.raises(InvalidResponse, match="another instrument"):
            fetch(make, self.disguised(99), self.WINDOW, Timeframe.M1)

    def test_in_the_second_request(self, make: Make) -> None:
        """The second request includes known candles in between."""
        disguise = iter([False, True])
        holes = frozenset({us("2024-05-07T03:00"), us("2024-05-08T03:00")})

        def answer(asked: Received) -> Scripted:
            if next(disguise):
                other = SmallOanda(NOW, KEY)(replace(asked, path=asked.path.replace("EUR_USD", "USD_JPY")))
                return replace(other, body=other.body.replace(b"USD_JPY", b"EUR_USD"))
            return SmallOanda(NOW, KEY, holes)(asked)

        with pytest.raises(InvalidResponse, match="another instrument"):
            fetch(make, answer, WEEK)

    def test_seams_are_first_rows(self, make: Make) -> None:
        answer, server = fetch(make, SmallOanda(NOW, KEY), self.WINDOW, Timeframe.M1)
        (delivery,) = answer.deliveries
        starts = sorted(micros_of(asked.query["from"]) for asked in server.requests)[1:]
        assert (
            delivery.seams.tolist()
            == delivery.candles.ts[np.searchsorted(delivery.candles.ts, starts)].tolist()
        )


class TestMissing:
    missing = frozenset({us("2024-05-07T03:00"), us("2024-05-08T23:00")})

    def test_a_missing_interval_is_requested_twice(self, make: Make) -> None:
        answer, server = fetch(make, SmallOanda(NOW, KEY, self.missing), WEEK)
        whole = truth(Timeframe.H1, WEEK)
        assert of(answer).equals(whole.take(~np.isin(whole.ts, list(self.missing))))
        assert len(server.requests) == 2
        assert answer.deliveries[0].seams.tolist() == [], "the second response has no rows"

    @pytest.mark.parametrize("kept", [0, 1, 60])
    def test_a_short_page_is_repaired(self, make: Make, kept: int) -> None:
        answers = iter([kept, 10**6])

        def short(_: Received, honest: Scripted) -> Scripted:
            document = orjson.loads(honest.body)
            document["candles"] = document["candles"][: next(answers)]
            return json_said(document)

        answer, server = fetch(make, SmallOanda(NOW, KEY, change=short), WEEK)
        assert of(answer).equals(truth(Timeframe.H1, WEEK))
        assert len(server.requests) == 2

    def test_a_bad_row_is_repaired_and_delivered_too(self, make: Make) -> None:
        first = iter([True])

        def spoil(_: Received, honest: Scripted) -> Scripted:
            document = orjson.loads(honest.body)
            if next(first, False):
                document["candles"][5]["mid"]["h"] = None
            return json_said(document)

        got = of(fetch(make, SmallOanda(NOW, KEY, change=spoil), WEEK)[0])
        assert len(got) == 121
        assert np.count_nonzero(np.isnan(got.high)) == 1
        assert got.take(~np.isnan(got.high)).equals(truth(Timeframe.H1, WEEK))


def row(**changes: Any) -> dict[str, Any]:
    mid = {"o": "1.1", "h": "1.2", "l": "1.0", "c": "1.1"}
    return {"complete": True, "time": "2024-05-06T00:00:00.000000000Z", "mid": mid, "volume": 3, **changes}


def document(*rows: object, **changes: Any) -> dict[str, Any]:
    return {"instrument": "EUR_USD", "granularity": "H1", "candles": list(rows), **changes}


class TestInvalidResponses:
    @pytest.mark.parametrize(
        "answer",
        [
            json_said([]),
            json_said(document(row(), instrument="USD_JPY")),
            json_said(document(row(), granularity="M1")),
            json_said(document(row(), candles={"0": row()})),
            json_said(document(None)),
            json_said(document(1, 2)),
            json_said(document(row(time="yesterday"))),
            json_said(document(row(time=None))),
            json_said(document(row(complete=None))),
            json_said(document(row(mid=["1.1"]))),
            json_said(document(row(mid={"o": "dear", "h": "1", "l": "1", "c": "1"}))),
        ],
    )
    def test_garbage(self, make: Make, answer: Scripted) -> None:
        with pytest.raises(InvalidResponse):
            fetch(make, lambda _: answer, WEEK, retry_budget_seconds=0.0)


class TestErrors:
    @pytest.mark.parametrize("path", [WIRE, SHARED_WIRE], ids=["own", "shared"])
    def test_recorded_responses(self, make: Make, path: Path) -> None:
        if not path.exists():
            pytest.skip(f"{path.name} is only there beside the shared folder")
        expected: dict[str, tuple[type[ProviderError], str]] = {
            "bad token": (WrongKey, "Insufficient authorization"),
            "bad instrument": (UnknownSymbol, "provider_symbols"),
            "window too large": (PermanentError, "'count' exceeded"),
            "to in future": (PermanentError, "clock is ahead"),
            "from+to+count": (PermanentError, "cannot be specified"),
        }
        lines = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        cases = {case["case"]: case for case in lines if case["provider"] == "oanda"}
        assert set(cases) == set(expected)
        for name, (kind, text) in expected.items():
            answer = json_said(cases[name]["body"], cases[name]["status"])
            with pytest.raises(kind, match=text) as caught:
                fetch(make, always(answer), WEEK)
            assert type(caught.value) is kind


def test_instruments() -> None:
    assert instrument_of(forex(symbol="USD/JPY")) == "USD_JPY"
    named = Series("GOLD", Timeframe.H1, AssetClass.FOREX, provider_symbols=(("oanda", "XAU_USD"),))
    assert instrument_of(named) == "XAU_USD"
    with pytest.raises(UnknownSymbol, match="provider_symbols"):
        instrument_of(forex(symbol="EURUSD"))


def test_other_asset_classes_are_declined(make: Make) -> None:
    provider = make("oanda", "http://127.0.0.1:1", key=KEY)
    with pytest.raises(PermanentError, match="no 1h candles of crypto"):
        provider.fetch(Series("BTC/USD", Timeframe.H1, AssetClass.CRYPTO), WEEK)
