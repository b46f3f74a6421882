"""Backfills with undefined assets or partitions, in a real instance with a separate code location."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from dagster import (
    AssetCheckKey,
    AssetKey,
    DagsterInstance,
    DagsterRunStatus,
    RunRequest,
    instance_for_test,
)
from dagster._core.definitions.selector import (
    PartitionRangeSelector,
    PartitionsByAssetSelector,
    PartitionsSelector,
)
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
from dagster._core.remote_origin import InProcessCodeLocationOrigin
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BACKFILL_ID_TAG,
)
from dagster._core.test_utils import create_run_for_test
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster_shared.error import SerializableErrorInfo

from fks_backfill_dagster.host.daemon import release_removed

A, B = AssetKey("a"), AssetKey("b")
MONTHS = ("2024-01-01", "2024-02-01")
SPAN = {ASSET_PARTITION_RANGE_START_TAG: MONTHS[0], ASSET_PARTITION_RANGE_END_TAG: MONTHS[1]}
CHANGED = SerializableErrorInfo(
    "Asset b existed at storage-time, but no longer does", [], "DagsterAssetBackfillDataLoadError"
)
LOG = logging.getLogger("backfills")

_CODE = """
from dagster import AssetSpec, Definitions, MonthlyPartitionsDefinition, multi_asset
months = MonthlyPartitionsDefinition("{begin}")

@multi_asset(specs=[AssetSpec(name) for name in {names!r}], partitions_def=months, can_subset=True)
def some(context): ...

