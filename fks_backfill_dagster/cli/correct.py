"""`fks-backfill correct`: the values of a file instead of stored ones."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import Chosen, report_code, usage
from fks_backfill_dagster.cli.completion import complete_symbol, complete_timeframe
from fks_backfill_dagster.cli.decisions import given_reason, log_problems, named_author
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    print_json,
    print_line,
    print_table,
    wide_option,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.corrections import CorrectionRows
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.corrections import Statement
    from fks_backfill_dagster.settings.model import Settings
    from fks_backfill_dagster.store.writer.correction import Corrected

MOST_ROWS = 20
"""Changes that a dry run prints."""


@click.command(
    epilog=example(
        "correct fix.csv BTC/USDT 1h --reason 'the exchange republished the day'",
        "correct fix.csv BTC/USDT 1h --reason test --dry-run",
    )
)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, allow_dash=True))
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframe", shell_complete=complete_timeframe)
@click.option("--reason", required=True, metavar="TEXT", help="Why the values are correct.")
@click.option("--author", metavar="NAME", help="Who gives them; by default the user of this account.")
@click.option("--dry-run", is_flag=True, help="Show the values before and after; write nothing.")
@wide_option
@json_option
def correct(
    file: Path,
    symbol: str,
    timeframe: str,
    reason: str,
    author: str | None,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Replace stored candles by those of FILE: CSV with a header, Parquet (.parquet), or - for CSV on stdin.

    The columns are ts (the open, UTC where no zone is given) and any of open, high, low, close, volume; other fields
    keep their stored values. An empty volume means that there is none. The file is valid as a whole or changes
    nothing (exit code 1). Corrected candles are pinned: no sync replaces them, not even --refetch --force, until
    `corrections release` does. `batches undo` takes a correction back.
    """
    from fks_backfill_dagster.pipeline.corrections import Statement
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    with usage():
        Catalog(settings).find_series(symbol, timeframe)  # before the file is read, and a database is started
        statement = Statement(named_author(author), given_reason(reason), _name(file))
        rows = _rows(file)
    return _apply(settings, symbol, timeframe, rows, statement, dry_run, as_json)


def _apply(
    settings: Settings,
    symbol: str,
    timeframe: str,
    rows: CorrectionRows,
    statement: Statement,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Returns the exit code."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.domain.corrections import CorrectionError
    from fks_backfill_dagster.pipeline.corrections import correct
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.queries import stored_series

    catalog = Catalog(settings)
    with open_database(settings) as database:
        stored = stored_series(database)
        series = catalog.find_series(symbol, timeframe, stored)
        if code := report_code(catalog, Chosen((series,), many=False), stored):
            return code
        dates = catalog.closed(series)
        try:
            done = correct(database, series, rows, statement, now(), closed_dates=dates, dry_run=dry_run)
        except CorrectionError as error:
            if as_json:
                print_json(documents.refused_correction(series, error))
            log_problems(statement.source, "line", error)
            return 1
    if as_json:
        print_json(documents.corrected(series, done))
    else:
        _print(series, done, dry_run)
    return 0


def _name(file: Path) -> str:
    return "stdin" if str(file) == "-" else file.name


def _rows(file: Path) -> CorrectionRows:
    """Raises FileError, a ValueError, for a file that is no correction file."""
    from fks_backfill_dagster.files.corrections import LARGEST_BYTES, read_csv, read_parquet

    name, most = _name(file), LARGEST_BYTES + 1
    try:
        if str(file) == "-":
            return read_csv(sys.stdin.buffer.read(most), name)
        with file.open("rb") as opened:
            data = opened.read(most)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
    return (read_parquet if file.suffix.lower() == ".parquet" else read_csv)(data, name)


# Output ----------------------------------------------------------------------------------------------------


def _print(series: Series, done: Corrected, dry_run: bool) -> None:
    changes = done.changes
    if dry_run:
        _print_changes(done)
    counts = f"{changes.inserted:,} inserted, {changes.updated:,} updated, {changes.unchanged:,} unchanged"
    if dry_run:
        print_line(f"{series}: would be {counts}; nothing was written.")
    elif done.batch is None:
        print_line(f"{series}: {counts}: the file holds the stored values, and pins nothing.")
    else:
        print_line(
            f"{series}: {counts}, pinned, batch {done.batch}; `fks-backfill batches undo {done.batch}` undoes it."
        )


def _print_changes(done: Corrected) -> None:
    from fks_backfill_dagster.domain.candles import FIELDS
    from fks_backfill_dagster.domain.timeframe import to_datetime

    before, after = (
        candles.take(slice(0, MOST_ROWS)) for candles in (done.changes.before, done.changes.after)
    )
    rows = []
    for place, ts in enumerate(after.ts.tolist()):
        pairs = [(getattr(before, name)[place], getattr(after, name)[place]) for name in FIELDS]
        rows.append((to_datetime(ts), *(_change(was, becomes) for was, becomes in pairs)))
    print_table(("ts (UTC)", *FIELDS), rows)
    if (more := len(done.changes.after) - len(rows)) > 0:
        print_line(f"and {more:,} more")


def _change(was: float, becomes: float) -> str:
    """One value where both are the same."""
    old, new = (("-" if value != value else f"{value:.12g}") for value in (was, becomes))
    return new if old == new else f"{old} -> {new}"
