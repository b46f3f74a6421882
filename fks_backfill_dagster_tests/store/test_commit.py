"""A commit of a batch: atomic, idempotent, and serialized per series."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import RejectedRows
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe, to_datetime
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.store import ledger, queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import ATTEMPTS, DatabaseFull, DatabaseUnavailable, StoreError
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster.store.writer.remove import remove_series
from fks_backfill_dagster_tests.domain.builders import at, candles, window
from fks_backfill_dagster_tests.store.builders import (
    EVER,
    MIDNIGHT,
    Shelf,
    brought,
    candles_at,
    execute,
    fetch,
    origin_of,
)
from fks_backfill_dagster_tests.store.conftest import fresh

COMMIT_GATE = 4613732

TABLES = ("series", "batch", "revision", "gap", "sync_state", "quarantine", "candles_1h")


def everything(database: Database) -> dict[str, list[str]]:
    """Every row of every table."""
    return {
        table: sorted(str(row) for row in fetch(database, f'SELECT t::text FROM fks."{table}" t'))
        for table in TABLES
    }


# Changes of a batch ---------------------------------------------------------------------------------------


def test_a_batch_with_holes(hours: Shelf) -> None:
    opens = hours.opens(0, 10)
    done = hours.commit(hours.span(0, 10), brought(candles_at(opens[[0, 1, 4, 5, 6]])))
    assert done == Committed(5, 0, 5)
    assert hours.read().equals(candles_at(opens[[0, 1, 4, 5, 6]]))
    assert [(g.start, g.end, g.missing) for g in hours.gaps()] == [
        (opens[2], opens[4], 2),
        (opens[7], opens[9] + MICROS_PER_HOUR, 3),
    ]


def test_lineage(hours: Shelf) -> None:
    opens = hours.opens(0, 10)
    hours.commit(
        hours.span(0, 20), brought(candles_at(opens[:6])), brought(candles_at(opens[6:9]), "polygon")
    )
    polygon, binance = queries.batches(hours.database, hours.series)
    assert (binance.provider, binance.inserted, polygon.provider, polygon.inserted) == (
        "binance",
        6,
        "polygon",
        3,
    )
    assert (binance.range_start, binance.range_end) == (to_datetime(MIDNIGHT), to_datetime(int(opens[6])))
    assert binance.committed_at == polygon.committed_at <= hours.now()
    assert binance.run_id == "run"
    assert {(o.provider, o.candles) for o in queries.origins(hours.database, hours.series, EVER)} == {
        ("binance", 6),
        ("polygon", 3),
    }
    assert queries.series_of_batch(hours.database, polygon.id) == hours.series


def test_the_last_candle_of_a_session_ends_its_batch(shared: Database) -> None:
    """A half-day: the bar of 12:00 New York ends at 13:00."""
    symbol = fresh("4h").symbol
    shelf = Shelf.of(shared, Series(symbol, Timeframe.H4, AssetClass.STOCKS))
    day = window("2023-11-24T00:00Z", "2023-11-25T00:00Z")
    shelf.commit(day, brought(candles_at(shelf.grid.opens(day))))
    assert shelf.grid.count(day) > 0
    (batch,) = queries.batches(shared, shelf.series)
    assert batch.range_end == to_datetime(at("2023-11-24T18:00Z"))


def test_the_same_batch_again_writes_nothing(hours: Shelf) -> None:
    opens = hours.opens(0, 200)
    deliveries = (brought(candles_at(opens[:90])), brought(candles_at(opens[100:]), "polygon"))
    assert hours.commit(hours.span(0, 200), *deliveries) == Committed(190, 0, 10)
    versions = f"SELECT ts, xmin::text, ctid::text FROM {hours.table} WHERE series_id = :id ORDER BY ts"
    before = (hours.rows(versions), hours.batches(), hours.gaps(), hours.status())
    assert hours.commit(hours.span(0, 200), *deliveries) == Committed(0, 0, 10)
    assert (hours.rows(versions), hours.batches(), hours.gaps(), hours.status()) == before


def test_a_change_is_a_correction(hours: Shelf) -> None:
    """The prices of one candle and the volume of another change; one gets a volume, one loses it."""
    opens = hours.opens(0, 5)
    flat = np.full(5, 10.0)
    volume = np.array([1.0, 1.0, np.nan, 1.0, np.nan])
    hours.commit(hours.span(0, 5), brought(Candles(opens, flat, flat, flat, flat, volume)))
    close = np.array([11.0, 10.0, 10.0, 10.0, 10.0])
    later = Candles(opens, flat, close, flat, close, np.array([1.0, 2.0, 3.0, np.nan, np.nan]))
    assert hours.commit(hours.span(0, 5), brought(later, "polygon")) == Committed(0, 4, 0)
    assert hours.read().equals(later)
    found = hours.rows(
        "SELECT ts, close_before, close_after, volume_before, volume_after, source FROM fks.corrections"
        " WHERE symbol = :symbol ORDER BY ts"
    )
    assert found == [
        (to_datetime(int(opens[0])), 10.0, 11.0, 1.0, 1.0, "polygon"),
        (to_datetime(int(opens[1])), 10.0, 10.0, 1.0, 2.0, "polygon"),
        (to_datetime(int(opens[2])), 10.0, 10.0, None, 3.0, "polygon"),
        (to_datetime(int(opens[3])), 10.0, 10.0, 1.0, None, "polygon"),
    ]


def test_evidence_is_kept_with_the_gap(hours: Shelf) -> None:
    earlier = Evidence("binance", MIDNIGHT, Outcome.ERROR, "HTTP 502")
    hours.commit(hours.span(0, 5), evidence=(earlier,))
    again = Evidence("binance", MIDNIGHT + 1, Outcome.ABSENT)
    hours.commit(hours.span(0, 5), evidence=(again, Evidence("polygon", MIDNIGHT, Outcome.ABSENT)))
    (gap,) = hours.gaps()
    assert (gap.attempts, gap.evidence) == (2, (again, Evidence("polygon", MIDNIGHT, Outcome.ABSENT)))
    hours.put(0, 5)
    assert hours.gaps() == ()
    assert hours.rows(
        "SELECT status, missing_candles, next_attempt_at FROM fks.gaps WHERE symbol = :symbol"
    ) == [("filled", 5, None)]


def test_an_explained_gap_stays_explained(hours: Shelf) -> None:
    hours.commit(hours.span(0, 10))
    execute(hours.database, f"UPDATE fks.gap SET status = 'no_trade' WHERE series_id = {hours.identity}")
    assert not np.isin(hours.opens(0, 10), hours.missing()).any()
    assert hours.put(4, 6) == Committed(2, 0, 0)
    assert [(g.missing, g.status) for g in hours.gaps()] == [(4, "no_trade"), (4, "no_trade")]
    assert hours.commit(hours.span(0, 12)) == Committed(0, 0, 10)
    assert [(g.missing, g.status) for g in hours.gaps()] == [(4, "no_trade"), (4, "no_trade"), (2, "open")]


def test_quarantine(hours: Shelf) -> None:
    """One row per rejected row, however often it is received; a value that is not finite is NULL."""
    broken = candles((MIDNIGHT, np.nan, np.inf, 1.0, 2.0, np.nan), (MIDNIGHT, 1.0, 2.0, 3.0, 4.0, 5.0))
    refused = RejectedRows.of(origin_of(), Reason.NOT_FINITE, broken)
    for _ in range(3):
        hours.commit(hours.span(0, 5), refused=(refused,))
    rows = "SELECT open, high, low, close, volume, seen, reason FROM fks.quarantine WHERE series_id = :id ORDER BY low"
    assert hours.rows(rows) == [
        (None, None, 1.0, 2.0, None, 3, "not_finite"),
        (1.0, 2.0, 3.0, 4.0, 5.0, 3, "not_finite"),
    ]
    assert len(hours.read()) == 0


def test_series_do_not_touch_each_other(shared: Database) -> None:
    one, other = Shelf.of(shared, fresh("1h")), Shelf.of(shared, fresh("1h"))
    one.put(0, 10)
    other.commit(other.span(5, 20), brought(candles_at(other.opens(8, 12), 2)))
    assert one.read().equals(candles_at(one.opens(0, 10)))
    assert one.gaps() == ()
    assert other.read().equals(candles_at(other.opens(8, 12), 2))
    assert sum(g.missing for g in other.gaps()) == 11


@pytest.mark.parametrize("timeframe", list(Timeframe))
def test_every_timeframe_has_its_table(shared: Database, timeframe: Timeframe) -> None:
    shelf = Shelf.of(shared, fresh(timeframe.value))
    week = window("2024-01-01T00:00Z", "2024-01-15T00:00Z")
    stored = candles_at(shelf.grid.opens(week)[:50])
    done = shelf.commit(week, brought(stored))
    assert done.inserted == len(stored) > 0
    assert shelf.read().equals(stored)
    assert queries.read_candles(shared, shelf.series, EVER).ts.tolist() == stored.ts.tolist()
    assert shelf.rows(f"SELECT count(*) FROM {shelf.table} WHERE series_id = :id") == [(len(stored),)]


def test_blocks_of_a_long_window(minutes: Shelf) -> None:
    minutes.put(0, 100_000)
    blocks = list(queries.iterate_candles(minutes.database, minutes.series, minutes.span(-5000, 120_000)))
    assert len(blocks) == 3
    assert max(len(b) for b in blocks) < 50_000
    assert Candles.concat(blocks).equals(candles_at(minutes.opens(0, 100_000)))


def test_removing_a_series_deletes_all_its_rows(shared: Database, hours: Shelf) -> None:
    neighbour = Shelf.of(shared, fresh("1h"))
    neighbour.put(0, 3)
    hours.put(0, 10)
    hours.put(0, 5, version=2)
    hours.undo(hours.batches()[0])
    hours.commit(
        hours.span(20, 30),
        refused=(RejectedRows.of(origin_of(), Reason.SPLICE, candles_at(hours.opens(20, 21))),),
    )
    assert remove_series(shared, hours.series) == len(hours.opens(0, 10)) - 5
    for table in (*TABLES, "lease"):
        key = "id" if table == "series" else "series_id"
        assert hours.rows(f'SELECT count(*) FROM fks."{table}" WHERE {key} = :id') == [(0,)]
    assert len(neighbour.read()) == 3
    assert len(hours.read()) == 0
    with pytest.raises(StoreError):  # a writer that still has the id of the deleted series
        hours.put(0, 5)
    assert remove_series(shared, hours.series) == 0


# Invalid batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("deliveries", "sentence"),
    [
        ([[0, 1, 2], [2, 3]], "two deliveries of one batch hold the same candle"),
        ([[1, 0]], "not ascending and unique"),
        ([[1, 1]], "not ascending and unique"),
        ([[0, 5]], "outside the batch"),
        ([[-1, 0]], "outside the batch"),
        ([[0, 0.5]], "where none is expected"),
    ],
)
def test_refused_batches_change_nothing(
    database: Database, deliveries: list[list[float]], sentence: str
) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 2)
    before = everything(database)
    parts = [
        brought(candles_at((MIDNIGHT + np.array(part) * MICROS_PER_HOUR).astype(np.int64), 2))
        for part in deliveries
    ]
    with pytest.raises(ValueError, match=sentence):
        shelf.commit(shelf.span(0, 5), *parts)
    assert everything(database) == before


# Atomicity ------------------------------------------------------------------------------------------------

FAILING = {  # where a statement of a commit can fail: the trigger's event and table
    "lineage": "AFTER INSERT ON fks.batch",
    "new candles": "AFTER INSERT ON fks.candles_1h",
    "revisions": "AFTER INSERT ON fks.revision",
    "changed candles": "AFTER UPDATE ON fks.candles_1h",
    "ledger, out": "AFTER DELETE ON fks.gap",
    "ledger, in": "AFTER INSERT ON fks.gap",
    "quarantine": "AFTER INSERT ON fks.quarantine",
    "coverage": "AFTER UPDATE ON fks.sync_state",
    "stamp": "AFTER UPDATE ON fks.batch",
}


@contextmanager
def failing(database: Database, event: str, sqlstate: str) -> Iterator[None]:
    quoted = event.replace("candles_1h", '"candles_1h"')
    table = quoted.split(" ON ")[1]
    execute(
        database,
        "CREATE OR REPLACE FUNCTION public.fail() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '{sqlstate}'; END $$",
        f"CREATE TRIGGER fail {quoted} FOR EACH ROW EXECUTE FUNCTION public.fail()",
    )
    try:
        yield
    finally:
        execute(database, f"DROP TRIGGER fail ON {table}")


def test_a_failure_anywhere_rolls_the_whole_batch_back(database: Database) -> None:
    """A full disk at every statement in turn; afterwards the same batch succeeds."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.commit(shelf.span(0, 10), brought(candles_at(shelf.opens(0, 6))))

    def write() -> Committed:
        return shelf.commit(
            shelf.span(4, 20),
            brought(candles_at(shelf.opens(4, 8), 2)),
            refused=(RejectedRows.of(origin_of(), Reason.HIGH_LOW, candles_at(shelf.opens(9, 10))),),
        )

    before = everything(database)
    for event in FAILING.values():
        with (
            failing(database, event, "53100"),
            pytest.raises(DatabaseFull, match=r"no room left .* free space"),
        ):
            write()
        assert everything(database) == before, event
    assert write() == Committed(2, 2, 12)


