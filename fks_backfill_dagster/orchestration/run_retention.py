"""Keeping Dagster's own tables bounded: runs are forgotten when later ones have made them obsolete.

Dagster keeps every event for ever. What it shows of a partition comes from the newest materialization
and the newest plan of it, and what it shows of a check from the newest evaluation. So a run is obsolete
when it ended longer than `automation.keep_runs_days` ago and holds none of those. How many events that
leaves: docs/dagster.md.

Does not belong here: candles and their lineage, which are kept for ever.
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

from datetime import UTC, datetime, timedelta

from dagster import DagsterInstance, JobDefinition, OpExecutionContext, in_process_executor, job, op

from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.dagster_schema import (
    DAGSTER_SCHEMA,
    event_count,
    forget_strays,
    obsolete_runs,
)
from fks_backfill_dagster.store.database import Database

HOUSEKEEPING = "housekeeping"


def build_housekeeping(settings: Settings) -> JobDefinition:
    """The job; it works where Dagster's storage is the database of the settings."""

    @op(name="forget_obsolete_runs", required_resource_keys={DATABASE})
    def forget(context: OpExecutionContext) -> None:
        database = getattr(context.resources, DATABASE).database
        before = datetime.now(UTC) - timedelta(days=settings.automation.keep_runs_days)
        forgotten = forget_before(context.instance, database, before)
        left = event_count(database, DAGSTER_SCHEMA)
        context.log.info(f"{forgotten:,} runs are forgotten, {left:,} events are left")

    @job(name=HOUSEKEEPING, executor_def=in_process_executor, description=__doc__)
    def housekeeping() -> None:
        forget()

    return housekeeping


def forget_before(instance: DagsterInstance, database: Database, before: datetime) -> int:
    """Forgets the obsolete runs that ended before that moment; their number."""
    runs = obsolete_runs(database, DAGSTER_SCHEMA, before)
    for run in runs:
        instance.delete_run(run)
    forget_strays(database, DAGSTER_SCHEMA)
    return len(runs)
