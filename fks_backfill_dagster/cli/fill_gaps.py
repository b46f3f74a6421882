"""`fks-backfill fill-gaps`: asks for the gaps of the ledger at once, however lately nobody could fill them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    any_series,
    choose,
    sooner,
    tell_never_synced,
    usage,
    window_option,
)
from fks_backfill_dagster.cli.output import (
    answer,
    answer_json,
    answer_table,
    example,
    json_option,
    many,
    tell,
)

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
@json_option
def fill_gaps(
    names: tuple[str, ...], everything: bool, start: int | None, end: int | None, as_json: bool
) -> int:
    """Ask every provider for the gaps that are known; without arguments for those of all configured series.

    What closed since the last sync is brought by `backfill`, and so is history that was never synced.
    Exit code 0 only if nothing that traded is missing of any of these gaps any more.
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

        answer_json([documents.filled_gap(*one) for one in gaps])
    else:
        _answer(gaps)
    return 0 if not broken and all(report.complete for report in found) else 1


def _fill_all(
    settings: Settings, names: tuple[str, ...], everything: bool, start: int | None, end: int | None
) -> tuple[list[FillReport], bool]:
    """The reports of the series, and whether one is lacking."""
    from fks_backfill_dagster.app import open_app
    from fks_backfill_dagster.cli.backfill import interruptible, waiting
    from fks_backfill_dagster.cli.progress import watched
    from fks_backfill_dagster.pipeline.fill import fill_gaps
    from fks_backfill_dagster.store.errors import SeriesChanged, StoreError
    from fks_backfill_dagster.store.queries import stored_series

    found: list[FillReport] = []
    broken = False
    told: set[str] = set()
    with open_app(settings, waiting) as app, interruptible(app):
        stored = stored_series(app.database)
        if not (names or settings.symbols):
            return [], False
        # Who was removed from the settings is asked for by name only.
        chosen = choose(settings, names, everything or not names, stored if names else ())
        if names:
            tell_never_synced(chosen, stored)
        for series in chosen.series:
            try:
                with watched(told=told) as listen:
                    until = sooner(end, settings.end_of(series))
                    report = fill_gaps(
                        app.context, series, settings.priority(series), start, until, listen=listen
                    )
            except (SeriesChanged, ValueError) as error:  # of this series: the others go on
                tell(f"Error: {error}")
                broken = True
                continue
            except StoreError as error:  # of the database, which is the same for all
                tell(f"Error: {error}")
                return found, True
            found.append(report)
            for message in report.sync.errors:
                tell(f"Error: {series}: {message}")
    return found, broken


def _answer(gaps: Sequence[tuple[Series, FilledGap]]) -> None:
    if not gaps:
        answer("No gaps to fill.")
        return
    rows = [_row(*one) for one in gaps]
    answer_table(("series", "start", "end", "filled", "of", "from", "left"), rows)
    candles = sum(one.filled for _, one in gaps)
    answer(
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
        filled.error,
    )
