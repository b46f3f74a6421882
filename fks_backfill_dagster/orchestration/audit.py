"""The audit in Dagster: a job over stored series, and its schedule.

A run audits 50 series at most. Differences are written to its log and, for a series that is an asset, to an
observation of the asset. A repaired difference is a warning; one that cannot be repaired fails the run, because
it needs an operator. Series that were removed from the settings are audited as well.

Does not belong here: what is compared and how it is repaired (`pipeline.audit` and below).
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

from collections.abc import Iterator, Sequence
from datetime import datetime

from dagster import (
    AssetObservation,
    DefaultScheduleStatus,
    Failure,
    Field,
    JobDefinition,
    MetadataValue,
    OpExecutionContext,
    RunRequest,
    RunsFilter,
    ScheduleDefinition,
    ScheduleEvaluationContext,
    SkipReason,
    in_process_executor,
    job,
    op,
    schedule,
)
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

from fks_backfill_dagster import app, documents
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.reconcile import SeriesAudit
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.groups import asset_key
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.orchestration.retrying import retried
from fks_backfill_dagster.pipeline.audit import AuditReport, audit, auditable
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.database import Database

AUDIT, OP = "audit", "audit_series"

MOST_LINES = 20
"""Differences in the log of a run; the observations hold all of them."""

_JOB = "Recomputes ledger, coverage and status of stored series from their candles, and repairs differences."

_MINUTE = 50  # no refresh and no daily job starts at this minute
_HOUR_SECONDS = 3600


# Plain types: a field of dagster.Config accepts {"env": NAME} too, and an unknown series name is shown in the error.
_CONFIG = {
    "series": Field(
        [str],
        default_value=[],
        description="Names such as `BTC/USDT 1h`; empty: every stored series, configured or not.",
    )
}


def build_audit(catalog: Catalog) -> JobDefinition:
    """The job."""

    @op(name=OP, required_resource_keys={DATABASE}, config_schema=_CONFIG)
    def audit_series(context: OpExecutionContext) -> None:
        database = getattr(context.resources, DATABASE).database
        with retried(context):
            series = _wanted(auditable(database, catalog.series), context.op_config["series"])
            report = audit(database, series, app.now, done=lambda found: _observe(context, catalog, found))
        _conclude(context, report)

    @job(
        name=AUDIT, executor_def=in_process_executor, description=_JOB, tags={cadence.PRIORITY: cadence.LAST}
    )
    def audit_job() -> None:
        audit_series()

    return audit_job


def _wanted(stored: Sequence[Series], names: Sequence[str]) -> Sequence[Series]:
    """The named series; all stored ones if `names` is empty. Raises Failure for a series that is not stored."""
    if not names:
        return stored
    by_name = {str(one): one for one in stored}
    unknown = [name for name in names if name not in by_name]
    if unknown:
        raise Failure(
            f"not stored: {', '.join(unknown)}. `series` takes names such as `BTC/USDT 1h` of series that were"
            " synced; see `fks-backfill series list`",
            allow_retries=False,
        )
    return [by_name[name] for name in names]


def _observe(context: OpExecutionContext, catalog: Catalog, found: SeriesAudit) -> None:
    if not found.differences:
        return
    if found.series in catalog:
        context.log_event(
            AssetObservation(
                asset_key(found.series),
                description=f"an audit found {len(found.differences):,} differences",
                metadata={
                    "candles": found.candles,
                    "expected": found.expected,
                    "missing": found.missing,
                    "explained": found.explained,
                    "left": len(found.left),
                    "differences": MetadataValue.json(
                        [documents.difference(one) for one in found.differences]
                    ),
                },
            )
        )


def _conclude(context: OpExecutionContext, report: AuditReport) -> None:
    """Logs differences and totals; raises Failure if any difference could not be repaired."""
    lines = [(one.series, found) for one in report.series for found in one.differences]
    # Unrepaired differences first: they need an operator.
    for series, found in sorted(lines, key=lambda line: line[1].repaired)[:MOST_LINES]:
        log = context.log.warning if found.repaired else context.log.error
        log(f"{series}: {found.kind}: {found.message}{' (repaired)' if found.repaired else ''}")
    if len(lines) > MOST_LINES:
        context.log.warning(f"and {len(lines) - MOST_LINES:,} more")
    sums = {
        "series": len(report.series),
        "candles": report.candles,
        "differences": report.differences,
        "repaired": report.repaired,
        "left": report.left,
        "seconds": round(report.seconds, 3),
    }
    context.log.info(", ".join(f"{name} {value:,}" for name, value in sums.items()))
    context.add_output_metadata(sums)
    if report.left:
        names = list(dict.fromkeys(str(one.series) for one in report.series if one.left))
        text = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
        raise Failure(
            f"{report.left:,} differences cannot be repaired from the candles, in {text}: the remedy of each"
            " is in the log; `fks-backfill audit` lists all of them",
            metadata=sums,
            allow_retries=False,
        )


# Schedule -----------------------------------------------------------------------------------------------


def build_audit_schedule(settings: Settings, catalog: Catalog) -> ScheduleDefinition:
    """Every `gap_detection.check_interval_hours`."""
    every = settings.gap_detection.check_interval_hours
    on = settings.automation.audit

    @schedule(
        name=AUDIT,
        cron_schedule=audit_cron(every),
        execution_timezone="UTC",
        job_name=AUDIT,
        default_status=DefaultScheduleStatus.RUNNING if on else DefaultScheduleStatus.STOPPED,
        description=f"Audits every stored series, every {every} hours. Fetches nothing.",
        required_resource_keys={DATABASE},
    )
    def audit_schedule(context: ScheduleEvaluationContext) -> Iterator[RunRequest | SkipReason]:
        if not is_audit_hour(context.scheduled_execution_time, every):
            yield SkipReason(f"an audit is due every {every} hours")
            return
        running = RunsFilter(job_name=AUDIT, statuses=NOT_FINISHED_STATUSES)
        if context.instance.get_runs_count(running):
            yield SkipReason("the previous audit is still queued or running")
            return
        database = getattr(context.resources, DATABASE).database
        found: list[RunRequest | SkipReason] = list(audit_requests(database, catalog))
        yield from found or [SkipReason("no series is stored")]

    return audit_schedule


def audit_cron(hours: int) -> str:
    """The cron schedule of an audit every `hours`: cron has no intervals that exceed a day or do not divide
    one, so there may be more ticks than audits; `is_audit_hour` selects."""
    if hours % 24 == 0:
        return f"{_MINUTE} 0 * * *"
    return f"{_MINUTE} */{hours} * * *" if 24 % hours == 0 else f"{_MINUTE} * * * *"


def is_audit_hour(moment: datetime, hours: int) -> bool:
    """Whether an audit is due at this tick. Counted from the epoch, so a restart does not shift it."""
    return int(moment.timestamp()) // _HOUR_SECONDS % hours == 0


def audit_requests(database: Database, catalog: Catalog) -> Iterator[RunRequest]:
    """A run per 50 stored series."""
    names = [str(one) for one in auditable(database, catalog.series)]
    for number, start in enumerate(range(0, len(names), cadence.MOST_SERIES)):
        some = names[start : start + cadence.MOST_SERIES]
        yield RunRequest(
            run_key=f"audit {number}",
            run_config={"ops": {OP: {"config": {"series": some}}}},
            tags={cadence.PRIORITY: cadence.LAST},
        )
