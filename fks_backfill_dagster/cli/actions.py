"""The group `actions`: splits of stocks, listed, imported, and requested from the providers."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    check_providers,
    choose_instruments,
    providers_option,
    symbol_arguments,
    usage,
)
from fks_backfill_dagster.cli.completion import complete_symbol
from fks_backfill_dagster.cli.messages import shown, waiting_logger
from fks_backfill_dagster.cli.output import (
    Failed,
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    wide_option,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fks_backfill_dagster.app import App
    from fks_backfill_dagster.domain.series import Instrument
    from fks_backfill_dagster.files.actions import Problem
    from fks_backfill_dagster.pipeline.actions import RefreshedActions
    from fks_backfill_dagster.settings.catalog import Catalog


@click.group()
def actions() -> None:
    """Splits of stocks: list, import from a file, request from the providers."""


@actions.command("list", epilog=example("actions list", "actions list AAPL --json"))
@symbol_arguments
@wide_option
@json_option
def list_actions(names: tuple[str, ...], as_json: bool) -> None:
    """List the stored actions by symbol and date, one row for each provider; without arguments those of all symbols.

    The ratio is in new shares per old share. Where providers differ, the column used names the row that adjusted
    prices apply, and stderr the difference.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.domain.actions import disputes
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.actions import stored_actions
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    with open_database(settings) as database:
        chosen = choose_instruments(Catalog(settings), names, stored_series(database)) if names else None
        found = stored_actions(database, None if chosen is None else [one.symbol for one in chosen])
    for dispute in disputes(found):
        log(f"warning: {dispute}")
    if as_json:
        print_json([documents.action(one) for one in found])
        return
    header = ("symbol", "kind", "ex_date", "ratio", "provider", "used", "fetched (UTC)")
    rows = [
        (
            one.action.symbol,
            one.action.kind,
            one.action.ex_date,
            "-" if one.action.ratio is None else f"{one.action.ratio:.6g}",
            one.provider,
            one.used,
            one.fetched_at.replace(microsecond=0),
        )
        for one in found
    ]
    print_table(header, rows)
    if not found:
        log(
            "No actions are stored: `fks-backfill actions refresh` requests them, `actions import` reads a file."
        )


@actions.command("import", epilog=example("actions import splits.csv", "actions import - AAPL < aapl.csv"))
@click.argument("file", type=click.File("rb"))
@click.argument("symbol", required=False, shell_complete=complete_symbol)
@json_option
def import_actions(file: IO[bytes], symbol: str | None, as_json: bool) -> int:
    """Store the actions of a CSV file; they are used before those of any provider.

    Columns: symbol, kind (split), ex_date (a date of the exchange), ratio (new shares per old share: 4 for 4:1, 0.1
    for 1:10; 1 means that there was no split), amount and currency (empty). With SYMBOL the column symbol may be
    absent. An invalid file changes nothing: every bad line is named, and the exit code is 1. - is stdin.
    """
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.files.actions import InvalidFile, read_actions
    from fks_backfill_dagster.pipeline.actions import import_actions as store_actions
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    catalog, name = Catalog(settings), str(getattr(file, "name", "<stdin>"))
    with open_database(settings) as database:
        find = _finder(catalog, [one.instrument for one in stored_series(database)])
        with usage():
            only = None if symbol is None else find(symbol)
        try:
            found = read_actions(file.read(), find, only)
        except InvalidFile as error:
            return _refused(name, error.problems, as_json=as_json)
        done = store_actions(database, found, lambda one: _priority(catalog, one), now())
    count = sum(map(len, found.values()))
    unchanged = count - done.inserted - done.updated
    if as_json:
        print_json(_imported(name, done.inserted, done.updated, unchanged, ()))
    else:
        print_line(
            f"{name}: {many(count, 'action')} of {many(len(found), 'symbol')}: {done.inserted:,} new,"
            f" {done.updated:,} changed, {unchanged:,} unchanged."
        )
    return 0


