"""The group `quarantine`: rejected rows, and decisions about them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import any_series, choose_stored, report_code, usage
from fks_backfill_dagster.cli.decisions import given_reason, log_problems, named_author
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
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.store.quarantine import QuarantinedRow

_IDS = click.argument("ids", metavar="ID...", nargs=-1, required=True, type=click.IntRange(1, 2**63 - 1))
_REASON = click.option("--reason", required=True, metavar="TEXT", help="Why; it is kept with the row.")
_AUTHOR = click.option("--author", metavar="NAME", help="Who decides; by default the user of this account.")

_VALUES = ("open", "high", "low", "close", "volume")


@click.group()
def quarantine() -> None:
    """Rejected rows: list them, show their neighbours, release or drop them."""


@quarantine.command(
    "list", epilog=example("quarantine list", "quarantine list BTC/USDT 1h --reason splice --json")
)
@any_series
@click.option("--reason", metavar="RULE", help="Only rows rejected by this rule, such as high_low or splice.")
@click.option("--decided", is_flag=True, help="Those that were released or dropped, instead of the others.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many, last seen first."
)
@wide_option
@json_option
def list_rows(
    names: tuple[str, ...], everything: bool, reason: str | None, decided: bool, limit: int, as_json: bool
) -> int:
    """List the rejected rows that wait for a decision, last seen first. Without arguments those of all series."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.domain.quality import Reason
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.quarantine import quarantined
    from fks_backfill_dagster.store.queries import stored_series

    if reason is not None and reason not in list(Reason):
        raise click.UsageError(f"{reason!r} is no rule; the rules are {', '.join(Reason)}")
    settings = load_settings()
    catalog = Catalog(settings)
    with open_database(settings) as database:
        stored = stored_series(database)
        chosen = choose_stored(catalog, names, everything, stored)
        if code := report_code(catalog, chosen, stored):
            return code
        found = quarantined(database, chosen.series, reason=reason, decided=decided, limit=limit)
    if as_json:
        print_json([documents.quarantined(one) for one in found])
        return 0
    _print_rows(found)
    if not found:
        log("No rows in quarantine.")
    return 0


@quarantine.command("show", epilog=example("quarantine show 17", "quarantine show 17 18 --json"))
@_IDS
@wide_option
@json_option
def show(ids: tuple[int, ...], as_json: bool) -> None:
    """Show rejected rows with the stored candles around them."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.quarantine import neighbours

    with open_database(load_settings()) as database:
        found = [(row, neighbours(database, row)) for row in _existing(database, ids)]
    if as_json:
        print_json(
            [documents.quarantined(row) | {"stored": documents.neighbours(near)} for row, near in found]
        )
        return
    for row, near in found:
        _print_rows([row])
        lines = [
            (one.ts, *map(_number, (getattr(one, name) for name in _VALUES)), one.provider) for one in near
        ]
        print_table(("stored (UTC)", *_VALUES, "provider"), lines)


@quarantine.command("release", epilog=example("quarantine release 17 --reason 'the spike was real'"))
@_IDS
@_REASON
@_AUTHOR
@json_option
def release(ids: tuple[int, ...], reason: str, author: str | None, as_json: bool) -> int:
    """Store rejected rows as corrections: with their own batch, pinned, to be undone by `batches undo`.

    A row that breaks a rule of candles itself (the grid, high and low, not closed) is refused, and then nothing is
    written (exit code 1).
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.domain.corrections import CorrectionError
    from fks_backfill_dagster.pipeline.quarantine import release as apply
    from fks_backfill_dagster.settings.load import load_settings

    with usage():
        who, why = named_author(author), given_reason(reason)
    with open_database(load_settings()) as database:
        rows = _undecided(database, ids)
        try:
            done = apply(database, rows, who, why, now())
        except CorrectionError as error:
            if as_json:
                print_json(documents.refused_release(error))
            log_problems("quarantine", "row", error)
            return 1
    if as_json:
        print_json(documents.released(done))
        return 0
    for one in done:
        batch = (
            "nothing differed from what is stored" if one.done.batch is None else f"batch {one.done.batch}"
        )
        print_line(f"{one.series}: {many(len(one.ids), 'row')} released, {batch}.")
    return 0


@quarantine.command("drop", epilog=example("quarantine drop 17 18 --reason 'cut off the minute'"))
@_IDS
@_REASON
@_AUTHOR
@json_option
def drop(ids: tuple[int, ...], reason: str, author: str | None, as_json: bool) -> int:
    """Record that rejected rows are wrong. They stay, with who decided it and why, and are no longer listed."""
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.writer.quarantine import drop_rows

    with usage():
        who, why = named_author(author), given_reason(reason)
    with open_database(load_settings()) as database:
        rows = _undecided(database, ids)
        dropped = drop_rows(database, [row.id for row in rows], who, why)
    if as_json:
        print_json({"dropped": dropped})
    else:
        print_line(f"{many(dropped, 'row')} dropped.")
    return 0


def _existing(database: Database, ids: Sequence[int]) -> list[QuarantinedRow]:
    from fks_backfill_dagster.store.quarantine import rows_by_id

    found = rows_by_id(database, ids)
    if missing := sorted(set(ids) - {row.id for row in found}):
        raise click.UsageError(
            f"there is no row {missing[0]} in quarantine; see `fks-backfill quarantine list`"
        )
    return found


def _undecided(database: Database, ids: Sequence[int]) -> list[QuarantinedRow]:
    found = _existing(database, ids)
    for row in found:
        if row.decision is not None:
            raise click.UsageError(
                f"row {row.id} was {row.decision} before, by {row.decided_by}: {row.decision_reason}"
            )
    return found


def _print_rows(rows: Sequence[QuarantinedRow]) -> None:
    lines = [
        (
            row.id,
            str(row.series),
            row.ts,
            *map(_number, (getattr(row, name) for name in _VALUES)),
            row.reason,
            row.provider,
            row.seen,
            row.last_seen_at.replace(microsecond=0),
            "-" if row.decision is None else f"{row.decision} by {row.decided_by}: {row.decision_reason}",
        )
        for row in rows
    ]
    header = ("id", "series", "ts (UTC)", *_VALUES, "rule", "provider", "seen", "last (UTC)", "decision")
    print_table(header, lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.12g}"
