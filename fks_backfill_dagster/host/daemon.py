"""The daemon that `up` starts: Dagster's own, with backfills that survive a change of the settings, and retries that
wait until the status of a failed run is stored.

Dagster fails a whole backfill, and cancels its runs, when one of its assets or partitions is no longer defined
("existed at storage-time, but no longer does"): a symbol or a timeframe was removed, or history starts later. This
daemon removes them from the backfill before Dagster evaluates it: queued runs that contain them are requested again
without them; a run that has started continues, because it has loaded its definitions.

    python -m fks_backfill_dagster.host.daemon WORKSPACE

Does not belong here: starting it (`servers`). A daemon that was started differently (`dagster dev`, `dagster-daemon`)
fails such a backfill; `launch` then starts another one for the remaining series.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

from dagster import (
    AssetKey,
    DagsterInstance,
    DagsterRun,
    DagsterRunStatus,
    RunRequest,
    RunsFilter,
    TimeWindowPartitionsDefinition,
)
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.execution.asset_backfill import AssetBackfillData
from dagster._core.execution.backfill import BulkActionsFilter, BulkActionStatus, PartitionBackfill
from dagster._core.storage.dagster_run import FINISHED_STATUSES, RunRecord
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BACKFILL_ID_TAG,
    PARTITION_NAME_TAG,
)
from dagster._core.utils import make_new_run_id
from dagster._core.workspace.context import IWorkspaceProcessContext, WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import (
    consume_new_runs_for_automatic_reexecution,
)
from dagster._daemon.auto_run_reexecution.event_log_consumer import EventLogConsumerDaemon
from dagster._daemon.controller import create_daemons_from_instance, daemon_controller_from_instance
from dagster._daemon.daemon import BackfillDaemon, DagsterDaemon, SpanMarker
from dagster._utils.caching_instance_queryer import CachingInstanceQueryer
from dagster._utils.interrupts import capture_interrupts, setup_interrupt_handlers

from fks_backfill_dagster.host.plain_logs import write_plain

_FIRST, _LAST = ASSET_PARTITION_RANGE_START_TAG, ASSET_PARTITION_RANGE_END_TAG

_DEFINITIONS_CHANGED = frozenset(
    {"DagsterAssetBackfillDataLoadError", "DagsterDefinitionChangedDeserializationError"}
)
"""The errors with which Dagster fails a backfill whose definitions have changed."""

_GONE = ("existed at storage-time, but no longer does", "have been removed since this backfill was stored")
"""Parts of their messages if assets or partitions were removed."""


# A status follows its event by one statement; a database that is being restarted by some more.
STATUS_SECONDS = 30.0
_STATUS_PAUSE_SECONDS = 0.2


class LastingBackfillDaemon(BackfillDaemon):
    """Dagster's backfill daemon; first removes undefined assets from backfills."""

    def core_loop(self, workspace_process_context: Any, shutdown_event: Event) -> Iterator[Any]:  # type: ignore[override]
        for each in super().core_loop(workspace_process_context, shutdown_event):
            if each is SpanMarker.START_SPAN:
                try:
                    release_removed(workspace_process_context, self._logger)
                except Exception:  # Dagster's own iteration must follow in any case
                    self._logger.exception("Comparing the backfills with the definitions failed")
            yield each


class EndedRunsDaemon(EventLogConsumerDaemon):
    """Dagster's daemon that retries failed runs; first waits until the status of each is stored.

    Dagster stores the event of a failure before the status of the run. Between the two the run cannot be retried ("not
    failed or canceled"), and Dagster would mark it as never to be retried.
    """

    @property
    def handle_updated_runs_fns(self) -> Sequence[Any]:
        return [_retry_ended_runs]


def _retry_ended_runs(
    context: IWorkspaceProcessContext[Any], records: Sequence[RunRecord], logger: logging.Logger
) -> Iterator[None]:
    yield from consume_new_runs_for_automatic_reexecution(context, ended(context.instance, records), logger)


def ended(instance: DagsterInstance, records: Sequence[RunRecord]) -> Sequence[RunRecord]:
    """Waits until the status of every run is final, at most STATUS_SECONDS; returns the current records.

    `records`: of runs with an event of their end.
    """
    deadline = time.monotonic() + STATUS_SECONDS
    while any(one.dagster_run.status not in FINISHED_STATUSES for one in records):
        if time.monotonic() > deadline:
            break
        time.sleep(_STATUS_PAUSE_SECONDS)
        records = instance.get_run_records(RunsFilter(run_ids=[one.dagster_run.run_id for one in records]))
    return records


