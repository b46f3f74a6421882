"""The assets: one subsettable multi-asset per (asset class, timeframe), materialized by `sync`.

A run may cover many partitions and many series. Each series is synced once over the whole window of
the run (a refresh: from where its last sync ended; a filling: its gaps alone), and then every partition
is judged by itself from the ledger: what succeeded is materialized with its own numbers, and a run in
which something failed ends as failed, which leaves exactly the other partitions failed. A failed
partition is one for which no provider responded; an observation of it records why, and when its gap is
requested again. A candle that is absent although a provider answered is a gap:
the partition is materialized, the completeness check tells.
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
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
from fks_backfill_dagster.orchestration.resources import ALL, opened
from fks_backfill_dagster.orchestration.retrying import is_back, retried
from fks_backfill_dagster.orchestration.run_config import RunKind, asked_range
from fks_backfill_dagster.orchestration.run_log import Lines, Progress, Story
from fks_backfill_dagster.pipeline.freshness import behind
from fks_backfill_dagster.pipeline.plan import Scope, closed_window
from fks_backfill_dagster.pipeline.sync import Context, SyncReport, sync
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.coverage import PartState, listed_at, part_states
from fks_backfill_dagster.store.errors import DatabaseUnavailable, SeriesChanged, StoreError
from fks_backfill_dagster.store.reaches import Reach, reaches

# A run costs seconds before its first request and a partition of it milliseconds, so a run takes years of
# months; more would leave nothing to run side by side. The figures have to differ: Dagster puts assets with
# the same partitions and the same backfill policy into one run, whatever launched the backfill, and a run of
# two asset classes keeps one waiting while the providers of the other fail.
PARTITIONS_PER_RUN = {AssetClass.CRYPTO: 60, AssetClass.STOCKS: 48, AssetClass.FOREX: 36}

# Series synced side by side in a run. One candle of each is mostly waiting, for a provider and for the
# database; the requests in flight have a bound of their own.
SERIES_AT_ONCE = 4

# Of the database, by one series in one run.
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
        TableColumn("provider", "text", "Who brought this candle."),
    ]
)


def build_asset(group: Group, settings: Settings) -> AssetsDefinition:
    """The multi-asset of one group."""
    partitions = partitions_for(group.timeframe, settings.earliest_start)

    @multi_asset(
        name=f"ohlcv_{group.name}",
        specs=[
            _spec(key, series, group, partitions, ended=settings.end_of(series) is not None)
            for key, series in group.series.items()
        ],
        partitions_def=partitions,
        backfill_policy=BackfillPolicy.multi_run(PARTITIONS_PER_RUN[group.asset_class]),
        required_resource_keys=set(ALL),
        can_subset=True,
        pool=group.asset_class.value,
    )
    def ohlcv(context: AssetExecutionContext) -> Iterator[MaterializeResult[Any]]:
        yield from _materialize(context, group, settings, partitions)

    return ohlcv


def _spec(
    key: AssetKey,
    series: Series,
    group: Group,
    partitions: TimeWindowPartitionsDefinition,
    *,
    ended: bool,
) -> AssetSpec:
    """An asset. Nobody looks after a symbol once it has ended, so it cannot become stale."""
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
    """What became of every partition of one series in one run.

    `failed` are the keys of those for which no provider responded. `first_provider` is the first of the
    series' priority, None where it is empty.
    """

    series: Series
    report: SyncReport
    parts: Mapping[str, PartState]
    failed: tuple[str, ...]
    first_provider: str | None = None

    def metadata(self, partition: str) -> dict[str, Any]:
        """The partition's own numbers; requests and speed belong to the run, and are in its log."""
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
            "quiet": part.quiet,
            "coverage": part.rounded_coverage,
            "providers": MetadataValue.json(dict(part.providers)),
            "from_fallback": part.from_fallback(self.first_provider),
            **{name: value for name, value in values.items() if value is not None},
        }

    @property
    def reason(self) -> str:
        """Why partitions failed, as the providers returned it."""
        return "; ".join(self.report.errors[:3]) or "no provider responded"

    def observation(self, key: AssetKey, partition: str) -> AssetObservation:
        """Why a failed partition failed, for its page: a failed one has no materialization to hold it."""
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
    """Ten significant digits: more are noise of the summation."""
    return float(f"{value:.10g}")


def _materialize(
    context: AssetExecutionContext,
    group: Group,
    settings: Settings,
    partitions: TimeWindowPartitionsDefinition,
) -> Iterator[MaterializeResult[Any]]:
    """Materializes the selected series over the partitions of the run, a few at a time."""
    windows = windows_of(partitions, context.partition_keys)
    selected = {key: one for key, one in group.series.items() if key in context.selected_asset_keys}
    lines = Lines()
    progress = Progress(len(selected), lines)
    failed: list[Outcome] = []
    refresh = RunKind.of(context.run.tags) is RunKind.REFRESH
    with opened(context.resources, settings, lines.warn) as work:
        try:
            with retried(context):
                for key, outcome in _outcomes(context, work, selected, windows, settings, lines):
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
        except StoreError as error:  # the database is gone or full: the next series would meet the same
            raise Failure(description=str(error), allow_retries=False) from error
        finally:
            progress.end()
            lines.write(context.log)
    if failed:
        raise _failure(failed, len(selected))


