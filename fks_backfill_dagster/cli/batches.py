"""The group `batches`: lineage of the committed batches, and undo."""

from __future__ import annotations

import click

from fks_backfill_dagster.cli.arguments import (
    usage,
)
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    short,
)


@click.group()
def batches() -> None:
    """Lineage: list the committed batches, undo one."""


@batches.command("list", epilog=example("batches list", "batches list BTC/USDT 1h --limit 5 --json"))
@click.argument("names", nargs=-1, metavar="[SYMBOL TIMEFRAME]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="How many of the newest batches.",
)
@json_option
def list_batches(names: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List the committed batches, newest first: provider, transport, range, source, host."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store import queries

    settings = load_settings()
    catalog = Catalog(settings)
    if len(names) not in (0, 2):
        raise click.UsageError("give a SYMBOL and a TIMEFRAME, or neither")
    with usage():
        wanted = catalog.find_series(names[0], names[1]) if names else None
    with open_database(settings) as database:
        if names:
            wanted = catalog.find_series(names[0], names[1], queries.stored_series(database))
        found = queries.batches(database, wanted, limit)
    if as_json:
        print_json([documents.batch(one) for one in found])
        return
    rows = [
        (
            one.id,
            f"{one.symbol} {one.timeframe}",
            f"{one.provider} {one.transport}",
            f"{short(one.range_start)} .. {short(one.range_end)}",
            one.inserted,
            one.updated,
            one.committed_at,
            one.source,
            one.host,
        )
        for one in found
    ]
    columns = ("id", "series", "from", "range", "inserted", "updated", "committed", "source", "host")
    print_table(columns, rows)
    if not found:
        log("No batches.")


@batches.command("undo", epilog=example("batches undo 42"))
@click.argument("batch_id", metavar="ID", type=click.IntRange(1, 2**31 - 1))
@json_option
def undo(batch_id: int, as_json: bool) -> int:
    """Undo a batch: remove inserted candles, restore corrected values and withdrawn candles.

    The undo is a batch of its own. Removed candles become an open gap, which the next backfill requests.
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
