"""The assets: one subsettable multi-asset per (asset class, timeframe), materialized by `sync`.

A run may cover many partitions and many series. Each series is synced once over the whole window of
the run (a refresh: from the end of its last sync; a gap-filling run: its gaps only). Then each partition is
evaluated from the ledger. Successful partitions are materialized with their own numbers; if any failed, the
run ends as failed, so that Dagster shows exactly the other partitions as failed. A partition fails if no
provider responded for it; an observation records the reason and the next attempt. A candle that is missing
from a provider's response is a gap: the partition is materialized, and the completeness check reports it.
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

from dagster import (
    AssetExecutionContext,
    AssetKey,
    AssetMaterialization,
    AssetObservation,
    AssetsDefinition,
    AssetSpec,
    BackfillPolicy,
    Failure,
    MaterializeResult,
    MetadataValue,
    TableColumn,
    TableSchema,
    TimeWindowPartitionsDefinition,
    multi_asset,
)

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series, identifier
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.checks import evaluate_after_failure, evaluate_after_refresh
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.partitions import partitions_for, windows_of
from fks_backfill_dagster.orchestration.refresh import requested_range
from fks_backfill_dagster.orchestration.resources import ALL, opened
from fks_backfill_dagster.orchestration.retrying import retried, wait_until_available
from fks_backfill_dagster.orchestration.run_config import SyncConfig, SyncMode, SyncOptions, options_of
from fks_backfill_dagster.orchestration.run_log import Lines, Progress, SyncLogger
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.freshness import behind
from fks_backfill_dagster.pipeline.plan import closed_window
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.coverage import PartState, listed_at, part_states
from fks_backfill_dagster.store.errors import DatabaseUnavailable, SeriesChanged, StoreError
from fks_backfill_dagster.store.reaches import Reach, reaches

# A run costs seconds before its first request, a partition milliseconds, so a run takes years of monthly
# partitions; larger runs would leave too few of them to run in parallel. The figures must differ: Dagster puts
# assets with the same partitions and backfill policy into one run, and a run of two asset classes delays one
# while the providers of the other fail.
PARTITIONS_PER_RUN = {AssetClass.CRYPTO: 60, AssetClass.STOCKS: 48, AssetClass.FOREX: 36}

# Series synced in parallel in a run. A small sync mostly waits for a provider and for the database; requests
# in flight are limited separately.
SERIES_AT_ONCE = 4

# How often one series of a run may lose the database before the run fails.
MOST_LOSSES = 5

OWNER = "team:market-data"
TABLE = "fks.ohlcv"

_COLUMNS = TableSchema(
    [
        TableColumn("symbol", "text"),
        TableColumn("timeframe", "text"),
        TableColumn("ts", "timestamptz", "The candle's open, UTC."),
        TableColumn("open", "float8"),
        TableColumn("high", "float8"),
        TableColumn("low", "float8"),
        TableColumn("close", "float8"),
        TableColumn("volume", "float8", "Base units; NULL where the provider has none."),
        TableColumn("provider", "text", "The provider that delivered the candle."),
    ]
)


def build_asset(group: Group, settings: Settings, catalog: Catalog) -> AssetsDefinition:
    """The multi-asset of one group."""
    partitions = partitions_for(group.timeframe, catalog.earliest_start)

    @multi_asset(
        name=group.op_name,
        specs=[
            _spec(key, series, group, partitions, ended=catalog.end_of(series) is not None)
            for key, series in group.series.items()
        ],
        partitions_def=partitions,
        backfill_policy=BackfillPolicy.multi_run(PARTITIONS_PER_RUN[group.asset_class]),
        required_resource_keys=set(ALL),
        can_subset=True,
        pool=group.asset_class.value,
    )
    def ohlcv(context: AssetExecutionContext, config: SyncConfig) -> Iterator[MaterializeResult[Any]]:
        options = options_of(context.run, group.op_name, config, settings)
        yield from _materialize(context, group, settings, catalog, partitions, options)

    return ohlcv


def _spec(
    key: AssetKey,
    series: Series,
    group: Group,
    partitions: TimeWindowPartitionsDefinition,
    *,
    ended: bool,
) -> AssetSpec:
    """An asset. A symbol that has ended is not refreshed, so it has no freshness policy."""
    return AssetSpec(
        key,
        description=f"{series.symbol}: {series.timeframe} candles, rows of {TABLE}.",
        metadata={
            "symbol": series.symbol,
            "timeframe": series.timeframe.value,
            "dagster/table_name": TABLE,
            "dagster/column_schema": _COLUMNS,
        },
        group_name=group.asset_class.value,
        kinds={"timescaledb"},
        owners=[OWNER],
        tags={"symbol": identifier(series.symbol), "timeframe": series.timeframe.value},
        freshness_policy=None if ended else cadence.freshness(group.asset_class, group.timeframe),
        partitions_def=partitions,
        skippable=True,
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one series in one run, by partition.

    `failed`: keys of partitions for which no provider responded. `first_provider`: the first provider of the
    series' priority, None if the priority is empty.
    """

    series: Series
    report: SyncReport
    parts: Mapping[str, PartState]
    failed: tuple[str, ...]
    first_provider: str | None = None

    def metadata(self, partition: str) -> dict[str, Any]:
        """Numbers of the partition; requests and speed are per run and in its log."""
        part = self.parts[partition]
        values = {
            "first": None if part.first is None else iso(part.first),
            "last": None if part.last is None else iso(part.last),
            "close_last": part.close_last,
            "volume_sum": None if part.volume_sum is None else rounded(part.volume_sum),
        }
        return {
            "expected": part.expected,
            "stored": part.stored,
            "missing": part.missing,
            "explained": part.missing - part.unexplained,
            "no_trade": part.no_trade,
            "coverage": part.rounded_coverage,
            "providers": MetadataValue.json(dict(part.providers)),
            "from_fallback": part.from_fallback(self.first_provider),
            **{name: value for name, value in values.items() if value is not None},
        }

    @property
    def reason(self) -> str:
        """The providers' errors, which made the partitions fail."""
        return "; ".join(self.report.errors[:3]) or "no provider responded"

    def observation(self, key: AssetKey, partition: str) -> AssetObservation:
        """The reason of a failed partition, for its page: without a materialization there is no other place for it."""
        part = self.parts[partition]
        attempt = None if part.next_attempt is None else iso(part.next_attempt)
        missing = f"{part.missing:,} of {part.expected:,} candles are missing. " if part.expected else ""
        when = f"Next attempt: {attempt}." if attempt else "No attempt is scheduled: materialize it again."
        return AssetObservation(
            key,
            partition=partition,
            description=f"{self.reason}. {missing}{when}",
            metadata={
                "reason": self.reason,
                "missing": part.missing,
                "expected": part.expected,
                "next_attempt": attempt or "none scheduled",
            },
        )

    def summary(self) -> str:
        names = ", ".join(self.failed[:12]) + (", ..." if len(self.failed) > 12 else "")
        return f"{self.series}: {len(self.failed)} of {len(self.parts)} partitions ({names}): {self.reason}"


