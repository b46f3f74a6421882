"""Freshness of stored series, with a market whose clock is fixed at 12:34:56."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fks_backfill_dagster.domain.closures import closed_ranges
from fks_backfill_dagster.domain.freshness import Thresholds, Verdict
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, Timeframe, to_datetime
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.freshness import (
    Assessment,
    Rule,
    behind,
    freshness,
    publication_delay,
)
from fks_backfill_dagster.pipeline.refresh import refresh_range
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.reaches import reaches
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


def test_a_series_is_fresh_after_its_sync_and_stale_without_new_candles(context: Context) -> None:
    assert set(verdicts(context).values()) == {("pending", None)}
    for series in (*QUARTERS, *HOURS):
        sync(context, series, DAY, ["binance"])
    assert set(verdicts(context).values()) == {("fresh", 0)}
    # Without a refresh (a dead daemon) the ledger has no gap, and the lag is still visible.
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
        " outage of crypto: 3 of 3 symbols miss candles"
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


def test_a_past_outage_makes_no_series_late(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(instant("2024-06-15T05:00"), TEN))
    for series in (*QUARTERS, *HOURS):
        sync(context, series, DAY, ["binance"])
    assert set(verdicts(context, now=NOW + 2 * MICROS_PER_HOUR + 20 * MICROS_PER_MINUTE).values()) == {
        ("late", 9),
        ("fresh", 2),
    }


def test_no_trade_intervals_at_the_end_are_no_lag(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(TEN, NOW + MICROS_PER_HOUR), "ETHUSDT")
    series = QUARTERS[1]
    sync(context, series, DAY, ["binance"])
    assert verdicts(context)["ETH/USDT 15m"] == ("late", 10)
    assert behind(context.database, series, TEN, context.closed) == 0
    assert behind(context.database, series, TEN + MICROS_PER_HOUR, context.closed) == 4
    execute(context.database, "UPDATE fks.gap SET status = 'no_trade'")
    assert verdicts(context)["ETH/USDT 15m"] == ("fresh", 0)
    assert behind(context.database, series, TEN + MICROS_PER_HOUR, context.closed) == 0


def test_nothing_is_expected_of_a_symbol_after_its_end(context: Context, market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(TEN, NOW + MICROS_PER_HOUR), "ETHUSDT")
    sync(context, QUARTERS[1], DAY, ["binance"])
    ended = Rule(end_of=lambda series: instant("2024-06-15T12:00"))
    state = freshness(context.database, [QUARTERS[1]], NOW, ended)[QUARTERS[1]]
    assert state.freshness.fresh
    assert str(state) == "no further candle is expected: the newest candle opens at 2024-06-15 09:45"


# A thin market --------------------------------------------------------------------------------------------

THIN = Series("THIN/USD", Timeframe.M1, AssetClass.CRYPTO)
BEGIN, LAST = instant("2024-06-14T00:00"), instant("2024-06-15T10:00")


@contextmanager
def trading(
    database: Database, folder: Path, share: float
) -> Iterator[tuple[Context, Callable[[int], None]]]:
    """A market with trades in `share` of the minutes up to LAST and none after it; yields the context, and a function
    that moves the clock."""
    opens = np.arange(BEGIN, LAST + 1, MICROS_PER_MINUTE)
    traded = opens[(np.random.default_rng(5).random(len(opens)) < share) | np.isin(opens, [BEGIN, LAST])]
    rows = "".join(f"{to_datetime(ts):%Y-%m-%dT%H:%M:%SZ},100,101,99,100.5,3\n" for ts in traded.tolist())
    (folder / "coinbase").mkdir()
    (folder / "coinbase/THINUSD-1m.csv").write_text(f"ts,open,high,low,close,volume\n{rows}")
    clock = [LAST]
    with LocalMarket(MarketConfig(limits=False, replay=folder, now=LAST)) as market:

        def move(at: int) -> None:
            clock[0] = at
            market.set_clock(at)

        pool = RequestPool(5)
        options = resolve_options(
            "polygon", base_url=market.polygon_url, key="any", retry_budget_seconds=0.01, timeout_seconds=5
        )
        provider = build("polygon", options, pool, ProcessLimiter({}), lambda: clock[0])
        yield (
            Context(database, {"polygon": provider}, lambda: clock[0], priority=lambda _: ("polygon",)),
            move,
        )
        pool.close()


def refreshed(context: Context) -> Assessment:
    """Runs a refresh and returns the freshness after it."""
    now, grid = context.clock(), grid_of(THIN)
    window = refresh_range(reaches(context.database, [THIN]).get(THIN), grid, THIN.timeframe, BEGIN, now)
    sync(context, THIN, window, ("polygon",))
    return freshness(context.database, [THIN], now, Rule())[THIN]


def state(context: Context) -> str:
    return queries.sync_status(context.database, THIN)[0].status


def test_a_tail_that_fits_the_density_of_trades_is_no_lag(database: Database, tmp_path: Path) -> None:
    """Trades in one of seven minutes: half an hour without one is no lag, and three hours are an outage."""
    with trading(database, tmp_path, 0.15) as (context, move):
        for minutes in (2, 17, 32, 47):
            move(LAST + minutes * MICROS_PER_MINUTE)
            found = refreshed(context)
            assert (found.freshness.verdict, found.freshness.lag) == (Verdict.FRESH, 0)
            assert state(context) == "completed"
            assert behind(context.database, THIN, LAST + minutes * MICROS_PER_MINUTE, context.closed) == 0
        assert str(found) == "up to date: the newest candle opens at 2024-06-15 10:00"
        for minutes in range(62, 200, 15):
            move(LAST + minutes * MICROS_PER_MINUTE)
            found = refreshed(context)
        assert (found.freshness.verdict, found.freshness.lag) == (Verdict.STALE, 195)
        assert state(context) == "error"
        assert behind(context.database, THIN, LAST + 31 * MICROS_PER_MINUTE, context.closed) == 0
        assert behind(context.database, THIN, LAST + 91 * MICROS_PER_MINUTE, context.closed) == 90


def test_a_liquid_symbol_of_a_dead_provider_is_stale(database: Database, tmp_path: Path) -> None:
    with trading(database, tmp_path, 0.999) as (context, move):
        verdicts, states = [], []
        for minutes in (2, 17, 32, 47, 62, 77):
            move(LAST + minutes * MICROS_PER_MINUTE)
            found = refreshed(context).freshness
            verdicts.append((found.verdict.value, found.lag))
            states.append(state(context))
        stale = [("stale", lag) for lag in (30, 45, 60, 75)]
        assert verdicts == [("fresh", 0), ("fresh", 15), *stale], "red after two polling intervals"
        assert states[-1] == "error"


def test_candles_of_a_closed_market_are_no_lag(context: Context, market: LocalMarket) -> None:
    """A closed date of the settings that is not in the ledger yet; candles missing beside it are lag."""
    series = HOURS[0]
    sync(context, series, DAY, ["binance"])
    date = closed_ranges(series, [(day := to_datetime(NOW).date(), day)])
    rule = Rule(closed=lambda one, window: date if one == series else RangeSet())
    for hours, lag in ((5, 0), (11, 0), (14, 2)):
        found = freshness(context.database, HOURS, NOW + hours * MICROS_PER_HOUR, rule)[series]
        assert found.freshness.lag == lag
    assert freshness(context.database, HOURS, NOW + 5 * MICROS_PER_HOUR, Rule())[series].freshness.lag == 5


@pytest.mark.parametrize(
    ("keys", "priority", "delay"),
    [
        ({}, ("coingecko", "binance"), 0),
        ({"coingecko": "k"}, ("coingecko",), 35 * MICROS_PER_MINUTE),
        ({"coingecko": "k"}, ("coingecko", "binance"), 0),
        ({"coingecko": "k", "polygon": "k"}, ("polygon", "coingecko"), 35 * MICROS_PER_MINUTE),
        ({"polygon": "k"}, ("polygon", "coingecko", "oanda"), 29 * MICROS_PER_HOUR),
        ({}, ("coingecko",), 0),
        ({}, ("unknown",), 0),
    ],
)
def test_the_delay_is_that_of_the_fastest_eligible_provider(
    keys: dict[str, str], priority: tuple[str, ...], delay: int
) -> None:
    pool = RequestPool(1)
    providers = {
        name: build(name, resolve_options(name, key=keys.get(name)), pool, ProcessLimiter({}))
        for name in ("binance", "coingecko", "polygon", "oanda")
    }
    pool.close()
    assert publication_delay(providers, priority, HOURS[0]) == delay
