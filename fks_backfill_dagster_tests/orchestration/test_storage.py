"""Dagster's state in our database, as dagster.yaml has it."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
from dagster import DagsterInstance
from dagster._core.instance.ref import InstanceRef
from dagster._core.run_coordinator import QueuedRunCoordinator

from fks_backfill_dagster.orchestration.storage import storage_url
from fks_backfill_dagster.settings import CHECKOUT
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.store.builders import fetch


@pytest.fixture
def instance(empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DagsterInstance:
    """As `dagster dev` makes it in the top folder."""
    for name in ("FKS_CONFIG", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FKS_DATABASE_URL", empty_database_url)
    monkeypatch.setenv("FKS_HOME", str(tmp_path / "home"))
    return DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT)))


def test_its_tables_are_in_a_schema_of_their_own(instance: DagsterInstance, empty_database_url: str) -> None:
    with instance:
        assert instance.get_runs() == []
        database = Database(empty_database_url)
        query = "SELECT DISTINCT table_schema FROM information_schema.tables WHERE table_name = 'runs'"
        assert fetch(database, query) == [("dagster",)]
        query = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert fetch(database, query) == [(0,)]
        database.dispose()


def test_what_is_kept_is_there_for_the_next_process(instance: DagsterInstance, tmp_path: Path) -> None:
    with instance:
        instance.run_storage.set_cursor_values({"who": "me"})
    with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT))) as second:
        assert second.run_storage.get_cursor_values({"who"}) == {"who": "me"}


def test_its_files_are_below_the_home(instance: DagsterInstance, tmp_path: Path) -> None:
    with instance:
        assert instance.storage_directory() == str(tmp_path / "home" / "dagster" / "storage")
        logs = instance.compute_log_manager.get_captured_local_path(["a"], "out")  # type: ignore[attr-defined]
        assert logs.startswith(str(tmp_path / "home" / "dagster" / "compute_logs"))


def backend(instance: DagsterInstance) -> int:
    """The process of the server that serves a query of the event log."""
    with instance.event_log_storage.index_connection() as connection:  # type: ignore[attr-defined]
        return int(connection.scalar(sa.text("SELECT pg_backend_pid()")))


def test_connections_are_kept_for_the_whole_process(instance: DagsterInstance, tmp_path: Path) -> None:
    with instance:
        first = backend(instance)
        assert backend(instance) == first
        with DagsterInstance.from_ref(
            InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT))
        ) as second:
            assert backend(second) == first


def test_a_server_that_was_restarted_meanwhile_is_connected_to_again(
    instance: DagsterInstance, empty_database_url: str
) -> None:
    with instance:
        first = backend(instance)
        database = Database(empty_database_url)
        assert fetch(database, f"SELECT pg_terminate_backend({first}, 5000)") == [(True,)]
        database.dispose()
        assert backend(instance) != first


def test_what_a_run_prints_is_kept_without_a_process_for_it(instance: DagsterInstance) -> None:
    with instance, instance.compute_log_manager.capture_logs(["a", "b"]):
        sys.stdout.write("said in a run\n")
        assert [child for child in psutil.Process().children() if "tail" in child.name()] == []
    path = instance.compute_log_manager.get_captured_local_path(["a", "b"], "out")  # type: ignore[attr-defined]
    assert Path(path).read_text() == "said in a run\n"


def test_a_few_runs_go_side_by_side(instance: DagsterInstance) -> None:
    with instance:
        assert isinstance(instance.run_coordinator, QueuedRunCoordinator)
        queue = instance.get_concurrency_config().run_queue_config
        assert queue is not None
        assert queue.max_concurrent_runs == 8
        # Of a backfill two runs of each asset class; three classes leave places for others.
        assert queue.tag_concurrency_limits == [
            {"key": "fks/backfill", "value": {"applyLimitPerUniqueValue": True}, "limit": 2}
        ]


def test_nothing_is_told_to_anybody(instance: DagsterInstance) -> None:
    with instance:
        assert instance.telemetry_enabled is False


@pytest.mark.parametrize("options", ["", "options=-cwork_mem%3D8MB&"])
def test_the_address_keeps_what_it_had(server_url: str, options: str) -> None:
    joined = server_url + ("&" if "?" in server_url else "?") + options
    url = sa.make_url(storage_url(joined.rstrip("?&")))
    assert url.drivername == "postgresql+psycopg2"
    assert url.host == sa.make_url(server_url).host
    assert str(url.query["options"]).split()[-1] == "-csearch_path=dagster"
    with sa.create_engine(url).connect() as connection:
        assert connection.scalar(sa.text("SHOW search_path")) == "dagster"
        if options:
            assert connection.scalar(sa.text("SHOW work_mem")) == "8MB"
