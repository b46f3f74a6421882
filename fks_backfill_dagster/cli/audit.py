"""`fks-backfill audit`: compares ledger, coverage and status with the stored candles."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import any_series, choose
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    short,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.ledger.reconcile import Difference, SeriesAudit
    from fks_backfill_dagster.pipeline.audit import AuditReport
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.database import Database

QUIET_SECONDS = 5.0


@click.command(epilog=example("audit", "audit BTC/USDT 1h --json", "audit --all --no-repair"))
@any_series
@click.option("--no-repair", is_flag=True, help="Report differences only, change nothing.")
@json_option
def audit(names: tuple[str, ...], everything: bool, no_repair: bool, as_json: bool) -> int:
    """Recompute gaps, coverage and status from the candles, and repair differences.

    Without arguments every stored series, including those no longer in the settings. Candles are
    never changed: an invalid one is reported with its remedy. Exit code 1 if a difference was not
    repaired. Sends no request to a provider, and may run during syncs.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.pipeline.audit import audit as run
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    with open_database(settings) as database:
        wanted = _wanted(Catalog(settings), database, names, everything)
        with _progress_output(len(wanted)) as show:

            def done(found: SeriesAudit) -> None:
                show(found)
                if not as_json:
                    for difference in found.differences:
                        print_line(f"{found.series}: {_text(difference)}")

            report = run(database, wanted, now, repair=not no_repair, done=done)
    if as_json:
        print_json(documents.audit_report(report))
    else:
        print_line(_totals(report))
    return 1 if report.left else 0


def _wanted(
    catalog: Catalog, database: Database, names: Sequence[str], everything: bool
) -> tuple[Series, ...]:
    """The selected stored series, each as configured if it is configured."""
    from fks_backfill_dagster.pipeline.audit import auditable

    stored = {one.key: one for one in auditable(database, catalog.series)}
    if not names:
        return tuple(stored.values())
    chosen = choose(catalog, names, everything, stored.values())
    for one in () if chosen.many else chosen.series:
        if one.key not in stored:
            log(f"{one}: never synced, so there is nothing to audit.")
    return tuple(stored[key] for one in chosen.series if (key := one.key) in stored)


def differences(report: AuditReport) -> list[str]:
    """A line for each difference, then the totals."""
    found = [f"{one.series}: {_text(each)}" for one in report.series for each in one.differences]
    return [*found, _totals(report)]


def _text(found: Difference) -> str:
    from fks_backfill_dagster.domain.timeframe import to_datetime

    where = ""
    if found.start is not None and found.end is not None:
        where = f"{short(to_datetime(found.start))} .. {short(to_datetime(found.end))}: "
    return f"{where}{found.message}{' (repaired)' if found.repaired else ''}"


def _totals(report: AuditReport) -> str:
    return (
        f"{many(len(report.series), 'series')}, {many(report.candles, 'candle')}:"
        f" {many(report.differences, 'difference')}, {report.repaired:,} repaired,"
        f" in {report.seconds:.1f} seconds"
    )


@contextmanager
def _progress_output(total: int) -> Iterator[Callable[[SeriesAudit], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; always on stderr."""
    if not sys.stderr.isatty():
        yield _Lines(total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("series, {task.description}", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False, highlight=False)) as progress:
        task = progress.add_task("", total=total)
        yield lambda found: progress.update(task, advance=1, description=str(found.series))


class _Lines:
    """Logs the progress every few seconds."""

    def __init__(self, total: int) -> None:
        self._total, self._series, self._candles = total, 0, 0
        self._logged_at = time.monotonic()

    def __call__(self, found: SeriesAudit) -> None:
        self._series += 1
        self._candles += found.candles
        if time.monotonic() - self._logged_at > QUIET_SECONDS and self._series < self._total:
            self._logged_at = time.monotonic()
            log(f"{self._series:,} of {many(self._total, 'series')}, {many(self._candles, 'candle')}")