@dataclass(frozen=True, slots=True)
class Change:
    """The undefined part of a backfill: whole assets, and partitions before a later start.

    `shortened`: the current partitions of remaining assets that have lost some. `all_gone`: nothing remains, and
    Dagster's own error message is right.
    """

    removed: frozenset[AssetKey]
    shortened: Mapping[AssetKey, TimeWindowPartitionsDefinition]
    all_gone: bool = False

    def __bool__(self) -> bool:
        return bool(self.removed or self.shortened)

    def first(self, key: AssetKey) -> str:
        """The first partition of a shortened asset; empty for any other."""
        return (self.shortened[key].get_first_partition_key() or "") if key in self.shortened else ""


def release_removed(context: WorkspaceProcessContext, logger: logging.Logger) -> None:
    """Removes undefined assets and partitions from every active backfill.

    A location that fails to load has no assets at all; its backfills wait.
    """
    found = context.instance.get_backfills(
        BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED, BulkActionStatus.FAILING])
    )
    active = [one for one in found if one.asset_backfill_data is not None and _is_active(one)]
    if not active:
        return
    if any(change_of(context, one) for one in active):
        # Assets that look removed may be new ones that this process has not loaded yet.
        for name in list(context.create_request_context().get_code_location_entries()):
            context.refresh_code_location(name)
    entries = context.create_request_context().get_code_location_entries().values()
    if any(entry.load_error for entry in entries):
        return
    for backfill in active:
        change = change_of(context, backfill)
        if not change.all_gone and (change or backfill.status is BulkActionStatus.FAILING):
            _release(context.instance, backfill, change, logger)


def _is_active(backfill: PartitionBackfill) -> bool:
    """Whether it is requested, or about to fail because of undefined assets or partitions."""
    if backfill.status is BulkActionStatus.REQUESTED:
        return True
    error = backfill.error
    return (
        error is not None
        and error.cls_name in _DEFINITIONS_CHANGED
        and any(text in error.message for text in _GONE)
    )


def change_of(context: WorkspaceProcessContext, backfill: PartitionBackfill) -> Change:
    """The part of the backfill that the loaded definitions do not contain."""
    assert backfill.asset_backfill_data is not None
    graph = context.create_request_context().asset_graph
    targeted = backfill.asset_backfill_data.target_subset
    removed = frozenset(key for key in targeted.asset_keys if not graph.has(key))
    shortened = {}
    for key, subset in targeted.partitions_subsets_by_asset_key.items():
        definition = graph.get(key).partitions_def if key not in removed else None
        if isinstance(definition, TimeWindowPartitionsDefinition) and not subset.is_empty:
            # Cheaper than Dagster's own comparison, which lists all partitions: only the start can have changed.
            window = definition.time_window_for_partition_key(next(iter(subset.get_partition_keys())))
            if window.start < definition.start:
                shortened[key] = definition
    change = Change(removed, shortened)
    left = [key for key in targeted.asset_keys - removed if not _is_lost(targeted, key, change)]
    return replace(change, all_gone=not left)


def _is_lost(subset: AssetGraphSubset, key: AssetKey, change: Change) -> bool:
    return key in change.shortened and not _from(subset, key, change.first(key))


def _from(subset: AssetGraphSubset, key: AssetKey, first: str) -> list[str]:
    """The partitions of the asset from `first` on."""
    return [one for one in subset.partitions_subsets_by_asset_key[key].get_partition_keys() if one >= first]


