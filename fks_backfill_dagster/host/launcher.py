"""Dagster's default run launcher with a health check of run workers.

Dagster's own launcher has none, so a run whose code server was killed would stay "started" permanently. The check
queries the code server that launched the run: if it is unreachable or does not know the run, the worker is gone. Run
monitoring (dagster.yaml) fails such a run, and Dagster retries it. While the keeper restarts the code server, the run
counts as running: Dagster launches a retry immediately, which fails without a code server, and does not repeat it.

Dagster tags a failed run for its retry a moment after the failure. If the daemon was lost together with the run, its
backfill thread, which starts at the same time, could read the run in that moment, end the backfill, and so prevent the
retry. The launcher therefore sets the tag before.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus
from dagster._core.errors import DagsterUserCodeUnreachableError
from dagster._core.execution.retries import auto_reexecution_should_retry_run
from dagster._core.launcher import DefaultRunLauncher, WorkerStatus
from dagster._core.launcher.base import CheckRunHealthResult
from dagster._core.storage.tags import GRPC_INFO_TAG, WILL_RETRY_TAG
from dagster._grpc.client import DagsterGrpcClient
from dagster._grpc.types import CanCancelExecutionRequest, CanCancelExecutionResult
from dagster._serdes import deserialize_value

from fks_backfill_dagster.host import code_server
from fks_backfill_dagster.host.processes import KEEPER, MARK, Background

RESPONSE_SECONDS = 10


class WatchedRunLauncher(DefaultRunLauncher):
    """The default launcher with the health check that run monitoring requires."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        found = _worker_health(run)
        if found.status is WorkerStatus.NOT_FOUND and self.has_instance:
            _tag_retry(self._instance, run)
        return found


def _worker_health(run: DagsterRun) -> CheckRunHealthResult:
    info = run.tags.get(GRPC_INFO_TAG)
    if info is None:  # not launched by a code server, such as `dagster job execute`
        return CheckRunHealthResult(WorkerStatus.RUNNING)
    try:
        found = _client(json.loads(info)).can_cancel_execution(
            CanCancelExecutionRequest(run_id=run.run_id), timeout=RESPONSE_SECONDS
        )
    except DagsterUserCodeUnreachableError as error:
        if _code(error.__cause__) == "UNAVAILABLE" and not _is_being_restarted(json.loads(info)):
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its code server is gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)  # reachable but too busy to respond
    if deserialize_value(found, CanCancelExecutionResult).can_cancel:
        return CheckRunHealthResult(WorkerStatus.RUNNING)
    return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its code server no longer knows it")


def _is_being_restarted(address: dict[str, Any]) -> bool:
    """Whether it is the code server of `up` and its keeper runs, which restarts it at the same address."""
    home = os.environ.get(MARK)
    if home is None or address.get("socket") is None:
        return False
    is_ours = Path(address["socket"]) == code_server.socket_of(Path(home))
    return is_ours and Background(Path(home), KEEPER).is_running()


def _tag_retry(instance: DagsterInstance, run: DagsterRun) -> None:
    """Tags a run that is about to be failed, as Dagster does later, if it will be retried.

    Skips a run that has ended meanwhile: its worker has exited normally.
    """
    current = instance.get_run_by_id(run.run_id)
    if current is None or current.is_finished or not instance.run_retries_enabled:
        return
    if auto_reexecution_should_retry_run(instance, current.with_status(DagsterRunStatus.FAILURE), None):
        instance.add_run_tags(run.run_id, {WILL_RETRY_TAG: "true"})


def _code(error: BaseException | None) -> str:
    """The name of a gRPC error's status; empty for any other error."""
    code = getattr(error, "code", None)
    return str(code().name) if callable(code) else ""


def _client(address: dict[str, Any]) -> DagsterGrpcClient:
    return DagsterGrpcClient(
        host=address["host"],
        port=address.get("port"),
        socket=address.get("socket"),
        use_ssl=bool(address.get("use_ssl", False)),
    )
