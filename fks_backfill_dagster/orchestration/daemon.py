"""The daemon that `up` starts: Dagster's own, whose backfills survive a symbol that is taken out of the settings.

Dagster fails a whole backfill, and cancels its runs, when one of its assets is not defined any more
("existed at storage-time, but no longer does"). Here such an asset leaves the backfill instead, before the
daemon looks at it: its partitions are no longer of the backfill, queued runs that hold it are requested again
without it, and a run that has begun goes on, as it has its definitions.

    python -m fks_backfill_dagster.orchestration.daemon WORKSPACE

Does not belong here: who starts it (`servers`). A daemon started otherwise (`dagster dev`, `dagster-daemon`)
fails such a backfill; `launch` then starts another one of what is left.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, RunRequest, RunsFilter
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BACKFILL_ID_TAG,
    PARTITION_NAME_TAG,
)
from dagster._core.utils import make_new_run_id
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.controller import create_daemons_from_instance, daemon_controller_from_instance
from dagster._daemon.daemon import BackfillDaemon, DagsterDaemon, SpanMarker
from dagster._utils.caching_instance_queryer import CachingInstanceQueryer
from dagster._utils.interrupts import capture_interrupts, setup_interrupt_handlers

_PARTS = ("target_subset", "materialized_subset", "requested_subset", "failed_and_downstream_subset")

_DEFINITIONS_CHANGED = frozenset(
    {"DagsterAssetBackfillDataLoadError", "DagsterDefinitionChangedDeserializationError"}
)
"""Names of the errors with which Dagster fails a backfill whose assets are gone."""


class LastingBackfillDaemon(BackfillDaemon):
    """Dagster's backfill daemon; before each of its looks, what is gone leaves the backfills."""

    def core_loop(self, workspace_process_context: Any, shutdown_event: Event) -> Iterator[Any]:  # type: ignore[override]
        for each in super().core_loop(workspace_process_context, shutdown_event):
            if each is SpanMarker.START_SPAN:
                try:
                    release_removed(workspace_process_context, self._logger)
                except Exception:  # Dagster's own look is to follow in any case
                    self._logger.exception("Backfills were not compared with the definitions")
            yield each


def release_removed(context: WorkspaceProcessContext, logger: logging.Logger) -> None:
    """Takes assets that are not defined any more out of every backfill that is under way.

    A location that does not load at the moment has no assets at all; its backfills wait.
    """
    found = context.instance.get_backfills(
        BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED, BulkActionStatus.FAILING])
    )
    under_way = [one for one in found if one.asset_backfill_data is not None and _goes_on(one)]
    if not under_way:
        return
    if any(_removed(context, one) for one in under_way):
        _refresh(context)  # an asset that looks gone may be one that is new
    entries = context.create_request_context().get_code_location_entries().values()
    if any(entry.load_error for entry in entries):
        return
    for backfill in under_way:
        removed = _removed(context, backfill)
        if removed or backfill.status is BulkActionStatus.FAILING:
            _release(context.instance, backfill, removed, logger)


def _goes_on(backfill: PartitionBackfill) -> bool:
    """Whether it is requested, or about to be failed for a change of the definitions."""
    if backfill.status is BulkActionStatus.REQUESTED:
        return True
    return backfill.error is not None and backfill.error.cls_name in _DEFINITIONS_CHANGED


def _removed(context: WorkspaceProcessContext, backfill: PartitionBackfill) -> frozenset[AssetKey]:
    """The assets of the backfill that are not defined; none if that is all of them: Dagster then fails it."""
    data = backfill.asset_backfill_data
    assert data is not None
    graph = context.create_request_context().asset_graph
    targeted = data.target_subset.asset_keys
    removed = frozenset(key for key in targeted if not graph.has(key))
    return removed if len(removed) < len(targeted) else frozenset()


def _refresh(context: WorkspaceProcessContext) -> None:
    for name in list(context.create_request_context().get_code_location_entries()):
        context.refresh_code_location(name)


