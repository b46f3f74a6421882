"""Whether a run's worker still lives: asked of the code server that started it."""

from __future__ import annotations

import json
from pathlib import Path

from dagster import DagsterRun
from dagster._core.launcher import WorkerStatus
from dagster._core.storage.tags import GRPC_INFO_TAG

from fks_backfill_dagster.orchestration.launcher import WatchedRunLauncher


def status_of(tags: dict[str, str]) -> WorkerStatus:
    run = DagsterRun(job_name="ohlcv_months", run_id="b6d7f6c2-0000-0000-0000-000000000000", tags=tags)
    return WatchedRunLauncher().check_run_worker_health(run).status


def test_nobody_at_its_address_means_gone(tmp_path: Path) -> None:
    told = {"host": "localhost", "socket": str(tmp_path / "gone")}
    assert status_of({GRPC_INFO_TAG: json.dumps(told)}) is WorkerStatus.NOT_FOUND


def test_a_run_that_no_code_server_launched_is_left_alone() -> None:
    assert status_of({}) is WorkerStatus.RUNNING