def rounded(value: float) -> float:
    """Rounds to ten significant digits: more are summation noise."""
    return float(f"{value:.10g}")


def _materialize(
    context: AssetExecutionContext,
    group: Group,
    settings: Settings,
    catalog: Catalog,
    partitions: TimeWindowPartitionsDefinition,
    options: SyncOptions,
) -> Iterator[MaterializeResult[Any]]:
    """Materializes the selected series over the partitions of the run, SERIES_AT_ONCE at a time."""
    windows = windows_of(partitions, context.partition_keys)
    selected = {key: one for key, one in group.series.items() if key in context.selected_asset_keys}
    lines = Lines()
    progress = Progress(len(selected), lines)
    failed: list[Outcome] = []
    refresh = options.mode is SyncMode.REFRESH
    with opened(context.resources, settings, lines.warn) as work:
        try:
            with retried(context):
                for key, outcome in _outcomes(context, work, selected, windows, catalog, lines, options):
                    progress.add(outcome.report)
                    stalled = refresh and _is_stalled(work, outcome)
                    if outcome.failed:
                        failed.append(outcome)
                        if not stalled:
                            _log_succeeded(context, key, outcome)
                        for partition in outcome.failed:
                            context.log_event(outcome.observation(key, partition))
                    if outcome.failed or stalled:
                        continue
                    for partition in windows:
                        context.add_asset_metadata(outcome.metadata(partition), key, partition)
                    yield MaterializeResult(asset_key=key)
                if refresh:
                    evaluate_after_refresh(context, work.database, group, settings, set(selected))
                if failed:
                    evaluate_after_failure(context, work.database, group, settings, set(selected))
        except StoreError as error:  # unreachable or full: the other series would fail the same way
            raise Failure(description=str(error), allow_retries=False) from error
        finally:
            progress.end()
            lines.write(context.log)
    if failed:
        raise _failure(failed, len(selected), options.mode)


