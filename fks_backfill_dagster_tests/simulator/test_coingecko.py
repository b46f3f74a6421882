"""CoinGecko over HTTP: close stamps, granularity by age, demo and paid keys, three shapes of errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.simulator.conftest import NOW
from fks_backfill_dagster_tests.simulator.wire import of_ohlc, ohlc, window


@pytest.mark.parametrize(
    ("days", "length"),
    [
        (1, MICROS_PER_HOUR // 2),
        (2, MICROS_PER_HOUR // 2),
        (3, 4 * MICROS_PER_HOUR),
        (30, 4 * MICROS_PER_HOUR),
        (31, 4 * MICROS_PER_DAY),
        (365, 4 * MICROS_PER_DAY),
    ],
)
def test_granularity_depends_on_the_days(market: LocalMarket, days: int, length: int) -> None:
    rows = ohlc(market, days=days).json()
    stamps = np.array([row[0] for row in rows]) * 1000
    assert set(np.diff(stamps).tolist()) == {length}
    assert stamps[-1] - length <= NOW < stamps[-1]  # the last one is forming
    assert stamps[0] - length <= NOW - days * MICROS_PER_DAY < stamps[0]


@pytest.mark.parametrize(("days", "timeframe"), [(1, "30m"), (7, "4h")])
def test_closed_rows_are_the_truth_stamped_with_the_close(
    market: LocalMarket, days: int, timeframe: str
) -> None:
    length = Timeframe(timeframe).micros
    served = of_ohlc(ohlc(market, days=days), length)
    of = TimeRange(int(served.ts[0]), NOW)
    truth = market.truth("coingecko", "BTC/USDT", Timeframe(timeframe), of)
    assert served.take(slice(0, -1)).equals(truth)
    assert np.isnan(truth.volume).all()


@pytest.mark.parametrize(("interval", "timeframe"), [("hourly", "1h"), ("daily", "1d")])
def test_ranges_for_paid_keys(market: LocalMarket, interval: str, timeframe: str) -> None:
    of = window("2025-02-01", "2025-02-20")
    requested = {"from": of.start // 1_000_000, "to": of.end // 1_000_000, "interval": interval}
    served = of_ohlc(ohlc(market, "bitcoin/ohlc/range", pro="key", **requested), Timeframe(timeframe).micros)
    assert served.equals(
        market.truth("coingecko", "bitcoin-usd".replace("bitcoin", "btc"), Timeframe(timeframe), of)
    )
    rejected = ohlc(market, "bitcoin/ohlc/range", demo="key", **requested)
    assert rejected.status_code == 401
    assert rejected.json()["status"]["error_code"] == 10005


def test_the_last_day_is_complete_at_0035(market: LocalMarket) -> None:
    requested = {"from": instant("2025-03-15") // 1_000_000, "to": instant("2025-03-21") // 1_000_000}

    def last() -> int:
        answer = ohlc(market, "bitcoin/ohlc/range", pro="key", interval="daily", **requested)
        return int(answer.json()[-1][0]) * 1000

    market.set_clock(instant("2025-03-20T00:34"))
    assert last() == instant("2025-03-19")
    market.set_clock(instant("2025-03-20T00:35"))
    assert last() == instant("2025-03-20")


@pytest.mark.parametrize(
    ("path", "params", "status", "body"),
    [
        ("nocoin/ohlc", {"days": 1}, 404, {"error": "coin not found"}),
        ("bitcoin/ohlc", {"days": 1, "vs_currency": "xxx"}, 400, {"error": "invalid vs_currency"}),
        ("bitcoin/ohlc", {"days": 0}, 400, {"error": "Invalid value for days"}),
        (
            "bitcoin/ohlc/range",
            {"pro": "key", "interval": "hourly", "from": 1_700_000_000, "to": 1_702_678_401},
            400,
            {"error": "The range is limited to 744 hourly candles"},
        ),
        (
            "bitcoin/ohlc/range",
            {"pro": "key", "interval": "weekly", "from": 1, "to": 2},
            400,
            {"error": "Invalid from, to or interval"},
        ),
    ],
)
def test_errors(
    market: LocalMarket, path: str, params: dict[str, Any], status: int, body: dict[str, str]
) -> None:
    answer = ohlc(market, path, **params)
    assert (answer.status_code, answer.json()) == (status, body)


@pytest.mark.parametrize("days", ["366", "max"])
def test_a_demo_key_is_limited_to_a_year(market: LocalMarket, days: str) -> None:
    rejected = ohlc(market, days=days, demo="key")
    assert rejected.status_code == 401
    assert rejected.json()["error"]["status"]["error_code"] == 10012
    assert len(ohlc(market, days=days, pro="key").json()) > 80


def test_a_bad_key(market: LocalMarket) -> None:
    rejected = ohlc(market, days=1, demo="bad-key")
    assert (rejected.status_code, rejected.json()["status"]["error_code"]) == (401, 10002)
    assert ohlc(market, days=1, x_cg_demo_api_key="in-the-url").status_code == 200
    assert "in-the-url" not in str(market.journal())


def test_requests_a_minute(market: LocalMarket) -> None:
    market.post("/sim/limits", coingecko=3)
    rejected = [answer for _ in range(8) if (answer := ohlc(market, days=1)).status_code == 429]
    assert rejected
    assert 1 <= int(rejected[0].headers["Retry-After"]) <= 60
    assert rejected[0].json()["status"]["error_code"] == 429


def test_other_coins_and_currencies(market: LocalMarket) -> None:
    bitcoin, ether = (of_ohlc(ohlc(market, f"{coin}/ohlc", days=7), 1) for coin in ("bitcoin", "ethereum"))
    assert bitcoin.low.min() > 2 * ether.high.max()
    assert len(ohlc(market, days=7, vs_currency="eur").json()) == len(bitcoin)
    url = f"{market.coingecko_url}/api/v3"
    assert {"id": "bitcoin", "symbol": "btc", "name": "bitcoin"} in requests.get(
        f"{url}/coins/list", timeout=10
    ).json()
    assert requests.get(f"{url}/ping", timeout=10).status_code == 200
