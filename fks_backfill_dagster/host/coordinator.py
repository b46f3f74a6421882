"""The queue of runs: Dagster's own, with a tag that says which asset class a backfill's run is of.

Dagster limits the runs that go side by side by their tags, and the runs of a backfill have nothing but the
backfill's id. With the tag two runs of each asset class find a place (dagster.yaml), whoever launched the
backfill: the runs of a class whose providers fail do not take all.
"""

from __future__ import annotations

from dagster import DagsterRun, QueuedRunCoordinator
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.storage.tags import BACKFILL_ID_TAG

BACKFILL = "fks/backfill"
"""The tag of a run of a backfill; its value the asset class."""


class AssetClassRunCoordinator(QueuedRunCoordinator):
    """The queue."""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        run = context.dagster_run
        if BACKFILL_ID_TAG in run.tags and BACKFILL not in run.tags:
            self._instance.add_run_tags(run.run_id, {BACKFILL: _asset_classes(context)})
        return super().submit_run(context)


def _asset_classes(context: SubmitRunContext) -> str:
    """The groups of the run's assets; `unknown` of none that the code location has."""
    graph = context.workspace.asset_graph
    selected = context.dagster_run.asset_selection or ()
    names = {graph.get(key).group_name for key in selected if graph.has(key)}
    return ",".join(sorted(name for name in names if name)) or "unknown"
