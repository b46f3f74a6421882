"""The schedules: refreshes of all series, daily checks, daily deletion of obsolete runs.

A tick of a refresh queries which series have a candle that has closed since their last sync, and requests runs for
those. A tick without new candles costs two queries. Series whose refresh is queued or running are skipped.

Does not belong here: intervals (`cadence`), what a run does (`assets`, `checks`, `run_retention`).
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime

from dagster import (
    AssetCheckKey,
    AssetKey,
    DagsterInstance,
    DefaultScheduleStatus,
    RunRequest,
    RunsFilter,
    ScheduleDefinition,
    ScheduleEvaluationContext,
    SkipReason,
    schedule,
)
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.tags import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
)

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_micros
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.checks import CHECK_NAMES
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.jobs import CHECKS, job_name
from fks_backfill_dagster.orchestration.refresh import is_wanted, requested_range
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.orchestration.run_config import REFRESH, SyncMode, run_config
from fks_backfill_dagster.orchestration.run_retention import HOUSEKEEPING
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.reaches import reaches, synced_ends

Tick = RunRequest | SkipReason


def build_schedules(
    groups: Sequence[Group], settings: Settings, catalog: Catalog
) -> list[ScheduleDefinition]:
    """A refresh per configured timeframe, the daily checks, the daily housekeeping."""
    if not groups:
        return []
    frames = sorted({group.timeframe for group in groups}, key=list(Timeframe).index)
    refreshes = [
        _refresh(frame, [group for group in groups if group.timeframe is frame], settings, catalog)
        for frame in frames
    ]
    return [*refreshes, _checks(groups, settings), _housekeeping(settings)]


def _status(on: bool) -> DefaultScheduleStatus:
    """A disabled schedule is shown in the UI as stopped."""
    return DefaultScheduleStatus.RUNNING if on else DefaultScheduleStatus.STOPPED


# Refresh ------------------------------------------------------------------------------------------------


def _refresh(
    frame: Timeframe, groups: Sequence[Group], settings: Settings, catalog: Catalog
) -> ScheduleDefinition:
    series = {key: one for group in groups for key, one in group.series.items()}

    @schedule(
        name=f"refresh_{frame}",
        cron_schedule=cadence.cron(frame),
        execution_timezone="UTC",
        job_name=job_name(frame),
        default_status=_status(frame in settings.automation.refresh),
        description=f"Fetches {frame} candles that have closed since the last sync of their series.",
        required_resource_keys={DATABASE},
    )
    def refresh(context: ScheduleEvaluationContext) -> Iterator[Tick]:
        moment = context.scheduled_execution_time
        database = getattr(context.resources, DATABASE).database
        waiting = unfinished(context.instance, {REFRESH: frame.value})
        idle = {key: one for key, one in series.items() if key not in waiting}
        found: list[Tick] = list(refresh_requests(frame, idle, catalog, database, moment))
        yield from found or [SkipReason(_why_nothing(frame, len(waiting)))]

    return refresh


def _why_nothing(frame: Timeframe, waiting: int) -> str:
    if waiting:
        return f"no {frame} candle to request; {waiting} series are being refreshed already"
    return f"no {frame} candle has closed since the last sync of any series"


def unfinished(instance: DagsterInstance, tags: Mapping[str, str]) -> set[AssetKey]:
    """The assets of unfinished runs with these tags."""
    runs = instance.get_runs(RunsFilter(tags=dict(tags), statuses=NOT_FINISHED_STATUSES))
    return {key for run in runs for key in run.asset_selection or ()}


def refresh_requests(
    frame: Timeframe, series: Mapping[AssetKey, Series], catalog: Catalog, database: Database, at: datetime
) -> Iterator[RunRequest]:
    """Runs for the series that are due at a tick, 50 per run, grouped by asset class and partitions. A class whose
    providers fail does not delay another one.

    The first tick of a day refreshes all series that have not ended, so that one without new candles (an exchange
    holiday, a delisting) stays fresh in Dagster. That costs no request.
    """
    now, grain = to_micros(at), Grain.of(frame)
    known = reaches(database, list(series.values()))
    daily = now % MICROS_PER_DAY < cadence.tick_interval(frame)
    alike: dict[tuple[str, AssetClass], list[AssetKey]] = {}
    for key, one in series.items():
        if is_wanted(one, known.get(one), catalog, now, daily=daily):
            begin = requested_range(one, known.get(one), catalog, now).start
            alike.setdefault((grain.key(min(begin, now)), one.asset_class), []).append(key)
    for (first, asset_class), keys in sorted(alike.items()):
        for number, start in enumerate(range(0, len(keys), cadence.MOST_SERIES)):
            some = keys[start : start + cadence.MOST_SERIES]
            yield RunRequest(
                run_key=f"refresh {frame} {asset_class} {first} {number}",
                asset_selection=some,
                run_config=run_config(SyncMode.REFRESH, (series[key] for key in some)),
                asset_check_keys=[],  # the default would be all checks of the assets, whatever the job selects
                tags={
                    REFRESH: frame.value,
                    cadence.PRIORITY: cadence.FIRST,
                    ASSET_PARTITION_RANGE_START_TAG: first,
                    ASSET_PARTITION_RANGE_END_TAG: grain.key(now),
                },
            )


# Checks and housekeeping --------------------------------------------------------------------------------


def _checks(groups: Sequence[Group], settings: Settings) -> ScheduleDefinition:
    @schedule(
        name="checks_daily",
        cron_schedule="40 0 * * *",
        execution_timezone="UTC",
        job_name=CHECKS,
        default_status=_status(settings.automation.checks),
        description="Runs all checks of all synced series. Fetches nothing.",
        required_resource_keys={DATABASE},
    )
    def checks_daily(context: ScheduleEvaluationContext) -> Iterator[Tick]:
        database = getattr(context.resources, DATABASE).database
        found: list[Tick] = list(check_requests(groups, database))
        yield from found or [SkipReason("no series is synced yet")]

    return checks_daily


def check_requests(groups: Sequence[Group], database: Database) -> Iterator[RunRequest]:
    """A run per 50 series of a group, so that a run reads one table."""
    for group in groups:
        synced = synced_ends(database, list(group.series.values()))
        keys = [key for key, one in group.series.items() if one in synced]
        for number, start in enumerate(range(0, len(keys), cadence.MOST_SERIES)):
            some = keys[start : start + cadence.MOST_SERIES]
            yield RunRequest(
                run_key=f"checks {group.name} {number}",
                asset_selection=[],
                asset_check_keys=[AssetCheckKey(key, name) for key in some for name in CHECK_NAMES],
                tags={cadence.PRIORITY: cadence.LAST},
            )


def _housekeeping(settings: Settings) -> ScheduleDefinition:
    return ScheduleDefinition(
        name="housekeeping_daily",
        cron_schedule="20 3 * * *",
        execution_timezone="UTC",
        job_name=HOUSEKEEPING,
        default_status=_status(settings.automation.housekeeping),
        description="Deletes runs, with their events, that later runs have made obsolete.",
        tags={cadence.PRIORITY: cadence.LAST},
    )
