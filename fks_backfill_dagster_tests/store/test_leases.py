"""The status of a series over its lifetime, and leases."""

from __future__ import annotations

from dataclasses import replace

from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.store import ledger, queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf
from fks_backfill_dagster_tests.store.conftest import fresh


def hold(shelf: Shelf, owner: str, seconds: float) -> None:
    with shelf.database.begin() as connection:
        ledger.hold_lease(connection, shelf.identity, owner, seconds)


def end(shelf: Shelf, owner: str, error: str | None = None) -> None:
    with shelf.database.begin() as connection:
        ledger.end_sync(connection, shelf.identity, owner, error)


def owners(shelf: Shelf) -> list[object]:
    return [o for (o,) in shelf.rows("SELECT owner FROM fks.lease WHERE series_id = :id ORDER BY owner")]


def test_the_life_of_a_series(hours: Shelf) -> None:
    assert hours.status() == queries.SyncStatus(
        hours.series.symbol, "1h", "pending", None, None, 0, None, None, 0
    )
    hold(hours, "a", 60)
    assert hours.status().status == "syncing"
    hours.put(0, 10)
    assert hours.status().status == "syncing"
    end(hours, "a", "binance: HTTP 502")
    status = hours.status()
    assert (status.status, status.error_message) == ("error", "binance: HTTP 502")
    assert status.last_sync_time is not None
    assert status.last_sync_time <= hours.now()
    hold(hours, "b", 60)
    end(hours, "b")
    hours.commit(hours.span(10, 15))
    status = hours.status()
    assert (status.status, status.error_message, status.open_gaps) == ("completed", None, 1)
    assert (status.oldest_data_time, status.total_candles) == (to_datetime(MIDNIGHT), 10)


def test_a_lease_expires_with_its_dead_owner(hours: Shelf) -> None:
    hold(hours, "killed", -1)
    assert hours.status().status == "pending"
    hold(hours, "killed", 60)  # it was only slow
    assert hours.status().status == "syncing"


def test_other_leases_stay(hours: Shelf) -> None:
    hold(hours, "dead", -1)
    hold(hours, "a", 60)
    hold(hours, "b", 60)
    end(hours, "a")
    assert owners(hours) == ["b"]
    assert hours.status().status == "syncing"
    end(hours, "b")
    assert owners(hours) == []
    assert hours.status().status == "completed"


def test_statuses_are_ordered(database: Database) -> None:
    symbols = sorted([fresh("1h").symbol, fresh("1h").symbol])
    for timeframe in ("1w", "1m", "4h", "15m"):
        for symbol in reversed(symbols):
            Shelf.of(database, replace(fresh(timeframe), symbol=symbol))
    found = [(s.symbol, s.timeframe) for s in queries.sync_status(database)]
    assert found == [(s, t) for s in symbols for t in ("1m", "15m", "4h", "1w")]
    assert sorted((s.symbol, s.timeframe.value) for s in queries.stored_series(database)) == sorted(found)
    assert queries.sync_status(database, fresh("1h")) == []


def test_an_unknown_series(shared: Database, hours: Shelf) -> None:
    with shared.begin() as connection:
        assert ledger.series_id(connection, fresh("1h")) is None
        assert ledger.series_id(connection, hours.series) == hours.identity
        known = ledger.known(connection, None, hours.span(0, 5))
    assert list(known.missing(hours.span(0, 5))) == [hours.span(0, 5)]
    assert queries.sync_status(shared, hours.series)[0].open_gaps == 0
    assert queries.ledger_gaps(shared, fresh("1h"), hours.span(0, 5)) == ()


def test_known_gaps_within_a_window(hours: Shelf) -> None:
    """Gaps that only adjoin the window are not in it; `known_around` returns the nearest of them."""
    for n in (0, 10, 20, 30):
        hours.put(n, n + 5)
        hours.commit(hours.span(n + 5, n + 10))
    with hours.database.begin() as connection:
        inside = ledger.known(connection, hours.identity, hours.span(12, 28))
        touching = ledger.known(connection, hours.identity, hours.span(10, 15))
        around = ledger.known_around(connection, hours.identity, hours.span(20, 25))
    starts = hours.opens(0, 40)
    assert [g.start for g in inside.gaps] == [starts[15], starts[25]]
    assert touching.gaps == ()
    assert [g.start for g in around.gaps] == [starts[15], starts[25]]
    assert list(inside.synced) == [hours.span(12, 28)]
    assert queries.sync_status(hours.database, hours.series)[0].open_gaps == 4
