"""A database written by 324a536 (written_by_324a536/README.md) returns the same results after an upgrade."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.audit_reader import examine
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import SchemaTooOld
from fks_backfill_dagster.store.ledger import series_id
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster.store.writer.undo import undo_batch
from fks_backfill_dagster_tests.domain.builders import at, window
from fks_backfill_dagster_tests.store.builders import Shelf, archive, brought, execute, fetch

FIXTURE = Path(__file__).parent / "written_by_324a536"
AS_OF = "SELECT * FROM fks.ohlcv_as_of(:symbol, :timeframe, '2000-01-01Z', '2030-01-01Z', :moment)"

Answers = dict[str, Any]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """The results of 324a536: per table its columns and rows, and `as_of` per series and moment."""
    found: Answers = json.loads(gzip.decompress((FIXTURE / "answers.json.gz").read_bytes()))
    return found


@pytest.fixture
def old(empty_database_url: str) -> Iterator[Database]:
    """The database as it was written: revision 0003."""
    sql = gzip.decompress((FIXTURE / "database.sql.gz").read_bytes()).decode()
    with psycopg.connect(empty_database_url) as connection:
        connection.execute(sql.encode())
    database = Database(empty_database_url)
    yield database
    database.dispose()


@pytest.fixture
def upgraded(old: Database) -> Database:
    assert old.revision() == "0003"
    with pytest.raises(SchemaTooOld, match="run `fks-backfill db upgrade`"):
        old.check()
    old.upgrade()
    old.check()
    return old


def plain(rows: list[tuple[object, ...]]) -> list[list[object]]:
    return sorted(
        ([value.isoformat() if isinstance(value, datetime) else value for value in row] for row in rows),
        key=str,
    )


def compare(database: Database, answers: Answers) -> None:
    for name in answers.keys() - {"as_of"}:
        columns, rows = answers[name]["columns"], answers[name]["rows"]
        assert plain(fetch(database, f"SELECT {columns} FROM fks.{name}")) == sorted(rows, key=str), name
    for then in answers["as_of"]:
        named = {name: then[name] for name in ("symbol", "timeframe", "moment")}
        assert plain(fetch(database, AS_OF, **named)) == sorted(then["rows"], key=str), named


def shelf_of(database: Database, symbol: str) -> Shelf:
    (series,) = [one for one in queries.stored_series(database) if one.symbol == symbol]
    with database.begin() as connection:
        identity = series_id(connection, series)
    assert identity is not None
    return Shelf(database, series, identity)


def batches_of(database: Database, symbol: str) -> list[queries.BatchInfo]:
    """Oldest first."""
    return queries.batches(database, shelf_of(database, symbol).series)[::-1]


def test_the_fixture_covers_every_state(answers: Answers) -> None:
    assert {row[5] for row in answers["gaps"]["rows"]} == {
        "open",
        "filled",
        "no_trade",
        "unavailable",
        "tolerated",
    }
    assert {row[3] for row in answers["batch"]["rows"]} == {"rest", "archive", "derived", "undo"}
    assert len(answers["ohlcv"]["rows"]) > 400
    assert any("," in row[1] for row in answers["sync_state"]["rows"])  # coverage with a hole
    assert {len(then["rows"]) for then in answers["as_of"]} >= {0, 21, 225, 285}


def test_an_upgrade_changes_no_result(old: Database, upgraded: Database, answers: Answers) -> None:
    """Candles, as_of, gaps, corrections, lineage, quarantine, coverage and listings."""
    compare(upgraded, answers)


def test_columns_of_the_views_are_added_at_the_end(upgraded: Database, answers: Answers) -> None:
    for view in ("ohlcv", "sync_status", "gaps", "corrections"):
        found = fetch(
            upgraded,
            "SELECT column_name FROM information_schema.columns"
            f" WHERE table_schema = 'fks' AND table_name = '{view}' ORDER BY ordinal_position",
        )
        columns = answers[view]["columns"].split(", ")
        assert [name for (name,) in found][: len(columns)] == columns


def test_an_audit_finds_nothing(upgraded: Database) -> None:
    series = queries.stored_series(upgraded)
    assert len(series) == 5
    for one in series:
        found = examine(upgraded, one, grid_of(one), lambda: at("2024-06-02T00:00Z"))
        assert found is not None
        assert found.differences == ()


def test_an_upgrade_adds_no_readers_and_removes_none(old: Database, answers: Answers) -> None:
    reader = f"fks_test_{uuid.uuid4().hex[:12]}"
    execute(
        old,
        f"CREATE ROLE {reader}",
        f"GRANT USAGE ON SCHEMA fks TO {reader}",
        f"GRANT SELECT ON fks.ohlcv, fks.sync_status, fks.gaps, fks.corrections TO {reader}",
    )
    old.upgrade()
    try:
        found = fetch(
            old,
            f"SELECT relname, has_table_privilege('{reader}', c.oid, 'SELECT'),"
            " has_table_privilege('public', c.oid, 'SELECT')"
            " FROM pg_class c WHERE relnamespace = 'fks'::regnamespace AND relkind IN ('r', 'p', 'v')",
        )
        views = {"ohlcv", "sync_status", "gaps", "corrections"}
        assert views < {name for name, _, _ in found}
        # A reader of every view reads the new ones, too.
        assert {name for name, reads, _ in found if reads} == views | {
            "actions",
            "findings",
            "conditions",
            "validations",
        }
        assert {public for _, _, public in found} == {False}
        admit = "has_function_privilege('public', 'fks.pace_admit'::regproc, 'EXECUTE')"
        assert fetch(old, f"SELECT {admit}") == [(False,)]
    finally:
        execute(old, f"DROP OWNED BY {reader}", f"DROP ROLE {reader}")


def test_a_second_upgrade_changes_nothing(upgraded: Database, answers: Answers) -> None:
    def all_rows() -> dict[str, list[str]]:
        tables = fetch(
            upgraded,
            "SELECT table_name FROM information_schema.tables"
            " WHERE table_schema = 'fks' AND table_type = 'BASE TABLE'",
        )
        return {
            str(name): sorted(str(row) for row in fetch(upgraded, f'SELECT t::text FROM fks."{name}" t'))
            for (name,) in tables
        }

    before = all_rows()
    assert sum(len(rows) for rows in before.values()) > 500
    upgraded.upgrade()
    assert all_rows() == before
    compare(upgraded, answers)


def test_the_publication_time_of_an_archive_follows_from_its_name(upgraded: Database) -> None:
    """Old batches have neither host nor instrument; the file's name contains its period."""
    found = {(one.source.rpartition("/")[2], one.published_at) for one in batches_of(upgraded, "BTC/USDT")}
    monthly, daily = "BTCUSDT-1m-2020-12.zip", "BTCUSDT-1m-2020-12-21.zip"
    assert {pair for pair in found if pair[0] in (monthly, daily)} == {
        (monthly, to_datetime(at("2020-12-02T00:00Z"))),
        (daily, to_datetime(at("2020-12-22T00:00Z"))),
    }
    assert {published for name, published in found if not name.endswith(".zip")} == {None}
    assert {(one.host, one.instrument) for one in queries.batches(upgraded)} == {("", None)}


