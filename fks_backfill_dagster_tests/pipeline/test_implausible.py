"""Candles a factor of 50 from those around them: by position, and by the response of a second provider."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import PRICES
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR as HOUR
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.conftest import NOW, make_context
from fks_backfill_dagster_tests.pipeline.test_faults import quarantined
from fks_backfill_dagster_tests.pipeline.two_markets import TwoMarkets, level, traded
from fks_backfill_dagster_tests.providers.scripted import Server, serve

BITCOIN = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
SPRING = days("2024-03-01", "2024-05-01")  # two spans: a month each
APRIL = days("2024-04-01", "2024-04-01").start
PLACES = {
    "first of all": SPRING.start,
    "inside": SPRING.start + 400 * HOUR,
    "last of a span": APRIL - HOUR,
    "first of a span": APRIL,
    "last of all": SPRING.end - HOUR,
}
Prices = tuple[float, float, float, float]


@pytest.fixture
def market() -> TwoMarkets:
    return TwoMarkets(NOW)


@pytest.fixture
def server(market: TwoMarkets) -> Iterator[Server]:
    with serve(market) as running:
        yield running


@pytest.fixture
def context(database: Database, server: Server) -> Context:
    return make_context(database, f"{server.url}/binance", polygon_url=f"{server.url}/polygon", budget=0.1)


def synced(context: Context, *priority: str, window: TimeRange = SPRING, **options: object) -> SyncReport:
    return sync(context, BITCOIN, window, priority or ("binance",), **options)  # type: ignore[arg-type]


def differing(database: Database, window: TimeRange = SPRING) -> dict[int, Prices | None]:
    """The stored candles that differ from the market by open; None for one that is not stored."""
    stored = queries.read_candles(database, BITCOIN, window)
    truth = traded(np.arange(window.start, window.end, HOUR))
    held = truth.take(np.isin(truth.ts, stored.ts))
    assert np.array_equal(held.ts, stored.ts)
    found: dict[int, Prices | None] = dict.fromkeys(np.setdiff1d(truth.ts, stored.ts).tolist())
    rows = np.stack([getattr(stored, name) for name in PRICES], axis=1)
    differ = (rows != np.stack([getattr(held, name) for name in PRICES], axis=1)).any(axis=1)
    for ts, row in zip(stored.ts[differ].tolist(), rows[differ].tolist(), strict=True):
        found[ts] = tuple(row)
    return found


KINDS = {
    "hundredfold": lambda ts: level(100, ts),
    "a hundredth": lambda ts: level(0.01, ts),
    "a wick": lambda ts: (500.0, 50_000.0, 499.0, 500.5),
    "a tail": lambda ts: (500.0, 501.0, 5.0, 500.5),
}


SECONDS = ["none", "agrees", "disagrees", "misses it", "is broken"]


@pytest.mark.parametrize(
    ("place", "kind", "second"),
    [
        *((place, "hundredfold", second) for place in PLACES for second in SECONDS),
        *((place, kind, "agrees") for place in ("inside", "first of a span") for kind in [*KINDS][1:]),
        *(("last of a span", kind, "disagrees") for kind in [*KINDS][1:]),
    ],
)
def test_a_single_candle(
    database: Database, market: TwoMarkets, context: Context, place: str, kind: str, second: str
) -> None:
    ts = PLACES[place]
    odd = market.binance.prices[ts] = KINDS[kind](ts)
    if second == "agrees":
        market.polygon.prices[ts] = odd
    if second == "misses it":
        market.polygon.missing.add(ts)
    market.polygon.broken = second == "is broken"
    report = synced(context, "binance", *([] if second == "none" else ["polygon"]))
    expected = {"agrees": {ts: odd}, "disagrees": {}}.get(second, {ts: None})
    assert differing(database) == expected
    assert quarantined(database) == ({} if second == "agrees" else {"implausible": 1})
    origins = queries.origins(database, BITCOIN, TimeRange(ts, ts + 1))
    assert [one.provider for one in origins] == (
        ["binance"] if second == "agrees" else ["polygon"] if second == "disagrees" else []
    )
    assert report.missing == (None in expected.values())
    assert any("implausible" in warning for warning in report.warnings) == (second != "agrees")
    if None in expected.values():
        (gap,) = queries.ledger_gaps(database, BITCOIN, SPRING)
        assert (gap.start, gap.end) == (ts, ts + HOUR)
        assert ("binance", "rejected") in [(item.provider, item.outcome) for item in gap.evidence]


@pytest.mark.parametrize("size", [7, 30])
@pytest.mark.parametrize(
    ("place", "length"), [(-700, 2), (-24, 24), (-2, 2), (-2, 3), (-1, 2), (-1, 24), (0, 2), (1, 3)]
)
def test_a_level_that_stays_is_stored(
    database: Database, market: TwoMarkets, context: Context, place: int, length: int, size: int
) -> None:
    """For two candles or more, independent of the edges of batches and responses."""
    opens = [APRIL + (place + n) * HOUR for n in range(length)]
    market.binance.prices |= {ts: level(100, ts) for ts in opens}
    report = synced(replace(context, batch_size_days=size))
    assert differing(database) == {ts: level(100, ts) for ts in opens}
    assert (report.complete, quarantined(database)) == (True, {})


def test_a_permanent_change_of_level_is_stored(
    database: Database, market: TwoMarkets, context: Context
) -> None:
    """From the last candle of a span on."""
    opens = range(APRIL - HOUR, SPRING.end, HOUR)
    market.binance.prices |= {ts: level(0.001, ts) for ts in opens}
    report = synced(context)
    assert set(differing(database)) == set(opens)
    assert (report.complete, quarantined(database)) == (True, {})


# Single candles -------------------------------------------------------------------------------------------


def refresh(context: Context, *priority: str, until: int) -> SyncReport:
    return synced(context, *priority, window=TimeRange(SPRING.start, until))


@pytest.mark.parametrize("priority", [("binance",), ("polygon",)])
@pytest.mark.parametrize("factor", [100, 0.01])
def test_the_newest_candle_is_compared_with_the_stored_ones(
    database: Database, market: TwoMarkets, context: Context, priority: tuple[str, ...], factor: float
) -> None:
    refresh(context, *priority, until=APRIL)
    quotes = getattr(market, priority[0])
    quotes.prices[APRIL] = level(factor, APRIL)
    refresh(context, *priority, until=APRIL + HOUR)
    assert differing(database, TimeRange(SPRING.start, APRIL + HOUR)) == {APRIL: None}
    assert quarantined(database) == {"implausible": 1}
    # The level lasts: both are stored as soon as there are two.
    quotes.prices[APRIL + HOUR] = level(factor, APRIL + HOUR)
    refresh(context, *priority, until=APRIL + 2 * HOUR)
    window = TimeRange(SPRING.start, APRIL + 2 * HOUR)
    assert set(differing(database, window)) == {APRIL, APRIL + HOUR}
    assert None not in differing(database, window).values()
    assert queries.what_is_known(database, BITCOIN, window).gaps == ()


def test_the_newest_candle_with_a_second_opinion(
    database: Database, market: TwoMarkets, context: Context
) -> None:
    refresh(context, until=APRIL)
    market.binance.prices[APRIL] = level(100, APRIL)
    report = refresh(context, "binance", "polygon", until=APRIL + HOUR)
    assert differing(database, TimeRange(SPRING.start, APRIL + HOUR)) == {}
    assert (report.complete, report.providers["polygon"].delivered) == (True, 1)


def test_a_gap_in_the_middle_is_compared_with_what_is_stored_around_it(
    database: Database, market: TwoMarkets, context: Context
) -> None:
    market.binance.missing.add(APRIL)
    synced(context)
    market.binance.missing.clear()
    market.binance.prices[APRIL] = level(100, APRIL)
    synced(context, recheck=True)
    assert differing(database) == {APRIL: None}
    assert quarantined(database) == {"implausible": 1}


# Refetches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["none", "agrees", "disagrees"])
def test_a_refetch_with_an_implausible_candle(
    database: Database, market: TwoMarkets, context: Context, second: str
) -> None:
    synced(context)
    odd = market.binance.prices[APRIL] = level(100, APRIL)
    if second == "agrees":
        market.polygon.prices[APRIL] = odd
    priority = ("binance",) if second == "none" else ("binance", "polygon")
    report = synced(context, *priority, scope=Scope.EVERYTHING)
    assert differing(database) == ({APRIL: odd} if second == "agrees" else {})
    assert {one.provider for one in queries.origins(database, BITCOIN, SPRING)} == {"binance"}
    assert quarantined(database) == ({} if second == "agrees" else {"implausible": 1})
    assert report.complete


def test_a_refetch_keeps_a_confirmed_implausible_candle(
    database: Database, market: TwoMarkets, context: Context
) -> None:
    odd = market.binance.prices[APRIL] = market.polygon.prices[APRIL] = level(100, APRIL)
    synced(context, "binance", "polygon")
    report = synced(context, scope=Scope.EVERYTHING)
    assert differing(database) == {APRIL: odd}
    assert (report.total_candles, quarantined(database)) == (0, {})
    # The candle is the first of its batch: only the jump from the batch before is reported.
    assert [one for one in report.warnings if "with a jump of 20 % or more" not in one] == []
