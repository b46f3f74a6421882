"""Binance over HTTP: klines, their bounds and errors, limits and bans, archives."""

from __future__ import annotations

import time
from hashlib import sha256

import pytest
import requests
from ccxt import binance as ccxt_binance

from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.simulator.conftest import NOW
from fks_backfill_dagster_tests.simulator.wire import archive, klines, of_klines, span, unzipped, window


@pytest.mark.parametrize("timeframe", list(Timeframe))
def test_a_page_is_the_truth(market: LocalMarket, timeframe: Timeframe) -> None:
    requested = window("2024-01-01", "2024-01-01T12:00" if timeframe.is_intraday else "2024-03-01")
    rows = klines(market, interval=str(timeframe), limit=1000, **span(requested)).json()
    truth = market.truth("binance", "BTC/USDT", timeframe, requested)
    assert len(rows) > 2
    assert of_klines(rows).equals(truth)
    assert {len(row) for row in rows} == {12}
    assert all(isinstance(row[i], str) for row in rows for i in (1, 2, 3, 4, 5, 7, 9, 10, 11))
    assert all(row[6] == row[0] + timeframe.minutes * 60_000 - 1 for row in rows)


def test_bounds_are_inclusive_on_the_open(market: LocalMarket) -> None:
    t = instant("2024-01-01") // 1000
    minute = 60_000

    def opens(**params: int) -> list[int]:
        return [(row[0] - t) // minute for row in klines(market, **params).json()]

    assert opens(startTime=t, endTime=t + 2 * minute) == [0, 1, 2]
    assert opens(startTime=t + 1, endTime=t + 2 * minute - 1) == [1]
    assert opens(startTime=t, limit=3) == [0, 1, 2]
    assert opens(endTime=t + 2 * minute, limit=3) == [0, 1, 2]
    assert opens(startTime=t, endTime=t + 999 * minute, limit=2) == [0, 1]
    assert opens(startTime=t + minute, endTime=t) == []
    assert len(opens(startTime=t)) == 500
    assert len(opens(startTime=t, limit=5000)) == 1000


def test_the_last_row_is_forming(market: LocalMarket) -> None:
    rows = klines(market, interval="1h", limit=3).json()
    assert rows[-1][0] == instant("2025-03-20T12:00") // 1000
    assert rows[-1][6] > NOW // 1000
    truth = market.truth("binance", "BTC/USDT", Timeframe.H1, window("2025-03-20T10:00", "2025-03-20T13:00"))
    assert of_klines(rows[:-1]).equals(truth)
    market.set_clock(instant("2025-03-20T13:00"))
    closed = klines(market, interval="1h", limit=4).json()
    assert closed[-2][0] == rows[-1][0]
    assert float(closed[-2][5]) > float(rows[-1][5])


def test_without_candles_the_response_is_an_empty_list(market: LocalMarket) -> None:
    assert klines(market, **span(window("2016-01-01", "2016-02-01"))).json() == []
    assert klines(market, **span(window("2026-01-01", "2026-02-01"))).json() == []
    first = klines(market, startTime=0, limit=1).json()
    assert first[0][0] == instant("2017-01-01") // 1000


@pytest.mark.parametrize(
    ("params", "code"),
    [
        ({"symbol": "NOPEUSDT"}, -1121),
        ({"symbol": "AAPL"}, -1121),
        ({"symbol": "BTC/USDT"}, -1100),
        ({"symbol": ""}, -1105),
        ({"symbol": None}, -1102),
        ({"interval": "7m"}, -1120),
        ({"interval": "1M"}, -1120),
        ({"interval": None}, -1102),
        ({"startTime": "yesterday"}, -1100),
        ({"endTime": "-1"}, -1100),
        ({"limit": "0"}, -1130),
        ({"limit": ""}, -1105),
    ],
)
def test_errors_carry_binances_codes(market: LocalMarket, params: dict[str, str | None], code: int) -> None:
    answer = klines(market, **params)
    assert answer.status_code == 400
    assert answer.json()["code"] == code


def test_ccxt_can_read_klines(market: LocalMarket) -> None:
    exchange = ccxt_binance({"options": {"fetchMarkets": {"types": ["spot"]}}, "enableRateLimit": False})
    exchange.urls["api"]["public"] = f"{market.binance_url}/api/v3"
    requested = window("2024-01-01", "2024-01-01T01:00")
    rows = exchange.fetch_ohlcv("BTC/USDT", "1m", since=requested.start // 1000, limit=60)
    assert of_klines(rows).equals(market.truth("binance", "BTC/USDT", Timeframe.M1, requested))
    assert exchange.fetch_time() == NOW // 1000


def test_the_date_header_follows_the_markets_clock(market: LocalMarket) -> None:
    answer = requests.get(f"{market.binance_url}/api/v3/ping", timeout=10)
    assert answer.headers["Date"] == "Thu, 20 Mar 2025 12:34:56 GMT"
    market.post("/sim/clock", advance=60)
    assert (
        requests.get(f"{market.binance_url}/api/v3/time", timeout=10).json()["serverTime"]
        == NOW // 1000 + 60_000
    )


@pytest.mark.server
def test_weight_then_429_then_418() -> None:
    config = MarketConfig(now=NOW, weight_per_minute=10, ban_after=3, ban_seconds=90)
    with LocalMarket(config) as market:
        if time.time() % 60 > 55:  # the limit is per clock minute: do not start at the end of one
            time.sleep(60 - time.time() % 60)
        answers = [klines(market, limit=1) for _ in range(10)]
        used = [int(a.headers["X-MBX-USED-WEIGHT-1M"]) for a in answers[:5]]
        statuses = [a.status_code for a in answers]
        assert used == [2, 4, 6, 8, 10]
        assert statuses == [200] * 5 + [429] * 3 + [418] * 2
        assert 1 <= int(answers[5].headers["Retry-After"]) <= 60
        assert answers[5].json()["code"] == -1003
        assert 85 <= int(answers[8].headers["Retry-After"]) <= 90
        assert "IP banned until" in answers[8].json()["msg"]
        market.post("/sim/limits", binance=None)
        assert [klines(market, limit=1).status_code for _ in range(20)] == [200] * 20


def test_halts_keep_the_remaining_trades_as_in_the_truth(market: LocalMarket) -> None:
    market.plant_halt(window("2024-01-05T03:10", "2024-01-05T05:00"), provider="binance")
    market.plant_outage("binance", window("2024-01-05T08:00", "2024-01-05T09:00"), symbol="ETH/USDT")
    requested = window("2024-01-05", "2024-01-05T12:00")
    hours = klines(market, interval="1h", **span(requested)).json()
    missing = {instant("2024-01-05T04:00") // 1000}
    assert {t // 1000 for t in range(requested.start, requested.end, 60 * MICROS_PER_MINUTE)} - {
        row[0] for row in hours
    } == missing
    for timeframe in (Timeframe.M1, Timeframe.M5, Timeframe.H1, Timeframe.H4):
        rows = klines(market, interval=str(timeframe), limit=1000, **span(requested)).json()
        assert of_klines(rows).equals(market.truth("binance", "BTCUSDT", timeframe, requested))
    # A partly affected candle aggregates the remaining trades.
    left = klines(market, **span(window("2024-01-05T03:00", "2024-01-05T03:10"))).json()
    third = next(row for row in hours if row[0] == instant("2024-01-05T03:00") // 1000)
    assert third[4] == left[-1][4]
    assert float(third[5]) == pytest.approx(sum(float(row[5]) for row in left))
    eth = klines(market, symbol="ETHUSDT", interval="1h", **span(requested)).json()
    assert len(eth) == 10
    polygon = market.truth("polygon", "BTC/USDT", Timeframe.H1, requested)
    assert len(polygon) == 12


def test_a_page_reaches_beyond_an_outage(market: LocalMarket) -> None:
    market.plant_outage("binance", window("2024-01-05T03:10", "2024-01-07"))
    rows = klines(market, startTime=instant("2024-01-05T03:00") // 1000, limit=20).json()
    opens = [row[0] for row in rows]
    assert len(opens) == 20
    assert opens[10] == instant("2024-01-07") // 1000
    market.clear_outages()
    again = klines(market, startTime=instant("2024-01-05T03:00") // 1000, limit=20).json()
    assert again[10][0] == instant("2024-01-05T03:10") // 1000


def test_prepared_pages_equal_those_made_on_demand(market: LocalMarket) -> None:
    requested = window("2024-02-01", "2024-02-03")
    t = requested.start // 1000
    queries = [
        {"startTime": t, "limit": 1000},
        {"startTime": t + 60_000_000, "endTime": requested.end // 1000 - 1, "limit": 1000},
        {"startTime": t + 120_000_000, "endTime": requested.end // 1000 - 1, "limit": 1000},
    ]
    before = [klines(market, **query).content for query in queries]
    assert market.prepare("binance", "BTC/USDT", Timeframe.M1, requested)["answers"] == 3
    assert [klines(market, **query).content for query in queries] == before
    market.plant_outage("binance", window("2024-02-01T01:00", "2024-02-01T02:00"))
    assert klines(market, **queries[0]).content != before[0]


def test_a_monthly_archive_and_its_checksum(market: LocalMarket) -> None:
    path = "monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2024-02.zip"
    body, checksum = archive(market, path).content, archive(market, f"{path}.CHECKSUM").text
    assert checksum == f"{sha256(body).hexdigest()}  BTCUSDT-1h-2024-02.zip\n"
    requested = window("2024-02-01", "2024-03-01")
    assert of_klines(unzipped(body)).equals(market.truth("binance", "BTCUSDT", Timeframe.H1, requested))
    pages = [klines(market, interval="1h", limit=1000, **span(requested)).json()]
    assert unzipped(body) == [[str(cell) for cell in row] for row in pages[0]]


def test_archives_are_in_microseconds_from_2025_on(market: LocalMarket) -> None:
    december = unzipped(archive(market, "daily/klines/BTCUSDT/1m/BTCUSDT-1m-2024-12-31.zip").content)
    january = unzipped(archive(market, "daily/klines/BTCUSDT/1m/BTCUSDT-1m-2025-01-01.zip").content)
    assert of_klines(december).equals(
        market.truth("binance", "BTCUSDT", Timeframe.M1, window("2024-12-31", "2025-01-01"))
    )
    assert of_klines(january, unit=1).equals(
        market.truth("binance", "BTCUSDT", Timeframe.M1, window("2025-01-01", "2025-01-02"))
    )
    assert int(january[0][6]) - int(january[0][0]) == 59_999_999


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("daily/klines/BTCUSDT/1h/BTCUSDT-1h-2025-03-19.zip", 200),
        ("daily/klines/BTCUSDT/1h/BTCUSDT-1h-2025-03-20.zip", 404),
        ("daily/klines/BTCUSDT/1w/BTCUSDT-1w-2025-03-17.zip", 404),
        ("daily/klines/BTCUSDT/1h/BTCUSDT-1h-2016-12-31.zip", 404),
        ("monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2025-02.zip", 200),
        ("monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2025-03.zip", 404),
        ("monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2016-11.zip", 404),
        ("monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2024-13.zip", 404),
        ("monthly/klines/BTCUSDT/1h/BTCUSDT-1h-2024-02-01.zip", 404),
        ("monthly/klines/NOPEUSDT/1h/NOPEUSDT-1h-2024-02.zip", 404),
        ("monthly/klines/BTCUSDT/1h/ETHUSDT-1h-2024-02.zip", 404),
    ],
)
def test_which_archives_exist(market: LocalMarket, path: str, status: int) -> None:
    assert archive(market, path).status_code == status
    assert archive(market, f"{path}.CHECKSUM").status_code == status


def test_a_month_is_published_days_after_its_first_monday(market: LocalMarket) -> None:
    path = "monthly/klines/BTCUSDT/1d/BTCUSDT-1d-2025-02.zip"
    market.set_clock(instant("2025-03-05T23:59"))
    assert archive(market, path).status_code == 404
    market.set_clock(instant("2025-03-06"))  # Monday was the 3rd
    assert archive(market, path).status_code == 200


@pytest.mark.server
def test_header_lines_from_a_date_on() -> None:
    config = MarketConfig(now=NOW, archive_header_from=instant("2024-02-02"))
    with LocalMarket(config) as market:
        plain = unzipped(archive(market, "daily/klines/BTCUSDT/1h/BTCUSDT-1h-2024-02-01.zip").content)
        headed = unzipped(archive(market, "daily/klines/BTCUSDT/1h/BTCUSDT-1h-2024-02-02.zip").content)
    assert plain[0][0].isdigit()
    assert headed[0][0] == "open_time"
    assert (len(plain), len(headed)) == (24, 25)
