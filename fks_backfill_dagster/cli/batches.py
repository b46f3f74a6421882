"""The group `batches`: lineage of the committed batches, and undo."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import any_series, choose
from fks_backfill_dagster.cli.output import (
    confirm,
    example,
    is_on_terminal,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    short,
    wide_option,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.store.queries import BatchInfo


@click.group()
def batches() -> None:
    """Lineage: list the committed batches, undo one."""


@batches.command("list", epilog=example("batches list", "batches list BTC/USDT 1h --limit 5 --json"))
@any_series
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="How many of the newest batches.",
)
@wide_option
@json_option
def list_batches(names: tuple[str, ...], everything: bool, limit: int, as_json: bool) -> None:
    """List the committed batches, newest first: provider, transport, range, source, host.

    Without arguments those of all series.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store import queries

    settings = load_settings()
    with open_database(settings) as database:
        if names:
            chosen = choose(Catalog(settings), names, everything, queries.stored_series(database)).series
            found = [one for series in chosen for one in queries.batches(database, series, limit)]
            found = sorted(found, key=lambda one: one.id, reverse=True)[:limit]
        else:
            found = queries.batches(database, None, limit)
    if as_json:
        print_json([documents.batch(one) for one in found])
        return
    columns = (
        "id",
        "series",
        "from",
        "range (UTC)",
        "inserted",
        "updated",
        "committed (UTC)",
        "note",
        "source",
        "host",
    )
    print_table(columns, [_row(one) for one in found])
    if not found:
        log("No batches.")


def _row(one: BatchInfo) -> tuple[object, ...]:
    return (
        one.id,
        f"{one.symbol} {one.timeframe}",
        f"{one.provider} {one.transport}",
        f"{short(one.range_start)} .. {short(one.range_end)}",
        one.inserted,
        one.updated,
        one.committed_at,
        _note(one),
        one.source,
        one.host,
    )


def _note(one: BatchInfo) -> str:
    """What the other columns do not say: an undo, whether it was undone, who corrected and why."""
    notes = [
        "" if one.undoes is None else f"undo of {one.undoes}",
        "" if one.author is None else f"{one.author}: {one.reason}",
        "" if one.undone_by is None else f"undone by {one.undone_by}",
    ]
    return ", ".join(filter(None, notes)) or "-"


@batches.command("undo", epilog=example("batches undo 42", "batches undo 42 --yes"))
@click.argument("batch_id", metavar="ID", type=click.IntRange(1, 2**31 - 1))
@click.option("--yes", is_flag=True, help="Undo without a question, which is asked on a terminal only.")
@json_option
def undo(batch_id: int, yes: bool, as_json: bool) -> int:
    """Undo a batch: remove inserted candles, restore corrected values and withdrawn candles.

    The undo is a batch of its own, and undoing it restores what it has removed. Removed candles become an open gap,
    which names the undo, and which the next backfill requests.
    """
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.domain.grid import grid_of
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store import queries
    from fks_backfill_dagster.store.ledger import series_id
    from fks_backfill_dagster.store.writer.undo import undo_batch

    with open_database(load_settings()) as database:
        found = queries.series_of_batch(database, batch_id)
        if found is None:
            raise click.UsageError(f"there is no batch {batch_id}; see `fks-backfill batches list`")
        if not yes and is_on_terminal():
            _confirm_undo(database, found, batch_id)
        with database.begin() as connection:
            identity = series_id(connection, found)
        assert identity is not None
        done = undo_batch(database, found, identity, batch_id, grid_of(found))
    if as_json:
        print_json(
            {
                "batch": batch_id,
                "symbol": found.symbol,
                "timeframe": found.timeframe.value,
                "candles_taken_back": done.updated,
                "missing": done.missing,
            }
        )
    else:
        print_line(f"{found}: {many(done.updated, 'candle')} of batch {batch_id} taken back.")
    return 0


def _confirm_undo(database: Database, series: Series, batch_id: int) -> None:
    from fks_backfill_dagster.store import queries

    one = next(one for one in queries.batches(database, series) if one.id == batch_id)
    log(
        f"Batch {batch_id} of {series}, from {one.provider} {one.transport}, committed {short(one.committed_at)} UTC:"
        f" {many(one.inserted, 'candle')} inserted, {one.updated:,} updated in {short(one.range_start)} .."
        f" {short(one.range_end)}."
    )
    confirm("Undo it?", "Nothing was undone; --yes undoes without a question.")
