"""Listings of a symbol by provider: claims, observations and the oldest delivered candle."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, to_micros
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.coverage import listed_at
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import Listing, ListingKind
from fks_backfill_dagster.store.writer.records import Withdrawal
from fks_backfill_dagster_tests.store.builders import (
    MIDNIGHT,
    Shelf,
    brought,
    candles_at,
    execute,
    fetch,
    origin_of,
)
from fks_backfill_dagster_tests.store.conftest import fresh

CLAIM, OBSERVATION = ListingKind.CLAIM, ListingKind.OBSERVATION


def remember(
    database: Database, provider: str, symbol: str, listed_at: int, kind: ListingKind = CLAIM
) -> None:
    with database.begin() as connection:
        ledger.remember_listing(connection, provider, symbol, listed_at, kind)


def listings(database: Database, symbol: str) -> dict[str, Listing]:
    with database.begin() as connection:
        return ledger.listings(connection, symbol)


def oldest(database: Database, symbol: str) -> dict[str, int]:
    """Over all timeframes."""
    with database.begin() as connection:
        found = ledger.oldest_by_provider(connection, symbol)
    return {name: min(opens.values()) for name, opens in found.items()}


def test_each_provider_has_its_own_listing(database: Database) -> None:
    assert listings(database, "BTC/USDT") == {}
    remember(database, "binance", "BTC/USDT", MIDNIGHT)
    remember(database, "polygon", "BTC/USDT", MIDNIGHT + 2, OBSERVATION)
    remember(database, "binance", "ETH/USDT", MIDNIGHT + 3)
    found = listings(database, "BTC/USDT")
    assert {name: (one.listed_at, one.kind) for name, one in found.items()} == {
        "binance": (MIDNIGHT, CLAIM),
        "polygon": (MIDNIGHT + 2, OBSERVATION),
    }
    assert fetch(database, "SELECT count(*) FROM fks.listing") == [(3,)]
    series = replace(fresh("1h"), symbol="BTC/USDT")
    assert listed_at(database, series, ["polygon", "binance", "oanda"]) == MIDNIGHT
    assert listed_at(database, series, ["polygon"]) == MIDNIGHT + 2
    assert listed_at(database, series, ["oanda"]) is None


@pytest.mark.parametrize("change", [-MICROS_PER_DAY, 0, MICROS_PER_DAY])
@pytest.mark.parametrize("kind", list(ListingKind))
def test_a_claim_can_be_corrected(database: Database, change: int, kind: ListingKind) -> None:
    """To an earlier time and to a later one, also by an observation; or confirmed unchanged."""
    remember(database, "binance", "BTC/USDT", MIDNIGHT)
    first = listings(database, "BTC/USDT")["binance"]
    remember(database, "binance", "BTC/USDT", MIDNIGHT + change, kind)
    second = listings(database, "BTC/USDT")["binance"]
    assert (second.listed_at, second.kind) == (MIDNIGHT + change, kind)
    ((now,),) = fetch(database, "SELECT clock_timestamp()")
    assert first.found_at < second.found_at < to_micros(now)


def test_an_unknown_kind_is_refused(database: Database) -> None:
    """By the database."""
    remember(database, "binance", "BTC/USDT", MIDNIGHT)
    with pytest.raises(Exception, match="listing_kind"):
        execute(database, "UPDATE fks.listing SET kind = 'rumour'")


def test_the_oldest_candle_of_each_provider(database: Database) -> None:
    """Over all timeframes of the symbol, without other symbols."""
    assert oldest(database, "X/USDT") == {}
    hours = Shelf.of(database, replace(fresh("1h"), symbol="X/USDT"))
    days = Shelf.of(database, replace(fresh("1d"), symbol="X/USDT"))
    other = Shelf.of(database, fresh("1h"))
    assert oldest(database, "X/USDT") == {}
    hours.put(50, 60)
    hours.put(40, 50)
    hours.put(60, 70)
    hours.commit(hours.span(24, 40), brought(candles_at(hours.opens(30, 34)), "polygon"))
    days.put(1, 3, provider="polygon")
    days.put(3, 5)
    other.put(-50, 5, provider="oanda")
    assert oldest(database, "X/USDT") == {
        "binance": hours.opens(40, 41)[0],
        "polygon": days.opens(1, 2)[0],
    }


def test_undone_and_withdrawn_candles_do_not_count(database: Database) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(10, 20)
    shelf.put(0, 5)
    shelf.put(0, 5, version=2, provider="polygon")
    _, second, third = shelf.batches()
    shelf.undo(third)
    shelf.undo(second)
    symbol = shelf.series.symbol
    assert oldest(database, symbol) == {"binance": shelf.opens(10, 11)[0]}
    shelf.put(0, 3, provider="polygon")
    shelf.put(3, 5)
    shelf.commit(shelf.span(3, 20), withdrawn=(Withdrawal(origin_of(), shelf.opens(10, 12)),))
    assert oldest(database, symbol) == {"binance": shelf.opens(3, 4)[0], "polygon": shelf.opens(0, 1)[0]}


def test_the_number_of_look_ups_does_not_depend_on_the_batches(database: Database) -> None:
    shelf = Shelf.of(database, fresh("1m"))
    shelf.put(0, 5)
    execute(
        database,
        "INSERT INTO fks.batch (series_id, provider, transport, source, host, range_start, range_end, fetched_at,"
        f" committed_at, inserted, updated) SELECT {shelf.identity},"
        " CASE mod(n, 2) WHEN 0 THEN 'binance' ELSE 'polygon' END, 'rest', '/', 'https://market.example',"
        " timestamptz '2024-02-01Z' + n * interval '1 minute', timestamptz '2024-02-01Z' + n * interval '2 minutes',"
        " now(), '2024-03-01', 1, 0 FROM generate_series(1, 100000) n",
        "ANALYZE fks.batch",
    )
    symbol = shelf.series.symbol
    found = oldest(database, symbol)
    assert found["binance"] == MIDNIGHT
    assert found["polygon"] > MIDNIGHT
    plan = fetch(database, f"EXPLAIN {ledger._OLDEST}".replace(":symbol", f"'{symbol}'"))
    assert not any("Seq Scan on batch" in str(line) for (line,) in plan)
