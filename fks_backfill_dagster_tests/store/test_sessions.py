"""Connections: their settings, waiting for a server, and replacement when they are lost. Servers with unusual
settings are in cli/test_odd_servers.py."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.store import sessions
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import ATTEMPTS, ConnectionLost, DatabaseUnavailable, StoreError
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.odd_servers import Cluster, folder_for_servers, until
from fks_backfill_dagster_tests.store.builders import Shelf, candles_at, execute, fetch
from fks_backfill_dagster_tests.store.conftest import fresh

pytestmark = pytest.mark.server

HELD = 77_002


def shown(database: Database, name: str) -> str:
    [(value,)] = fetch(database, f"SHOW {name}")
    return str(value)


@pytest.fixture
def odd(database: Database, database_url: str) -> Iterator[Database]:
    """A database with an administrator's strict settings, and a user's options in the URL."""
    name = sa.make_url(database_url).database
    execute(
        database,
        f"ALTER DATABASE \"{name}\" SET statement_timeout = '7s'",
        f"ALTER DATABASE \"{name}\" SET lock_timeout = '7s'",
        f"ALTER DATABASE \"{name}\" SET datestyle = 'German'",
        f'ALTER DATABASE "{name}" SET default_transaction_read_only = on',
    )
    options = {"options": "-c work_mem=8MB -c lock_timeout=9s -c timezone=Asia/Tokyo"}
    url = sa.make_url(database_url).update_query_dict(options)
    opened = Database(url.render_as_string(hide_password=False))
    yield opened
    opened.dispose()


def test_required_settings_are_set_and_others_kept(odd: Database) -> None:
    assert shown(odd, "timezone") == "UTC"
    assert shown(odd, "datestyle") == "ISO, MDY"
    assert shown(odd, "work_mem") == "8MB"
    assert shown(odd, "default_transaction_read_only") == "on"
    # A general timeout does not end long statements; a timeout in the URL is meant for this program.
    assert shown(odd, "statement_timeout") == "0"
    assert shown(odd, "lock_timeout") == "9s"


@pytest.mark.parametrize(
    ("query", "name"), [("", "fks-backfill"), ("&application_name=mine", "mine")], ids=["ours", "given"]
)
def test_a_parameter_of_the_url_replaces_a_default(database_url: str, query: str, name: str) -> None:
    database = Database(database_url + ("&" if "?" in database_url else "?") + query.lstrip("&"))
    assert shown(database, "application_name") == name
    database.dispose()


# Lost connections ------------------------------------------------------------------------------------------


def hold_commits(database: Database) -> None:
    """Makes batches wait for an advisory lock before they are committed."""
    execute(
        database,
        "CREATE FUNCTION public.hold() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({HELD}); RETURN NULL; END $$",
        "CREATE CONSTRAINT TRIGGER hold AFTER UPDATE ON fks.batch DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION public.hold()",
    )


WAITING = (
    "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
    f" WHERE l.locktype = 'advisory' AND l.objid = {HELD} AND NOT l.granted AND d.datname = current_database()"
)


def waiting(connection: psycopg.Connection) -> int:
    """The backend of a waiting batch."""
    until(lambda: connection.execute(WAITING).fetchone() is not None)
    row = connection.execute(WAITING).fetchone()
    assert row is not None
    return int(row[0])


def test_a_batch_whose_connection_is_lost_is_committed_again(database: Database, database_url: str) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    hold_commits(database)
    with psycopg.connect(database_url, autocommit=True) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(f"SELECT pg_advisory_lock({HELD})")
        writing = pool.submit(shelf.put, 0, 10)
        first = waiting(holder)
        holder.execute("SELECT pg_terminate_backend(%s, 5000)", [first])
        assert waiting(holder) != first
        holder.execute(f"SELECT pg_advisory_unlock({HELD})")
        assert writing.result(30) == Committed(10, 0, 0)
    assert shelf.read().equals(candles_at(shelf.opens(0, 10)))
    assert len(shelf.batches()) == 1


def test_repetitions_are_bounded(database: Database, database_url: str) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    hold_commits(database)
    with psycopg.connect(database_url, autocommit=True) as holder, ThreadPoolExecutor(1) as pool:
        holder.execute(f"SELECT pg_advisory_lock({HELD})")
        writing = pool.submit(shelf.put, 0, 10)
        for _ in range(ATTEMPTS):
            holder.execute("SELECT pg_terminate_backend(%s, 5000)", [waiting(holder)])
        with pytest.raises(ConnectionLost, match="what was committed is kept, run the same command again"):
            writing.result(30)
    assert len(shelf.read()) == 0


# Servers that stop, start and recover ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped() -> Iterator[Cluster]:
    """A stopped primary server with a series of ten hours, to copy."""
    with folder_for_servers() as folder:
        cluster = Cluster.make(folder / "a", "wal_level = replica").start().ready()
        database = Database(cluster.url)
        database.upgrade()
        Shelf.of(database, fresh("1h")).put(0, 10)
        database.dispose()
        cluster.stop()
        yield cluster


@pytest.fixture
def cluster(stopped: Cluster) -> Iterator[Cluster]:
    """A copy for one test, not started."""
    with folder_for_servers() as folder:
        copy = stopped.copied(folder / "b")
        yield copy
        copy.stop()


def stored(database: Database) -> Shelf:
    with database.begin() as connection:
        symbol, identity = connection.execute(sa.text("SELECT symbol, id FROM fks.series")).one()
    series = fresh("1h")
    return Shelf(database, type(series)(symbol, series.timeframe, series.asset_class), identity)


def test_a_standby_serves_the_present_and_refuses_the_past(cluster: Cluster) -> None:
    """The contents as of a moment change until the standby has replayed all of them."""
    cluster.touch("standby.signal")
    cluster.start().ready()
    database = Database(cluster.url)
    database.check()
    shelf = stored(database)
    assert len(shelf.read()) == 10
    with pytest.raises(
        StoreError, match=r"ohlcv_as_of refuses on a standby, .*: call it on the primary server"
    ):
        shelf.read(shelf.now())
    with pytest.raises(StoreError, match="Point FKS_DATABASE_URL at the primary server"):
        shelf.put(10, 12)
    database.dispose()


def test_a_server_that_does_not_accept_connections_yet_is_waited_for(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """A standby without hot standby refuses connections like a recovering server, until it is promoted."""
    cluster.touch("standby.signal")
    cluster.configure("hot_standby = off")
    cluster.start()
    database = Database(cluster.url)
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(database.revision)
        until(lambda: "is not ready: waiting for it, up to 60 s" in caplog.text)
        assert not pending.done()
        cluster.touch("promote")
        cluster.signal(10)  # SIGUSR1: look for the file
        assert pending.result(60)
    database.dispose()
    assert caplog.text.count("is not ready") == 1


def test_the_wait_is_bounded(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "PATIENCE_SECONDS", 0.5)
    cluster.touch("standby.signal")
    cluster.configure("hot_standby = off")
    cluster.start()
    until(lambda: "57P03" in _refusal(cluster))
    database = Database(cluster.url)
    with pytest.raises(DatabaseUnavailable, match=r"is not ready yet \(.*\)\. Wait until it is"):
        database.revision()


def _refusal(cluster: Cluster) -> str:
    """The state of a server by its log; libpq returns no SQLSTATE for a refused connection."""
    try:
        psycopg.connect(cluster.url).close()
    except psycopg.OperationalError as error:
        return "57P03" if "the database system is" in str(error) else str(error)
    return ""


def test_a_crash_in_the_middle_of_a_batch_is_recovered_from(cluster: Cluster) -> None:
    cluster.start().ready()
    database = Database(cluster.url)
    shelf = stored(database)
    hold_commits(database)
    with ThreadPoolExecutor(1) as pool:
        with psycopg.connect(cluster.url, autocommit=True) as holder:
            holder.execute(f"SELECT pg_advisory_lock({HELD})")
            writing = pool.submit(shelf.put, 10, 20)
            cluster.kill_backend(waiting(holder))
        assert writing.result(60) == Committed(10, 0, 0)
    assert len(shelf.read()) == 20
    database.dispose()


def test_a_restart_is_waited_for_after_a_first_connection(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.start().ready()
    database, unconnected = Database(cluster.url), Database(cluster.url)
    shelf = stored(database)
    cluster.stop()
    with pytest.raises(DatabaseUnavailable, match="Start it or correct FKS_DATABASE_URL"):
        unconnected.revision()
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(shelf.read)
        until(lambda: "is not ready: waiting for it" in caplog.text)
        cluster.start()
        assert len(pending.result(60)) == 10
    cluster.stop()
    monkeypatch.setattr(sessions, "PATIENCE_SECONDS", 0.5)
    for _ in range(2):
        with pytest.raises(DatabaseUnavailable, match="does not answer"):
            shelf.read()
    database.dispose()