def test_an_older_publication_changes_no_old_candle(upgraded: Database) -> None:
    """50 minutes come from a daily file that replaced a monthly one: the monthly one does not replace them."""
    shelf = shelf_of(upgraded, "BTC/USDT")
    minutes = window("2020-12-21T13:00Z", "2020-12-21T13:50Z")
    stored = queries.read_candles(upgraded, shelf.series, minutes)
    assert len(stored) == 50
    other = replace(stored, high=stored.high + 1).take(slice(0, 40))
    assert shelf.commit(minutes, archive(other, at("2020-12-02T00:00Z"))) == Committed(0, 0, 0, outdated=40)
    assert queries.read_candles(upgraded, shelf.series, minutes).equals(stored)
    assert shelf.commit(minutes, brought(other, requested_at=at("2024-06-02T00:00Z"))) == Committed(0, 40, 0)


def test_an_old_batch_can_be_undone(upgraded: Database, answers: Answers) -> None:
    shelf = shelf_of(upgraded, "AAPL")
    correction = batches_of(upgraded, "AAPL")[-1]
    done = undo_batch(upgraded, shelf.series, shelf.identity, correction.id, shelf.grid)
    assert (done.inserted, done.updated) == (0, 3)
    before = next(then for then in answers["as_of"] if then["symbol"] == "AAPL")
    assert datetime.fromisoformat(before["moment"]) < correction.committed_at
    now = fetch(upgraded, AS_OF, symbol="AAPL", timeframe="1d", moment=shelf.now())
    assert plain(now) == sorted(before["rows"], key=str)
    assert shelf.audit().differences == ()
