"""`fks-backfill validate`: stored candles compared with other providers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    check_providers,
    choose,
    providers_option,
    report_code,
    series_arguments,
)
from fks_backfill_dagster.cli.messages import Messages, shown, waiting_logger
from fks_backfill_dagster.cli.output import (
    duration,
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    verbose_option,
    wide_option,
)
from fks_backfill_dagster.cli.syncs import interruptible
from fks_backfill_dagster.cli.times import check_window, window_option

if TYPE_CHECKING:
    from fks_backfill_dagster.app import App
    from fks_backfill_dagster.documents import Document
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.validate import Validation, ValidationOptions
    from fks_backfill_dagster.pipeline.validation_report import ValidationEstimate, ValidationReport
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import Settings

QUIET_SECONDS = 10.0
"""The shortest time between two lines of progress."""

_INTERRUPTED = "Interrupted: nothing was recorded; the same command compares the same candles."
_SHOWN = 10
"""Discrepancies in the table of a series; `--json` has more."""


@click.command(
    epilog=example(
        "validate BTC/USDT 1h --start 2024-01 --end 2024-07",
        "validate BTC/USDT 1h --start 2024-01 --end 2024-02 --full --provider polygon",
        "validate --all 1d --sample 0.1 --dry-run",
    )
)
@series_arguments
@window_option
@click.option(
    "--tolerance",
    type=click.FloatRange(0, 1),
    help="Largest difference of a price, as a share of the other provider's price: 0.01 is one per cent; twice as much"
    " for high and low. Default: `validation.tolerance_pct`.",
)
@providers_option
@click.option(
    "--sample",
    "share",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the range to compare, such as 0.1. Default: all of up to 2,000 candles; of more, 12 days spread"
    " over the range, those beside gaps and those with the largest moves.",
)
@click.option("--full", is_flag=True, help="Compare all candles of the range; the same as --sample 1.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show estimated requests, candles and duration per provider; request nothing.",
)
@verbose_option
@wide_option
@json_option
def validate(
    names: tuple[str, ...],
    everything: bool,
    start: int | None,
    end: int | None,
    tolerance: float | None,
    providers: tuple[str, ...],
    share: float | None,
    full: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Compare stored candles with those of other providers; nothing stored changes.

    Each candle is compared with providers that did not deliver it: those of --provider, else of
    `validation.validation_providers`, else the others of its priority. Where none of them has the timeframe, stored
    candles are aggregated to one that it has. Without --start from the configured start, without --end up to now.
    Exit code 0 if something was compared and all of it agrees; 1 if prices differ, if nothing could be compared,
    or if candles remain unverified because requests failed.
    """
    from fks_backfill_dagster.app import now, open_app
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series

    if full and share is not None:
        raise click.UsageError("--full compares all candles: give it or --sample, not both.")
    present = now()
    check_window(0 if start is None else start, present if end is None else end, present)
    settings = load_settings()
    catalog, chosen_providers = Catalog(settings), check_providers(settings, providers)
    share, limit = (
        1.0 if full else share,
        settings.validation.tolerance_pct if tolerance is None else tolerance,
    )
    with open_app(settings, waiting_logger()) as app, interruptible(app, _INTERRUPTED):
        stored = stored_series(app.database)
        chosen = choose(catalog, names, everything, stored)
        if code := report_code(catalog, chosen, stored):
            return code
        run = _Run(app, catalog, chosen.many, dry_run, as_json)
        for series in chosen.series:
            run.validate(
                series, start, end, _options(settings, catalog, series, chosen_providers, limit, share)
            )
    if as_json:
        print_json(run.documents if chosen.many else run.documents[0])
    return 0 if run.good else 1


def _options(
    settings: Settings,
    catalog: Catalog,
    series: Series,
    chosen: Sequence[str],
    tolerance: float,
    share: float | None,
) -> ValidationOptions:
    from fks_backfill_dagster.pipeline.validate import ValidationOptions

    lists = [chosen] if chosen else [settings.validation.validation_providers, catalog.priority(series)]
    obstacle = None
    if not settings.validation.enabled:
        obstacle = "validation is disabled: set validation.enabled to true in the settings"
    return ValidationOptions(lists, tolerance, share, heed_circuit=not chosen, obstacle=obstacle)


