"""The assets: one subsettable multi-asset per (asset class, timeframe), materialized by `sync`.

A run may cover many partitions and many series. Each series is synced once over the whole window of
the run, and then every partition is judged by itself from the ledger: what succeeded is materialized
with its own numbers, and a run in which something failed ends as failed, which leaves exactly the
other partitions failed. A failed partition is one that nobody answered for. A candle that is absent
although a provider answered is a gap: the partition is materialized, the completeness check tells.
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dagster import (
    AssetExecutionContext,
    AssetKey,
    AssetMaterialization,
    AssetsDefinition,
    AssetSpec,
    BackfillPolicy,
    Failure,
    MaterializeResult,
    MetadataValue,
    TimeWindowPartitionsDefinition,
    multi_asset,
)

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.partitions import partitions_for, windows_of
from fks_backfill_dagster.orchestration.resources import ALL, opened
from fks_backfill_dagster.orchestration.story import Story
from fks_backfill_dagster.pipeline.plan import closed_window
from fks_backfill_dagster.pipeline.sync import Context, SyncReport, sync
from fks_backfill_dagster.settings import Settings
from fks_backfill_dagster.store.checking import PartState, part_states
from fks_backfill_dagster.store.errors import StoreError

# A run costs seconds before its first request and a partition of it milliseconds, so a run takes five
# years of months. More would leave nothing to run side by side.
PARTITIONS_PER_RUN = 60


def build_asset(group: Group, settings: Settings) -> AssetsDefinition:
    """The multi-asset of one group."""
    partitions = partitions_for(group.timeframe, settings.history_start)

    @multi_asset(
        name=f"ohlcv_{group.name}",
        specs=[_spec(key, series, group, partitions) for key, series in group.series.items()],
        partitions_def=partitions,
        backfill_policy=BackfillPolicy.multi_run(PARTITIONS_PER_RUN),
        required_resource_keys=set(ALL),
        can_subset=True,
    )
    def ohlcv(context: AssetExecutionContext) -> Iterator[MaterializeResult[Any]]:
        yield from _materialize(context, group, settings, partitions)

    return ohlcv


def _spec(
    key: AssetKey, series: Series, group: Group, partitions: TimeWindowPartitionsDefinition
) -> AssetSpec:
    return AssetSpec(
        key,
        description=f"{series.symbol}: {series.timeframe} candles, rows of fks.ohlcv.",
        metadata={"symbol": series.symbol, "timeframe": series.timeframe.value},
        group_name=group.asset_class.value,
        kinds={"timescaledb"},
        partitions_def=partitions,
        skippable=True,
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of every partition of one series in one run.

    `failed` are the keys of those that nobody answered for.
    """

    series: Series
    report: SyncReport
    parts: Mapping[str, PartState]
    failed: tuple[str, ...]

    def metadata(self, partition: str) -> dict[str, Any]:
        """The partition's own numbers; `requests` and `candles_per_second` are those of the whole sync."""
        part, report = self.parts[partition], self.report
        return {
            "expected": part.expected,
            "stored": part.stored,
            "missing": part.missing,
            "coverage": part.coverage,
            "providers": MetadataValue.json(dict(part.providers)),
            "requests": report.requests,
            "candles_per_second": round(report.total_candles / report.seconds) if report.seconds else 0,
        }

    def summary(self) -> str:
        names = ", ".join(self.failed[:12]) + (", ..." if len(self.failed) > 12 else "")
        reasons = "; ".join(self.report.errors[:3]) or "nobody answered"
        return f"{self.series}: {len(self.failed)} of {len(self.parts)} partitions ({names}): {reasons}"


def _materialize(
    context: AssetExecutionContext,
    group: Group,
    settings: Settings,
    partitions: TimeWindowPartitionsDefinition,
) -> Iterator[MaterializeResult[Any]]:
    """Materializes the selected series over the partitions of the run, one after the other."""
    windows = windows_of(partitions, context.partition_keys)
    failed: list[Outcome] = []
    selected = [key for key in group.series if key in context.selected_asset_keys]
    with opened(context.resources, settings) as work:
        for key in selected:
            try:
                outcome = materialize_series(context, work, group.series[key], windows, settings)
            except StoreError as error:  # the database is gone or full: the next series would meet the same
                raise Failure(description=str(error), allow_retries=False) from error
            if outcome.failed:
                failed.append(outcome)
                _log_succeeded(context, key, outcome)
                continue
            for partition in windows:
                context.add_asset_metadata(outcome.metadata(partition), key, partition)
            yield MaterializeResult(asset_key=key)
    if failed:
        raise _failure(failed, len(selected))


def materialize_series(
    context: AssetExecutionContext,
    work: Context,
    series: Series,
    windows: Mapping[str, TimeRange],
    settings: Settings,
) -> Outcome:
    """Syncs the series over `windows`, which follow each other, and judges each of them."""
    hull = TimeRange(min(w.start for w in windows.values()), max(w.end for w in windows.values()))
    start = min(max(hull.start, settings.start_of(series)), hull.end)
    window = TimeRange(start, hull.end)
    grid = grid_of(series)
    if not grid.count(closed_window(window, grid, work.clock(), None)):  # known without asking anybody
        context.log.info(f"{series}: nothing is expected in {window}")
        return Outcome(series, SyncReport(series, window), dict.fromkeys(windows, PartState()), ())
    story = Story(context.log.info, context.log.warning)
    report = sync(work, series, window, settings.priority(series), run_id=context.run.run_id, listen=story)
    story.end(report)
    parts = part_states(
        work.database, series, {key: part.intersect(report.window) for key, part in windows.items()}
    )
    unanswered = story.failed_windows
    if report.failed_batches > len(unanswered):  # there was nobody to ask, and so no event of a batch
        unanswered = [report.window]
    failed = tuple(
        key
        for key, part in windows.items()
        if parts[key].unexplained and any(part.intersect(lost) for lost in unanswered)
    )
    return Outcome(series, report, parts, failed)


def _log_succeeded(context: AssetExecutionContext, key: AssetKey, outcome: Outcome) -> None:
    """Shows the partitions that succeeded as materialized; those left out show as failed with the run."""
    for partition in (key for key in outcome.parts if key not in outcome.failed):
        context.log_event(
            AssetMaterialization(key, partition=partition, metadata=outcome.metadata(partition))
        )


def _failure(failed: Sequence[Outcome], selected: int) -> Failure:
    """What and why. Not retried as a crash: the clients have retried, the rest is the gaps' business."""
    text = "\n".join(outcome.summary() for outcome in failed)
    return Failure(
        description=f"{len(failed)} of {selected} series could not be fetched as a whole:\n{text}\n"
        "Everything else is stored. Materialize the failed partitions again: only what is missing is asked for.",
        metadata={
            "failed": MetadataValue.json({str(o.series): cast(Any, list(o.failed)) for o in failed}),
        },
        allow_retries=False,
    )
