"""Retention of Dagster's own tables: deletes runs that later ones have made obsolete.

Dagster keeps every event permanently. Its view of a partition uses the newest materialization and the newest
planned one, its view of a check the newest evaluation. A run is obsolete when it ended more than
`automation.keep_runs_days` ago and holds none of those. Number of remaining events: docs/dagster.md.

Does not belong here: candles and their lineage, which are kept permanently.
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

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
    """The job; it requires Dagster's storage to be in the database of the settings."""

    @op(name="forget_obsolete_runs", required_resource_keys={DATABASE})
    def delete(context: OpExecutionContext) -> None:
        database = getattr(context.resources, DATABASE).database
        before = datetime.now(UTC) - timedelta(days=settings.automation.keep_runs_days)
        deleted = delete_runs_before(context.instance, database, before)
        left = event_count(database, DAGSTER_SCHEMA)
        context.log.info(f"deleted {deleted:,} runs; {left:,} events remain")

    @job(name=HOUSEKEEPING, executor_def=in_process_executor, description=__doc__)
    def housekeeping() -> None:
        delete()

    return housekeeping


def delete_runs_before(instance: DagsterInstance, database: Database, before: datetime) -> int:
    """Deletes the obsolete runs that ended before `before`; returns their number."""
    runs = obsolete_runs(database, DAGSTER_SCHEMA, before)
    for run in runs:
        instance.delete_run(run)
    forget_strays(database, DAGSTER_SCHEMA)
    return len(runs)
