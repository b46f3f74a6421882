"""The group `actions`: splits of stocks, listed and imported."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import choose_instruments, symbol_arguments, usage
from fks_backfill_dagster.cli.completion import complete_symbol
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

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fks_backfill_dagster.domain.series import Instrument
    from fks_backfill_dagster.files.actions import Problem
    from fks_backfill_dagster.settings.catalog import Catalog


@click.group()
def actions() -> None:
    """Splits of stocks: list, import from a file."""


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
        log("No actions are stored: `fks-backfill actions import` reads a file.")


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
