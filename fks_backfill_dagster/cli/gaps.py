"""The command `gaps`: the gap ledger of series."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    any_series,
    choose,
    log_never_synced,
    named,
    report_code,
    usage,
)
from fks_backfill_dagster.cli.messages import shown
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    log,
    many,
    print_json,
    print_table,
    verbose_option,
    wide_option,
)
from fks_backfill_dagster.cli.status import settle_closures
from fks_backfill_dagster.cli.times import sooner, window_option

if TYPE_CHECKING:
    from fks_backfill_dagster.cli.arguments import Chosen
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.gaps import FoundGap
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.store.database import Database


@click.command(
    epilog=example(
        "gaps",
        "gaps BTC/USDT 1h --start -30d",
        "gaps BTC/USDT 1h --start 2024-01 --end 2024-02 --json",
    )
)
@any_series
@window_option
@verbose_option
@wide_option
@json_option
def gaps(names: tuple[str, ...], everything: bool, start: int | None, end: int | None, as_json: bool) -> int:
    """List the gaps of a series, in every state but filled; without arguments of all series.

    Without --start from the oldest stored candle, without --end to the last closed one. Candles closed
    since the last sync are an open gap; history that was never synced is pending, not a gap. For several
    series, outages of whole venues are reported as well, once each. Exit code 2 for a series that is
    neither configured nor stored, else 0.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    catalog = Catalog(settings)
    if start is not None and end is not None:
        with usage():
            TimeRange(start, end)
    with open_database(settings) as database:
        stored = stored_series(database)
        chosen = choose(catalog, names, everything or not names, stored)
        settle_closures(settings, database, chosen)
        found = _find(catalog, database, chosen, start, end)
    code = report_code(catalog, chosen, stored)
    if not code:
        log_never_synced(chosen, stored)
    for line in found.remarks:
        log(line)
    if as_json:
        print_json([documents.gap_of(*one) if chosen.many else documents.gap(one[1]) for one in found.gaps])
        return code
    rows = [_gap_row(series, gap) for series, gap in found.gaps]
    print_table(("series", "start (UTC)", "end (UTC)", "missing", "status", "evidence"), rows)
    if stored and not found.gaps and not code:
        log("No gaps.")
    return code


@dataclass(frozen=True, slots=True)
class _Found:
    """Gaps by series, and sentences about what is not in the list: earlier gaps, outages of venues."""

    gaps: list[tuple[Series, FoundGap]]
    remarks: list[str]


def _find(catalog: Catalog, database: Database, chosen: Chosen, start: int | None, end: int | None) -> _Found:
    from fks_backfill_dagster.app import now
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.pipeline.gaps import earlier_gaps, find_gaps
    from fks_backfill_dagster.pipeline.outages import find_outages

    present = now()
    found = [
        (s, gap)
        for s in chosen.series
        for gap in find_gaps(database, s, present, start, sooner(end, catalog.end_of(s)))
    ]
    early = {} if start is not None else {s: earlier_gaps(database, s, present) for s in chosen.series}
    remarks = _earlier({series: missing for series, missing in early.items() if missing})
    if chosen.many:
        past = present if end is None else end
        window = TimeRange(min(start or 0, past), past)
        remarks += map(str, find_outages(database, chosen.series, window, catalog.end_of))
    return _Found(found, remarks)


def _earlier(missing: Mapping[Series, int]) -> list[str]:
    """At most one sentence about the candles that are missing before the oldest stored one of each series."""
    if not missing:
        return []
    where = str(next(iter(missing))) if len(missing) == 1 else f"{many(len(missing), 'series')}"
    names = "" if len(missing) == 1 else f" ({named(list(missing))})"
    return [
        f"{where}: {many(sum(missing.values()), 'candle')} missing before the oldest stored one{names}; list them with"
        " --start 1970."
    ]


def _gap_row(series: Series, found: FoundGap) -> tuple[object, ...]:
    from fks_backfill_dagster.documents import NOT_ASKED
    from fks_backfill_dagster.domain.timeframe import to_datetime

    row = found.row
    responses = "; ".join(f"{e.provider}: {e.text}" for e in row.evidence)
    return (
        series,
        to_datetime(row.start),
        to_datetime(row.end),
        row.missing,
        row.status.value,
        shown(responses) if found.asked else NOT_ASKED,
    )