def _release(
    instance: DagsterInstance, backfill: PartitionBackfill, change: Change, logger: logging.Logger
) -> None:
    assert backfill.asset_backfill_data is not None
    names = sorted("/".join(key.path) for key in (*change.removed, *change.shortened))
    logger.warning(
        f"Backfill {backfill.backfill_id} continues without assets or partitions that were removed: {names}"
    )
    pending = zip(backfill.submitting_run_requests, backfill.reserved_run_ids, strict=True)
    requests = [(without(request, change), run_id) for request, run_id in pending]
    for run in instance.get_runs(RunsFilter(tags={BACKFILL_ID_TAG: backfill.backfill_id})):
        request = request_of(run)
        left = without(request, change)
        if left == request:
            continue
        if run.status is DagsterRunStatus.QUEUED:
            instance.delete_run(run.run_id)  # it could not load; it has not started, so nothing is lost
            requests.append((left, make_new_run_id()))
        elif left is not None and left.tags != request.tags:
            # It has loaded its definitions and continues. Dagster reads the partitions to run from its tags.
            instance.add_run_tags(run.run_id, dict(left.tags))
    kept = [(request, run_id) for request, run_id in requests if request is not None]
    instance.update_backfill(
        backfill._replace(
            asset_backfill_data=trimmed(backfill.asset_backfill_data, change),
            status=BulkActionStatus.REQUESTED,
            error=None,
            failure_count=0,
            submitting_run_requests=[request for request, _ in kept],
            reserved_run_ids=[run_id for _, run_id in kept],
        )
    )


def trimmed(data: AssetBackfillData, change: Change) -> AssetBackfillData:
    """The data without undefined assets and partitions."""
    return data._replace(
        target_subset=_trimmed(data.target_subset, change),
        materialized_subset=_trimmed(data.materialized_subset, change),
        requested_subset=_trimmed(data.requested_subset, change),
        failed_and_downstream_subset=_trimmed(data.failed_and_downstream_subset, change),
    )


def _trimmed(subset: AssetGraphSubset, change: Change) -> AssetGraphSubset:
    kept = subset.filter_asset_keys(subset.asset_keys - change.removed)
    parts = {
        key: partitions
        if key not in change.shortened
        else change.shortened[key].subset_with_partition_keys(_from(kept, key, change.first(key)))
        for key, partitions in kept.partitions_subsets_by_asset_key.items()
    }
    return kept._replace(
        partitions_subsets_by_asset_key={key: one for key, one in parts.items() if not one.is_empty}
    )


def request_of(run: DagsterRun) -> RunRequest:
    """The request from which Dagster made a run of a backfill."""
    span = (_FIRST, _LAST)
    return RunRequest(
        asset_selection=sorted(run.asset_selection or ()),
        asset_check_keys=None if run.asset_check_selection is None else sorted(run.asset_check_selection),
        tags={name: run.tags[name] for name in span if name in run.tags},
        partition_key=run.tags.get(PARTITION_NAME_TAG),
        run_config=run.run_config,
    )


def without(request: RunRequest, change: Change) -> RunRequest | None:
    """The request without undefined parts; None if nothing remains. The assets of a run share their partitions."""
    assets = [key for key in request.asset_selection or () if key not in change.removed]
    begin = max((change.first(key) for key in assets), default="")
    last = request.tags.get(_LAST, request.partition_key or begin)
    if not assets or last < begin:
        return None
    tags = dict(request.tags)
    if _FIRST in tags:
        tags[_FIRST] = max(tags[_FIRST], begin)
    checks = request.asset_check_keys
    return request._replace(
        asset_selection=assets,
        asset_check_keys=None
        if checks is None
        else [one for one in checks if one.asset_key not in change.removed],
        tags=tags,
    )


def _ignore_removed() -> None:
    """Makes Dagster ignore removed assets of failed runs: looking them up in the graph would fail the iteration of
    the backfill. There is no hook, so the method that lists the assets of a run is wrapped."""
    planned = CachingInstanceQueryer.get_planned_materializations_for_run

    def known(self: CachingInstanceQueryer, run_id: str) -> set[AssetKey]:
        return {key for key in planned(self, run_id) if self.asset_graph.has(key)}

    CachingInstanceQueryer.get_planned_materializations_for_run = known  # type: ignore[method-assign]


def daemons(instance: DagsterInstance) -> list[DagsterDaemon[Any]]:
    """Dagster's daemons for this instance, with those of backfills and of retries replaced."""

    def ours(one: DagsterDaemon[Any]) -> DagsterDaemon[Any]:
        if isinstance(one, BackfillDaemon):
            return LastingBackfillDaemon(settings=instance.get_backfill_settings())
        return EndedRunsDaemon() if isinstance(one, EventLogConsumerDaemon) else one

    return [ours(one) for one in create_daemons_from_instance(instance)]


def run(workspace: str) -> None:
    """Runs the daemon; returns after an interrupt."""
    setup_interrupt_handlers()
    write_plain()
    _ignore_removed()
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