@actions.command("refresh", epilog=example("actions refresh", "actions refresh AAPL --provider yfinance"))
@symbol_arguments
@providers_option
@json_option
def refresh(names: tuple[str, ...], providers: tuple[str, ...], as_json: bool) -> int:
    """Request all splits of stocks from every provider that lists them; without arguments of all stocks.

    Polygon and Yahoo list them. A sync stores those that Yahoo lists beside its candles already. Exit code 1 if a stock
    had no response, a row was refused, a split in use is no longer listed, or providers contradict each other.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.cli.syncs import interruptible
    from fks_backfill_dagster.domain.actions import disputes
    from fks_backfill_dagster.pipeline.actions import refresh_actions
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.actions import stored_actions
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    check_providers(settings, providers)
    catalog = Catalog(settings)
    with open_app(settings, waiting_logger()) as app, interruptible(app):
        chosen = choose_instruments(catalog, names, stored_series(app.database))
        wanted = _sources(app, catalog, _stocks(chosen, named=bool(names)), providers)
        found = []
        for one in refresh_actions(app.context, wanted):
            found.append(one)
            for message in (*one.refused, *one.gone, *([one.error] if one.error else ())):
                log(f"warning: {shown(message)}")
        contradictions = disputes(stored_actions(app.database, [one.symbol for one, _ in wanted]))
    for dispute in contradictions:
        log(f"warning: {dispute}")
    if as_json:
        print_json([documents.refreshed_actions(one) for one in found])
    else:
        _print_refreshed(found)
    silent = {one for one, _ in wanted} - {one.instrument for one in found if one.error is None}
    for symbol in sorted(one.symbol for one in silent):
        log(f"Error: no provider reported the splits of {symbol}.")
    return 1 if silent or contradictions or any(one.refused or one.gone for one in found) else 0


def _stocks(chosen: Sequence[Instrument], *, named: bool) -> list[Instrument]:
    """The stocks among the chosen instruments. Others are named if the user named them."""
    from fks_backfill_dagster.domain.actions import has_actions

    stocks = [one for one in chosen if has_actions(one)]
    for one in chosen if named else ():
        if one not in stocks:
            log(f"{one.symbol} is {one.asset_class}, and only stocks have splits.")
    if not stocks:
        raise Failed(
            "No stock is among these symbols, so nothing was requested: see `fks-backfill series list`."
        )
    return stocks


def _sources(
    app: App, catalog: Catalog, stocks: Sequence[Instrument], providers: Sequence[str]
) -> list[tuple[Instrument, tuple[str, ...]]]:
    """The providers of each stock. A key that is missing is reported once."""
    from fks_backfill_dagster.pipeline.actions import action_sources
    from fks_backfill_dagster.providers.base import ActionSource

    listing = [name for name, one in app.context.providers.items() if isinstance(one, ActionSource)]
    with usage():
        if unable := next((name for name in providers if name not in listing), None):
            raise ValueError(f"{unable} lists no splits: {' and '.join(listing)} do")
    found = [
        (one, action_sources(app.context.providers, providers or _priority(catalog, one))) for one in stocks
    ]
    for warning in dict.fromkeys(warning for _, sources in found for warning in sources.warnings):
        log(f"warning: {warning}")
    return [(one, sources.names) for one, sources in found]


def _print_refreshed(found: Sequence[RefreshedActions]) -> None:
    rows = [
        (
            one.instrument.symbol,
            one.provider,
            *(
                (None,) * 4
                if one.error
                else (one.listed, one.written.inserted, one.written.updated, len(one.refused))
            ),
            "failed" if one.error else "done",
        )
        for one in found
    ]
    print_table(("symbol", "provider", "listed", "new", "changed", "refused", "result"), rows)


def _finder(catalog: Catalog, stored: Sequence[Instrument]) -> Callable[[str], Instrument]:
    """Finds a configured or stored instrument by its symbol in any notation."""
    from fks_backfill_dagster.cli.arguments import nearest_symbols
    from fks_backfill_dagster.domain.series import identifier

    known = {identifier(one.symbol).upper(): one for one in stored}
    known |= {identifier(one.symbol).upper(): one.instrument for one in catalog.series}

    def find(written: str) -> Instrument:
        found = known.get(identifier(written.strip()).upper())
        if found is None:
            nearest = nearest_symbols(written, (one.symbol for one in known.values()))
            raise ValueError(f"symbol {written} is neither configured nor stored; {nearest}")
        return found

    return find


def _priority(catalog: Catalog, instrument: Instrument) -> tuple[str, ...]:
    from fks_backfill_dagster.domain.timeframe import Timeframe

    return catalog.priority(instrument.at(Timeframe.D1))


def _refused(name: str, problems: Sequence[Problem], *, as_json: bool) -> int:
    for problem in problems:
        log(f"Error: {name}: {problem}")
    log(
        f"Nothing of {name} was stored: correct {'it' if len(problems) == 1 else 'these lines'} and import it again."
    )
    if as_json:
        print_json(_imported(name, 0, 0, 0, problems))
    return 1


def _imported(
    name: str, inserted: int, updated: int, unchanged: int, problems: Sequence[Problem]
) -> dict[str, object]:
    return {
        "file": name,
        "inserted": inserted,
        "updated": updated,
        "unchanged": unchanged,
        "refused": [{"line": one.line, "reason": one.reason} for one in problems],
    }
