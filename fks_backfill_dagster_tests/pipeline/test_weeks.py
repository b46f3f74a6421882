"""Weeks of operation: every gap is filled or explained, and unavailable gaps are requested with back-off.

The clocks of the program and of the market are moved hour by hour; outages, late candles, providers that fail and
recover, and a key that is added later are simulated (weeks.py).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from contextlib import closing

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.weeks import Down, Outage, World
from fks_backfill_dagster_tests.store.builders import fetch

BITCOIN = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
ETHER = Series("ETH/USDT", Timeframe.H4, AssetClass.CRYPTO)
APPLE = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
EURO = Series("EUR/USD", Timeframe.H4, AssetClass.FOREX)

CRYPTO = ("binance", "polygon")
STOCKS = ("polygon", "yfinance", "alphavantage")
FOREX = ("oanda", "polygon")

SINCE, BEGIN, END = instant("2023-12-16"), instant("2023-12-18T00:02"), instant("2024-01-08T00:02")
NEW_KEY = instant("2024-01-02T12:00")
KEYS = {"polygon": BEGIN, "oanda": BEGIN, "alphavantage": NEW_KEY}


def span(start: str, end: str) -> TimeRange:
    return TimeRange(instant(start), instant(end))


@pytest.fixture
def quick(database: Database) -> Database:
    """A database without synchronous commits: these tests have no crash."""
    with database.autocommit() as connection:
        connection.exec_driver_sql(f'ALTER DATABASE "{database.url.database}" SET synchronous_commit = off')
    database.dispose()
    return database


@pytest.fixture(scope="module")
def running() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=BEGIN), process=True) as market:
        yield market


@pytest.fixture
def market(running: LocalMarket) -> LocalMarket:
    running.clear_faults()
    running.clear_outages()
    running.set_clock(BEGIN)
    running.reset_requests()
    return running


def hours(duration: int) -> float:
    return duration / MICROS_PER_HOUR


# Three weeks around the turn of a year -----------------------------------------------------------------

AT_BINANCE_ONLY = Outage(BITCOIN, span("2023-12-19T05:00", "2023-12-19T11:00"), ("binance",))
UNAVAILABLE_EVERYWHERE = Outage(BITCOIN, span("2023-12-20T02:00", "2023-12-20T08:00"), CRYPTO)
LATE = Outage(
    BITCOIN, span("2023-12-21T10:00", "2023-12-21T15:00"), CRYPTO, published=instant("2023-12-25T10:00")
)
SOON = Outage(
    BITCOIN, span("2023-12-27T03:00", "2023-12-27T05:00"), CRYPTO, published=instant("2023-12-27T09:00")
)
WHILE_POLYGON_IS_DOWN = Outage(BITCOIN, span("2023-12-23T06:00", "2023-12-23T09:00"), ("binance",))
WHILE_BINANCE_IS_DOWN = Outage(BITCOIN, span("2023-12-28T10:00", "2023-12-28T12:00"), ("polygon",))
OLD_YEAR = Outage(BITCOIN, span("2023-12-31T18:00", "2024-01-01T00:00"), CRYPTO)
NEW_YEAR = Outage(
    BITCOIN, span("2024-01-01T00:00", "2024-01-01T04:00"), CRYPTO, published=instant("2024-01-03T00:00")
)
LONG = [
    Outage(
        ETHER, span("2023-12-19T00:00", "2023-12-20T00:00"), CRYPTO, published=instant("2023-12-21T00:00")
    ),
    Outage(
        ETHER, span("2023-12-20T00:00", "2023-12-26T00:00"), CRYPTO, published=instant("2023-12-27T00:00")
    ),
]
# It contains a whole session, so that it is not no-trade although two providers lack it.
OVER_CHRISTMAS = Outage(APPLE, span("2023-12-22T19:00", "2023-12-26T21:00"), STOCKS[:2])
INSIDE_A_SESSION = Outage(APPLE, span("2024-01-04T15:00", "2024-01-04T17:00"), STOCKS)
OVER_A_WEEKEND = Outage(EURO, span("2023-12-29T16:00", "2024-01-01T04:00"), ("oanda",))
OF_BOTH = Outage(EURO, span("2024-01-04T08:00", "2024-01-04T16:00"), FOREX)

OUTAGES = [
    AT_BINANCE_ONLY,
    UNAVAILABLE_EVERYWHERE,
    LATE,
    SOON,
    WHILE_POLYGON_IS_DOWN,
    WHILE_BINANCE_IS_DOWN,
    OLD_YEAR,
    NEW_YEAR,
    *LONG,
    OVER_CHRISTMAS,
    INSIDE_A_SESSION,
    OVER_A_WEEKEND,
    OF_BOTH,
]
DOWNS = [
    Down("polygon", span("2023-12-22T06:00", "2023-12-24T06:00")),
    # No other provider can be requested for Polygon's outage over Christmas until the new key is added.
    Down("yfinance", span("2023-12-22T18:00", "2024-01-03T18:00")),
    Down("binance", span("2023-12-28T06:00", "2023-12-28T18:00")),
    Down("binance", span("2024-01-05T00:00", "2024-01-05T06:00")),
    Down("polygon", span("2024-01-05T00:00", "2024-01-05T06:00")),
]


@pytest.mark.slow
def test_every_gap_is_filled_or_explained(quick: Database, market: LocalMarket) -> None:
    series = {BITCOIN: CRYPTO, ETHER: CRYPTO, APPLE: STOCKS, EURO: FOREX}
    with closing(World(quick, market, series, SINCE, BEGIN, KEYS, OUTAGES, DOWNS)) as world:
        world.run(END)

        # Available candles are stored; the others are explained by the responses of all eligible providers.
        assert {one: len(world.lacking(one)) for one in series} == dict.fromkeys(series, 0)
        assert {one: [(gap.missing, gap.status) for gap in world.gaps(one)] for one in series} == {
            BITCOIN: [(6, GapStatus.UNAVAILABLE), (6, GapStatus.UNAVAILABLE)],
            ETHER: [],
            APPLE: [(2, GapStatus.NO_TRADE)],  # three providers omit intervals without trades
            EURO: [(2, GapStatus.NO_TRADE)],  # two providers omit intervals without trades
        }
        for one, providers in series.items():
            assert [gap.declined() for gap in world.gaps(one)] == [frozenset(providers)] * len(
                world.gaps(one)
            )

        # The next provider fills the gaps of the first, as soon as it can be requested.
        for outage, provider in (
            (AT_BINANCE_ONLY, "polygon"),
            (WHILE_POLYGON_IS_DOWN, "polygon"),
            (WHILE_BINANCE_IS_DOWN, "binance"),
            (OVER_CHRISTMAS, "alphavantage"),
            (OVER_A_WEEKEND, "polygon"),
        ):
            found = queries.origins(quick, outage.series, outage.window)
            assert [origin.provider for origin in found] == [provider]
        assert hours(world.filled_at(AT_BINANCE_ONLY) - AT_BINANCE_ONLY.window.end) < 1
        assert hours(world.filled_at(OVER_CHRISTMAS) - NEW_KEY) < 1

        # Late candles are stored after a delay of at most the age of their gap.
        for late in (LATE, SOON, NEW_YEAR, *LONG):
            assert late.published is not None
            known_for = late.published - late.window.start
            assert 0 <= world.filled_at(late) - late.published <= known_for + MICROS_PER_HOUR

        # Unavailable candles were requested while they were in the range of the refresh, and then with back-off.
        times = [one.at for one in world.requests_for(BITCOIN, UNAVAILABLE_EVERYWHERE.window)]
        doublings = math.log2(hours(END - UNAVAILABLE_EVERYWHERE.window.start))
        assert world.gaps(BITCOIN)[0].attempts <= doublings + 5
        assert len(set(times)) <= UNAVAILABLE_EVERYWHERE.window.duration // MICROS_PER_HOUR + doublings + 3
        half = (UNAVAILABLE_EVERYWHERE.window.start + END) // 2
        assert len({at for at in times if at > half}) <= 1

        # Without a due gap no provider is requested, and only the simulated clock was used.
        before = world.requests
        world.run(world.now + 2 * MICROS_PER_HOUR, refreshing=False)
        assert world.requests == before
        assert fetch(quick, "SELECT max(found_at) < to_timestamp(:now) FROM fks.gap", now=END / 1e6) == [
            (True,)
        ]


def test_requests_for_an_unavailable_gap_grow_with_the_logarithm_of_time(
    quick: Database, market: LocalMarket
) -> None:
    with closing(
        World(quick, market, {BITCOIN: CRYPTO}, SINCE, BEGIN, KEYS, [UNAVAILABLE_EVERYWHERE])
    ) as world:
        world.run(UNAVAILABLE_EVERYWHERE.window.end + MICROS_PER_DAY)
        begun, (gap,) = world.now, world.gaps(BITCOIN)
        assert gap.found_at is not None
        world.asked.clear()
        world.run(begun + 56 * MICROS_PER_DAY, 6 * MICROS_PER_HOUR, refreshing=False)
        ages = sorted({one.at - gap.found_at for one in world.asked})
        assert 5 <= len(ages) <= 1 + math.log2((world.now - gap.found_at) / (begun - gap.found_at))
        assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(ages))
        assert len(world.asked) <= 4 * len(ages), (
            "Binance requests beyond an empty page, Polygon is requested twice"
        )


def test_a_tolerated_candle_is_requested_once(quick: Database, market: LocalMarket) -> None:
    solana = Series("SOL/USDT", Timeframe.M5, AssetClass.CRYPTO)
    outage = Outage(solana, span("2023-12-18T03:00", "2023-12-18T03:05"), CRYPTO)
    with closing(
        World(quick, market, {solana: CRYPTO}, instant("2023-12-17"), BEGIN, KEYS, [outage])
    ) as world:
        world.run(BEGIN + MICROS_PER_DAY, 15 * MICROS_PER_MINUTE)
        assert [(gap.missing, gap.status) for gap in world.gaps(solana)] == [(1, GapStatus.TOLERATED)]
        assert {one.at for one in world.requests_for(solana, outage.window)} == {instant("2023-12-18T03:17")}


# Random events ---------------------------------------------------------------------------------------------


HALF_HOURS, TURN = Series("BTC/USDT", Timeframe.M30, AssetClass.CRYPTO), instant("2023-12-30")


def events(seed: int) -> tuple[list[Outage], list[Down]]:
    """Outages that begin within four days, half of them at both providers and some published late; and downtimes."""
    draw = random.Random(seed)

    def window() -> TimeRange:
        start = TURN + draw.randrange(96) * MICROS_PER_HOUR
        return TimeRange(start, start + draw.randrange(1, 14) * MICROS_PER_HOUR)

    outages = []
    for _ in range(8):
        span = window()
        providers = draw.choice([CRYPTO, CRYPTO, CRYPTO[:1], CRYPTO[1:]])
        late = draw.choice([None, span.start + draw.randrange(1, 40) * MICROS_PER_HOUR])
        outages.append(Outage(HALF_HOURS, span, providers, late))
    return outages, [Down(draw.choice(CRYPTO), window()) for _ in range(4)]


@pytest.mark.parametrize("seed", [1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_no_gap_stays_open_after_random_events(quick: Database, market: LocalMarket, seed: int) -> None:
    outages, downs = events(seed)
    series, begin = {HALF_HOURS: CRYPTO}, TURN + 2 * MICROS_PER_MINUTE
    with closing(World(quick, market, series, SINCE, begin, KEYS, outages, downs)) as world:
        world.run(begin + 6 * MICROS_PER_DAY)
        world.compare(HALF_HOURS, MICROS_PER_HOUR)
        assert {gap.status for gap in world.gaps(HALF_HOURS)} == {GapStatus.UNAVAILABLE}