class _Run:
    """The validations of one command: their documents so far, and whether all of them are good."""

    def __init__(self, app: App, catalog: Catalog, several: bool, dry_run: bool, as_json: bool) -> None:
        self.app, self.catalog, self.several = app, catalog, several
        self.dry_run, self.as_json = dry_run, as_json
        self.documents: list[Document] = []
        self.good = True
        self._messages = Messages()

    def validate(
        self, series: Series, start: int | None, end: int | None, options: ValidationOptions
    ) -> None:
        from fks_backfill_dagster.app import now
        from fks_backfill_dagster.domain.ranges import TimeRange
        from fks_backfill_dagster.pipeline.validation_report import ValidationReport

        present = now()
        first = self.catalog.start_of(series) if start is None else start
        window = TimeRange(first, max(first, present if end is None else end))
        try:
            self._validate(series, window, options)
        except ValueError as error:  # from its calendar: other series may have another one
            log(f"Error: {series}: {error}.")
            self._report(
                ValidationReport(series, window, series, options.tolerance, present, obstacle=str(error))
            )

    def _validate(self, series: Series, window: TimeRange, options: ValidationOptions) -> None:
        from fks_backfill_dagster import documents
        from fks_backfill_dagster.pipeline.validate import Validation, record

        validation = Validation(self.app.context, series, window, options)
        for message in validation.warnings:
            self._messages.warn(series, message)
        estimates = validation.estimate()
        if self.dry_run:
            self.good &= validation.obstacle is None
            self.documents.append(documents.validation_plan(validation, estimates))
            self._show(lambda: _print_plan(validation, estimates))
            return
        for line in _cost(validation, estimates):
            log(f"{series}: {line}")
        with _progress(series, sum(one.candles for one in estimates.values())) as advance:
            report = validation.run(advance)
        record(self.app.context, report)
        for message in report.warnings:
            self._messages.warn(series, message)
        for message in report.errors:
            log(f"Error: {series}: {shown(message)}")
        self._report(report)

    def _report(self, report: ValidationReport) -> None:
        from fks_backfill_dagster import documents

        self.good &= report.valid is True
        self.documents.append(documents.validation(report))
        self._show(lambda: _print_report(report, self.several))

    def _show(self, show: Callable[[], None]) -> None:
        if not self.as_json:
            show()


def _cost(validation: Validation, estimates: Mapping[str, ValidationEstimate]) -> Iterator[str]:
    """The estimate, a line per provider."""
    compared = validation.validators.series.timeframe
    how = "all of the range" if validation.complete else many(len(validation.sample), "range")
    for name, one in estimates.items():
        yield (
            f"{many(one.candles, 'candle')} of {compared} ({how}) to compare with {name}: about"
            f" {many(one.requests, 'request')}, {duration(one.seconds)}"
        )


@contextmanager
def _progress(series: Series, total: int) -> Iterator[Callable[[int], None]]:
    """Called with the number of candles after each request: a bar on a terminal, a line every few seconds elsewhere."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True, markup=False, highlight=False)
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(str(series), total=total)
            yield lambda candles: progress.update(task, advance=candles)
        return
    done, logged_at = 0, time.monotonic()

    def advance(candles: int) -> None:
        nonlocal done, logged_at
        done += candles
        if time.monotonic() - logged_at >= QUIET_SECONDS:
            logged_at = time.monotonic()
            log(f"{series}: {done:,} of {many(total, 'candle')} requested")

    yield advance


# Output -----------------------------------------------------------------------------------------------


def _print_plan(validation: Validation, estimates: Mapping[str, ValidationEstimate]) -> None:
    if validation.obstacle is not None:
        print_line(f"{validation.series}: nothing to compare: {shown(validation.obstacle)}")
        return
    compared = validation.validators.series.timeframe
    rows = [
        (validation.series, name, compared, one.requests, one.candles, duration(one.seconds))
        for name, one in estimates.items()
    ]
    print_table(("series", "provider", "compared at", "requests", "candles", "duration"), rows)


def _print_report(report: ValidationReport, brief: bool) -> None:
    verdict = {True: "valid", False: "INVALID", None: "no verdict"}[report.valid]
    how = "" if report.complete or not report.compared else " by sample"
    reason = "" if report.reason is None else f": {shown(report.reason)}"
    print_line(
        f"{report.series}: {verdict}{how}{reason} ({many(report.compared, 'candle')} of"
        f" {report.compared_series.timeframe} compared, {report.stored:,} stored,"
        f" {many(report.discrepancies, 'discrepancy')})"
    )
    if brief:
        return
    _print_sources(report)
    _print_worst(report)


def _print_sources(report: ValidationReport) -> None:
    rows = [
        (
            f"  {name}",
            one.compared,
            one.differing,
            _percent(one.spread.largest_of("close")),
            _percent(one.spread.quantile("close", 0.99)),
            ", ".join(f"{why} {count:,}" for why, count in one.not_comparable.items()),
        )
        for name, one in report.sources.items()
    ]
    if rows:
        print_table(("  provider", "compared", "differ", "close max", "close p99", "not compared"), rows)


def _print_worst(report: ValidationReport) -> None:
    from fks_backfill_dagster.domain.timeframe import to_datetime

    rows = [
        (
            to_datetime(one.ts),
            one.field,
            f"{one.stored:.10g}",
            f"{one.other:.10g}",
            _percent(one.difference),
            name,
        )
        for name, one in report.worst[:_SHOWN]
    ]
    if rows:
        print_table(("open (UTC)", "field", "stored", "other", "difference", "provider"), rows)
        if report.discrepancies > len(rows):
            log(f"{report.discrepancies - len(rows):,} more prices differ; --json lists the worst 100.")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"
