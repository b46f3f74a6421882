"""The command `status`: coverage and lag of series."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import any_series, choose, report_code
from fks_backfill_dagster.cli.messages import shown
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    short,
    verbose_option,
    wide_option,
)
from fks_backfill_dagster.cli.providers import state_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fks_backfill_dagster.cli.arguments import Chosen
    from fks_backfill_dagster.pipeline.coverage import Coverage
    from fks_backfill_dagster.pipeline.freshness import Rule
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import Settings
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.tables import CoverageRow


@click.command(epilog=example("status", "status BTC/USDT 1h --json", "status --check"))
@any_series
@click.option(
    "--check", is_flag=True, help="Exit with 1 if anything is stale, has open gaps or ended in an error."
)
@verbose_option
@wide_option
@json_option
def status(names: tuple[str, ...], everything: bool, check: bool, as_json: bool) -> int:
    """Show coverage and lag of a series; without arguments of all series.

    `expected`, `stored` and `coverage` refer to the synced range; `lag` counts the closed candles since the
    newest stored one. Exit code 2 for a series that is neither configured nor stored, else 0; with --check 1
    if a series or a server of `up` needs attention. Errors, open findings, and providers in a cool-down are
    reported on stderr.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database, provider_states
    from fks_backfill_dagster.host import keeper
    from fks_backfill_dagster.pipeline.calendars import calendar_changes
    from fks_backfill_dagster.pipeline.coverage import coverage
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series

    settings, present = load_settings(), now()
    catalog = Catalog(settings)
    for line in (server_problems := keeper.problems(settings.home)):
        log(line)
    with open_database(settings) as database:
        stored = stored_series(database)
        chosen = choose(catalog, names, everything or not names, stored)
        settle_closures(settings, database, chosen)
        changes = calendar_changes(database, chosen.series)
        found = coverage(database, chosen.series, present, _rule(settings, catalog, check=check))
        silent_lines = [] if check else _silent_series(catalog, database, chosen)
        providers = provider_states(settings, database)
    code = report_code(catalog, chosen, stored)
    for name, state in providers.items():
        log(f"{name}: {shown(state_text(state))}")
    for change in dict.fromkeys(changes.values()):
        log(str(change))
    if check:
        problems = _problems(catalog, found)
        for line in problems:
            log(line)
        code = code or int(bool(problems or changes or server_problems))
    if as_json:
        reports = [documents.status(one) for one in found]
        print_json(reports if chosen.many else reports[0])
        return code
    if code != 2:
        _print_coverage(found, present, total=chosen.many)
        print_line(f"Settings: {settings.config_file or 'no file, the defaults'}")
    for line in () if check else (*_last_errors(found), *silent_lines, *_open_findings(found)):
        log(line)
    return code


def _rule(settings: Settings, catalog: Catalog, *, check: bool) -> Rule:
    """Only --check needs the publication delays of providers, whose import is slow."""
    from fks_backfill_dagster.app import closures, freshness_rule
    from fks_backfill_dagster.pipeline.freshness import Rule

    return freshness_rule(settings) if check else Rule(end_of=catalog.end_of, closed=closures(catalog))


def _problems(catalog: Catalog, found: Sequence[Coverage]) -> list[str]:
    """A line for every series that is stale, has open gaps or ended in an error."""
    # A series removed from the settings is not kept fresh, so it cannot be stale.
    return [
        f"{one.series}: {shown(reason)}"
        for one in found
        if (reason := one.problem(kept_fresh=one.series in catalog))
    ]


def _last_errors(found: Sequence[Coverage]) -> list[str]:
    """A line for every series whose last sync failed."""
    return [
        f"{one.series}: error: {shown(one.status.error_message)}"
        for one in found
        if one.status is not None and one.status.error_message
    ]


def _open_findings(found: Sequence[Coverage]) -> list[str]:
    """A line for every series with open findings."""
    return [
        f"{one.series}: {many(one.open_findings, 'open finding')}; see `fks-backfill findings list {one.series}`"
        for one in found
        if one.open_findings
    ]


def settle_closures(settings: Settings, database: Database, chosen: Chosen) -> None:
    """Applies the closed dates of the settings at once, before the next sync; a read-only role gets a warning."""
    from fks_backfill_dagster.app import settle_closures
    from fks_backfill_dagster.store.errors import StoreError

    try:
        settled = settle_closures(settings, database, chosen.series)
    except StoreError as error:
        log(f"closed dates of the settings are not applied yet: {error}")
        return
    for one in settled:
        log(f"{one.series}: {one}")


def _print_coverage(found: Sequence[Coverage], now: int, *, total: bool) -> None:
    from fks_backfill_dagster import tables

    rows = [_coverage_row(one) for one in found]
    cells = [
        (*row.cells(now), one.status.status if one.status else "not_started")
        for row, one in zip(rows, found, strict=True)
    ]
    if total and rows:
        cells.append((*tables.coverage_total(rows, now), ""))
    print_table((*tables.COVERAGE, "status"), cells)


def _coverage_row(found: Coverage) -> CoverageRow:
    from fks_backfill_dagster.tables import CoverageRow

    return CoverageRow(
        found.series,
        None if found.status is None else found.counts,
        found.counts.open_gaps,
        found.assessment.freshness.newest,
        found.assessment.freshness.lag,
        found.next_attempt,
    )


def _silent_series(catalog: Catalog, database: Database, chosen: Chosen) -> list[str]:
    """A line for every configured series without a new candle from any provider for long."""
    from fks_backfill_dagster.domain.timeframe import to_datetime
    from fks_backfill_dagster.pipeline.refresh import quiet_until, silent_since
    from fks_backfill_dagster.store.reaches import reaches

    lines, known = [], reaches(database, chosen.series)
    for series in chosen.series:
        since, wait = silent_since(known.get(series)), quiet_until(known.get(series))
        if since is not None and wait is not None and series in catalog and not catalog.end_of(series):
            lines.append(
                f"{series}: silent since {short(to_datetime(since))}: no provider has a newer candle. The next"
                f" refresh is after {short(to_datetime(wait))}; if it was delisted, set its `end` in the settings."
            )
    return lines
