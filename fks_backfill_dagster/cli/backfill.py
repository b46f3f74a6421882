"""`fks-backfill backfill`: a sync without Dagster."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    check_providers,
    check_window,
    choose,
    series_arguments,
    warn_of_typos,
    window_option,
)
from fks_backfill_dagster.cli.output import (
    answer,
    answer_json,
    answer_table,
    example,
    json_option,
    last_words,
    many,
    tell,
)
from fks_backfill_dagster.cli.signals import signals

if TYPE_CHECKING:
    from fks_backfill_dagster.app import App
    from fks_backfill_dagster.documents import Document
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.events import SyncEvent
    from fks_backfill_dagster.pipeline.plan import Scope
    from fks_backfill_dagster.pipeline.sync import DryRun, SyncReport
    from fks_backfill_dagster.settings.model import Settings

_INTERRUPTED = (
    "Interrupted: what was committed stays, and the same command fetches only what is still missing."
)

# One task of the command: a series, its window, who is asked.
Task = tuple["Series", "TimeRange", tuple[str, ...]]


@click.command(
    epilog=example(
        "backfill BTC/USDT 1h --start 2024-01-01 --end 2024-02-01",
        "backfill --all 1d --json",
        "backfill '*/USDT' 1m --start 2024-01-01 --dry-run",
    )
)
@series_arguments
@window_option
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="P",
    help="Ask this one only; repeat it for more, in order.",
)
@click.option("--refetch", is_flag=True, help="Ask for stored candles as well, and correct what differs.")
@click.option(
    "--force", is_flag=True, help="With --refetch: write also what differs as another symbol's candles would."
)
@click.option(
    "--dry-run", is_flag=True, help="Tell requests, candles and duration per provider; fetch nothing."
)
@json_option
def backfill(
    names: tuple[str, ...],
    everything: bool,
    start: int | None,
    end: int | None,
    providers: tuple[str, ...],
    refetch: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Bring the candles of a range that are not stored yet.

    Without --start from the configured start of the symbol on, without --end up to now. Running it
    again fetches only what is missing. Exit code 0 only if every expected candle that traded is there.
    """
    from fks_backfill_dagster.pipeline.plan import Scope
    from fks_backfill_dagster.settings.load import load_settings

    if force and not refetch:
        raise click.UsageError("--force is for --refetch: nothing else overwrites stored candles.")
    settings = load_settings()
    scope = Scope.EVERYTHING if refetch else Scope.MISSING
    tasks, several = _tasks(settings, names, everything, start, end, providers)
    if dry_run:
        return _dry_run(settings, tasks, several, scope, as_json)
    done = _sync_all(settings, tasks, scope, force, as_json)
    if as_json:
        documents = [document for document, _ in done]
        answer_json(documents if several else documents[0])
    return 0 if all(complete for _, complete in done) else 1


def _tasks(
    settings: Settings,
    names: tuple[str, ...],
    everything: bool,
    start: int | None,
    end: int | None,
    providers: Sequence[str],
) -> tuple[list[Task], bool]:
    from fks_backfill_dagster.app import now

    chosen, asked, present = choose(settings, names, everything), check_providers(settings, providers), now()
    tasks: list[Task] = []
    for series in chosen.series:
        first = settings.start_of(series) if start is None else start
        window = check_window(first, present if end is None else end, present)
        tasks.append((series, _until_its_end(settings, series, window), asked or settings.priority(series)))
    return tasks, chosen.many


def _until_its_end(settings: Settings, series: Series, window: TimeRange) -> TimeRange:
    """The window up to the `end` of a symbol that has one; that nothing is left of it is told."""
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.timeframe import iso

    end = settings.end_of(series)
    if end is None:
        return window
    if end <= window.start:
        tell(
            f"{series}: nothing is expected of it from {iso(end)} on, the end of {series.symbol} in the settings."
        )
    return TimeRange(window.start, max(window.start, min(window.end, end)))


# Doing it ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Seen:
    """What a sync has told so far: all that is known of one that breaks."""

    batches: int = 0
    succeeded: int = 0
    failed: int = 0
    candles: int = 0

    def __call__(self, event: SyncEvent) -> None:
        from fks_backfill_dagster.pipeline.events import BatchDone, Planned

        if isinstance(event, Planned):
            self.batches = len(event.plan.batches)
        elif isinstance(event, BatchDone):
            self.succeeded += event.error is None
            self.failed += event.error is not None
            self.candles += event.candles

    def report(self, series: Series, error: Exception) -> Document:
        from fks_backfill_dagster import documents

        return documents.broken_sync(
            series,
            str(error),
            total_batches=self.batches,
            successful_batches=self.succeeded,
            failed_batches=self.failed,
            candles=self.candles,
        )


