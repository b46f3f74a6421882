"""`ohlcv_as_of` with concurrent sessions and invalid arguments. `test_history` tests that it returns every state."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.store.builders import EVER, Shelf, candles_at, execute
from fks_backfill_dagster_tests.store.conftest import fresh

COMMIT_GATE = 4613732
HELD = 77_001


def connect(database: Database) -> psycopg.Connection:
    url = database.url.set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(url, autocommit=True)


def waiters(connection: psycopg.Connection) -> int:
    row = connection.execute(
        "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE l.locktype = 'advisory' AND NOT l.granted AND d.datname = current_database()"
    ).fetchone()
    assert row is not None
    return int(row[0])


def wait_for(connection: psycopg.Connection, count: int) -> None:
    for _ in range(1000):
        if waiters(connection) == count:
            return
        time.sleep(0.01)
    raise AssertionError(f"there are {waiters(connection)} waiting, not {count}")


def test_the_result_does_not_change_during_a_commit(database: Database) -> None:
    """A commit waits between its stamp and its end. A query for a moment after the stamp waits for it."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    before = shelf.now()
    execute(
        database,
        "CREATE FUNCTION public.hold() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({HELD}); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER hold AFTER UPDATE ON fks.batch DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION public.hold()",
    )
    with connect(database) as holder, ThreadPoolExecutor(3) as pool:
        holder.execute(f"SELECT pg_advisory_lock({HELD})")
        writing = pool.submit(shelf.put, 0, 10, 2)
        wait_for(holder, 1)
        moment = shelf.now()
        assert shelf.read().equals(candles_at(shelf.opens(0, 5)))  # not visible to other sessions yet
        pending = pool.submit(shelf.read, moment)
        asked_before = pool.submit(shelf.read, before)
        wait_for(holder, 3)
        holder.execute(f"SELECT pg_advisory_unlock({HELD})")
        assert writing.result(30) == Committed(5, 5, 0)
        found = pending.result(30)
        assert asked_before.result(30).equals(candles_at(shelf.opens(0, 5)))
    assert found.equals(candles_at(shelf.opens(0, 10), 2))
    assert shelf.read(moment).equals(found)


def test_a_reader_blocks_no_writer(database: Database) -> None:
    """The reader has passed the gate, and its transaction is still open."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    with database.begin() as connection:
        query = "SELECT count(*) FROM fks.ohlcv_as_of(:symbol, '1h', '2024-01-01', '2025-01-01', :moment)"
        named = {"symbol": shelf.series.symbol, "moment": shelf.now()}
        assert connection.scalar(sa.text(query), named) == 5
        done = threading.Thread(target=shelf.put, args=(0, 10), daemon=True)
        done.start()
        done.join(timeout=20)
        assert not done.is_alive()
        assert connection.scalar(sa.text(query), named) == 5
    assert shelf.status().total_candles == 10


def test_a_cancelled_reader_leaves_the_gate_open(database: Database) -> None:
    """It is cancelled while waiting at the gate, and its session stays open."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    select = "SELECT * FROM fks.ohlcv_as_of('X', '1h', '2024-01-01', '2025-01-01', '2024-01-01')"
    with connect(database) as holder, connect(database) as reader:
        holder.execute(f"SELECT pg_advisory_lock({COMMIT_GATE})")
        reader.execute("SET statement_timeout = 200")
        with pytest.raises(psycopg.errors.QueryCanceled):
            reader.execute(select)
        holder.execute(f"SELECT pg_advisory_unlock({COMMIT_GATE})")
        assert reader.execute(select).fetchall() == []
        assert reader.execute(
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        ).fetchone() == (0,)
        assert shelf.put(5, 6) == Committed(1, 0, 0)


def test_the_future_is_refused(hours: Shelf) -> None:
    hours.put(0, 5)
    with pytest.raises(StoreError, match="lies in the future: what it would hold can still change"):
        hours.read(hours.now() + timedelta(minutes=1))


def test_a_moment_without_a_zone_is_refused(hours: Shelf) -> None:
    hours.put(0, 5)
    with pytest.raises(ValueError, match="no time zone"):
        hours.read(datetime(2024, 1, 1))  # noqa: DTZ001


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_an_old_snapshot_is_refused(hours: Shelf, level: str) -> None:
    hours.put(0, 5)
    with connect(hours.database) as reader:
        reader.execute(f"BEGIN ISOLATION LEVEL {level}")
        with pytest.raises(psycopg.errors.RaiseException, match="READ COMMITTED only"):
            reader.execute(
                "SELECT * FROM fks.ohlcv_as_of('X', '1h', '2024-01-01', '2025-01-01', '2024-01-01')"
            )


def test_a_read_only_role_may_call_it(database: Database) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    with connect(database) as reader:
        reader.execute("SET default_transaction_read_only = on")
        found = reader.execute(
            "SELECT ts, open, high, low, close, volume, provider"
            " FROM fks.ohlcv_as_of(%s, '1h', '2024-01-01', '2025-01-01', now())",
            [shelf.series.symbol],
        ).fetchall()
    assert len(found) == 5
    assert {row[6] for row in found} == {"binance"}


def test_nothing_was_held_before_the_first_commit(hours: Shelf) -> None:
    start = hours.now()
    hours.put(0, 5)
    assert len(hours.read(start)) == 0
    assert len(hours.read(hours.now())) == 5
    blocks = list(queries.iterate_candles(hours.database, hours.series, EVER, hours.now()))
    assert sum(len(b) for b in blocks) == 5


def test_an_unknown_series(shared: Database) -> None:
    moment = datetime.fromisoformat("2024-01-01T00:00:00+00:00")
    assert len(queries.read_candles(shared, fresh("1h"), EVER, moment)) == 0
    assert len(queries.read_candles(shared, fresh("1h"), EVER)) == 0
    assert len(queries.read_candles(shared, fresh("1h"), EVER).ts) == 0
