"""Polygon's aggregates over HTTP: keys, snapping, base-bar limits, cursors; stocks and currency pairs."""

from __future__ import annotations

from dataclasses import replace
from datetime import date
from typing import Any

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.frames import local_dates
from fks_backfill_dagster_tests.simulator.wire import (
    aggs,
    chart,
    klines,
    of_aggs,
    of_chart,
    of_klines,
    of_series,
    span,
    vantage,
    window,
)


def follow(market: LocalMarket, path: str, **params: Any) -> tuple[list[dict[str, Any]], int]:
    """All results over all pages, and the number of pages."""
    page = aggs(market, path, **params).json()
    results, pages = list(page.get("results", [])), 1
    while "next_url" in page:
        assert page["next_url"].startswith(f"{market.polygon_url}/v2/aggs/")
        page = requests.get(page["next_url"], headers={"Authorization": "Bearer any"}, timeout=10).json()
        results, pages = results + page.get("results", []), pages + 1
    return results, pages


def test_a_ticker_is_the_usdt_market(market: LocalMarket) -> None:
    requested = window("2024-01-01", "2024-01-02")
    page = aggs(market, "X:BTCUSD/range/1/hour/2024-01-01/2024-01-01", limit=50000).json()
    assert page["resultsCount"] == 24
    assert page["queryCount"] == 1440
    assert page["ticker"] == "X:BTCUSD"
    assert of_aggs(page["results"]).equals(market.truth("polygon", "BTC/USDT", Timeframe.H1, requested))
    assert of_aggs(page["results"]).equals(of_klines(klines(market, interval="1h", **span(requested)).json()))


@pytest.mark.server
def test_an_offset_moves_all_prices() -> None:
    with LocalMarket(MarketConfig(polygon_offset_ppm=1000)) as market:
        requested = window("2024-01-01", "2024-01-02")
        ours = market.truth("polygon", "BTC/USDT", Timeframe.H1, requested)
        theirs = market.truth("binance", "BTC/USDT", Timeframe.H1, requested)
        assert ours.close == pytest.approx(theirs.close * 1.001, rel=1e-6)
        assert (ours.close > theirs.close).all()


