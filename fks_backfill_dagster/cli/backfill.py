"""`fks-backfill backfill`: a sync without Dagster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    check_providers,
    choose,
    named,
    providers_option,
    series_arguments,
    usage,
    warn_of_typos,
)
from fks_backfill_dagster.cli.messages import Messages, waiting_logger
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
from fks_backfill_dagster.cli.syncs import Task, interruptible, sync_all
from fks_backfill_dagster.cli.times import check_window, window_option

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.plan import Scope
    from fks_backfill_dagster.pipeline.report import DryRun
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import Settings


@click.command(
    epilog=example(
        "backfill BTC/USDT 1h --start 2024-01-01 --end 2024-02-01",
        "backfill BTC/USDT --start -7d",
        "backfill --all 1d --json",
        "backfill '*/USDT' 1m --start 2024-01-01 --dry-run",
    )
)
@series_arguments
@window_option
@providers_option
@click.option("--refetch", is_flag=True, help="Request stored candles as well, and correct differences.")
@click.option(
    "--force",
    is_flag=True,
    help="With --refetch: write candles even if they differ as much as another symbol's would. Candles that a person"
    " corrected stay, see `corrections release`.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show estimated requests, candles and duration per provider; fetch nothing.",
)
@verbose_option
@wide_option
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

    Without TIMEFRAME all configured timeframes of the symbol. Without --start from the configured start of the
    symbol, without --end up to now. Running it again fetches only what is missing. Several series have one line
    each, and a summary. Exit code 0 only if every expected candle is stored or explained as no-trade.
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
    done = sync_all(settings, tasks, several, scope, force, as_json)
    if as_json:
        documents = [one.document for one in done]
        print_json(documents if several else documents[0])
    return 0 if all(one.complete for one in done) else 1


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
    chosen, selected = choose(catalog, names, everything), check_providers(settings, providers)
    present = now()
    _check_not_before(catalog, chosen.series, start, end)
    tasks: list[Task] = []
    for series in chosen.series:
        window = _window(catalog, series, start, end, present)
        tasks.append((series, window, selected or catalog.priority(series)))
    _log_empty(catalog, [series for series, window, _ in tasks if not window])
    return tasks, chosen.many


def _check_not_before(catalog: Catalog, series: Sequence[Series], start: int | None, end: int | None) -> None:
    """A usage error if no --start is given and --end lies before the start of every series in the settings."""
    from fks_backfill_dagster.domain.timeframe import iso

    first = min(series, key=catalog.start_of)
    if start is None and end is not None and end <= catalog.start_of(first):
        with usage():
            raise ValueError(f"{first} starts at {iso(catalog.start_of(first))}, and the range ends before")


def _window(catalog: Catalog, series: Series, start: int | None, end: int | None, present: int) -> TimeRange:
    """The range of a series, from its start in the settings to its end there; empty if it lies outside of both."""
    from fks_backfill_dagster.domain.ranges import TimeRange

    own_start, own_end = catalog.start_of(series), catalog.end_of(series)
    if start is None and end is not None and end <= own_start <= present:
        return TimeRange(own_start, own_start)
    window = check_window(own_start if start is None else start, present if end is None else end, present)
    if own_end is None:
        return window
    return TimeRange(window.start, max(window.start, min(window.end, own_end)))


def _log_empty(catalog: Catalog, empty: Sequence[Series]) -> None:
    """Logs the series whose range is empty."""
    from fks_backfill_dagster.domain.timeframe import iso

    if not empty:
        return
    first, end = empty[0], catalog.end_of(empty[0])
    if len(empty) > 1:
        log(
            f"{many(len(empty), 'series')} start after this range or end before it, by the settings, so none of their"
            f" candles is expected: {named(empty)}"
        )
    elif end is not None:
        log(f"{first}: no candle is expected from {iso(end)} on, the end of {first.symbol} in the settings.")
    else:
        log(
            f"{first}: no candle is expected before {iso(catalog.start_of(first))}, its start in the settings."
        )


# Dry run ----------------------------------------------------------------------------------------------


def _dry_run(settings: Settings, tasks: Sequence[Task], several: bool, scope: Scope, as_json: bool) -> int:
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.pipeline.sync import dry_run
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.queries import stored_series

    with open_app(settings, waiting_logger()) as app, interruptible(app):
        warn_of_typos(Catalog(settings), [series for series, _, _ in tasks], stored_series(app.database))
        found = [
            dry_run(app.context, series, window, priority, scope=scope, recheck=True)
            for series, window, priority in tasks
        ]
    messages = Messages()
    for one in found:
        for message in one.warnings:
            messages.warn(one.plan.series, message)
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
            duration(estimate.seconds),
        )
        for one in found
        if one.plan.batches
        for name, estimate in one.estimates
    ]
    print_table(("series", "provider", "requests", "candles", "batches", "duration"), rows)
    nothing = [one.plan.series for one in found if not one.plan.batches]
    unserved = [one.plan.series for one in found if one.plan.batches and not one.estimates]
    if nothing:
        print_line(f"{named(nothing)}: nothing to fetch")
    if unserved:
        print_line(f"{named(unserved)}: no eligible provider; see `fks-backfill series providers`")
