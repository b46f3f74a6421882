"""The group `corrections`: former values of candles, and the release of pinned ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import Chosen, any_series, choose_stored, report_code, usage
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
from fks_backfill_dagster.cli.times import check_order, window_option

if TYPE_CHECKING:
    from fks_backfill_dagster.store.corrections import CorrectionInfo


@click.group()
def corrections() -> None:
    """Replaced values of candles: list them, release what a person has corrected."""


@corrections.command(
    "list", epilog=example("corrections list", "corrections list BTC/USDT 1h --pinned --json")
)
@any_series
@window_option
@click.option("--pinned", is_flag=True, help="Only the stored values that no sync replaces.")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="How many of the newest corrections.",
)
@wide_option
@json_option
def list_corrections(
    names: tuple[str, ...],
    everything: bool,
    start: int | None,
    end: int | None,
    pinned: bool,
    limit: int,
    as_json: bool,
) -> int:
    """List replaced values, newest first: before and after, source, reason, author.

    Those of refetches, withdrawals and undos as well as those of a person. Without arguments of all series.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.corrections import corrections as read
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    catalog = Catalog(settings)
    with usage():
        check_order(start, end)
    with open_database(settings) as database:
        stored = stored_series(database)
        chosen = choose_stored(catalog, names, everything, stored)
        if code := report_code(catalog, chosen, stored):
            return code
        found = read(database, chosen.series, start, end, pinned=pinned, limit=limit)
    if as_json:
        print_json([documents.correction(one) for one in found])
    else:
        _print(found)
    return 0


def _print(found: Sequence[CorrectionInfo]) -> None:
    rows = [
        (
            f"{one.symbol} {one.timeframe}",
            one.ts,
            _changed(one.close_before, one.close_after),
            _changed(one.volume_before, one.volume_after),
            "pinned" if one.pinned else "-",
            one.source if one.author is None else f"{one.author}: {one.origin}",
            one.reason,
            one.batch,
            one.corrected_at,
        )
        for one in found
    ]
    header = ("series", "ts (UTC)", "close", "volume", "pin", "source", "reason", "batch", "corrected (UTC)")
    print_table(header, rows)
    if not found:
        log("No corrections.")


def _changed(before: float | None, after: float | None) -> str:
    old, new = ("-" if value is None else f"{value:.12g}" for value in (before, after))
    return new if old == new else f"{old} -> {new}"


@corrections.command(
    "release",
    epilog=example("corrections release BTC/USDT 1h", "corrections release BTC/USDT 1h --start 2024-01-05"),
)
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframe", shell_complete=complete_timeframe)
@window_option
@json_option
def release(symbol: str, timeframe: str, start: int | None, end: int | None, as_json: bool) -> int:
    """Release the pinned candles of a range, without --start and --end all of the series.

    Their values stay until a sync that requests them (`backfill --refetch`) gets others.
    """
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series
    from fks_backfill_dagster.store.writer.correction import release_pins

    settings = load_settings()
    catalog = Catalog(settings)
    with usage():
        catalog.find_series(symbol, timeframe)
        check_order(start, end)
    with open_database(settings) as database:
        stored = stored_series(database)
        series = catalog.find_series(symbol, timeframe, stored)
        if code := report_code(catalog, Chosen((series,), many=False), stored):
            return code
        released = release_pins(database, series, start, end)
    if as_json:
        print_json({"symbol": series.symbol, "timeframe": series.timeframe.value, "released": released})
    else:
        print_line(f"{series}: {many(released, 'candle')} released.")
    return 0
