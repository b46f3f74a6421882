"""Polygon's aggregates over HTTP: keys, snapping, base-bar limits, cursors."""

from __future__ import annotations

from typing import Any

import pytest
import requests

from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.simulator.wire import aggs, klines, of_aggs, of_klines, span, window


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
    asked = window("2024-01-01", "2024-01-02")
    page = aggs(market, "X:BTCUSD/range/1/hour/2024-01-01/2024-01-01", limit=50000).json()
    assert page["resultsCount"] == 24
    assert page["queryCount"] == 1440
    assert page["ticker"] == "X:BTCUSD"
    assert of_aggs(page["results"]).equals(market.truth("polygon", "BTC/USDT", Timeframe.H1, asked))
    assert of_aggs(page["results"]).equals(of_klines(klines(market, interval="1h", **span(asked)).json()))


def test_an_offset_moves_all_prices() -> None:
    with LocalMarket(MarketConfig(polygon_offset_ppm=1000)) as market:
        asked = window("2024-01-01", "2024-01-02")
        ours = market.truth("polygon", "BTC/USDT", Timeframe.H1, asked)
        theirs = market.truth("binance", "BTC/USDT", Timeframe.H1, asked)
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
def test_pages_join_without_a_seam(
    market: LocalMarket, mult: int, unit: str, timeframe: str, sort: str
) -> None:
    asked = window("2024-01-01", "2024-01-04")
    market.plant_outage("polygon", window("2024-01-02T03:20", "2024-01-02T07:00"))
    limit = 2 if unit == "day" else 1000
    path = f"X:BTCUSD/range/{mult}/{unit}/2024-01-01/2024-01-03"
    results, pages = follow(market, path, sort=sort, limit=limit)
    assert pages > 1
    ordered = results if sort == "asc" else results[::-1]
    truth = market.truth("polygon", "BTC/USDT", Timeframe(timeframe), asked)
    assert of_aggs(ordered).equals(truth)


def test_limit_counts_minutes_even_for_hours(market: LocalMarket) -> None:
    page = aggs(market, "X:BTCUSD/range/1/hour/2024-01-01/2024-01-05", limit=120).json()
    assert (page["queryCount"], page["resultsCount"]) == (120, 2)
    tiny = aggs(market, "X:BTCUSD/range/1/hour/2024-01-01/2024-01-05", limit=1).json()
    assert tiny["resultsCount"] == 1


def test_weeks_begin_on_sunday(market: LocalMarket) -> None:
    results, _ = follow(market, "X:BTCUSD/range/1/week/2024-01-03/2024-01-10")
    assert [r["t"] for r in results] == [instant("2023-12-31") // 1000, instant("2024-01-07") // 1000]


@pytest.mark.parametrize("ticker", ["X:NOPEUSD", "AAPL", "X:BTCUSDT", "BTCUSD"])
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
    asked = window("2024-01-01", "2024-02-20")
    edges = f"{asked.start // 1000}/{asked.end // 1000 - 1}"
    path = f"X:BTCUSD/range/1/minute/{edges}"
    before, pages = follow(market, path, limit=50000, adjusted="false")
    assert market.prepare("polygon", "BTC/USDT", Timeframe.M1, asked)["answers"] == pages == 2
    assert follow(market, path, limit=50000, adjusted="false")[0] == before