def test_killed_before_the_commit(database: Database) -> None:
    """In every attempt the backend dies with everything written but the commit; the Database works afterwards."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 10)
    before = everything(database)
    with psycopg.connect(_libpq(database), autocommit=True) as other, ThreadPoolExecutor(1) as pool:
        other.execute(f"SELECT pg_advisory_lock({COMMIT_GATE})")
        writing = pool.submit(shelf.put, 5, 20, 2)
        for _ in range(ATTEMPTS):
            victim = _blocked(other)
            assert other.execute("SELECT pg_terminate_backend(%s, 5000)", [victim]).fetchone() == (True,)
        with pytest.raises(DatabaseUnavailable, match="what was committed is kept"):
            writing.result(timeout=30)
    assert everything(database) == before
    assert shelf.put(5, 20, 2) == Committed(10, 5, 0)


def _libpq(database: Database) -> str:
    return database.url.set(drivername="postgresql").render_as_string(hide_password=False)


def _blocked(other: psycopg.Connection) -> int:
    """Waits for a backend of this database that waits for an advisory lock; returns its pid."""
    waiting = (
        "SELECT l.pid FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
        " WHERE l.locktype = 'advisory' AND NOT l.granted AND d.datname = current_database()"
    )
    for _ in range(1000):
        found = other.execute(waiting).fetchone()
        if found is not None:
            return int(found[0])
        time.sleep(0.01)
    raise AssertionError("no backend waits")


# Concurrency ----------------------------------------------------------------------------------------------


def at_once(*work: Callable[[], object]) -> None:
    """Runs all of them at the same time; raises the error of any of them."""
    start = threading.Barrier(len(work))

    def run(one: Callable[[], object]) -> None:
        start.wait()
        one()

    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(run, one) for one in work]:
            done.result(timeout=60)


def test_two_writers_of_one_series(database: Database) -> None:
    """The same windows and overlapping ones, in opposite order, one of them with gaps."""
    shelf = Shelf.of(database, fresh("1h"))
    other = Database(_libpq(database))
    windows = [(n, n + 70) for n in range(0, 1000, 50)]

    def whole() -> None:
        for first, past in windows:
            shelf.put(first, past)

    def with_holes() -> None:
        for first, past in reversed(windows):
            opens = shelf.opens(first, past)
            shelf.on(other).commit(
                shelf.span(first, past), brought(candles_at(opens[opens % 7 > 2]), "polygon")
            )

    at_once(whole, with_holes, whole)
    other.dispose()
    assert shelf.read().equals(candles_at(shelf.opens(0, 1020)))
    assert shelf.gaps() == ()
    status = shelf.status()
    assert (status.total_candles, status.open_gaps) == (1020, 0)
    batches = queries.batches(database, shelf.series)
    assert (sum(b.inserted for b in batches), sum(b.updated for b in batches)) == (1020, 0)


def test_writers_of_many_series_and_readers_of_the_past(database: Database) -> None:
    shelves = [Shelf.of(database, fresh("1h")) for _ in range(4)]

    def write(shelf: Shelf) -> Callable[[], None]:
        def run() -> None:
            for n in range(0, 300, 20):
                shelf.put(n, n + 40, version=n % 3)

        return run

    def read_past() -> None:
        for shelf in shelves * 8:
            moment = shelf.now()
            first = shelf.read(moment)
            assert shelf.read(moment).equals(first)

    at_once(*(write(s) for s in shelves), read_past)
    assert [s.status().total_candles for s in shelves] == [320] * 4
    stamps = [b.committed_at for b in queries.batches(database)]
    assert len(set(stamps)) == len(stamps)


def test_registered_by_several_at_once(database: Database) -> None:
    series, found = fresh("1h"), []

    def register() -> None:
        with database.begin() as connection:
            found.append(ledger.register(connection, series))

    at_once(*[register] * 6)
    assert len(found) == 6
    assert len(set(found)) == 1
    assert fetch(database, "SELECT count(*) FROM fks.sync_state") == [(1,)]


def test_a_database_with_another_isolation_level(database: Database) -> None:
    """With serializable as the default, the second writer still sees what the first one wrote."""
    name = sa.make_url(_libpq(database)).database
    execute(database, f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'")
    strict = Database(_libpq(database))
    shelf = Shelf.of(strict, fresh("1h"))
    at_once(*[lambda: shelf.put(0, 100)] * 4)
    assert shelf.status().total_candles == 100
    strict.dispose()
