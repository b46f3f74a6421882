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
    example,
    json_option,
    log,
    log_if_possible,
    many,
    print_json,
    print_line,
    print_table,
)
from fks_backfill_dagster.cli.signals import signals

if TYPE_CHECKING:
    from fks_backfill_dagster.app import App
    from fks_backfill_dagster.documents import Document
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.events import SyncEvent
    from fks_backfill_dagster.pipeline.plan import Scope
    from fks_backfill_dagster.pipeline.report import DryRun, SyncReport
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import Settings

_INTERRUPTED = "Interrupted: committed batches stay, and the same command fetches only what is still missing."

# A series, its window, and its providers in order of priority.
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
    help="Request this provider only; repeat it for several, in order of priority.",
)
@click.option("--refetch", is_flag=True, help="Request stored candles as well, and correct differences.")
@click.option(
    "--force",
    is_flag=True,
    help="With --refetch: write candles even if they differ as much as another symbol's would.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show estimated requests, candles and duration per provider; fetch nothing.",
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
    """Fetch the missing candles of a range.

    Without --start from the configured start of the symbol, without --end up to now. Running it
    again fetches only what is missing. Exit code 0 only if every expected candle is stored or
    explained as no-trade.
    """
    from fks_backfill_dagster.pipeline.plan import Scope
    from fks_backfill_dagster.settings.load import load_settings

    if force and not refetch:
        raise click.UsageError("--force needs --refetch: only a refetch overwrites stored candles.")
    settings = load_settings()
    scope = Scope.EVERYTHING if refetch else Scope.MISSING
    tasks, several = _tasks(settings, names, everything, start, end, providers)
    if dry_run:
        return _dry_run(settings, tasks, several, scope, as_json)
    done = _sync_all(settings, tasks, scope, force, as_json)
    if as_json:
        documents = [document for document, _ in done]
        print_json(documents if several else documents[0])
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
    from fks_backfill_dagster.settings.catalog import Catalog

    catalog = Catalog(settings)
    chosen, selected, present = (
        choose(catalog, names, everything),
        check_providers(settings, providers),
        now(),
    )
    tasks: list[Task] = []
    for series in chosen.series:
        first = catalog.start_of(series) if start is None else start
        window = check_window(first, present if end is None else end, present)
        tasks.append((series, _clipped_to_end(catalog, series, window), selected or catalog.priority(series)))
    return tasks, chosen.many


def _clipped_to_end(catalog: Catalog, series: Series, window: TimeRange) -> TimeRange:
    """The window up to the configured `end` of the symbol; logs it if nothing is left."""
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.timeframe import iso

    end = catalog.end_of(series)
    if end is None:
        return window
    if end <= window.start:
        log(
            f"{series}: no candle is expected from {iso(end)} on, the end of {series.symbol} in the settings."
        )
    return TimeRange(window.start, max(window.start, min(window.end, end)))


# Sync -------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Counts:
    """Counts from the events of a sync: the report of one that fails."""

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

    A series that fails does not stop the others. A database failure does, because all series share
    it: the remaining ones are reported as failed for that reason.
    """
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.embedded import EmbeddedError
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.errors import StoreError
    from fks_backfill_dagster.store.queries import stored_series

    done: list[tuple[Document, bool]] = []
    counts, logged = _Counts(), set[str]()
    try:
        with open_app(settings, log_waiting) as app, interruptible(app):
            warn_of_typos(Catalog(settings), [series for series, _, _ in tasks], stored_series(app.database))
            for task in tasks:
                counts = _Counts()
                done.append(_sync_one(app, task, scope, force, as_json, counts, logged))
    except (StoreError, EmbeddedError) as error:
        log(f"Error: {error}")
        for series, _, _ in tasks[len(done) :]:
            done.append((counts.report(series, error), False))
            counts = _Counts()
    return done


def _sync_one(
    app: App, task: Task, scope: Scope, force: bool, as_json: bool, counts: _Counts, logged: set[str]
) -> tuple[Document, bool]:
    """One task's report as a document, and whether it is complete; `logged` are the warnings so far."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.cli.progress import watched
    from fks_backfill_dagster.pipeline.report import SyncReport
    from fks_backfill_dagster.pipeline.sync import sync
    from fks_backfill_dagster.store.errors import SeriesChanged

    series, window, priority = task
    if not window:
        return documents.sync_report(SyncReport(series, window)), True
    try:
        with watched(counts, logged) as listen:
            report = sync(
                app.context, series, window, priority, scope=scope, recheck=True, force=force, listen=listen
            )
    except SeriesChanged as error:
        log(f"Error: {error}")
        return counts.report(series, error), False
    except ValueError as error:  # from its calendar: other series may have another one
        log(f"Error: {series}: {error}.")
        return counts.report(series, error), False
    if not as_json:
        _print_report(report)
    for message in report.errors:
        log(f"Error: {series}: {message}")
    if report.missing and report.providers:  # without providers the error names the reason
        left = many(report.missing, "candle")
        again = " Run the same command again to fetch only these." if report.errors else ""
        log(f"{series}: {left} still missing; see `fks-backfill gaps {series}`.{again}")
    return documents.sync_report(report), report.complete


def log_waiting(sentence: str) -> None:
    log(f"waiting: {sentence}")


def _print_report(report: SyncReport) -> None:
    quiet = f" {report.quiet:,} no-trade," if report.quiet else ""
    print_line(
        f"{report.series}: {report.stored:,} of {many(report.expected, 'candle')} stored,{quiet}"
        f" {report.total_candles:,} of them by this call"
        f" ({many(report.total_batches, 'batch')}, {many(report.requests, 'request')}, {report.seconds:.1f} s)"
    )
    rows = [
        (f"  {name}", tally.asked, tally.delivered, tally.rejected, tally.failed)
        for name, tally in report.providers.items()
    ]
    print_table(("  provider", "asked", "delivered", "rejected", "failed"), rows)


@contextmanager
def interruptible(app: App) -> Iterator[None]:
    """A signal ends all waiting for providers at once; a batch that is being committed is rolled back."""
    received_signals = signals()
    with received_signals.first(app.pool.stop.set):
        try:
            yield
        except (KeyboardInterrupt, Exception):
            if received_signals.received is None:
                raise
            # Any exception: an interrupted statement can fail in several ways.
            log_if_possible(_INTERRUPTED)
            raise click.exceptions.Exit(received_signals.exit_code) from None


# Dry run ----------------------------------------------------------------------------------------------


def _dry_run(settings: Settings, tasks: Sequence[Task], several: bool, scope: Scope, as_json: bool) -> int:
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.pipeline.sync import dry_run
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.queries import stored_series

    with open_app(settings, log_waiting) as app, interruptible(app):
        warn_of_typos(Catalog(settings), [series for series, _, _ in tasks], stored_series(app.database))
        found = [
            dry_run(app.context, series, window, priority, scope=scope, recheck=True)
            for series, window, priority in tasks
        ]
    logged: dict[str, Series] = {}
    for one in found:
        for message in one.warnings:
            if logged.setdefault(message, one.plan.series) is one.plan.series:
                log(f"{one.plan.series}: warning: {message}")
    if as_json:
        shown = [documents.dry_run(one) for one in found]
        print_json(shown if several else shown[0])
    else:
        _print_estimates(found)
    return 0


def _print_estimates(found: Sequence[DryRun]) -> None:
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
    print_table(("series", "provider", "requests", "candles", "batches", "duration"), rows)
    for one in found:
        if not one.plan.batches:
            print_line(f"{one.plan.series}: nothing to fetch")
        elif not one.estimates:
            print_line(f"{one.plan.series}: no eligible provider; see `fks-backfill series providers`")


def _duration(seconds: float) -> str:
    """An estimate from the rate limits, so two units are enough."""
    if seconds < 1:
        return "< 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
