"""Dagster's storage in the project's database, as configured by dagster.yaml."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy as sa
from dagster import DagsterInstance, EventLogEntry
from dagster._core.instance.ref import InstanceRef
from dagster._core.run_coordinator import QueuedRunCoordinator

from fks_backfill_dagster.host.storage import DatabaseStorage, dagster_place
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import UnsuitableServer
from fks_backfill_dagster_tests.odd_servers import Cluster, folder_for_servers, pgbouncer
from fks_backfill_dagster_tests.postgres import scratch_database
from fks_backfill_dagster_tests.store.builders import execute, fetch
from fks_backfill_dagster_tests.store.test_errors import role
from fks_backfill_dagster_tests.store.test_sessions import HELD, waiting

pytestmark = pytest.mark.server


@pytest.fixture
def instance(empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DagsterInstance:
    """The instance of `dagster dev` in the top folder."""
    for name in ("FKS_CONFIG", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FKS_DATABASE_URL", empty_database_url)
    monkeypatch.setenv("FKS_HOME", str(tmp_path / "home"))
    return DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT)))


def test_its_tables_are_in_a_separate_schema(instance: DagsterInstance, empty_database_url: str) -> None:
    with instance:
        assert instance.get_runs() == []
        database = Database(empty_database_url)
        query = "SELECT DISTINCT table_schema FROM information_schema.tables WHERE table_name = 'runs'"
        assert fetch(database, query) == [("dagster",)]
        query = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert fetch(database, query) == [(0,)]
        database.dispose()


def test_another_process_reads_the_stored_state(instance: DagsterInstance, tmp_path: Path) -> None:
    with instance:
        instance.run_storage.set_cursor_values({"who": "me"})
    with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT))) as second:
        assert second.run_storage.get_cursor_values({"who"}) == {"who": "me"}


def test_its_files_are_below_the_home(instance: DagsterInstance, tmp_path: Path) -> None:
    with instance:
        assert instance.storage_directory() == str(tmp_path / "home" / "dagster" / "storage")
        logs = instance.compute_log_manager.get_captured_local_path(["a"], "out")  # type: ignore[attr-defined]
        assert logs.startswith(str(tmp_path / "home" / "dagster" / "compute_logs"))


def test_a_dagster_yaml_with_alias_modules_works(
    empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", empty_database_url)
    monkeypatch.setenv("FKS_HOME", str(tmp_path / "home"))
    text = (CHECKOUT / "dagster.yaml").read_text()
    aliased = text.replace("fks_backfill_dagster.host.", "fks_backfill_dagster.orchestration.")
    assert aliased.count(".orchestration.") == 5
    (tmp_path / "dagster.yaml").write_text(aliased)
    with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path))) as instance:
        assert instance.get_runs() == []
        assert type(instance.run_launcher).__module__ == "fks_backfill_dagster.host.launcher"
        assert type(instance.run_coordinator).__module__ == "fks_backfill_dagster.host.coordinator"


def backend(instance: DagsterInstance) -> int:
    """The backend pid of a query of the event log."""
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")))


def test_connections_are_pooled_per_process(instance: DagsterInstance, tmp_path: Path) -> None:
    with instance:
        first = backend(instance)
        assert backend(instance) == first
        with DagsterInstance.from_ref(
            InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT))
        ) as second:
            assert backend(second) == first


def test_a_lost_connection_is_replaced(instance: DagsterInstance, empty_database_url: str) -> None:
    with instance:
        first = backend(instance)
        database = Database(empty_database_url)
        assert fetch(database, f"SELECT pg_terminate_backend({first}, 5000)") == [(True,)]
        database.dispose()
        assert backend(instance) != first


def test_an_event_whose_connection_is_lost_is_stored(
    instance: DagsterInstance, empty_database_url: str
) -> None:
    event = EventLogEntry(  # type: ignore[no-untyped-call]  # Dagster's constructor has no annotations
        None, logging.INFO, "stored after a lost connection", "a-run", time.time(), step_key=None
    )
    with (
        instance,
        psycopg.connect(empty_database_url, autocommit=True) as holder,
        ThreadPoolExecutor(1) as pool,
    ):
        holder.execute(
            "CREATE FUNCTION public.hold() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN PERFORM pg_advisory_xact_lock_shared({HELD}); RETURN NEW; END $$".encode()
        )
        holder.execute(
            "CREATE TRIGGER hold BEFORE INSERT ON dagster.event_logs FOR EACH ROW EXECUTE FUNCTION public.hold()"
        )
        holder.execute(f"SELECT pg_advisory_lock({HELD})".encode())
        storing = pool.submit(instance.event_log_storage.store_event, event)
        holder.execute("SELECT pg_terminate_backend(%s, 5000)", [waiting(holder)])
        holder.execute(f"SELECT pg_advisory_unlock({HELD})".encode())
        storing.result(30)
        assert [stored.user_message for stored in instance.all_logs("a-run")] == [
            "stored after a lost connection"
        ]


def test_the_output_of_a_run_is_captured_without_another_process(instance: DagsterInstance) -> None:
    with instance, instance.compute_log_manager.capture_logs(["a", "b"]):
        sys.stdout.write("printed by a run\n")
        assert [child for child in psutil.Process().children() if "tail" in child.name()] == []
    path = instance.compute_log_manager.get_captured_local_path(["a", "b"], "out")  # type: ignore[attr-defined]
    assert Path(path).read_text() == "printed by a run\n"


def test_the_concurrency_limits_of_runs(instance: DagsterInstance) -> None:
    with instance:
        assert isinstance(instance.run_coordinator, QueuedRunCoordinator)
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None
        assert queue.max_concurrent_runs == 8
        # Two backfill runs per asset class; with three classes, slots remain for other runs.
        assert queue.tag_concurrency_limits == [
            {"key": "fks/backfill", "value": {"applyLimitPerUniqueValue": True}, "limit": 2}
        ]


def test_telemetry_is_disabled(instance: DagsterInstance) -> None:
    with instance:
        assert instance.telemetry_enabled is False


def test_its_sessions_have_our_settings_except_for_the_schema(
    empty_database_url: str,
) -> None:
    """Dagster's timestamps have no zone and use that of the session. Options of the URL are kept."""
    name = sa.make_url(empty_database_url).database
    database = Database(empty_database_url)
    execute(database, f"ALTER DATABASE \"{name}\" SET timezone = 'Asia/Tokyo'")
    database.dispose()
    url = sa.make_url(empty_database_url).update_query_dict(
        {"options": "-c work_mem=8MB -c search_path=public"}
    )
    place = dagster_place(url.render_as_string(hide_password=False))
    storage = DatabaseStorage(place, makes_tables=True)
    for webserver in (False, True):
        if webserver:
            storage.event_log_storage.optimize_for_webserver(5000, -1, 1)
        with storage.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
            settings = ("search_path", "timezone", "work_mem", "statement_timeout")
            found = [connection.scalar(sa.text(f"SHOW {name}")) for name in settings]
        assert found == ["dagster", "UTC", "8MB", "5s" if webserver else "0"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server that accepts every account of the machine: a pooler does not run as root."""
    with folder_for_servers() as folder:
        running = Cluster.make(folder / "a").start().ready()
        yield running
        running.stop()


@pytest.mark.parametrize(
    "settings", [(), ("ignore_startup_parameters = options",)], ids=["rejects", "ignores"]
)
def test_its_schema_works_behind_a_pooler(cluster: Cluster, settings: tuple[str, ...]) -> None:
    """For poolers that reject or drop the startup options of a client."""
    with pgbouncer(cluster, "session", *settings) as running, scratch_database(cluster.url, None) as url:
        storage = DatabaseStorage(dagster_place(running.url(url)), makes_tables=True)
        storage.run_storage.set_cursor_values({"who": "me"})
        assert storage.run_storage.get_cursor_values({"who"}) == {"who": "me"}
        database = Database(url)
        query = (
            "SELECT schemaname, count(*) > 15 FROM pg_tables"
            " WHERE schemaname IN ('public', 'dagster') GROUP BY 1"
        )
        assert fetch(database, query) == [("dagster", True)]
        database.dispose()


def test_a_role_without_the_right_to_create_its_schema(empty_database_url: str) -> None:
    with role(empty_database_url, "LOGIN PASSWORD 'any'") as name:
        limited = sa.make_url(empty_database_url).set(username=name, password="any")
        remedy = f'let an administrator run CREATE SCHEMA dagster AUTHORIZATION "{name}"'
        with pytest.raises(UnsuitableServer, match=re.escape(remedy)):
            dagster_place(limited.render_as_string(hide_password=False))
