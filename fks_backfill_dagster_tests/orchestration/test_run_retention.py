"""Obsolete runs are deleted without a change of the status of partitions and checks."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from dagster import AssetCheckKey, DagsterInstance
from dagster._core.instance.ref import InstanceRef

from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.run_retention import delete_runs_before
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.dagster_schema import DAGSTER_SCHEMA, event_count
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.orchestration.conftest import Project, settings_of
from fks_backfill_dagster_tests.orchestration.test_assets import plant_failure, statuses

MONTHS = ("2024-01-01", "2024-02-01")


@pytest.fixture
def stored(
    database_url: str, resources: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    """Definitions in an instance configured by dagster.yaml, with its tables in the database."""
    monkeypatch.delenv("FKS_CONFIG", raising=False)
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    monkeypatch.setenv("FKS_HOME", str(tmp_path / "home"))
    settings = settings_of("BTC/USDT")
    with DagsterInstance.from_ref(InstanceRef.from_dir(str(tmp_path), config_dir=str(CHECKOUT))) as instance:
        yield Project(settings, build_defs(settings=settings, resource_overrides=resources), instance)


def delete_obsolete(project: Project, database: Database, hours: int = 0) -> int:
    return delete_runs_before(project.instance, database, datetime.now(UTC) - timedelta(hours=hours))


def test_runs_made_obsolete_by_later_ones_are_deleted(stored: Project, database: Database) -> None:
    for _ in range(3):
        assert stored.materialize("15m", *MONTHS).success
    last = stored.materialize("15m", MONTHS[1])
    key = stored.key("BTC/USDT", "15m")
    before, shown = event_count(database, DAGSTER_SCHEMA), statuses(stored, key, *MONTHS)
    assert delete_obsolete(stored, database, hours=1) == 0
    assert delete_obsolete(stored, database) == 2
    assert event_count(database, DAGSTER_SCHEMA) < before * 0.6
    assert len(stored.instance.get_runs()) == 2
    assert statuses(stored, key, *MONTHS) == shown == dict.fromkeys(MONTHS, "MATERIALIZED")
    checked = AssetCheckKey(key, "completeness")
    latest = stored.instance.event_log_storage.get_latest_asset_check_execution_by_key([checked])[checked]
    assert latest.run_id == last.run_id
    assert delete_obsolete(stored, database) == 0


def test_a_failed_partition_stays_failed(stored: Project, market: LocalMarket, database: Database) -> None:
    assert stored.materialize("15m", MONTHS[0]).success
    plant_failure(market, "BTCUSDT", "2024-02-01", "2024-03-01")
    assert not stored.materialize("15m", *MONTHS).success
    assert delete_obsolete(stored, database) == 1
    key = stored.key("BTC/USDT", "15m")
    assert statuses(stored, key, *MONTHS) == {MONTHS[0]: "MATERIALIZED", MONTHS[1]: "FAILED"}


def test_the_job_logs_its_result(stored: Project) -> None:
    done = stored.definitions.resolve_job_def("housekeeping").execute_in_process(instance=stored.instance)
    assert done.success
    logged = [entry.user_message for entry in stored.instance.all_logs(done.run_id)]
    assert any("deleted 0 runs" in line for line in logged)