def _release(
    instance: DagsterInstance,
    backfill: PartitionBackfill,
    removed: frozenset[AssetKey],
    logger: logging.Logger,
) -> None:
    assert backfill.asset_backfill_data is not None
    names = ", ".join(sorted("/".join(key.path) for key in removed))
    logger.warning(f"Backfill {backfill.backfill_id} goes on without what is not defined any more: {names}")
    requests = list(zip(backfill.submitting_run_requests, backfill.reserved_run_ids, strict=True))
    requests = [
        (without(request, removed), run_id)
        for request, run_id in requests
        if set(request.asset_selection or ()) - removed
    ]
    for run in _queued(instance, backfill.backfill_id):
        if run.asset_selection is None or not run.asset_selection & removed:
            continue
        instance.delete_run(run.run_id)  # it could not load; as it never began, nothing is lost
        if run.asset_selection - removed:
            requests.append((without(request_of(run), removed), make_new_run_id()))
    instance.update_backfill(
        backfill._replace(
            asset_backfill_data=trimmed(backfill.asset_backfill_data, removed),
            status=BulkActionStatus.REQUESTED,
            error=None,
            failure_count=0,
            submitting_run_requests=[request for request, _ in requests],
            reserved_run_ids=[run_id for _, run_id in requests],
        )
    )


def _queued(instance: DagsterInstance, backfill: str) -> Sequence[DagsterRun]:
    return instance.get_runs(RunsFilter(tags={BACKFILL_ID_TAG: backfill}, statuses=[DagsterRunStatus.QUEUED]))


def trimmed(data: AssetBackfillData, removed: frozenset[AssetKey]) -> AssetBackfillData:
    """The data without these assets."""
    kept = data.target_subset.asset_keys - removed
    return data._replace(**{name: getattr(data, name).filter_asset_keys(kept) for name in _PARTS})


def request_of(run: DagsterRun) -> RunRequest:
    """The request from which Dagster made a run of a backfill."""
    span = (ASSET_PARTITION_RANGE_START_TAG, ASSET_PARTITION_RANGE_END_TAG)
    return RunRequest(
        asset_selection=sorted(run.asset_selection or ()),
        asset_check_keys=None if run.asset_check_selection is None else sorted(run.asset_check_selection),
        tags={name: run.tags[name] for name in span if name in run.tags},
        partition_key=run.tags.get(PARTITION_NAME_TAG),
    )


def without(request: RunRequest, removed: frozenset[AssetKey]) -> RunRequest:
    """The request without these assets and their checks."""
    checks = request.asset_check_keys
    return request._replace(
        asset_selection=[key for key in request.asset_selection or () if key not in removed],
        asset_check_keys=None if checks is None else [one for one in checks if one.asset_key not in removed],
    )


def _forget_removed() -> None:
    """A failed run that holds an asset that is gone fails the look at its backfill, as Dagster then asks the
    graph for the asset. There is no hook for it, so the method that lists the assets of a run is wrapped."""
    planned = CachingInstanceQueryer.get_planned_materializations_for_run

    def known(self: CachingInstanceQueryer, run_id: str) -> set[AssetKey]:
        return {key for key in planned(self, run_id) if self.asset_graph.has(key)}

    CachingInstanceQueryer.get_planned_materializations_for_run = known  # type: ignore[method-assign]


def daemons(instance: DagsterInstance) -> list[DagsterDaemon[Any]]:
    """All that Dagster has for this instance, one of them replaced."""
    return [
        LastingBackfillDaemon(settings=instance.get_backfill_settings())
        if isinstance(one, BackfillDaemon)
        else one
        for one in create_daemons_from_instance(instance)
    ]


def run(workspace: str) -> None:
    """Returns when it was told to end."""
    setup_interrupt_handlers()
    _forget_removed()
    try:
        with (
            capture_interrupts(),
            DagsterInstance.get() as instance,
            daemon_controller_from_instance(
                instance,
                workspace_load_target=WorkspaceFileTarget([workspace]),
                gen_daemons=daemons,
                code_server_log_level="warning",
            ) as controller,
        ):
            controller.check_daemon_loop()
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    run(sys.argv[1])
