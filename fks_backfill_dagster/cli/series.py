"""The group `series`: list and removal of series, exchange calendars, providers."""

from __future__ import annotations

import click

from fks_backfill_dagster.cli.arguments import any_series, choose, usage
from fks_backfill_dagster.cli.completion import complete_symbol, complete_timeframe
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    wide_option,
)
from fks_backfill_dagster.cli.providers import list_providers


@click.group()
def series() -> None:
    """Configured and stored series, exchange calendars, providers."""


@series.command("list", epilog=example("series list", "series list BTC/USDT", "series list '*/USDT' 1h"))
@any_series
@wide_option
@json_option
def list_series(names: tuple[str, ...], everything: bool, as_json: bool) -> None:
    """List the configured and the stored series; without arguments all of them."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series, sync_status

    settings = load_settings()
    catalog = Catalog(settings)
    with open_database(settings) as database:
        stored = stored_series(database)
        states = {(s.symbol, s.timeframe): s for s in sync_status(database)}
    is_empty = not (names or stored or catalog.series)
    chosen = () if is_empty else choose(catalog, names, everything or not names, stored).series
    found = [(one, states.get(one.key)) for one in chosen]
    if as_json:
        print_json(
            [documents.series(one, state, one in catalog, catalog.priority(one)) for one, state in found]
        )
        return
    rows = [
        (
            one.symbol,
            one.timeframe,
            one.asset_class,
            one in catalog,
            state.total_candles if state else 0,
            state.oldest_data_time if state else None,
            state.newest_data_time if state else None,
            ", ".join(catalog.priority(one)),
        )
        for one, state in found
    ]
    header = ("symbol", "timeframe", "class", "configured", "candles", "oldest (UTC)", "newest (UTC)")
    print_table((*header, "providers"), rows)


@series.command("remove", epilog=example("series remove DOGE/USDT 1h --yes"))
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframe", shell_complete=complete_timeframe)
@click.option("--yes", is_flag=True, help="Confirm the deletion.")
@json_option
def remove_series(symbol: str, timeframe: str, yes: bool, as_json: bool) -> int:
    """Delete a series from the database: candles, lineage, gaps, findings, quarantine. Settings are not changed."""
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series, sync_status
    from fks_backfill_dagster.store.writer.remove import remove_series as remove_stored

    settings = load_settings()
    catalog = Catalog(settings)
    with usage():
        found = catalog.find_series(symbol, timeframe)
    with open_database(settings) as database:
        found = catalog.find_series(symbol, timeframe, stored_series(database))
        state = next(iter(sync_status(database, found)), None)
        if state is None:
            log(f"Error: nothing is stored of {found}; see `fks-backfill series list`.")
            return 1
        if not yes:
            raise click.UsageError(
                f"this would delete {many(state.total_candles, 'candle')} of {found}: add --yes to confirm"
            )
        candles = remove_stored(database, found)
    if as_json:
        print_json({"symbol": found.symbol, "timeframe": found.timeframe.value, "candles_removed": candles})
    else:
        print_line(f"{found}: removed with {many(candles, 'candle')}.")
    return 0


@series.command("accept-calendar", epilog=example("series accept-calendar XHKG"))
@click.argument("calendar")
@json_option
def accept_calendar(calendar: str, as_json: bool) -> int:
    """Settle the gaps of all series of an exchange calendar by the current sessions of its library.

    For a calendar whose past sessions have changed, which `status` reports. New sessions become open gaps; gaps on
    days that are no longer sessions are removed. Candles are never changed. Exit code 1 if a difference is left,
    such as candles on such days: each with its remedy, as `audit` reports it.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.cli.audit import differences
    from fks_backfill_dagster.pipeline.audit import audit, auditable
    from fks_backfill_dagster.pipeline.calendars import accept_calendar as accept
    from fks_backfill_dagster.pipeline.calendars import calendar_change
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    catalog = Catalog(settings)
    with open_database(settings) as database:
        with usage():
            change = calendar_change(database, calendar)
        if change is None:
            log(f"{calendar}: nothing to accept: no series was synced by another version of this calendar.")
            if as_json:
                print_json({"calendar": calendar, "new": [], "gone": [], "hours": [], "audit": None})
            return 0
        accept(database, change, now())
        concerned = [one for one in auditable(database, catalog.series) if change.concerns(one)]
        report = audit(database, concerned, now)
    if as_json:
        print_json(
            {
                "calendar": calendar,
                **{
                    name: [str(day) for day in getattr(change.difference, name)]
                    for name in ("new", "gone", "hours")
                },
                "audit": documents.audit_report(report),
            }
        )
    else:
        print_line(f"{calendar}: {change.difference}: accepted.")
        for line in differences(report):
            print_line(line)
    return 1 if report.left else 0


series.add_command(list_providers)