def _outcomes(
    context: AssetExecutionContext,
    work: Context,
    selected: Mapping[AssetKey, Series],
    windows: Mapping[str, TimeRange],
    catalog: Catalog,
    lines: Lines,
    options: SyncOptions,
) -> Iterator[tuple[AssetKey, Outcome]]:
    """The outcome of each series as it completes. Log lines of the threads are written here, in the op's thread."""
    known = reaches(work.database, list(selected.values())) if options.mode is SyncMode.REFRESH else {}
    detailed = len(selected) <= SERIES_AT_ONCE
    pool = ThreadPoolExecutor(SERIES_AT_ONCE, thread_name_prefix="series")
    waiting: dict[Future[Outcome], AssetKey] = {}
    try:
        for key, series in selected.items():
            task = Task(series, windows, catalog, context.run.run_id, options, known.get(series))
            waiting[pool.submit(materialize_with_retries, work, task, lines, detailed)] = key
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            lines.write(context.log)
            for future in done:
                yield waiting.pop(future), future.result()
    finally:
        # After an interruption: do not wait for a series in the middle of a retry.
        pool.shutdown(wait=not waiting, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Task:
    """One series of a run. `windows` are contiguous; `reach` is used by a refresh only."""

    series: Series
    windows: Mapping[str, TimeRange]
    catalog: Catalog
    run_id: str
    options: SyncOptions = field(default_factory=SyncOptions)
    reach: Reach | None = None

    @property
    def window(self) -> TimeRange:
        """The range of the run's partitions, limited to the series' start and end."""
        start, end = min(w.start for w in self.windows.values()), max(w.end for w in self.windows.values())
        return self.catalog.kept(self.series, TimeRange(start, end))

    def requested(self, now: int) -> TimeRange:
        """The range to sync."""
        if self.options.mode is not SyncMode.REFRESH:
            return self.window
        return self.window.intersect(requested_range(self.series, self.reach, self.catalog, now))


def materialize_with_retries(work: Context, task: Task, lines: Lines, detailed: bool) -> Outcome:
    """`materialize_series`, repeated when it loses the database: only missing candles are requested again."""
    for losses in count(1):
        try:
            return materialize_series(work, task, SyncLogger(lines, detailed))
        except DatabaseUnavailable as error:
            if losses > MOST_LOSSES or not wait_until_available(work.database):
                raise
            lines.warn(f"lost the database; missing candles are fetched again: {error}", str(task.series))
    raise AssertionError


def materialize_series(work: Context, task: Task, logger: SyncLogger) -> Outcome:
    """Syncs the series and evaluates each partition of the run."""
    series, now, grid = task.series, work.clock(), grid_of(task.series)
    priority = task.catalog.priority(series)
    first_provider = next(iter(priority), None)
    requested = closed_window(task.requested(now), grid, now, None)
    if grid.count(requested):
        try:
            report = sync(
                work,
                series,
                requested,
                task.options.providers or priority,
                scope=task.options.mode.scope,
                recheck=task.options.mode.rechecks,
                run_id=task.run_id,
                listen=logger,
            )
        except SeriesChanged as error:  # raised before any request; the other series of the run continue
            report = SyncReport(series, requested, errors=(str(error),))
            return Outcome(series, report, dict.fromkeys(task.windows, PartState()), tuple(task.windows))
    else:  # no candle is expected: no request
        report = SyncReport(series, requested)
    logger.end(report)
    possible = _possible(work, task, report, now)
    if not grid.count(possible):
        return Outcome(series, report, dict.fromkeys(task.windows, PartState()), ())
    parts = part_states(
        work.database, series, {key: part.intersect(possible) for key, part in task.windows.items()}
    )
    unanswered = logger.failed_windows
    if report.failed_batches > len(unanswered):  # no eligible provider, so no batch events
        unanswered = [report.window]
    failed = tuple(
        key
        for key, part in task.windows.items()
        if (parts[key].missing or task.options.mode is SyncMode.REFETCH)
        and any(part.intersect(lost) for lost in unanswered)
    )
    return Outcome(series, report, parts, failed, first_provider)


def _possible(work: Context, task: Task, report: SyncReport, now: int) -> TimeRange:
    """The part of the run's partitions in which candles can exist; a sync of all of them has determined it."""
    if task.options.mode is not SyncMode.REFRESH:
        return report.window
    listed = listed_at(work.database, task.series, task.catalog.priority(task.series))
    return closed_window(task.window, grid_of(task.series), now, listed)


def _is_stalled(work: Context, outcome: Outcome) -> bool:
    """Whether a refresh stored nothing although candles were due. The series is then not materialized, so that
    its freshness policy turns stale; a materialization would keep it fresh."""
    report = outcome.report
    if report.total_candles:
        return False
    lag = behind(work.database, outcome.series, report.window.end, work.closed)
    return bool(report.missing if lag is None else lag)


def _log_succeeded(context: AssetExecutionContext, key: AssetKey, outcome: Outcome) -> None:
    """Logs materializations of the successful partitions; Dagster shows the others as failed with the run."""
    for partition in (key for key in outcome.parts if key not in outcome.failed):
        context.log_event(
            AssetMaterialization(key, partition=partition, metadata=outcome.metadata(partition))
        )


def _failure(failed: Sequence[Outcome], selected: int, mode: SyncMode) -> Failure:
    """The failure with its reasons. Without a run retry: the clients have retried, the gap sensor does the rest."""
    text = "\n".join(outcome.summary() for outcome in failed)
    again = "Materialize the failed partitions again: only missing candles are requested."
    if mode is SyncMode.REFETCH:
        again = "Launch the failed partitions again with `mode: refetch`."
    return Failure(
        description=f"{len(failed)} of {selected} series could not be fetched completely:\n{text}\n"
        f"Everything else is stored. {again}",
        metadata={
            "failed": MetadataValue.json({str(o.series): cast(Any, list(o.failed)) for o in failed}),
        },
        allow_retries=False,
    )
