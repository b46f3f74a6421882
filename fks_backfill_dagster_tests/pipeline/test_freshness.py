"""Freshness of stored series, with a market whose clock stands at 12:34:56."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.domain.freshness import Thresholds, Verdict
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.pipeline.freshness import (
    Rule,
    behind,
    freshness,
    publication_delay,
)
from fks_backfill_dagster.pipeline.sync import Context, sync
from fks_backfill_dagster.providers.http import ProcessLimiter, RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.pipeline.conftest import NOW
from fks_backfill_dagster_tests.store.builders import execute

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
QUARTERS, HOURS = (
    [Series(name, frame, AssetClass.CRYPTO) for name in SYMBOLS] for frame in (Timeframe.M15, Timeframe.H1)
)
DAY = TimeRange(instant("2024-06-14"), NOW)
TEN = instant("2024-06-15T10:00")
RULE = Rule(venue_members=(*QUARTERS, *HOURS))


def verdicts(context: Context, rule: Rule = RULE, now: int = NOW) -> dict[str, tuple[str, int | None]]:
    found = freshness(context.database, (*QUARTERS, *HOURS), now, rule)
    return {str(one): (state.freshness.verdict.value, state.freshness.lag) for one, state in found.items()}


def test_a_series_is_fresh_after_its_sync_and_stale_when_nothing_comes(context: Context) -> None:
    assert set(verdicts(context).values()) == {("pending", None)}
    for series in (*QUARTERS, *HOURS):
        sync(context, series, DAY, ["binance"])
    assert set(verdicts(context).values()) == {("fresh", 0)}
    # No refresh at all, as with a dead daemon: nothing is in the ledger, and the lag is seen all the same.
    later = verdicts(context, now=NOW + 3 * MICROS_PER_HOUR)
    assert {later["BTC/USDT 15m"], later["BTC/USDT 1h"]} == {("stale", 12), ("fresh", 3)}
    loose = Rule(Thresholds(20, 30))
    assert set(verdicts(context, loose, NOW + 3 * MICROS_PER_HOUR).values()) == {("fresh", 12), ("fresh", 3)}


def test_a_series_in_an_outage_of_its_venue_is_late_from_its_first_overdue_candle_on(
    context: Context, market: LocalMarket
) -> None:
    market.plant_outage("binance", TimeRange(TEN, NOW + MICROS_PER_HOUR))
    for series in (*QUARTERS, *HOURS):
        sync(context, series, DAY, ["binance"])
    found = freshness(context.database, (*QUARTERS, *HOURS), NOW, RULE)
    state = found[HOURS[0]]
    assert (state.freshness.lag, state.freshness.allowed, state.freshness.verdict) == (2, 1, Verdict.LATE)
    assert str(state) == (
        "2 closed candles behind, 1 allowed: the newest candle opens at 2024-06-15 09:00;"
        " outage of crypto: 3 of 3 symbols lack candles"
    )
    assert found[QUARTERS[0]].freshness.verdict is Verdict.LATE
    assert verdicts(context, Rule())["BTC/USDT 1h"] == ("fresh", 2), (
        "without its venue it is within the margin"
    )


def test_a_symbol_that_lags_alone_is_in_no_outage(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(TEN, NOW + MICROS_PER_HOUR), "BTCUSDT")
    for series in (*QUARTERS, *HOURS):
        sync(context, series, DAY, ["binance"])
    found = freshness(context.database, (*QUARTERS, *HOURS), NOW, RULE)
    assert {one.outage for one in found.values()} == {None}
    assert found[HOURS[0]].freshness.fresh
    assert found[QUARTERS[0]].freshness.verdict is Verdict.LATE


def test_an_outage_that_is_over_makes_nothing_late(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(instant("2024-06-15T05:00"), TEN))
    for series in (*QUARTERS, *HOURS):
        sync(context, series, DAY, ["binance"])
    assert set(verdicts(context, now=NOW + 2 * MICROS_PER_HOUR + 20 * MICROS_PER_MINUTE).values()) == {
        ("late", 9),
        ("fresh", 2),
    }


def test_what_did_not_trade_at_the_end_is_no_lag(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(TEN, NOW + MICROS_PER_HOUR), "ETHUSDT")
    series = QUARTERS[1]
    sync(context, series, DAY, ["binance"])
    assert verdicts(context)["ETH/USDT 15m"] == ("late", 10)
    assert behind(context.database, series, TEN) == 0
    assert behind(context.database, series, TEN + MICROS_PER_HOUR) == 4
    execute(context.database, "UPDATE fks.gap SET status = 'no_trade'")
    assert verdicts(context)["ETH/USDT 15m"] == ("fresh", 0)
    assert behind(context.database, series, TEN + MICROS_PER_HOUR) == 0


def test_nothing_is_expected_of_a_symbol_after_its_end(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(TEN, NOW + MICROS_PER_HOUR), "ETHUSDT")
    sync(context, QUARTERS[1], DAY, ["binance"])
    ended = Rule(end_of=lambda series: instant("2024-06-15T12:00"))
    state = freshness(context.database, [QUARTERS[1]], NOW, ended)[QUARTERS[1]]
    assert state.freshness.fresh
    assert str(state) == "nothing is expected any more: the newest candle opens at 2024-06-15 09:45"


@pytest.mark.parametrize(
    ("keys", "priority", "delay"),
    [
        ({}, ("coingecko", "binance"), 0),
        ({"coingecko": "k"}, ("coingecko",), 35 * MICROS_PER_MINUTE),
        ({"coingecko": "k"}, ("coingecko", "binance"), 0),
        ({"coingecko": "k", "polygon": "k"}, ("polygon", "coingecko"), 35 * MICROS_PER_MINUTE),
        ({"polygon": "k"}, ("polygon", "coingecko", "oanda"), 29 * MICROS_PER_HOUR),
        ({}, ("coingecko",), 0),
        ({}, ("nobody",), 0),
    ],
)
def test_the_delay_is_that_of_the_quickest_provider_that_can_be_requested(
    keys: dict[str, str], priority: tuple[str, ...], delay: int
) -> None:
    pool = RequestPool(1)
    providers = {
        name: build(name, resolve_options(name, key=keys.get(name)), pool, ProcessLimiter({}))
        for name in ("binance", "coingecko", "polygon", "oanda")
    }
    pool.close()
    assert publication_delay(providers, priority, HOURS[0]) == delay
