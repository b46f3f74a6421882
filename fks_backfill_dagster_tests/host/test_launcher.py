"""The health check of run workers. With killed workers: test_kills.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG, WILL_RETRY_TAG

from fks_backfill_dagster.host import code_server
from fks_backfill_dagster.host.launcher import WatchedRunLauncher
from fks_backfill_dagster.host.processes import KEEPER, MARK, Background, stop


def status_of(tags: dict[str, str]) -> WorkerStatus:
    run = DagsterRun(job_name="ohlcv_months", run_id="b6d7f6c2-0000-0000-0000-000000000000", tags=tags)
    return WatchedRunLauncher().check_run_worker_health(run).status


def test_an_unreachable_code_server_means_a_lost_worker(tmp_path: Path) -> None:
    address = {"host": "localhost", "socket": str(tmp_path / "gone")}
    assert status_of({GRPC_INFO_TAG: json.dumps(address)}) is WorkerStatus.NOT_FOUND


@pytest.mark.server
def test_a_run_counts_as_running_while_the_keeper_restarts_its_code_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MARK, str(tmp_path))
    tags = {GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": str(code_server.socket_of(tmp_path))})}
    assert status_of(tags) is WorkerStatus.NOT_FOUND
    keeper = Background(tmp_path, KEEPER)
    keeper.start(["/bin/sleep", "60"], cwd=tmp_path, environment=os.environ, port=0)
    assert status_of(tags) is WorkerStatus.RUNNING
    stop([keeper])
    assert status_of(tags) is WorkerStatus.NOT_FOUND


def test_a_run_that_no_code_server_launched_is_skipped() -> None:
    assert status_of({}) is WorkerStatus.RUNNING


@pytest.mark.parametrize(
    ("status", "retries", "tag"),
    [
        (DagsterRunStatus.STARTED, 1, "true"),
        (DagsterRunStatus.STARTED, 0, None),
        (DagsterRunStatus.SUCCESS, 1, None),  # it ended after run monitoring listed it
    ],
)
def test_a_lost_run_is_tagged_for_its_retry_before_it_is_failed(
    tmp_path: Path, status: DagsterRunStatus, retries: int, tag: str | None
) -> None:
    tags = {GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": str(tmp_path / "gone")})}
    options = {"run_retries": {"enabled": True, "max_retries": retries}}
    with DagsterInstance.local_temp(str(tmp_path), overrides=options) as instance:
        run = instance.add_run(DagsterRun(job_name="ohlcv_months", tags=tags, status=status))
        launcher = WatchedRunLauncher()
        launcher.register_instance(instance)
        assert launcher.check_run_worker_health(run).status is WorkerStatus.NOT_FOUND
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        assert found.tags.get(WILL_RETRY_TAG) == tag
