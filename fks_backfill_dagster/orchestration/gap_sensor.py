"""The gap sensor: reads the gap ledger, never the candles, and requests gap-filling runs.

A gap is requested when it is due according to the ledger, whose back-off makes a gap that no provider can fill ever
cheaper. It is skipped while a run that may fill it is queued or running, and for some minutes after it: a run that
fails before its first request must not be restarted in a loop. History that was never synced is not in the ledger
and is not requested here.

Does not belong here: when a gap is due (`ledger.settle`, `store.due_gaps`), what a run does (`assets`).
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from dagster import (
    AssetCheckKey,
    AssetKey,
    DagsterInstance,
    DefaultSensorStatus,
    RunRequest,
    RunsFilter,
    SensorDefinition,
    SensorEvaluationContext,
    SkipReason,
    sensor,
)
from dagster._core.definitions.target import ExecutableDefinition
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.tags import PARTITION_NAME_TAG, SENSOR_NAME_TAG

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.checks import COMPLETENESS
from fks_backfill_dagster.orchestration.groups import Group, asset_key
from fks_backfill_dagster.orchestration.jobs import job_name
from fks_backfill_dagster.orchestration.resources import ALL, opened
from fks_backfill_dagster.orchestration.run_config import FILL, SyncMode, run_config
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.settings_changes import settle_closures
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.due_gaps import Place, Wanted, due_places
from fks_backfill_dagster.store.ledger import reopen

SENSOR = "fill_gaps"

# An asset and one of its partition keys.
AssetPartition = tuple[AssetKey, str]
Tick = RunRequest | SkipReason


def build_sensors(
    groups: Sequence[Group], jobs: Sequence[ExecutableDefinition], settings: Settings, catalog: Catalog
) -> list[SensorDefinition]:
    """The sensor, if there is any series; `jobs` are the jobs that materialize them."""
    if not groups:
        return []
    on = settings.automation.fill_gaps

    @sensor(
        name=SENSOR,
        jobs=jobs,
        minimum_interval_seconds=cadence.FILL_SECONDS,
        default_status=DefaultSensorStatus.RUNNING if on else DefaultSensorStatus.STOPPED,
        description="Requests runs for gaps that are due. Reads the gap ledger, not the candles.",
        required_resource_keys=set(ALL),
    )
    def fill_gaps(context: SensorEvaluationContext) -> Iterator[Tick]:
        recent = recent_runs(context.instance)
        places = cadence.FILL_RUNS - recent.unfinished
        if places <= 0:
            yield SkipReason(f"{recent.unfinished} gap-filling runs are queued or running already")
            return
        with opened(context.resources, settings, context.log.info) as work:
            found: list[Tick] = [*fill_requests(groups, catalog, work, recent.partitions, places)]
        yield from found or [SkipReason("no gap is due")]

    return [fill_gaps]


@dataclass(frozen=True, slots=True)
class Recent:
    """The sensor's requests that are unfinished or were made within the last minutes."""

    unfinished: int
    partitions: frozenset[AssetPartition]


def recent_runs(instance: DagsterInstance) -> Recent:
    """The sensor's unfinished runs and those of the last minutes."""
    tags = {SENSOR_NAME_TAG: SENSOR}
    unfinished = instance.get_runs(RunsFilter(tags=tags, statuses=NOT_FINISHED_STATUSES))
    since = datetime.now(UTC) - timedelta(seconds=cadence.FILL_AGAIN_SECONDS)
    created_lately = instance.get_runs(RunsFilter(tags=tags, created_after=since))
    return Recent(
        len(unfinished),
        frozenset(
            (key, run.tags[PARTITION_NAME_TAG])
            for run in (*unfinished, *created_lately)
            for key in run.asset_selection or ()
        ),
    )


def fill_requests(
    groups: Sequence[Group],
    catalog: Catalog,
    work: Context,
    excluded: Collection[AssetPartition],
    most_runs: int,
) -> Iterator[RunRequest]:
    """Runs for due gaps, `most_runs` at most: one partition each, of up to 50 series of one grain and asset
    class.

    Gaps in the partitions `excluded` are skipped. First, gaps that rely on one provider's response are reopened
    if another provider has become eligible, and gaps within configured closures are explained.
    """
    wanted, now, most = _wanted(groups, catalog, work), work.clock(), cadence.MOST_SERIES * most_runs
    with work.database.begin() as connection:
        reopen(connection, {series: one.eligible for series, one in wanted.items()}, now)
    settle_closures(work, wanted)
    due = due_places(work.database, wanted, now, most + len(excluded))
    open_places = [one for one in due if (asset_key(one.series), one.key) not in excluded]
    for (job, key, _), series in bundled(open_places, most_runs).items():
        keys = [asset_key(one) for one in series]
        yield RunRequest(
            # Without a run key: the same gap may have to be requested again.
            job_name=job,
            partition_key=key,
            asset_selection=keys,
            asset_check_keys=[AssetCheckKey(one, COMPLETENESS) for one in keys],
            run_config=run_config(SyncMode.FILL_GAPS, series),
            tags={FILL: key, cadence.PRIORITY: cadence.LAST},
        )


def _wanted(groups: Sequence[Group], catalog: Catalog, work: Context) -> dict[Series, Wanted]:
    return {
        one: Wanted(
            since=catalog.start_of(one),
            grain=Grain.of(one.timeframe),
            eligible=work.eligible(one),
            until=catalog.end_of(one),
        )
        for group in groups
        for one in group.series.values()
    }


def bundled(places: Sequence[Place], most: int) -> Mapping[tuple[str, str, AssetClass], Sequence[Series]]:
    """Series that one run can take, by job, partition and asset class: the first `most` such runs, in the order
    of their first places, 50 series each."""
    bundles: dict[tuple[str, str, AssetClass], list[Series]] = {}
    for place in places:
        where = (job_name(place.series.timeframe), place.key, place.series.asset_class)
        if where not in bundles and len(bundles) == most:
            continue
        members = bundles.setdefault(where, [])
        if len(members) < cadence.MOST_SERIES:
            members.append(place.series)
    return bundles
