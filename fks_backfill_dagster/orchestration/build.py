"""Builds the Dagster definitions from the settings."""

from __future__ import annotations

from collections.abc import Mapping

from dagster import Definitions, in_process_executor

from fks_backfill_dagster.orchestration.assets import build_asset
from fks_backfill_dagster.orchestration.audit import build_audit, build_audit_schedule
from fks_backfill_dagster.orchestration.before_start import build_before_start_sensors
from fks_backfill_dagster.orchestration.checks import build_checks
from fks_backfill_dagster.orchestration.gap_sensor import build_sensors
from fks_backfill_dagster.orchestration.groups import groups_of
from fks_backfill_dagster.orchestration.jobs import build_check_jobs, build_jobs
from fks_backfill_dagster.orchestration.outage_sensor import build_outage_sensors
from fks_backfill_dagster.orchestration.resources import default_resources, fixed
from fks_backfill_dagster.orchestration.run_retention import build_housekeeping
from fks_backfill_dagster.orchestration.schedules import build_schedules
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings


def build_defs(
    *, settings: Settings | None = None, resource_overrides: Mapping[str, object] | None = None
) -> Definitions:
    """The definitions for `settings`; None: loaded from the settings file and the environment.

    `resource_overrides` replaces resources by name (`timescaledb`, `binance`, ...), for tests and other
    deployments. The configuration of a run cannot replace any. Raises SettingsError, which lists every problem.
    """
    settings = load_settings() if settings is None else settings
    resources = {**default_resources(settings), **(resource_overrides or {})}
    catalog = Catalog(settings)
    groups = groups_of(catalog)
    jobs = build_jobs(groups)
    return Definitions(
        assets=[build_asset(group, settings, catalog) for group in groups],
        asset_checks=[build_checks(group, settings) for group in groups],
        jobs=[*jobs, *build_check_jobs(groups), build_housekeeping(settings), build_audit(catalog)],
        schedules=[*build_schedules(groups, settings, catalog), build_audit_schedule(settings, catalog)],
        sensors=[
            *build_sensors(groups, jobs, settings, catalog),
            *build_outage_sensors(groups, settings, catalog),
            *build_before_start_sensors(groups, catalog),
        ],
        resources={name: fixed(resource) for name, resource in resources.items()},
        # A run is one op with its own threads. With a process per step it takes 7 s to start, in this
        # process 0.9 s.
        executor=in_process_executor,
    )