defs = Definitions([some])
"""


@dataclass(frozen=True)
class Place:
    file: Path
    instance: DagsterInstance
    context: WorkspaceProcessContext
    id: str = "none"

    def define(self, *names: str, begin: str = MONTHS[0], code: str = _CODE) -> None:
        text = code.format(names=list(names), begin=begin)
        if text != self.file.read_text():
            self.file.write_text(text)
            sys.modules.pop(self.file.stem, None)
            self.context.refresh_code_location("here")

    def backfill(self) -> PartitionBackfill:
        """The stored backfill of both assets over both months; creates it."""
        found = self.instance.get_backfill(self.id)
        if found is None:
            span = PartitionsSelector(ranges=[PartitionRangeSelector(start=MONTHS[0], end=MONTHS[1])])
            found = PartitionBackfill.from_partitions_by_assets(
                backfill_id=self.id,
                asset_graph=self.context.create_request_context().asset_graph,
                backfill_timestamp=1_750_000_000.0,
                tags={},
                dynamic_partitions_store=self.instance,
                partitions_by_assets=[
                    PartitionsByAssetSelector(asset_key=key, partitions=span) for key in (A, B)
                ],
                title=None,
                description=None,
                run_config=None,
            )
            self.instance.add_backfill(found)
        return found

    def fail(self, error: SerializableErrorInfo) -> None:
        self.instance.update_backfill(
            self.backfill()._replace(status=BulkActionStatus.FAILING, error=error, failure_count=1)
        )

    def partitions(self, key: AssetKey) -> list[str]:
        data = self.backfill().asset_backfill_data
        assert data is not None
        return list(data.target_subset.get_partitions_subset(key).get_partition_keys())

    def targeted(self) -> set[AssetKey]:
        data = self.backfill().asset_backfill_data
        assert data is not None
        return set(data.target_subset.asset_keys)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    file = tmp_path_factory.mktemp("location") / "location_of_this_test.py"
    file.write_text(_CODE.format(names=["a", "b"], begin=MONTHS[0]))
    origin = LoadableTargetOrigin(executable_path=sys.executable, python_file=str(file))
    target = InProcessWorkspaceLoadTarget(InProcessCodeLocationOrigin(origin, location_name="here"))
    with (
        pytest.MonkeyPatch.context() as patch,
        instance_for_test() as instance,
        WorkspaceProcessContext(instance, target) as context,
    ):
        # For two sources of one length within a second, Python would use the bytecode of the first one.
        patch.setattr(sys, "dont_write_bytecode", True)
        yield Place(file, instance, context)


@pytest.fixture
def place(served: Place, request: pytest.FixtureRequest) -> Iterator[Place]:
    """Both assets are defined, and a separate backfill is requested."""
    made = replace(served, id=request.node.name)
    made.define("a", "b")
    made.backfill()
    yield made
    canceled = made.backfill().with_status(BulkActionStatus.CANCELED)  # type: ignore[no-untyped-call]  # Dagster's
    made.instance.update_backfill(canceled)


def test_a_removed_asset_leaves_the_backfill(place: Place) -> None:
    place.define("a")
    release_removed(place.context, LOG)
    assert place.targeted() == {A}
    assert place.backfill().status is BulkActionStatus.REQUESTED


def test_without_removed_assets_nothing_changes(place: Place) -> None:
    before = place.backfill()
    release_removed(place.context, LOG)
    assert place.backfill() == before


def test_a_backfill_that_is_about_to_fail_for_a_removed_asset_continues(place: Place) -> None:
    """The definitions change during an iteration of the daemon; runs would be canceled by the next one."""
    place.define("a")
    place.fail(CHANGED)
    release_removed(place.context, LOG)
    found = place.backfill()
    assert (found.status, found.error, found.failure_count) == (BulkActionStatus.REQUESTED, None, 0)
    assert place.targeted() == {A}


@pytest.mark.parametrize("error", ["CheckError", "DagsterBackfillFailedError"])
def test_a_backfill_that_fails_for_another_reason_is_not_changed(place: Place, error: str) -> None:
    place.define("a")
    place.fail(SerializableErrorInfo("something else", [], error))
    before = place.backfill()
    release_removed(place.context, LOG)
    assert place.backfill() == before


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize(("name", "begin"), [("c", MONTHS[0]), ("a", "2024-03-01")])
def test_a_backfill_of_which_nothing_remains_is_not_changed(
    place: Place, name: str, begin: str, failing: bool
) -> None:
    place.define(name, begin=begin)
    if failing:
        place.fail(CHANGED)
    before = place.backfill()
    release_removed(place.context, LOG)
    assert place.backfill() == before


def test_partitions_before_a_later_start_leave_the_backfill(place: Place) -> None:
    """Also in the tags of a started run, from which Dagster reads its range if it fails."""
    location = place.context.create_request_context().get_code_location("here")
    origin = location.get_repository("__repository__").get_full_job("__ASSET_JOB").get_remote_origin()
    started, queued, before = (
        create_run_for_test(
            place.instance,
            tags={BACKFILL_ID_TAG: place.id, **span},
            status=status,
            asset_selection=frozenset({A, B}),
            remote_job_origin=origin,
        )
        for status, span in (
            (DagsterRunStatus.STARTED, SPAN),
            (DagsterRunStatus.QUEUED, SPAN),
            (DagsterRunStatus.QUEUED, {**SPAN, ASSET_PARTITION_RANGE_END_TAG: MONTHS[0]}),
        )
    )
    place.define("a", "b", begin=MONTHS[1])
    release_removed(place.context, LOG)
    assert place.targeted() == {A, B}
    assert place.partitions(A) == place.partitions(B) == [MONTHS[1]]
    (request,) = place.backfill().submitting_run_requests
    span = {ASSET_PARTITION_RANGE_START_TAG: MONTHS[1], ASSET_PARTITION_RANGE_END_TAG: MONTHS[1]}
    assert dict(request.tags) == span
    runs = {run.run_id: run for run in place.instance.get_runs() if run.tags[BACKFILL_ID_TAG] == place.id}
    assert not {queued.run_id, before.run_id} & set(runs)
    assert span.items() <= runs[started.run_id].tags.items()


@pytest.mark.filterwarnings("ignore:Error loading repository location")
def test_definitions_that_fail_to_load_change_nothing(place: Place) -> None:
    place.define("a", code="this is {names} no Python")
    before = place.backfill()
    release_removed(place.context, LOG)
    assert place.backfill() == before


def test_a_queued_run_is_requested_again_without_the_removed_asset(place: Place) -> None:
    """With its configuration. A started run continues with its loaded definitions; a run without the asset does not
    change."""
    refetch = {"ops": {"some": {"config": {"mode": "refetch"}}}}
    keys = {BACKFILL_ID_TAG: place.id, **SPAN}
    location = place.context.create_request_context().get_code_location("here")
    origin = location.get_repository("__repository__").get_full_job("__ASSET_JOB").get_remote_origin()
    queued, started, other, own = (
        create_run_for_test(
            place.instance,
            tags=keys,
            run_config=refetch,
            status=status,
            asset_selection=frozenset(selection),
            remote_job_origin=origin,
        )
        for status, selection in (
            (DagsterRunStatus.QUEUED, {A, B}),
            (DagsterRunStatus.STARTED, {A, B}),
            (DagsterRunStatus.QUEUED, {A}),
            (DagsterRunStatus.QUEUED, {B}),
        )
    )
    checks = [AssetCheckKey(A, "sane"), AssetCheckKey(B, "sane")]
    interrupted = RunRequest(asset_selection=[B, A], asset_check_keys=checks, tags=SPAN)
    place.instance.update_backfill(
        place.backfill().with_submitting_run_requests(
            [interrupted, RunRequest(asset_selection=[B], tags=SPAN)], ["id-1", "id-2"]
        )
    )
    place.define("a")
    release_removed(place.context, LOG)
    left = {run.run_id for run in place.instance.get_runs() if run.tags[BACKFILL_ID_TAG] == place.id}
    assert left == {started.run_id, other.run_id}
    assert not {queued.run_id, own.run_id} & left
    found = place.backfill()
    first, second = found.submitting_run_requests
    assert (first.asset_selection, first.asset_check_keys) == ([A], checks[:1])
    assert (second.asset_selection, dict(second.tags), second.run_config) == ([A], SPAN, refetch)
    assert found.reserved_run_ids[0] == "id-1"
    assert len(set(found.reserved_run_ids)) == 2
