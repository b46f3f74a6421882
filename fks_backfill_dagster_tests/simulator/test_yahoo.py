"""Yahoo's chart over HTTP: bar alignment, nulls, the latest bar, splits, depth, errors."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.simulator.conftest import NOW
from fks_backfill_dagster_tests.simulator.wire import chart, of_chart, window

SESSION = window("2025-03-19T13:30", "2025-03-19T20:00")
OPEN_TO_OPEN = int(13.5 * MICROS_PER_HOUR)


@pytest.mark.parametrize("interval", ["1m", "5m", "15m", "30m"])
def test_intraday_bars_are_the_truth_with_nulls_without_trades(market: LocalMarket, interval: str) -> None:
    answer = chart(market, interval=interval, of=window("2025-03-17", "2025-03-20"))
    result = answer.json()["chart"]["result"][0]
    timeframe = Timeframe(interval)
    truth = market.truth("yahoo", "AAPL", timeframe, window("2025-03-17", "2025-03-20"))
    assert of_chart(answer).equals(truth)
    assert len(result["timestamp"]) == 3 * 390 // timeframe.minutes
    assert len(truth) < len(result["timestamp"]) or timeframe.minutes > 1
    quote = result["indicators"]["quote"][0]
    assert {len(column) for column in quote.values()} == {len(result["timestamp"])}


def test_days_are_stamped_with_the_open_of_the_session(market: LocalMarket) -> None:
    days = of_chart(chart(market, interval="1d", of=window("2025-03-10", "2025-03-20")))
    truth = market.truth("yahoo", "AAPL", Timeframe.D1, window("2025-03-10", "2025-03-20"))
    assert days.ts.tolist() == (truth.ts + OPEN_TO_OPEN).tolist()
    assert days.close.tolist() == truth.close.tolist()
    assert days.volume.tolist() == truth.volume.tolist()


def test_hours_begin_on_the_half_hour(market: LocalMarket) -> None:
    hours = of_chart(chart(market, interval="1h", of=SESSION))
    assert [(ts - SESSION.start) / MICROS_PER_HOUR for ts in hours.ts.tolist()] == list(range(7))
    parts = of_chart(chart(market, interval="30m", of=SESSION))
    assert hours.high.tolist() == [parts.high[n : n + 2].max() for n in range(0, 13, 2)]
    assert hours.close.tolist() == [*parts.close[1:13:2].tolist(), parts.close[12]]


def test_pre_and_post_market_only_on_request(market: LocalMarket) -> None:
    of = window("2025-03-19", "2025-03-20")
    regular, whole = (
        of_chart(chart(market, interval="5m", of=of, includePrePost=flag)) for flag in ("false", "true")
    )
    inside = whole.within(SESSION)
    assert inside.equals(regular)
    assert len(whole) > len(regular) + 10
    meta = chart(market, interval="5m", of=of, includePrePost="true").json()["chart"]["result"][0]["meta"]
    assert {name: len(periods) for name, periods in meta["tradingPeriods"].items()} == {
        "pre": 1,
        "regular": 1,
        "post": 1,
    }


def test_the_latest_bar_is_stamped_with_the_last_trade(market: LocalMarket) -> None:
    now = instant("2025-03-20T15:34:56")
    market.set_clock(now)
    of = window("2025-03-20", "2025-03-21")
    for interval, bars in {"1d": 1, "1h": 3, "5m": 25}.items():
        stamps = chart(market, interval=interval, of=of).json()["chart"]["result"][0]["timestamp"]
        assert len(stamps) == bars
        assert stamps[-1] == now // 1_000_000
    market.set_clock(instant("2025-03-20T22:00"))  # a day keeps that stamp after the close
    day, hours = (
        chart(market, interval=interval, of=of).json()["chart"]["result"][0]["timestamp"]
        for interval in ("1d", "1h")
    )
    assert day == [instant("2025-03-20T20:00") // 1_000_000]
    assert hours[-1] == instant("2025-03-20T19:30") // 1_000_000


def test_weeks_begin_on_monday_in_new_york(market: LocalMarket) -> None:
    weeks = of_chart(chart(market, interval="1wk", of=window("2025-03-01", "2025-03-15")))
    assert weeks.ts.tolist() == [instant("2025-03-03T05:00"), instant("2025-03-10T04:00")]
    truth = market.truth("yahoo", "AAPL", Timeframe.W1, window("2025-03-01", "2025-03-15"))
    assert weeks.high.tolist() == truth.high.tolist()
    assert weeks.volume.tolist() == truth.volume.tolist()


@pytest.fixture(scope="module")
def split() -> Iterator[LocalMarket]:
    splits = (Split("AAPL", date(2025, 3, 12), 4), Split("AAPL", date(2025, 6, 1), 2))
    with LocalMarket(MarketConfig(now=NOW, splits=splits)) as market:
        yield market


@pytest.mark.server
def test_prices_are_adjusted_by_the_splits_so_far(split: LocalMarket) -> None:
    requested = window("2025-03-10", "2025-03-15")
    answer = chart(split, interval="1d", of=requested, events="div,splits")
    days, truth = of_chart(answer), split.truth("yahoo", "AAPL", Timeframe.D1, requested)
    ratio = np.array([4, 4, 1, 1, 1])
    assert days.open == pytest.approx(truth.open / ratio, rel=1e-9)
    assert days.volume.tolist() == (truth.volume * ratio).tolist()
    events = answer.json()["chart"]["result"][0]["events"]["splits"]
    at = instant("2025-03-12T13:30") // 1_000_000
    assert events == {str(at): {"date": at, "numerator": 4, "denominator": 1, "splitRatio": "4:1"}}
    assert truth.open[1] > 3 * truth.open[2]
    assert "events" not in chart(split, interval="1d", of=requested).json()["chart"]["result"][0]


@pytest.mark.server
def test_single_precision_matches_the_real_prices() -> None:
    with LocalMarket(MarketConfig(now=NOW, single_precision=True)) as market:
        days = of_chart(chart(market, interval="1d", of=window("2025-03-10", "2025-03-15")))
        truth = market.truth("yahoo", "AAPL", Timeframe.D1, window("2025-03-10", "2025-03-15"))
    assert days.close.tolist() == truth.close.astype(np.float32).astype(float).tolist()
    assert days.close.tolist() != truth.close.tolist()


@pytest.mark.parametrize(
    ("interval", "back", "days", "sentence"),
    [
        ("1m", 20, 9, "Only 8 days worth of 1m granularity data are allowed to be fetched per request."),
        ("1m", 31, 2, "The requested range must be within the last 30 days."),
        ("15m", 61, 3, "The requested range must be within the last 60 days."),
        ("1h", 731, 3, "The requested range must be within the last 730 days."),
    ],
)
def test_a_request_beyond_the_depth_is_rejected_as_a_whole(
    market: LocalMarket, interval: str, back: int, days: int, sentence: str
) -> None:
    start = NOW // 1_000_000 - back * 86_400
    end = start + days * 86_400
    answer = chart(market, interval=interval, period1=start, period2=end)
    assert answer.status_code == 422
    error = answer.json()["chart"]["error"]
    assert error["code"] == "Unprocessable Entity"
    where = f"{interval} data not available for startTime={start} and endTime={end}."
    assert error["description"] == f"{where} {sentence}"
    near = NOW // 1_000_000 - (back - 1) * 86_400
    assert chart(market, interval=interval, period1=near, period2=near + 86_400).status_code == 200


@pytest.mark.parametrize(
    ("symbol", "params", "status", "code"),
    [
        ("NOPE", {"interval": "1d", "range": "5d"}, 404, "Not Found"),
        ("AAPL", {"interval": "4h", "range": "5d"}, 400, "Bad Request"),
        ("AAPL", {"interval": "1d", "range": "7y"}, 422, "Unprocessable Entity"),
        ("AAPL", {"interval": "1d", "period1": "soon"}, 400, "Bad Request"),
        ("AAPL", {"interval": "1d", "period1": "20", "period2": "10"}, 400, "Bad Request"),
    ],
)
def test_errors(market: LocalMarket, symbol: str, params: dict[str, str], status: int, code: str) -> None:
    answer = chart(market, symbol, **params)
    assert answer.status_code == status
    assert answer.json()["chart"]["error"]["code"] == code
    assert answer.json()["chart"]["result"] is None


def test_an_empty_range_is_a_result_without_bars(market: LocalMarket) -> None:
    answer = chart(market, interval="1d", of=window("2025-03-15", "2025-03-17"))  # a weekend
    result = answer.json()["chart"]["result"][0]
    assert result["indicators"] == {"quote": [{}], "adjclose": [{}]}
    assert "timestamp" not in result


def test_ranges_count_back_from_now(market: LocalMarket) -> None:
    market.set_clock(instant("2025-03-20T22:00"))
    assert len(of_chart(chart(market, interval="1d", range="5d"))) == 5
    month = of_chart(chart(market, interval="1d", range="1mo"))
    assert month.ts[0] == instant("2025-02-19T14:30") or month.ts[0] == instant("2025-02-18T14:30")
    everything = of_chart(chart(market, interval="1d", range="max"))
    assert everything.ts[0] == instant("2017-01-03T14:30")


def test_meta_contains_zone_and_sessions(market: LocalMarket) -> None:
    meta = chart(market, interval="1d", range="5d").json()["chart"]["result"][0]["meta"]
    assert (meta["symbol"], meta["exchangeTimezoneName"], meta["instrumentType"]) == (
        "AAPL",
        "America/New_York",
        "EQUITY",
    )
    regular = meta["currentTradingPeriod"]["regular"]
    assert regular["end"] - regular["start"] == 6.5 * 3600
    assert (regular["timezone"], regular["gmtoffset"]) == ("EDT", -4 * 3600)
    assert meta["gmtoffset"] == -4 * 3600


def test_cookie_and_crumb(market: LocalMarket) -> None:
    cookie = requests.get(f"{market.yahoo_url}/", timeout=10)
    assert cookie.status_code == 404
    assert cookie.cookies["A3"]
    assert requests.get(f"{market.yahoo_url}/v1/test/getcrumb", timeout=10).text == "local.market"


def test_too_many_requests_is_a_text(market: LocalMarket) -> None:
    market.post("/sim/limits", yahoo=2)
    answers = [chart(market, interval="1d", range="5d") for _ in range(5)]
    rejected = [answer for answer in answers if answer.status_code == 429]
    assert rejected
    assert rejected[0].text == "Edge: Too Many Requests"
    assert rejected[0].headers["Content-Type"] == "text/html"


def test_a_class_is_written_with_a_dash(market: LocalMarket) -> None:
    answer = chart(market, "BRK-B", interval="1d", range="5d")
    assert answer.json()["chart"]["result"][0]["meta"]["symbol"] == "BRK-B"
    truth = market.truth("yahoo", "BRK.B", Timeframe.D1, window("2025-03-18", "2025-03-20"))
    served = of_chart(answer).within(window("2025-03-18", "2025-03-20"))
    assert served.close.tolist() == truth.close.tolist()
    assert truth.ts[-1] - truth.ts[0] == MICROS_PER_DAY