def _outcomes(
    context: AssetExecutionContext,
    work: Context,
    selected: Mapping[AssetKey, Series],
    windows: Mapping[str, TimeRange],
    settings: Settings,
    lines: Lines,
) -> Iterator[tuple[AssetKey, Outcome]]:
    """The outcome of every series as it ends. What the threads tell is logged here: Dagster is not theirs."""
    run_kind = RunKind.of(context.run.tags)
    known = reaches(work.database, list(selected.values())) if run_kind is RunKind.REFRESH else {}
    detailed = len(selected) <= SERIES_AT_ONCE
    pool = ThreadPoolExecutor(SERIES_AT_ONCE, thread_name_prefix="series")
    waiting: dict[Future[Outcome], AssetKey] = {}
    try:
        for key, series in selected.items():
            task = Task(series, windows, settings, context.run.run_id, run_kind, known.get(series))
            waiting[pool.submit(materialize_lasting, work, task, lines, detailed)] = key
        while waiting:
            done, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            lines.write(context.log)
            for future in done:
                yield waiting.pop(future), future.result()
    finally:
        # After an interruption nobody waits for a series in the middle of a retry.
        pool.shutdown(wait=not waiting, cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Task:
    """One series of a run. `windows` follow each other; `reach` matters for a refresh only."""

    series: Series
    windows: Mapping[str, TimeRange]
    settings: Settings
    run_id: str
    run_kind: RunKind = RunKind.BACKFILL
    reach: Reach | None = None

    @property
    def window(self) -> TimeRange:
        """The partitions of the run, from where the series is kept to where it ends."""
        start, end = min(w.start for w in self.windows.values()), max(w.end for w in self.windows.values())
        return self.settings.kept(self.series, TimeRange(start, end))

    def asked(self, now: int) -> TimeRange:
        """What is synced."""
        if self.run_kind is not RunKind.REFRESH:
            return self.window
        asked = asked_range(self.series, self.reach, self.settings, now)
        return self.window.intersect(asked)


def materialize_lasting(work: Context, task: Task, lines: Lines, detailed: bool) -> Outcome:
    """`materialize_series`, from its beginning again when it loses the database: only what is missing is requested."""
    for losses in count(1):
        try:
            return materialize_series(work, task, Story(lines, detailed))
        except DatabaseUnavailable as error:
            if losses > MOST_LOSSES or not is_back(work.database):
                raise
            lines.warn(f"the database was away, what is missing is fetched again: {error}", str(task.series))
    raise AssertionError


def materialize_series(work: Context, task: Task, story: Story) -> Outcome:
    """Syncs the series, and judges each partition of the run."""
    series, now, grid = task.series, work.clock(), grid_of(task.series)
    priority = task.settings.priority(series)
    first_provider = next(iter(priority), None)
    asked = closed_window(task.asked(now), grid, now, None)
    if grid.count(asked):
        try:
            report = sync(
                work,
                series,
                asked,
                priority,
                scope=Scope.GAPS if task.run_kind is RunKind.FILL else Scope.MISSING,
                # A person who asks for a partition means its gaps, however lately nobody had them.
                recheck=task.run_kind is RunKind.BACKFILL,
                run_id=task.run_id,
                listen=story,
            )
        except SeriesChanged as error:  # nothing was asked; the other series of the run go on
            report = SyncReport(series, asked, errors=(str(error),))
            return Outcome(series, report, dict.fromkeys(task.windows, PartState()), tuple(task.windows))
    else:  # known without asking anybody
        report = SyncReport(series, asked)
    story.end(report)
    possible = _possible(work, task, report, now)
    if not grid.count(possible):
        return Outcome(series, report, dict.fromkeys(task.windows, PartState()), ())
    parts = part_states(
        work.database, series, {key: part.intersect(possible) for key, part in task.windows.items()}
    )
    unanswered = story.failed_windows
    if report.failed_batches > len(unanswered):  # there was nobody to ask, and so no event of a batch
        unanswered = [report.window]
    failed = tuple(
        key
        for key, part in task.windows.items()
        if parts[key].missing and any(part.intersect(lost) for lost in unanswered)
    )
    return Outcome(series, report, parts, failed, first_provider)


def _possible(work: Context, task: Task, report: SyncReport, now: int) -> TimeRange:
    """Where candles of the run's partitions can exist; a sync of all of it has found that out."""
    if task.run_kind is not RunKind.REFRESH:
        return report.window
    listed = listed_at(work.database, task.series, task.settings.priority(task.series))
    return closed_window(task.window, grid_of(task.series), now, listed)


def _is_stalled(work: Context, outcome: Outcome) -> bool:
    """Whether a refresh stored nothing although candles were due. Then nothing of the series shows as
    materialized, so that its freshness policy ages: as materialized it would look fresh for ever."""
    report = outcome.report
    if report.total_candles:
        return False
    lag = behind(work.database, outcome.series, report.window.end, work.closed)
    return bool(report.missing if lag is None else lag)


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
