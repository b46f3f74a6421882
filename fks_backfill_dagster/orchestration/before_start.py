"""The sensor that reports partitions before a series' own start: materialized, nothing expected, no run.

All series of a grain share their partitions, which begin with the earliest series. Without these reports a
series that starts later shows empty partitions permanently, and a backfill of "all missing" runs them.
Each partition is reported once: those that Dagster has as materialized, by a report or a run, are skipped. The
cursor is an optimization: it counts the completed series, so that a tick without changes costs no query.

Does not belong here: partitions in which a run finds nothing expected (`assets`).
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dagster import (
    AssetKey,
    AssetMaterialization,
    DagsterEvent,
    DagsterEventType,
    DagsterInstance,
    DefaultSensorStatus,
    SensorDefinition,
    SensorEvaluationContext,
    SkipReason,
    sensor,
)
from dagster._core.events import StepMaterializationData
from dagster._core.instance.utils import RUNLESS_JOB_NAME, RUNLESS_RUN_ID

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.groups import Group, asset_key
from fks_backfill_dagster.settings.catalog import Catalog

SENSOR = "partitions_before_start"

MOST_REPORTS = 500
"""Reports per tick: each is an event of about 15 ms, and a tick has a minute."""

MOST_SERIES = 500
"""Series looked up per tick, one query each."""


@dataclass(frozen=True, slots=True)
class Early:
    """The partitions of a series that lie wholly before its own start, ascending."""

    series: Series
    start: int
    keys: tuple[str, ...]


def build_before_start_sensors(groups: Sequence[Group], catalog: Catalog) -> list[SensorDefinition]:
    """The sensor, if any series starts later than the partitions; otherwise an empty list."""
    early = early_partitions(groups, catalog)
    if not early:
        return []
    mark = fingerprint(early)

    @sensor(
        name=SENSOR,
        minimum_interval_seconds=cadence.BEFORE_START_SECONDS,
        default_status=DefaultSensorStatus.RUNNING,
        description="Reports partitions before a series' own start as materialized, once. Starts no run.",
    )
    def partitions_before_start(context: SensorEvaluationContext) -> SkipReason:
        done = settled(context.cursor, mark)
        if done == len(early):
            return SkipReason("every partition before a series' own start is reported")
        reported, done = report(context.instance, early, done)
        context.update_cursor(json.dumps({"mark": mark, "done": done}))
        return SkipReason(
            f"{reported:,} partitions reported in which nothing is expected; {done:,} of {len(early):,} series settled"
        )

    return [partitions_before_start]


def early_partitions(groups: Sequence[Group], catalog: Catalog) -> list[Early]:
    """Partitions to report, by series; series without any are omitted."""
    begin = catalog.earliest_start
    found = (
        Early(one, start, keys_before_start(Grain.of(one.timeframe), begin, start))
        for group in groups
        for one in group.series.values()
        for start in (catalog.start_of(one),)
    )
    return [one for one in found if one.keys]


def keys_before_start(grain: Grain, begin: int, start: int) -> tuple[str, ...]:
    """The keys of the partitions, from the one that contains `begin` on, that lie wholly before `start`."""
    whole = TimeRange(begin, max(begin, grain.start(start)))
    return tuple(grain.keys(whole)) if whole else ()


def fingerprint(early: Sequence[Early]) -> str:
    """Changes with the symbols, their starts and the first partition."""
    text = "\n".join(f"{one.series} {one.keys[0]} {one.keys[-1]}" for one in early)
    return hashlib.sha256(text.encode()).hexdigest()


def settled(cursor: str | None, mark: str) -> int:
    """The number of series completed according to the cursor; 0 if its fingerprint differs."""
    known: Mapping[str, object] = json.loads(cursor) if cursor else {}
    done = known.get("done")
    return done if known.get("mark") == mark and isinstance(done, int) else 0


def report(instance: DagsterInstance, early: Sequence[Early], done: int) -> tuple[int, int]:
    """Reports partitions that are not materialized yet, from series number `done` on, within the limits of a tick.

    Returns the number of reports and the number of completed series.
    """
    reported = 0
    for one in early[done : done + MOST_SERIES]:
        key = asset_key(one.series)
        known = instance.get_materialized_partitions(key)
        absent = [partition for partition in one.keys if partition not in known]
        taken = absent[: MOST_REPORTS - reported]
        if taken:
            _report(instance, key, one, taken)
            reported += len(taken)
        if len(taken) < len(absent):
            break
        done += 1
    return reported, done


def _report(instance: DagsterInstance, key: AssetKey, one: Early, partitions: Sequence[str]) -> None:
    """Reports the partitions without making the series look fresh.

    The freshness policy uses the time of the newest materialization. A report therefore has the time of the
    latest existing one or, without any, of the partition's end.
    """
    latest = instance.get_latest_materialization_event(key)
    for partition in partitions:
        window = Grain.of(one.series.timeframe).window(partition)
        instance.report_dagster_event(
            DagsterEvent(
                event_type_value=DagsterEventType.ASSET_MATERIALIZATION.value,
                event_specific_data=StepMaterializationData(_materialization(key, one, partition)),
                job_name=RUNLESS_JOB_NAME,
            ),
            run_id=RUNLESS_RUN_ID,
            timestamp=_moment(window) if latest is None else latest.timestamp,
        )


def _materialization(key: AssetKey, one: Early, partition: str) -> AssetMaterialization:
    return AssetMaterialization(
        key,
        partition=partition,
        description=f"nothing expected: {one.series} starts at {iso(one.start)}",
        metadata={"expected": 0, "stored": 0, "missing": 0, "coverage": 1.0},
    )


def _moment(window: TimeRange) -> float:
    return to_datetime(window.end).timestamp()
