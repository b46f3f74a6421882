"""TimescaleDB: hypertables, compression, and plain tables that become hypertables."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.reconcile import Kind
from fks_backfill_dagster.store import timescale
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.postgres import needs_timescale
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, execute, fetch
from fks_backfill_dagster_tests.store.conftest import fresh

HYPERTABLES = (
    "SELECT hypertable_name::text FROM timescaledb_information.hypertables WHERE hypertable_schema = 'fks'"
)


def test_the_extension_is_detected(shared: Database) -> None:
    found = fetch(shared, "SELECT count(*) FROM pg_extension WHERE extname = 'timescaledb'")
    assert shared.has_timescale() == (found == [(1,)])


@needs_timescale
def test_a_hypertable_for_every_timeframe(shared: Database) -> None:
    chunks = fetch(
        shared,
        "SELECT hypertable_name::text, extract(day FROM time_interval)::int, column_name::text"
        " FROM timescaledb_information.dimensions WHERE hypertable_schema = 'fks'",
    )
    assert set(chunks) == {(f"candles_{t}", days, "ts") for t, days in timescale.CHUNK_DAYS.items()}
    assert len(chunks) == 8


@needs_timescale
def test_a_compression_policy_for_every_hypertable(shared: Database) -> None:
    policies = fetch(
        shared,
        "SELECT hypertable_name::text, (config ->> 'compress_after')::interval = make_interval(days => 1) * days"
        " FROM timescaledb_information.jobs JOIN (VALUES "
        + ", ".join(f"('candles_{t}', {2 * days})" for t, days in timescale.CHUNK_DAYS.items())
        + ") AS wanted(name, days) ON wanted.name = hypertable_name WHERE proc_name = 'policy_compression'",
    )
    assert sorted(policies) == sorted((f"candles_{t}", True) for t in timescale.CHUNK_DAYS)
    settings = fetch(
        shared,
        "SELECT hypertable::text, segmentby, orderby FROM timescaledb_information.hypertable_compression_settings"
        " WHERE hypertable::text LIKE 'fks.%'",
    )
    assert len(settings) == 8
    assert {segment for _, segment, _ in settings} == {"series_id"}


@pytest.fixture
def compressed(database: Database) -> Iterator[Shelf]:
    """130,000 minutes over five chunks, all compressed, with a gap of 3,000; a second series besides."""
    shelf, neighbour = Shelf.of(database, fresh("1m")), Shelf.of(database, fresh("1m"))
    opens = shelf.opens(0, 130_000)
    shelf.commit(shelf.span(0, 130_000), brought(candles_at(np.delete(opens, slice(50_000, 53_000)))))
    neighbour.put(0, 50_000)
    compress(database)
    yield shelf
    assert neighbour.read().equals(candles_at(neighbour.opens(0, 50_000)))


def compress(database: Database) -> None:
    assert fetch(database, "SELECT count(compress_chunk(c)) > 3 FROM show_chunks('fks.candles_1m') c") == [
        (True,)
    ]


@needs_timescale
def test_writing_into_compressed_chunks(compressed: Shelf) -> None:
    opens = compressed.opens(0, 130_000)
    stored = candles_at(np.delete(opens, slice(50_000, 53_000)))
    assert compressed.read().equals(stored)
    assert compressed.commit(compressed.span(0, 130_000), brought(stored)) == Committed(0, 0, 3000)
    assert compressed.put(50_000, 53_000) == Committed(3000, 0, 0)
    assert compressed.read().equals(candles_at(opens))
    compress(compressed.database)
    moment = compressed.now()
    assert compressed.put(2_000, 112_000, version=2) == Committed(0, 110_000, 0)
    changed = candles_at(compressed.opens(2_000, 112_000), 2)
    unchanged = candles_at(np.delete(opens, slice(2_000, 112_000)))
    assert compressed.read().equals(Candles.concat([changed, unchanged]).sorted())
    assert compressed.read(moment).equals(candles_at(opens))
    compress(compressed.database)
    assert compressed.undo(compressed.batches()[-1]) == Committed(0, 110_000, 0)
    assert compressed.read().equals(candles_at(opens))
    assert compressed.undo(compressed.batches()[0]) == Committed(0, 127_000, 127_000)
    assert compressed.read().equals(candles_at(compressed.opens(50_000, 53_000)))


@needs_timescale
def test_an_upgrade_with_compressed_chunks(compressed: Shelf) -> None:
    before = compressed.read()
    compressed.database.upgrade()
    assert len(fetch(compressed.database, HYPERTABLES)) == 8
    assert compressed.read().equals(before)


@needs_timescale
def test_the_extension_is_installed_later(empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upgrade turns filled plain tables into hypertables and keeps their rows."""
    database = Database(empty_database_url)
    with monkeypatch.context() as without:
        without.setattr(timescale, "install", lambda _: False)
        database.ensure()
    minutes, days = Shelf.of(database, fresh("1m")), Shelf.of(database, fresh("1d"))
    minutes.put(0, 90_000)
    days.put(0, 400)
    assert fetch(database, "SELECT count(*) FROM pg_class WHERE relname LIKE '\\_hyper\\_%'") == [(0,)]
    database.upgrade()
    assert len(fetch(database, HYPERTABLES)) == 8
    assert fetch(database, "SELECT count(*) > 2 FROM show_chunks('fks.candles_1m')") == [(True,)]
    assert minutes.read().equals(candles_at(minutes.opens(0, 90_000)))
    assert minutes.put(80_000, 100_000) == Committed(10_000, 0, 0)
    assert days.read().equals(candles_at(days.opens(0, 400)))
    database.check()
    database.dispose()


@needs_timescale
def test_an_audit_reads_compressed_chunks(compressed: Shelf) -> None:
    found = compressed.audit()
    assert (found.candles, found.missing, found.differences) == (127_000, 3000, ())
    first = compressed.opens(60_000, 60_001)[0]
    execute(compressed.database, "UPDATE fks.sync_state SET total_candles = 1", "DELETE FROM fks.gap")
    execute(
        compressed.database,
        f"DELETE FROM {compressed.table} WHERE series_id = {compressed.identity} AND ts = '{to_datetime(int(first))}'",
    )
    assert [(d.kind, d.actual) for d in compressed.repair().differences] == [
        (Kind.TOTAL, 126_999),
        (Kind.UNRECORDED_GAP, 3000),
        (Kind.UNRECORDED_GAP, 1),
    ]
    assert compressed.audit().differences == ()
