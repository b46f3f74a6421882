"""The schema: migrations and metadata agree, several processes make it at once, other revisions are refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from fks_backfill_dagster.store import database as opening
from fks_backfill_dagster.store import schema
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import SchemaTooNew, SchemaTooOld
from fks_backfill_dagster_tests.store.builders import Shelf, candles_at, execute, fetch
from fks_backfill_dagster_tests.store.conftest import fresh


def test_migrations_create_the_tables_of_the_metadata(shared: Database) -> None:
    def ours(name: str | None, kind: str, _: Any) -> bool:
        # TimescaleDB has its own schemas.
        return name == schema.SCHEMA if kind == "schema" else True

    options = {
        "include_schemas": True,
        "include_name": ours,
        "version_table_schema": schema.SCHEMA,
        "compare_type": True,
        "compare_server_default": True,
    }
    # The user of the embedded server has the same name as the schema, which would make that the default schema.
    engine = sa.create_engine(
        shared.url, connect_args={"options": "-c search_path=public"}, poolclass=sa.NullPool
    )
    with engine.begin() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, schema.metadata) == []
        # Not in the comparison: keys, CHECKs, and the columns' order and NULLs of every table.
        found = sa.inspect(connection)
        for table in schema.metadata.sorted_tables:
            name = table.name
            assert (
                found.get_pk_constraint(name, "fks")["constrained_columns"]
                == table.primary_key.columns.keys()
            )
            columns = [(c["name"], c["nullable"]) for c in found.get_columns(name, "fks")]
            assert columns == [(c.name, c.nullable) for c in table.columns]
            checks = {c["name"] for c in found.get_check_constraints(name, "fks")}
            assert checks == {c.name for c in table.constraints if isinstance(c, sa.CheckConstraint)}


def test_the_schema_is_made_once(empty_database_url: str) -> None:
    database = Database(empty_database_url)
    assert database.revision() is None
    with pytest.raises(SchemaTooOld, match=r"has no schema fks yet: run `fks-backfill db init`"):
        database.check()
    database.ensure()
    database.check()
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 10)
    database.ensure()
    database.upgrade()
    assert shelf.read().equals(candles_at(shelf.opens(0, 10)))
    database.dispose()


def test_four_processes_make_it_at_the_same_time(empty_database_url: str) -> None:
    program = (
        "import sys; from fks_backfill_dagster.store.database import Database;"
        "sys.stdin.readline(); d = Database(sys.argv[1]); d.ensure(); print(d.revision()); d.dispose()"
    )
    started = [sys.executable, "-W", "error", "-c", program, empty_database_url]
    running = [
        subprocess.Popen(
            started, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(4)
    ]
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=60) for process in running]
    assert outputs == [(f"{opening._head()}\n", "")] * 4


def test_a_schema_of_the_future(database: Database) -> None:
    execute(database, "UPDATE fks.alembic_version SET version_num = '0999'")
    for call in (database.check, database.ensure, database.upgrade):
        with pytest.raises(
            SchemaTooNew, match=rf"revision 0999, .* \(this one knows up to {opening._head()}\): upgrade this"
        ):
            call()
    assert fetch(database, "SELECT version_num FROM fks.alembic_version") == [("0999",)]


def test_a_schema_of_the_past(empty_database_url: str) -> None:
    """Refused and unchanged until an explicit upgrade, which keeps the stored rows."""
    database, head = Database(empty_database_url), opening._head()
    with database.begin() as connection:
        connection.execute(sa.text("CREATE SCHEMA fks"))
        config = opening._alembic_config()
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
    for call in (database.check, database.ensure):
        with pytest.raises(
            SchemaTooOld, match=f"revision 0001, this program needs {head}: run `fks-backfill db upg"
        ):
            call()
    assert database.revision() == "0001"
    execute(
        database,
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar) VALUES ('OLD', '1h', 'crypto', 'XNYS')",
    )
    database.upgrade()
    assert database.revision() == head
    assert fetch(database, "SELECT symbol FROM fks.series") == [("OLD",)]
    database.dispose()


CONTRACT = {
    "ohlcv": "symbol timeframe ts open high low close volume provider",
    "sync_status": "symbol timeframe status oldest_data_time newest_data_time total_candles last_sync_time"
    " error_message open_gaps",
    "gaps": "symbol timeframe gap_start gap_end missing_candles status attempts next_attempt_at evidence",
    "corrections": "symbol timeframe ts corrected_at open_before high_before low_before close_before volume_before"
    " open_after high_after low_after close_after volume_after source reason batch author origin",
    "validations": "symbol timeframe start_ts end_ts compared discrepancies providers validated_at stored compared_at"
    " tolerance",
    "findings": "id symbol timeframe start_ts end_ts candles rule severity status first_seen_at last_seen_at evidence"
    " verdict",
    "conditions": "symbol timeframe day condition expected stored last_modified",
    "actions": "symbol kind ex_date ratio amount currency provider fetched_at begins_at used",
}


@pytest.mark.parametrize("view", CONTRACT)
def test_columns_that_others_rely_on(shared: Database, view: str) -> None:
    found = fetch(
        shared,
        "SELECT column_name FROM information_schema.columns"
        f" WHERE table_schema = 'fks' AND table_name = '{view}' ORDER BY ordinal_position",
    )
    assert [name for (name,) in found] == CONTRACT[view].split()


def test_arguments_that_others_rely_on(shared: Database) -> None:
    found = fetch(
        shared,
        "SELECT pg_get_function_arguments(oid), pg_get_function_result(oid) FROM pg_proc"
        " WHERE oid = 'fks.ohlcv_as_of'::regproc",
    )
    assert found == [
        (
            "symbol text, timeframe text, start_ts timestamp with time zone, end_ts timestamp with time zone,"
            " as_of timestamp with time zone",
            "TABLE(ts timestamp with time zone, open double precision, high double precision,"
            " low double precision, close double precision, volume double precision, provider text)",
        )
    ]
    adjusted = fetch(
        shared,
        "SELECT pg_get_function_arguments(oid), pg_get_function_result(oid) FROM pg_proc"
        " WHERE oid = 'fks.ohlcv_adjusted'::regproc",
    )
    assert adjusted == [(found[0][0].replace("as_of timestamp with time zone", "mode text"), found[0][1])]


def test_the_view_of_candles(hours: Shelf) -> None:
    hours.put(0, 3)
    stored = candles_at(hours.opens(0, 3))
    found = hours.rows(
        "SELECT extract(epoch FROM ts)::bigint * 1000000, open, high, low, close, coalesce(volume, 'NaN'),"
        " provider, timeframe FROM fks.ohlcv WHERE symbol = :symbol ORDER BY ts"
    )
    columns = [*(column.tolist() for column in stored.columns()), ["binance"] * 3, ["1h"] * 3]
    assert str(found) == str(list(zip(*columns, strict=True)))  # as text: NaN equals NaN


def test_the_view_of_candles_looks_into_one_table_only(hours: Shelf) -> None:
    """With a condition on symbol and timeframe, the other seven tables are not read."""
    plan = hours.rows(
        "EXPLAIN SELECT * FROM fks.ohlcv WHERE symbol = :symbol AND timeframe = '1h' AND ts > '2024-01-01'"
    )
    text = "\n".join(str(line) for (line,) in plan)
    assert "candles_1h" in text or "_hyper_" in text
    assert not any(f"candles_{other}" in text for other in ("1m", "5m", "15m", "30m", "4h", "1d", "1w"))
