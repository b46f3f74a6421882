"""Launches runs as Dagster does by default, and can tell whether a run's worker still lives.

Dagster's own launcher cannot, so a run whose code server was killed would stay "started" for ever. The
code server that launched a run is asked; where nobody answers at its address any more, or it does not
know the run, the worker is gone. Run monitoring (dagster.yaml) fails such a run, and it is tried again.
While the keeper restarts the code server the run counts as running: Dagster would give up its retry, for it
launches that at once and cannot without a code server.

Dagster writes down that a failed run will be tried again a moment after it has failed. The daemon's
threads all begin at the same time: its backfills, which look in just that moment, would take a run that
was lost together with the daemon for their last, end, and with that forbid the retry. So it is written
down before.
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

ANSWER_SECONDS = 10


class WatchedRunLauncher(DefaultRunLauncher):
    """The default launcher with the health check that run monitoring asks for."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        found = _worker_health(run)
        if found.status is WorkerStatus.NOT_FOUND and self.has_instance:
            _announce_retry(self._instance, run)
        return found


def _worker_health(run: DagsterRun) -> CheckRunHealthResult:
    told = run.tags.get(GRPC_INFO_TAG)
    if told is None:  # not launched by a code server, such as `dagster job execute`
        return CheckRunHealthResult(WorkerStatus.RUNNING)
    try:
        found = _client(json.loads(told)).can_cancel_execution(
            CanCancelExecutionRequest(run_id=run.run_id), timeout=ANSWER_SECONDS
        )
    except DagsterUserCodeUnreachableError as error:
        if _code(error.__cause__) == "UNAVAILABLE" and not _comes_back(json.loads(told)):
            return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its code server is gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)  # it is there, and too busy to say so
    if deserialize_value(found, CanCancelExecutionResult).can_cancel:
        return CheckRunHealthResult(WorkerStatus.RUNNING)
    return CheckRunHealthResult(WorkerStatus.NOT_FOUND, "its code server does not know it any more")


def _comes_back(told: dict[str, Any]) -> bool:
    """Whether it is the code server of `up`, which its keeper starts again at the same place."""
    home = os.environ.get(MARK)
    if home is None or told.get("socket") is None:
        return False
    is_ours = Path(told["socket"]) == code_server.socket_of(Path(home))
    return is_ours and Background(Path(home), KEEPER).is_running()


def _announce_retry(instance: DagsterInstance, run: DagsterRun) -> None:
    """Tags a run that is about to be failed as Dagster will, if it is to be tried again.

    A run that has ended meanwhile is left alone: its worker is gone because it had nothing more to do.
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


def _client(told: dict[str, Any]) -> DagsterGrpcClient:
    return DagsterGrpcClient(
        host=told["host"],
        port=told.get("port"),
        socket=told.get("socket"),
        use_ssl=bool(told.get("use_ssl", False)),
    )
