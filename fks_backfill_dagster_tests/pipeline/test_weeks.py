"""Weeks of operation: every gap ends filled or explained, and what nobody has costs ever fewer requests.

The clocks of the program and of the market are moved, hour by hour; outages, late candles, providers that
fail and recover and a key that comes later are real to everything below (weeks.py).
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
    """Nobody pulls the plug in these weeks, so no commit waits for the disk."""
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

HELPED = Outage(BITCOIN, span("2023-12-19T05:00", "2023-12-19T11:00"), ("binance",))
NOBODYS = Outage(BITCOIN, span("2023-12-20T02:00", "2023-12-20T08:00"), CRYPTO)
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
# It holds a whole session, so that two providers that lack it do not make it an interval without trades.
OVER_CHRISTMAS = Outage(APPLE, span("2023-12-22T19:00", "2023-12-26T21:00"), STOCKS[:2])
A_SESSIONS_MIDDLE = Outage(APPLE, span("2024-01-04T15:00", "2024-01-04T17:00"), STOCKS)
OVER_A_WEEKEND = Outage(EURO, span("2023-12-29T16:00", "2024-01-01T04:00"), ("oanda",))
OF_BOTH = Outage(EURO, span("2024-01-04T08:00", "2024-01-04T16:00"), FOREX)

OUTAGES = [
    HELPED,
    NOBODYS,
    LATE,
    SOON,
    WHILE_POLYGON_IS_DOWN,
    WHILE_BINANCE_IS_DOWN,
    OLD_YEAR,
    NEW_YEAR,
    *LONG,
    OVER_CHRISTMAS,
    A_SESSIONS_MIDDLE,
    OVER_A_WEEKEND,
    OF_BOTH,
]
DOWNS = [
    Down("polygon", span("2023-12-22T06:00", "2023-12-24T06:00")),
    # What Polygon lacks of Christmas nobody else can be asked for, until the new key comes.
    Down("yfinance", span("2023-12-22T18:00", "2024-01-03T18:00")),
    Down("binance", span("2023-12-28T06:00", "2023-12-28T18:00")),
    Down("binance", span("2024-01-05T00:00", "2024-01-05T06:00")),
    Down("polygon", span("2024-01-05T00:00", "2024-01-05T06:00")),
]


def test_every_gap_ends_filled_or_explained(quick: Database, market: LocalMarket) -> None:
    series = {BITCOIN: CRYPTO, ETHER: CRYPTO, APPLE: STOCKS, EURO: FOREX}
    with closing(World(quick, market, series, SINCE, BEGIN, KEYS, OUTAGES, DOWNS)) as world:
        world.run(END)

        # What can be had is stored; the rest is explained, in the words of all who can be asked.
        assert {one: len(world.lacking(one)) for one in series} == dict.fromkeys(series, 0)
        assert {one: [(gap.missing, gap.status) for gap in world.gaps(one)] for one in series} == {
            BITCOIN: [(6, GapStatus.UNAVAILABLE), (6, GapStatus.UNAVAILABLE)],
            ETHER: [],
            APPLE: [(2, GapStatus.NO_TRADE)],  # of three that leave intervals without trades out
            EURO: [(2, GapStatus.NO_TRADE)],  # of two that leave quiet intervals out
        }
        for one, providers in series.items():
            assert [gap.heard() for gap in world.gaps(one)] == [frozenset(providers)] * len(world.gaps(one))

        # The next one fills what the first lacks, as soon as it can be asked.
        for outage, provider in (
            (HELPED, "polygon"),
            (WHILE_POLYGON_IS_DOWN, "polygon"),
            (WHILE_BINANCE_IS_DOWN, "binance"),
            (OVER_CHRISTMAS, "alphavantage"),
            (OVER_A_WEEKEND, "polygon"),
        ):
            found = queries.origins(quick, outage.series, outage.window)
            assert [origin.provider for origin in found] == [provider]
        assert hours(world.filled_at(HELPED) - HELPED.window.end) < 1
        assert hours(world.filled_at(OVER_CHRISTMAS) - NEW_KEY) < 1

        # What comes late is stored after at most as long again as it was known.
        for late in (LATE, SOON, NEW_YEAR, *LONG):
            assert late.published is not None
            known_for = late.published - late.window.start
            assert 0 <= world.filled_at(late) - late.published <= known_for + MICROS_PER_HOUR

        # What nobody has was asked for while the refresh reached it, and then ever less.
        asked = [one.at for one in world.requests_for(BITCOIN, NOBODYS.window)]
        doublings = math.log2(hours(END - NOBODYS.window.start))
        assert world.gaps(BITCOIN)[0].attempts <= doublings + 5
        assert len(set(asked)) <= NOBODYS.window.duration // MICROS_PER_HOUR + doublings + 3
        half = (NOBODYS.window.start + END) // 2
        assert len({at for at in asked if at > half}) <= 1

        # A quiet hour later nobody is asked, and no clock but the moved one was looked at.
        before = world.requests
        world.run(world.now + 2 * MICROS_PER_HOUR, refreshing=False)
        assert world.requests == before
        assert fetch(quick, "SELECT max(found_at) < to_timestamp(:now) FROM fks.gap", now=END / 1e6) == [
            (True,)
        ]


def test_the_requests_for_what_nobody_has_grow_like_the_logarithm_of_time(
    quick: Database, market: LocalMarket
) -> None:
    with closing(World(quick, market, {BITCOIN: CRYPTO}, SINCE, BEGIN, KEYS, [NOBODYS])) as world:
        world.run(NOBODYS.window.end + MICROS_PER_DAY)
        begun, (gap,) = world.now, world.gaps(BITCOIN)
        assert gap.found_at is not None
        world.asked.clear()
        world.run(begun + 56 * MICROS_PER_DAY, 6 * MICROS_PER_HOUR, refreshing=False)
        ages = sorted({one.at - gap.found_at for one in world.asked})
        assert 5 <= len(ages) <= 1 + math.log2((world.now - gap.found_at) / (begun - gap.found_at))
        assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(ages))
        assert len(world.asked) <= 4 * len(ages), "Binance looks beyond an empty page, Polygon is asked twice"


def test_a_candle_that_one_can_live_with_is_asked_for_once(quick: Database, market: LocalMarket) -> None:
    solana = Series("SOL/USDT", Timeframe.M5, AssetClass.CRYPTO)
    outage = Outage(solana, span("2023-12-18T03:00", "2023-12-18T03:05"), CRYPTO)
    with closing(
        World(quick, market, {solana: CRYPTO}, instant("2023-12-17"), BEGIN, KEYS, [outage])
    ) as world:
        world.run(BEGIN + MICROS_PER_DAY, 15 * MICROS_PER_MINUTE)
        assert [(gap.missing, gap.status) for gap in world.gaps(solana)] == [(1, GapStatus.TOLERATED)]
        assert {one.at for one in world.requests_for(solana, outage.window)} == {instant("2023-12-18T03:17")}


# Whatever happens ------------------------------------------------------------------------------------------


HALF_HOURS, TURN = Series("BTC/USDT", Timeframe.M30, AssetClass.CRYPTO), instant("2023-12-30")


def events(seed: int) -> tuple[list[Outage], list[Down]]:
    """Outages that begin within four days, half of them of both and half of all late; and who is down."""
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
def test_whatever_happens_nothing_stays_open(quick: Database, market: LocalMarket, seed: int) -> None:
    outages, downs = events(seed)
    series, begin = {HALF_HOURS: CRYPTO}, TURN + 2 * MICROS_PER_MINUTE
    with closing(World(quick, market, series, SINCE, begin, KEYS, outages, downs)) as world:
        world.run(begin + 6 * MICROS_PER_DAY)
        world.compare(HALF_HOURS, MICROS_PER_HOUR)
        assert {gap.status for gap in world.gaps(HALF_HOURS)} == {GapStatus.UNAVAILABLE}