def test_from_and_to_snap_outwards(market: LocalMarket) -> None:
    start, end = instant("2024-01-01T01:20") // 1000, instant("2024-01-01T03:05") // 1000
    results, _ = follow(market, f"X:BTCUSD/range/1/hour/{start}/{end}", limit=50000)
    assert [r["t"] for r in results] == [instant(f"2024-01-01T0{h}:00") // 1000 for h in (1, 2, 3)]


@pytest.mark.parametrize("sort", ["asc", "desc"])
@pytest.mark.parametrize(
    ("mult", "unit", "timeframe"), [(1, "hour", "1h"), (15, "minute", "15m"), (1, "day", "1d")]
)
def test_pages_are_contiguous(market: LocalMarket, mult: int, unit: str, timeframe: str, sort: str) -> None:
    requested = window("2024-01-01", "2024-01-05")
    market.plant_outage("polygon", window("2024-01-02T03:20", "2024-01-02T07:00"))
    market.plant_halt(window("2024-01-03T03:20", "2024-01-03T07:00"))
    limit = 2 if unit == "day" else 1000
    path = f"X:BTCUSD/range/{mult}/{unit}/2024-01-01/2024-01-04"
    results, pages = follow(market, path, sort=sort, limit=limit)
    assert pages > 1
    ordered = results if sort == "asc" else results[::-1]
    truth = market.truth("polygon", "BTC/USDT", Timeframe(timeframe), requested)
    assert of_aggs(ordered).equals(truth)


def test_limit_counts_minutes_even_for_hours(market: LocalMarket) -> None:
    page = aggs(market, "X:BTCUSD/range/1/hour/2024-01-01/2024-01-05", limit=120).json()
    assert (page["queryCount"], page["resultsCount"]) == (120, 2)
    tiny = aggs(market, "X:BTCUSD/range/1/hour/2024-01-01/2024-01-05", limit=1).json()
    assert tiny["resultsCount"] == 1


def test_weeks_begin_on_sunday(market: LocalMarket) -> None:
    results, _ = follow(market, "X:BTCUSD/range/1/week/2024-01-03/2024-01-10")
    assert [r["t"] for r in results] == [instant("2023-12-31") // 1000, instant("2024-01-07") // 1000]


@pytest.mark.parametrize("ticker", ["X:NOPEUSD", "NOPE", "C:EURXXX", "X:BTCUSDT", "BTCUSD"])
def test_an_unknown_ticker_is_an_empty_200(market: LocalMarket, ticker: str) -> None:
    answer = aggs(market, f"{ticker}/range/1/hour/2024-01-01/2024-01-02")
    assert answer.status_code == 200
    assert answer.json()["resultsCount"] == 0
    assert "results" not in answer.json()


def test_keys(market: LocalMarket) -> None:
    path = "X:BTCUSD/range/1/hour/2024-01-01/2024-01-02"
    missing, bad = aggs(market, path, key=""), aggs(market, path, key="bad-key")
    assert (missing.status_code, missing.json()["error"]) == (401, "API Key was not provided")
    assert (bad.status_code, bad.json()["error"]) == (401, "Unknown API Key")
    assert aggs(market, path, key="", apiKey="in-the-url").status_code == 200
    assert "in-the-url" not in str(market.journal())


@pytest.mark.parametrize(
    "path",
    [
        "X:BTCUSD/range/1/decade/2024-01-01/2024-01-02",
        "X:BTCUSD/range/0/hour/2024-01-01/2024-01-02",
        "X:BTCUSD/range/1/hour/2024-01-03/2024-01-02",
        "X:BTCUSD/range/1/hour/tomorrow/2024-01-02",
        "X:BTCUSD/range/1/hour/2024-01-01/2024-01-02?limit=50001",
        "X:BTCUSD/range/1/hour/2024-01-01/2024-01-02?cursor=%21",
    ],
)
def test_bad_requests(market: LocalMarket, path: str) -> None:
    answer = aggs(market, path)
    assert answer.status_code == 400
    assert answer.json()["status"] == "ERROR"


def test_requests_a_minute(market: LocalMarket) -> None:
    path = "X:BTCUSD/range/1/hour/2024-01-01/2024-01-02"
    market.post("/sim/limits", polygon=5)
    statuses = [aggs(market, path).status_code for _ in range(12)]
    assert statuses[:5] == [200] * 5
    assert 429 in statuses


def test_prepared_pages_equal_those_made_on_demand(market: LocalMarket) -> None:
    requested = window("2024-01-01", "2024-02-20")
    edges = f"{requested.start // 1000}/{requested.end // 1000 - 1}"
    path = f"X:BTCUSD/range/1/minute/{edges}"
    before, pages = follow(market, path, limit=50000, adjusted="false")
    assert market.prepare("polygon", "BTC/USDT", Timeframe.M1, requested)["answers"] == pages == 2
    assert follow(market, path, limit=50000, adjusted="false")[0] == before


@pytest.mark.parametrize(("ticker", "symbol"), [("AAPL", "AAPL"), ("C:EURUSD", "EUR/USD")])
@pytest.mark.parametrize(("mult", "timeframe"), [(1, "1m"), (5, "5m"), (30, "30m")])
def test_minutes_of_stocks_and_pairs(
    market: LocalMarket, ticker: str, symbol: str, mult: int, timeframe: str
) -> None:
    requested = window("2024-03-04", "2024-03-07")
    path = f"{ticker}/range/{mult}/minute/2024-03-04/2024-03-06"
    results, pages = follow(market, path, limit=1000, adjusted="false")
    truth = market.truth("polygon", symbol, Timeframe(timeframe), requested)
    served = of_aggs(results)
    inside = served.take(np.isin(served.ts, truth.ts))
    assert inside.close.tolist() == truth.close.tolist()
    assert inside.ts.tolist() == truth.ts.tolist()
    assert pages > 1
    if symbol == "AAPL":  # with pre- and post-market
        assert inside.volume.tolist() == truth.volume.tolist()
        assert len(served) > len(truth)
    else:
        assert len(served) == len(truth)


def test_the_hour_at_nine_includes_pre_market_trades(market: LocalMarket) -> None:
    day = "2024-03-05/2024-03-05"
    hours, _ = follow(market, f"AAPL/range/1/hour/{day}", limit=50000, adjusted="false")
    halves, _ = follow(market, f"AAPL/range/30/minute/{day}", limit=50000, adjusted="false")
    nine = instant("2024-03-05T14:00") // 1000
    (hour,) = (bar for bar in hours if bar["t"] == nine)
    parts = [bar for bar in halves if bar["t"] in (nine, nine + 1_800_000)]
    assert len(parts) == 2
    assert (hour["o"], hour["c"]) == (parts[0]["o"], parts[1]["c"])
    assert hour["v"] == sum(bar["v"] for bar in parts)
    truth = market.truth("polygon", "AAPL", Timeframe.H1, window("2024-03-05", "2024-03-06"))
    assert hour["v"] > truth.volume[0] == parts[1]["v"]


def test_days_and_weeks_of_stocks_are_those_of_new_york(market: LocalMarket) -> None:
    days, _ = follow(market, "AAPL/range/1/day/2024-03-08/2024-03-12", adjusted="false")
    assert [bar["t"] * 1000 for bar in days] == [
        instant("2024-03-08T05:00"),  # summer time begins on the 10th
        instant("2024-03-11T04:00"),
        instant("2024-03-12T04:00"),
    ]
    weeks, _ = follow(market, "AAPL/range/1/week/2024-03-06/2024-03-12", adjusted="false")
    assert [bar["t"] * 1000 for bar in weeks] == [instant("2024-03-03T05:00"), instant("2024-03-10T05:00")]
    pairs, _ = follow(market, "C:EURUSD/range/1/day/2024-03-08/2024-03-10")
    friday, saturday, sunday = pairs
    assert [bar["t"] * 1000 for bar in pairs] == [instant(f"2024-03-{day}") for day in ("08", "09", "10")]
    assert 20 * saturday["v"] < sunday["v"] < friday["v"]


def official_days(market: LocalMarket, requested: TimeRange) -> dict[str, Candles]:
    """AAPL's days by date from the three stock providers, for the dates of `requested`."""
    first, last = (f"{to_datetime(at):%Y-%m-%d}" for at in (requested.start, requested.end - 1))
    answer = aggs(market, f"AAPL/range/1/day/{first}/{last}", adjusted="false", limit=50000)
    found = {
        "polygon": of_aggs(answer.json()["results"]),
        "yahoo": of_chart(chart(market, interval="1d", of=requested)),
        "alphavantage": of_series(vantage(market, "TIME_SERIES_DAILY")).within(requested),
    }
    dated = {name: local_dates(days.ts) for name, days in found.items() if name != "alphavantage"}
    return {name: replace(days, ts=dated.get(name, days.ts)) for name, days in found.items()}


def test_all_providers_serve_the_same_official_days(market: LocalMarket) -> None:
    requested = window("2024-06-24", "2024-12-14")  # half-days, holidays, and a change of the clocks
    served = official_days(market, requested)
    for name, days in served.items():
        assert days.equals(market.truth(name, "AAPL", Timeframe.D1, requested)), name
    days = served["polygon"]
    assert len(days) == grid_of(Series("AAPL", Timeframe.D1, AssetClass.STOCKS)).count(requested)
    minutes = market.truth("polygon", "AAPL", Timeframe.M1, requested)
    first = np.searchsorted(minutes.ts, days.ts)
    last = np.append(first[1:], len(minutes)) - 1
    assert np.maximum.reduceat(minutes.high, first).tolist() == days.high.tolist()
    assert np.minimum.reduceat(minutes.low, first).tolist() == days.low.tolist()
    for official, traded in ((days.open, minutes.open[first]), (days.close, minutes.close[last])):
        assert (np.abs(official / traded - 1) < 0.00085).all()  # to a cent
        assert (official != traded).mean() > 0.8, "the auction has its own price"
    extra = days.volume / np.add.reduceat(minutes.volume, first)
    assert ((extra > 1.05) & (extra < 1.16)).all()


def test_weeks_are_aggregated_from_official_days(market: LocalMarket) -> None:
    requested = window("2024-03-04", "2024-03-16")
    days = official_days(market, requested)["polygon"]
    weeks, _ = follow(market, "AAPL/range/1/week/2024-03-04/2024-03-14", adjusted="false")
    assert [bar["t"] * 1000 for bar in weeks] == [instant("2024-03-03T05:00"), instant("2024-03-10T05:00")]
    truth = market.truth("polygon", "AAPL", Timeframe.W1, requested)
    assert [bar["o"] for bar in weeks] == truth.open.tolist() == days.open[[0, 5]].tolist()
    assert [bar["c"] for bar in weeks] == truth.close.tolist() == days.close[[4, 9]].tolist()
    sums = np.add.reduceat(days.volume, [0, 5]).tolist()
    assert [bar["v"] for bar in weeks] == truth.volume.tolist() == sums


def test_the_closing_auction_is_at_the_close(market: LocalMarket) -> None:
    """At 16:00 New York, 20:00 UTC: before it the day's close is the last trade."""
    path = "AAPL/range/1/day/2025-03-19/2025-03-19"
    final = aggs(market, path).json()["results"]
    market.set_clock(instant("2025-03-19T20:00") - 1)
    (forming,) = aggs(market, path).json()["results"]
    last = market.truth("polygon", "AAPL", Timeframe.M1, window("2025-03-19", "2025-03-20")).close[-1]
    assert abs(forming["c"] / last - 1) < 0.0005
    assert forming["o"] == final[0]["o"]
    assert forming["v"] < final[0]["v"] / 1.04
    market.set_clock(instant("2025-03-19T20:00"))
    assert aggs(market, path).json()["results"] == final
    market.set_clock(instant("2025-03-19T13:29"))  # pre-market only
    assert aggs(market, path).json()["resultsCount"] == 0


def test_days_are_contiguous(market: LocalMarket) -> None:
    path = "AAPL/range/1/day/2024-01-01/2024-03-31"
    whole, _ = follow(market, path, limit=50000)
    cut, pages = follow(market, path, limit=7)
    assert cut == whole
    assert pages > 5
    backwards, _ = follow(market, path, limit=7, sort="desc")
    assert backwards[::-1] == whole


@pytest.mark.server
def test_adjusted_prices_are_the_default() -> None:
    splits = (Split("AAPL", date(2024, 3, 6), 7),)
    with LocalMarket(MarketConfig(splits=splits)) as market:
        raw, plain = (
            of_aggs(follow(market, "AAPL/range/30/minute/2024-03-05/2024-03-06", limit=50000, **p)[0])
            for p in ({"adjusted": "false"}, {})
        )
    before = raw.ts < instant("2024-03-06T05:00")
    assert plain.open[before] == pytest.approx(raw.open[before] / 7, rel=1e-9)
    assert plain.open[~before].tolist() == raw.open[~before].tolist()
    assert 0 < before.sum() < len(raw)


def test_unsupported_multiples_are_an_error(market: LocalMarket) -> None:
    answer = aggs(market, "AAPL/range/3/day/2024-01-01/2024-01-02")
    assert answer.status_code == 400
    assert "divide a day" in answer.json()["error"]
