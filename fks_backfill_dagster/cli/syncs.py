"""Syncs of one or several series, with what a command prints of them.

A single series has its plan, its progress, a line and a table of providers; several have one line each and a summary.
With `-v` every series has all of that. Does not belong here: choosing series and windows (the commands).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import named, warn_of_typos
from fks_backfill_dagster.cli.messages import Messages, waiting_logger
from fks_backfill_dagster.cli.output import (
    is_verbose,
    log,
    log_if_possible,
    many,
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
    from fks_backfill_dagster.pipeline.report import SyncReport
    from fks_backfill_dagster.settings.model import Settings

_INTERRUPTED = "Interrupted: committed batches stay, and the same command fetches only what is still missing."

# A series, its window, and its providers in order of priority.
Task = tuple["Series", "TimeRange", tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a task as a document; `report` is None for one that was aborted."""

    series: Series
    document: Document
    report: SyncReport | None = None

    @property
    def complete(self) -> bool:
        return self.report is not None and self.report.complete


@contextmanager
def interruptible(app: App, message: str = _INTERRUPTED) -> Iterator[None]:
    """A signal ends all waiting for providers at once; a batch that is being committed is rolled back. Then `message`
    is logged."""
    received_signals = signals()
    with received_signals.first(app.pool.stop.set):
        try:
            yield
        except (KeyboardInterrupt, Exception):
            if received_signals.received is None:
                raise
            # Any exception: an interrupted statement can fail in several ways.
            log_if_possible(message)
            raise click.exceptions.Exit(received_signals.exit_code) from None


def sync_all(
    settings: Settings, tasks: Sequence[Task], several: bool, scope: Scope, force: bool, as_json: bool
) -> list[Done]:
    """The result of every task, printed as well unless `as_json`.

    A series that fails does not stop the others. A database failure does, because all series share
    it: the remaining ones are reported as failed for that reason.
    """
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.embedded import EmbeddedError
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.errors import StoreError
    from fks_backfill_dagster.store.queries import stored_series

    done: list[Done] = []
    counts, output = _Counts(), _Output(len(tasks), several, as_json)
    try:
        with open_app(settings, waiting_logger()) as app, interruptible(app):
            warn_of_typos(Catalog(settings), [series for series, _, _ in tasks], stored_series(app.database))
            for task in tasks:
                counts = _Counts()
                done.append(_sync_one(app, task, scope, force, counts, output))
                output.report(done[-1])
    except (StoreError, EmbeddedError) as error:
        log(f"Error: {error}")
        for series, _, _ in tasks[len(done) :]:
            done.append(counts.aborted(series, error))
            counts = _Counts()
    output.summary(done)
    return done


def _sync_one(app: App, task: Task, scope: Scope, force: bool, counts: _Counts, output: _Output) -> Done:
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.cli.progress import watched
    from fks_backfill_dagster.pipeline.report import SyncReport
    from fks_backfill_dagster.pipeline.sync import sync
    from fks_backfill_dagster.store.errors import SeriesChanged

    series, window, priority = task
    position = output.next_position()
    if not window:
        nothing = SyncReport(series, window)
        return Done(series, documents.sync_report(nothing), nothing)
    try:
        with watched(output.messages, counts, position=position) as listen:
            report = sync(
                app.context, series, window, priority, scope=scope, recheck=True, force=force, listen=listen
            )
    except SeriesChanged as error:
        log(f"Error: {error}")
        return counts.aborted(series, error)
    except ValueError as error:  # from its calendar: other series may have another one
        log(f"Error: {series}: {error}.")
        return counts.aborted(series, error)
    return Done(series, documents.sync_report(report), report)


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

    def aborted(self, series: Series, error: Exception) -> Done:
        from fks_backfill_dagster import documents

        return Done(
            series,
            documents.broken_sync(
                series,
                str(error),
                total_batches=self.batches,
                successful_batches=self.succeeded,
                failed_batches=self.failed,
                candles=self.candles,
            ),
        )


# Output -----------------------------------------------------------------------------------------------


class _Output:
    """What a command prints of its syncs. With `--json` the lines of several series go to stderr as progress."""

    def __init__(self, total: int, several: bool, as_json: bool) -> None:
        self._brief = several and not is_verbose()
        self._total, self._several, self._as_json, self._begun = total, several, as_json, 0
        self.messages = Messages()

    def next_position(self) -> str | None:
        """That of the next series to be synced; None if each series is printed in full."""
        self._begun += 1
        return f"{self._begun:,} of {self._total:,}" if self._brief else None

    def report(self, done: Done) -> None:
        """Prints the result of one series; the error of an aborted one is logged already."""
        report = done.report
        if report is None:
            return
        self.messages.log_rest(report)
        if self._brief:
            (log if self._as_json else print_line)(f"{_line(report)}{_left(report, ': ')}")
            return
        if not self._as_json:
            print_line(_line(report))
            _print_providers(report)
        if left := _left(report, ""):
            _log_left(report, left)

    def summary(self, done: Sequence[Done]) -> None:
        """Prints the totals of several series, and names those that are incomplete."""
        if not self._several:
            return
        reports = [one.report for one in done if one.report is not None]
        incomplete = [one for one in done if not one.complete]
        stored, expected, changed = (
            sum(getattr(one, name) for one in reports) for name in ("stored", "expected", "total_candles")
        )
        (log if self._as_json else print_line)(
            f"{many(len(done), 'series')}: {len(done) - len(incomplete):,} complete, {len(incomplete):,} incomplete;"
            f" {stored:,} of {many(expected, 'candle')} stored, {changed:,} of them by this call"
            f" ({many(sum(one.requests for one in reports), 'request')},"
            f" {sum(one.seconds for one in reports):.1f} s)"
        )
        if incomplete:
            names = named([one.series for one in incomplete])
            log(
                f"Incomplete: {names}. `fks-backfill gaps` lists their gaps; run the same command again to fetch"
                " only what is missing."
            )


def _line(report: SyncReport) -> str:
    quiet = f" {report.no_trade:,} no-trade," if report.no_trade else ""
    return (
        f"{report.series}: {report.stored:,} of {many(report.expected, 'candle')} stored,{quiet}"
        f" {report.total_candles:,} of them by this call"
        f" ({many(report.total_batches, 'batch')}, {many(report.requests, 'request')}, {report.seconds:.1f} s)"
    )


def _print_providers(report: SyncReport) -> None:
    rows = [
        (f"  {name}", tally.asked, tally.delivered, tally.rejected, tally.failed)
        for name, tally in report.providers.items()
    ]
    print_table(("  provider", "asked", "delivered", "rejected", "failed"), rows)


def _left(report: SyncReport, before: str) -> str:
    """What is incomplete after a sync; empty if nothing is."""
    parts = []
    if report.failed_batches:
        parts.append(f"{report.failed_batches:,} of {many(report.total_batches, 'batch')} failed")
    if report.missing:
        parts.append(f"{many(report.missing, 'candle')} still missing")
    return before + ", ".join(parts) if parts else ""


def _log_left(report: SyncReport, left: str) -> None:
    """The last line about a single series."""
    start = "Error: " if report.errors else ""
    gaps = f"; see `fks-backfill gaps {report.series}`" if report.missing and report.providers else ""
    again = " Run the same command again to fetch only these." if report.missing and report.errors else ""
    log(f"{start}{report.series}: {left}{gaps}.{again}")
