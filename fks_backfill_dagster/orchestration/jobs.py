"""The jobs: one per partition grain, because a run cannot mix them, and one for all checks.

Backfills need none of these: they run in Dagster's own asset job.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from dagster import AssetSelection
from dagster import define_asset_job as define
from dagster._core.definitions.unresolved_asset_job_definition import UnresolvedAssetJobDefinition

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.groups import Group

CHECKS = "ohlcv_checks"

_SERIES = {Grain.MONTH: "below 1h, by month", Grain.YEAR: "from 1h up, by year"}


def job_name(timeframe: Timeframe) -> str:
    """The job that materializes series of this timeframe."""
    return f"ohlcv_{Grain.of(timeframe)}s"


def build_jobs(groups: Sequence[Group]) -> list[UnresolvedAssetJobDefinition]:
    """The jobs that materialize series, one per grain in use."""
    # The policies of asset classes differ on purpose (`assets`); without the filter each load would warn.
    warnings.filterwarnings("ignore", r"Asset job \w+ materializes assets with varying BackfillPolicies")
    jobs = []
    for grain, text in _SERIES.items():
        mine = [group for group in groups if Grain.of(group.timeframe) is grain]
        if mine:
            selection = AssetSelection.assets(*(key for group in mine for key in group.series))
            name = job_name(mine[0].timeframe)
            jobs.append(define(name, selection, description=f"Materializes the series {text}."))
    return jobs


def build_check_jobs(groups: Sequence[Group]) -> list[UnresolvedAssetJobDefinition]:
    """The job of all checks, if there is any series."""
    if not groups:
        return []
    checks = AssetSelection.all_asset_checks()
    return [define(CHECKS, checks, description="All checks of all series. Fetches nothing.")]
