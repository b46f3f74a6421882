"""`fks-backfill fill-gaps`: requests the gaps of the ledger at once, regardless of their back-off."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import any_series, choose, log_never_synced, usage
from fks_backfill_dagster.cli.messages import Messages, shown, waiting_logger
from fks_backfill_dagster.cli.output import (
    example,
    is_verbose,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    verbose_option,
    wide_option,
)
from fks_backfill_dagster.cli.syncs import interruptible
from fks_backfill_dagster.cli.times import sooner, window_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.fill import FilledGap, FillReport
    from fks_backfill_dagster.settings.model import Settings


@click.command(
    "fill-gaps", epilog=example("fill-gaps", "fill-gaps BTC/USDT 1h", "fill-gaps '*/USDT' 1m --json")
)
@any_series
@window_option
@verbose_option
@wide_option
@json_option
def fill_gaps(
    names: tuple[str, ...], everything: bool, start: int | None, end: int | None, as_json: bool
) -> int:
    """Request the gaps of the ledger from every eligible provider; without arguments of all configured series.

    Candles closed since the last sync, and history that was never synced, are fetched by `backfill`.
    Exit code 0 only if every candle of these gaps is stored or explained as no-trade.
    """
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    if start is not None and end is not None:
        with usage():
            TimeRange(start, end)
    found, broken = _fill_all(settings, names, everything, start, end)
    gaps = [(report.sync.series, gap) for report in found for gap in report.gaps]
    if as_json:
        from fks_backfill_dagster import documents

        print_json([documents.filled_gap(*one) for one in gaps])
    else:
        _print_report(gaps)
    return 0 if not broken and all(report.complete for report in found) else 1


def _fill_all(
    settings: Settings, names: tuple[str, ...], everything: bool, start: int | None, end: int | None
) -> tuple[list[FillReport], bool]:
    """The reports of the series, and whether one is missing."""
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.cli.progress import watched
    from fks_backfill_dagster.pipeline.fill import fill_gaps
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.errors import SeriesChanged, StoreError
    from fks_backfill_dagster.store.queries import stored_series

    catalog = Catalog(settings)
    found: list[FillReport] = []
    broken = False
    messages = Messages()
    with open_app(settings, waiting_logger()) as app, interruptible(app):
        stored = stored_series(app.database)
        if not (names or catalog.series):
            return [], False
        # Series removed from the settings are requested by name only.
        chosen = choose(catalog, names, everything or not names, stored if names else ())
        if names:
            log_never_synced(chosen, stored)
        for number, series in enumerate(chosen.series, start=1):
            brief = chosen.many and not is_verbose()
            position = f"{number:,} of {len(chosen.series):,}" if brief else None
            try:
                with watched(messages, position=position) as listen:
                    until = sooner(end, catalog.end_of(series))
                    report = fill_gaps(
                        app.context, series, catalog.priority(series), start, until, listen=listen
                    )
            except (SeriesChanged, ValueError) as error:  # concerns this series only
                log(f"Error: {error}")
                broken = True
                continue
            except StoreError as error:  # concerns the database, which all series share
                log(f"Error: {error}")
                return found, True
            found.append(report)
            messages.log_rest(report.sync)
    return found, broken


def _print_report(gaps: Sequence[tuple[Series, FilledGap]]) -> None:
    if not gaps:
        print_line("No gaps to fill.")
        return
    rows = [_row(*one) for one in gaps]
    print_table(("series", "start (UTC)", "end (UTC)", "filled", "of", "from", "left"), rows)
    candles = sum(one.filled for _, one in gaps)
    print_line(
        f"{sum(one.success for _, one in gaps):,} of {many(len(gaps), 'gap')} filled"
        f" with {many(candles, 'candle')}."
    )


def _row(series: Series, filled: FilledGap) -> tuple[object, ...]:
    from fks_backfill_dagster.domain.timeframe import to_datetime

    gap = filled.gap
    return (
        series,
        to_datetime(gap.start),
        to_datetime(gap.end),
        filled.filled,
        gap.missing,
        ", ".join(filled.providers),
        None if filled.error is None else shown(filled.error),
    )
