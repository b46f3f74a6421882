"""OANDA over HTTP: alignment, the complete flag, bounds, page limit, errors."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.simulator.conftest import NOW
from fks_backfill_dagster_tests.simulator.wire import candles, of_candles, window

REQUESTED = window("2025-03-06", "2025-03-12")  # summer time begins in between


def opens(answer: requests.Response) -> list[str]:
    return [candle["time"][:16] for candle in answer.json()["candles"]]


@pytest.mark.parametrize(
    ("timeframe", "params"),
    [
        ("1m", {"granularity": "M1", "of": window("2025-03-07", "2025-03-08")}),
        ("5m", {"granularity": "M5"}),
        ("15m", {"granularity": "M15"}),
        ("30m", {"granularity": "M30"}),
        ("1h", {"granularity": "H1"}),
        ("4h", {"granularity": "H4", "dailyAlignment": 0, "alignmentTimezone": "UTC"}),
        ("1d", {"granularity": "D"}),
        ("1w", {"granularity": "W", "weeklyAlignment": "Sunday"}),
    ],
)
def test_the_matching_alignment_is_the_truth(
    market: LocalMarket, timeframe: str, params: dict[str, Any]
) -> None:
    of = params.get("of", REQUESTED)
    served = of_candles(candles(market, **{"of": of, **params}))
    truth = market.truth("oanda", "EUR/USD", Timeframe(timeframe), of)
    assert served.within(of).equals(truth)
    assert len(truth) > 0


def test_the_default_alignment_differs(market: LocalMarket) -> None:
    assert opens(candles(market, granularity="H4", of=window("2025-03-06", "2025-03-06T12:00"))) == [
        "2025-03-05T22:00",
        "2025-03-06T02:00",
        "2025-03-06T06:00",
        "2025-03-06T10:00",
    ]
    assert opens(candles(market, granularity="D", of=REQUESTED)) == [
        "2025-03-05T22:00",
        "2025-03-06T22:00",
        "2025-03-09T21:00",
        "2025-03-10T21:00",
        "2025-03-11T21:00",
    ]
    assert opens(candles(market, granularity="W", of=REQUESTED)) == ["2025-02-28T22:00", "2025-03-07T22:00"]


def test_candles_are_mid_prices_as_strings(market: LocalMarket) -> None:
    document = candles(market, granularity="H1", count=2).json()
    assert (document["instrument"], document["granularity"]) == ("EUR_USD", "H1")
    candle = document["candles"][0]
    assert set(candle) == {"complete", "volume", "time", "mid"}
    assert candle["time"].endswith(":00:00.000000000Z")
    assert all(isinstance(candle["mid"][key], str) for key in "ohlc")
    assert isinstance(candle["volume"], int)


def test_the_forming_candle_is_not_complete(market: LocalMarket) -> None:
    flags = [c["complete"] for c in candles(market, granularity="H1", count=3).json()["candles"]]
    assert flags == [True, True, False]
    market.set_clock(instant("2025-03-20T13:00"))
    flags = [c["complete"] for c in candles(market, granularity="H1", count=3).json()["candles"]]
    assert flags == [True, True, False]  # one that has just begun
    market.set_clock(instant("2025-03-22T12:00"))  # a weekend
    assert opens(candles(market, granularity="H1", count=1)) == ["2025-03-21T20:00"]


def test_bounds(market: LocalMarket) -> None:
    first = "2025-03-06T10:20:00.000000000Z"
    assert opens(candles(market, granularity="H1", **{"from": first}, to="2025-03-06T12:00:00Z")) == [
        "2025-03-06T10:00",
        "2025-03-06T11:00",
    ]
    without: dict[str, Any] = {"from": first, "includeFirst": "false", "count": 2}
    assert opens(candles(market, granularity="H1", **without)) == ["2025-03-06T11:00", "2025-03-06T12:00"]
    assert (
        opens(candles(market, granularity="H1", to="2025-03-10T00:00:00Z", count=4))
        == [
            "2025-03-09T21:00",
            "2025-03-09T22:00",
            "2025-03-09T23:00",
        ][-3:]
        or opens(candles(market, granularity="H1", to="2025-03-10T00:00:00Z", count=4))[0]
        == "2025-03-07T21:00"
    )
    assert len(opens(candles(market, granularity="M5"))) == 500
    assert opens(candles(market, granularity="H1", **{"from": "0"}, count=1)) == ["2017-01-01T22:00"]


def test_unix_times(market: LocalMarket) -> None:
    url = f"{market.oanda_url}/v3/instruments/EUR_USD/candles?granularity=H1&count=1&from=1741255200.5"
    headers = {"Authorization": "Bearer any", "Accept-Datetime-Format": "UNIX"}
    (candle,) = requests.get(url, headers=headers, timeout=10).json()["candles"]
    assert candle["time"] == "1741255200.000000000"


def test_minutes_without_trades_are_omitted(market: LocalMarket) -> None:
    of = window("2025-03-06", "2025-03-07")
    served = of_candles(candles(market, granularity="M1", of=of))
    assert 1320 < len(served) < 1440


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"count": 5001}, "Maximum value for 'count' exceeded"),
        (
            {"granularity": "M1", "of": window("2025-03-06", "2025-03-10")},
            "Maximum value for 'count' exceeded",
        ),
        (
            {"of": REQUESTED, "count": 5},
            "'count' cannot be specified when 'to' and 'from' parameters are set",
        ),
        ({"to": "2025-03-20T12:34:57Z"}, "Invalid value specified for 'to'. Time is in the future"),
        ({"from": "2025-03-21T00:00:00Z"}, "Invalid value specified for 'from'. Time is in the future"),
        ({"granularity": "1h"}, "Invalid value specified for 'granularity'"),
        ({"from": "yesterday"}, "Invalid value specified for 'from'"),
        ({"price": "BA"}, "Invalid value specified for 'price'"),
        ({"granularity": "D", "dailyAlignment": 24}, "Invalid value specified for 'dailyAlignment'"),
        (
            {"granularity": "D", "alignmentTimezone": "Mars/X"},
            "Invalid value specified for 'alignmentTimezone'",
        ),
        ({"granularity": "W", "weeklyAlignment": "sunday"}, "Invalid value specified for 'weeklyAlignment'"),
    ],
)
def test_bad_requests(market: LocalMarket, params: dict[str, Any], message: str) -> None:
    answer = candles(market, **{"granularity": "H1", **params})
    assert (answer.status_code, answer.json()) == (400, {"errorMessage": message})


def test_instrument_and_token(market: LocalMarket) -> None:
    for instrument in ("EUR_XXX", "EURUSD", "BTC_USDT"):
        answer = candles(market, instrument, granularity="H1")
        assert answer.status_code == 400
        assert answer.json()["errorMessage"] == "Invalid value specified for 'instrument'"
    for key in ("", "bad-key"):
        rejected = candles(market, key=key, granularity="H1")
        assert rejected.status_code == 401
        assert rejected.json()["errorMessage"] == "Insufficient authorization to perform request."
        assert rejected.headers["RequestID"]


def test_requests_a_second(market: LocalMarket) -> None:
    market.post("/sim/limits", oanda=2)
    assert 429 in [candles(market, granularity="D", count=1).status_code for _ in range(12)]


def test_outages_are_omitted(market: LocalMarket) -> None:
    market.plant_outage("oanda", window("2025-03-06T09:30", "2025-03-06T12:00"), symbol="EUR/USD")
    of = window("2025-03-06T08:00", "2025-03-06T14:00")
    answer = candles(market, granularity="H1", of=of)
    assert opens(answer) == [f"2025-03-06T{hour:02d}:00" for hour in (8, 12, 13)]
    assert of_candles(answer).equals(market.truth("oanda", "EUR_USD", Timeframe.H1, of))
    assert len(market.truth("polygon", "C:EURUSD", Timeframe.H1, of)) == 6
    assert (NOW - of.end) > MICROS_PER_HOUR
