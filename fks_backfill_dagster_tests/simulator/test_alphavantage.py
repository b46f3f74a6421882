"""Alpha Vantage over HTTP: status 200, months and stamps in New York time, free and premium keys."""

from __future__ import annotations

import time
from datetime import date

import numpy as np
import pytest

from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.simulator.conftest import NOW
from fks_backfill_dagster_tests.simulator.wire import of_series, vantage, window

INTRADAY, DAILY = "TIME_SERIES_INTRADAY", "TIME_SERIES_DAILY"
FEBRUARY = window("2025-02-01", "2025-03-01")


@pytest.mark.parametrize(
    ("interval", "timeframe"),
    [("1min", "1m"), ("5min", "5m"), ("15min", "15m"), ("30min", "30m"), ("60min", "1h")],
)
def test_a_month_is_the_truth(market: LocalMarket, interval: str, timeframe: str) -> None:
    answer = vantage(market, INTRADAY, interval=interval, month="2025-02")
    truth = market.truth("alphavantage", "AAPL", Timeframe(timeframe), FEBRUARY)
    assert of_series(answer).equals(truth)
    assert len(truth) > 100
    document = answer.json()
    stamps = list(document[f"Time Series ({interval})"])
    assert stamps == sorted(stamps, reverse=True)
    assert document["Meta Data"]["6. Time Zone"] == "US/Eastern"
    assert document["Meta Data"]["3. Last Refreshed"] == stamps[0]


def test_months_are_those_of_new_york(market: LocalMarket) -> None:
    series = of_series(vantage(market, INTRADAY, interval="1min", month="2025-02", extended_hours="true"))
    assert series.ts[-1] > instant("2025-03-01")  # the evening of 28 February
    assert series.ts[-1] < instant("2025-03-01T01:00")


@pytest.mark.server
def test_extended_hours_and_adjusted_prices_are_the_default() -> None:
    with LocalMarket(MarketConfig(now=NOW, splits=(Split("AAPL", date(2025, 2, 14), 2),))) as market:
        requested = {"interval": "30min", "month": "2025-02"}
        plain = of_series(vantage(market, INTRADAY, **requested, extended_hours=None, adjusted=None))
        raw = of_series(vantage(market, INTRADAY, **requested))
        daily = of_series(vantage(market, DAILY)).within(FEBRUARY)
        truth = market.truth("alphavantage", "AAPL", Timeframe.D1, FEBRUARY)
    shared = plain.take(np.isin(plain.ts, raw.ts))
    assert len(plain) > len(raw)
    before = raw.ts < instant("2025-02-14")
    assert shared.open[before] == pytest.approx(raw.open[before] / 2, rel=1e-9)
    assert shared.open[~before].tolist() == raw.open[~before].tolist()
    assert daily.equals(truth)  # days are always as traded


def test_extended_hours_include_pre_market_trades(market: LocalMarket) -> None:
    requested = {"interval": "60min", "month": "2025-02"}
    regular = of_series(vantage(market, INTRADAY, **requested))
    mixed = of_series(vantage(market, INTRADAY, **requested, extended_hours="true"))
    opens = regular.ts[(regular.ts // (60 * MICROS_PER_MINUTE)) % 24 == 14]  # 09:00 in February
    volumes = {name: c.volume[np.isin(c.ts, opens)] for name, c in (("r", regular), ("m", mixed))}
    assert len(opens) == 19
    assert (volumes["m"] >= volumes["r"]).all()
    assert (volumes["m"] > volumes["r"]).sum() > 10


def test_days_are_keyed_by_date_and_the_running_day_is_absent(market: LocalMarket) -> None:
    market.set_clock(instant("2025-03-20T15:00"))
    requested = window("2017-01-01", "2025-03-21")
    full = vantage(market, DAILY)
    assert of_series(full).equals(market.truth("alphavantage", "AAPL", Timeframe.D1, requested))
    assert next(iter(full.json()["Time Series (Daily)"])) == "2025-03-19"
    compact = of_series(vantage(market, DAILY, outputsize=None))
    assert compact.equals(of_series(full).take(slice(-100, None)))


def test_compact_and_trailing_days(market: LocalMarket) -> None:
    month = of_series(vantage(market, INTRADAY, interval="5min", month="2025-02"))
    compact = of_series(vantage(market, INTRADAY, interval="5min", month="2025-02", outputsize=None))
    assert compact.equals(month.take(slice(-100, None)))
    trailing = of_series(vantage(market, INTRADAY, interval="5min"))
    assert trailing.ts[0] >= instant("2025-02-18T14:30")
    assert trailing.ts[-1] < NOW


@pytest.mark.server
def test_close_stamps_are_an_option() -> None:
    with LocalMarket(MarketConfig(now=NOW, close_stamped=True)) as market:
        series = of_series(vantage(market, INTRADAY, interval="15min", month="2025-02"))
        truth = market.truth("alphavantage", "AAPL", Timeframe.M15, FEBRUARY)
    assert series.ts.tolist() == (truth.ts + 15 * MICROS_PER_MINUTE).tolist()


def test_a_free_key_has_compact_days_only(market: LocalMarket) -> None:
    premium = "This is a premium endpoint"
    for function, params in (
        (INTRADAY, {"interval": "5min"}),
        (DAILY, {"outputsize": "full"}),
    ):
        answer = vantage(market, function, apikey="free-1", **params)
        assert answer.status_code == 200
        assert premium in answer.json()["Information"]
    assert len(of_series(vantage(market, DAILY, apikey="free-1", outputsize="compact"))) == 100


def test_a_free_keys_limits_return_200_and_quote_the_key(market: LocalMarket) -> None:
    market.post("/sim/limits", alphavantage=3)
    answers = [vantage(market, DAILY, apikey="free-secret", outputsize=None) for _ in range(4)]
    assert [a.status_code for a in answers] == [200] * 4
    assert ["Information" in a.json() for a in answers] == [False, False, False, True]
    message = answers[-1].json()["Information"]
    assert message.startswith(
        "We have detected your API key as free-secret and our standard API rate limit is 3"
    )
    assert "free-secret" not in str(market.journal())
    assert "Meta Data" in vantage(market, DAILY, apikey="premium").json()


def test_one_request_a_second(market: LocalMarket) -> None:
    market.post("/sim/limits", alphavantage_burst=1)
    time.sleep(1 - time.time() % 1)  # the limit is per clock second: start at the beginning of one
    first, second = (vantage(market, DAILY, apikey="free", outputsize=None).json() for _ in range(2))
    assert "Meta Data" in first
    assert "1 request per second" in second["Information"]


@pytest.mark.parametrize(
    ("function", "params", "sentence"),
    [
        (DAILY, {"apikey": None}, "the parameter apikey is invalid or missing"),
        (DAILY, {"apikey": "bad-key"}, "the parameter apikey is invalid or missing"),
        (DAILY, {"symbol": "NOPE"}, "for TIME_SERIES_DAILY."),
        ("TIME_SERIES_HOURLY", {}, "for TIME_SERIES_HOURLY."),
        (INTRADAY, {"interval": "4h"}, "for TIME_SERIES_INTRADAY."),
        (INTRADAY, {"interval": "5min", "month": "1999-12"}, "for TIME_SERIES_INTRADAY."),
    ],
)
def test_errors_have_status_200(
    market: LocalMarket, function: str, params: dict[str, str | None], sentence: str
) -> None:
    answer = vantage(market, function, **params)
    assert answer.status_code == 200
    assert sentence in answer.json()["Error Message"]
