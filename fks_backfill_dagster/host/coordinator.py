"""The run queue: Dagster's own, plus a tag with the asset class on the runs of backfills.

Dagster limits concurrent runs by tag, and the runs of a backfill only have the backfill's id. With the tag,
dagster.yaml allows two backfill runs per asset class, however the backfill was launched: a class whose providers fail
cannot occupy all slots.
"""

from __future__ import annotations

from dagster import DagsterRun, QueuedRunCoordinator
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.storage.tags import BACKFILL_ID_TAG

BACKFILL = "fks/backfill"
"""The tag of a run of a backfill, its value the asset class."""


class AssetClassRunCoordinator(QueuedRunCoordinator):
    """A QueuedRunCoordinator that adds the tag."""

    def submit_run(self, context: SubmitRunContext) -> DagsterRun:
        run = context.dagster_run
        if BACKFILL_ID_TAG in run.tags and BACKFILL not in run.tags:
            self._instance.add_run_tags(run.run_id, {BACKFILL: _asset_classes(context)})
        return super().submit_run(context)


def _asset_classes(context: SubmitRunContext) -> str:
    """The groups of the run's assets; `unknown` if the code location defines none of them."""
    graph = context.workspace.asset_graph
    selected = context.dagster_run.asset_selection or ()
    names = {graph.get(key).group_name for key in selected if graph.has(key)}
    return ",".join(sorted(name for name in names if name)) or "unknown"