def _sync_all(
    settings: Settings, tasks: Sequence[Task], scope: Scope, force: bool, as_json: bool
) -> list[tuple[Document, bool]]:
    """Every task's report as a document, and whether it is complete.

    A series that fails does not stop the others. A database that fails does, as it is the same one
    for all: then those that were not reached are told as failed for that reason.
    """
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.embedded import EmbeddedError
    from fks_backfill_dagster.store.errors import StoreError
    from fks_backfill_dagster.store.queries import stored_series

    done: list[tuple[Document, bool]] = []
    seen, told = _Seen(), set[str]()
    try:
        with open_app(settings, waiting) as app, interruptible(app):
            warn_of_typos(settings, [series for series, _, _ in tasks], stored_series(app.database))
            for task in tasks:
                seen = _Seen()
                done.append(_sync_one(app, task, scope, force, as_json, seen, told))
    except (StoreError, EmbeddedError) as error:
        tell(f"Error: {error}")
        for series, _, _ in tasks[len(done) :]:
            done.append((seen.report(series, error), False))
            seen = _Seen()
    return done


def _sync_one(
    app: App, task: Task, scope: Scope, force: bool, as_json: bool, seen: _Seen, told: set[str]
) -> tuple[Document, bool]:
    """One task's report as a document, and whether it is complete; `told` are the warnings so far."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.cli.progress import watched
    from fks_backfill_dagster.pipeline.sync import SyncReport, sync
    from fks_backfill_dagster.store.errors import SeriesChanged

    series, window, priority = task
    if not window:
        return documents.sync_report(SyncReport(series, window)), True
    try:
        with watched(seen, told) as listen:
            report = sync(
                app.context, series, window, priority, scope=scope, recheck=True, force=force, listen=listen
            )
    except SeriesChanged as error:
        tell(f"Error: {error}")
        return seen.report(series, error), False
    except ValueError as error:  # of its calendar: the other series may have another one
        tell(f"Error: {series}: {error}.")
        return seen.report(series, error), False
    if not as_json:
        _answer(report)
    for message in report.errors:
        tell(f"Error: {series}: {message}")
    if report.missing and report.providers:  # without, nobody could be asked, and the error says why
        left = many(report.missing, "candle")
        again = " Run the same command again to fetch them, and nothing else." if report.errors else ""
        tell(f"{series}: {left} still missing; see `fks-backfill gaps {series}`.{again}")
    return documents.sync_report(report), report.complete


def waiting(sentence: str) -> None:
    tell(f"waiting: {sentence}")


def _answer(report: SyncReport) -> None:
    quiet = f" nothing traded in {report.quiet:,}," if report.quiet else ""
    answer(
        f"{report.series}: {report.stored:,} of {many(report.expected, 'candle')} stored,{quiet}"
        f" {report.total_candles:,} of them by this call"
        f" ({many(report.total_batches, 'batch')}, {many(report.requests, 'request')}, {report.seconds:.1f} s)"
    )
    rows = [
        (f"  {name}", tally.asked, tally.delivered, tally.rejected, tally.failed)
        for name, tally in report.providers.items()
    ]
    answer_table(("  provider", "asked", "delivered", "rejected", "failed"), rows)


@contextmanager
def interruptible(app: App) -> Iterator[None]:
    """A signal ends every wait of a provider at once; a batch that is being committed is rolled back whole."""
    ending = signals()
    with ending.first(app.pool.stop.set):
        try:
            yield
        except (KeyboardInterrupt, Exception):
            if ending.received is None:
                raise
            # Whatever came of it: a statement that is torn off in the middle fails in ways of its own.
            last_words(_INTERRUPTED)
            raise click.exceptions.Exit(ending.exit_code) from None


# Only telling -----------------------------------------------------------------------------------------


def _dry_run(settings: Settings, tasks: Sequence[Task], several: bool, scope: Scope, as_json: bool) -> int:
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.pipeline.sync import dry_run
    from fks_backfill_dagster.store.queries import stored_series

    with open_app(settings, waiting) as app, interruptible(app):
        warn_of_typos(settings, [series for series, _, _ in tasks], stored_series(app.database))
        found = [
            dry_run(app.context, series, window, priority, scope=scope, recheck=True)
            for series, window, priority in tasks
        ]
    told: dict[str, Series] = {}
    for one in found:
        for message in one.warnings:
            if told.setdefault(message, one.plan.series) is one.plan.series:
                tell(f"{one.plan.series}: warning: {message}")
    if as_json:
        shown = [documents.dry_run(one) for one in found]
        answer_json(shown if several else shown[0])
    else:
        _answer_estimates(found)
    return 0


def _answer_estimates(found: Sequence[DryRun]) -> None:
    rows = [
        (
            one.plan.series,
            name,
            estimate.requests,
            sum(batch.candles for batch in one.plan.batches),
            len(one.plan.batches),
            _duration(estimate.seconds),
        )
        for one in found
        for name, estimate in one.estimates
    ]
    answer_table(("series", "provider", "requests", "candles", "batches", "duration"), rows)
    for one in found:
        if not one.plan.batches:
            answer(f"{one.plan.series}: nothing to fetch")
        elif not one.estimates:
            answer(f"{one.plan.series}: no provider can serve it; see `fks-backfill series providers`")


def _duration(seconds: float) -> str:
    """At the providers' rate limits, so it is a guess: two units will do."""
    if seconds < 1:
        return "< 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
