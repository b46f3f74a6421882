"""The group `findings`: suspicious stored candles, found, listed, shown and decided about."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import any_series, choose, choose_stored, named, report_code, usage
from fks_backfill_dagster.cli.decisions import named_author
from fks_backfill_dagster.cli.output import (
    example,
    json_option,
    log,
    many,
    print_json,
    print_line,
    print_table,
    short,
    wide_option,
)
from fks_backfill_dagster.cli.times import check_order, window_option

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.ledger.findings import Finding
    from fks_backfill_dagster.pipeline.evaluate import Evaluated
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.store.findings import StoredFinding

# The names are fixed by the tables; the ledger is imported by the commands only, since it needs numpy.
_ACTIVE = ("open", "confirmed", "accepted")
_STATUSES = (*_ACTIVE, "corrected", "resolved")
_RULES = (
    "spike",
    "level_shift",
    "stuck",
    "volume_outlier",
    "cross_timeframe",
    "cross_source",
    "wrong_symbol",
    "unadjusted_split",
    "unit_change",
)
AROUND = 5
"""Candles on either side of a finding that `show` prints."""

_number = click.IntRange(1, 2**63 - 1)
_numbers = click.argument("numbers", metavar="ID...", type=_number, nargs=-1, required=True)


@click.group()
def findings() -> None:
    """Findings: suspicious stored candles, and the decisions about them."""


# check --------------------------------------------------------------------------------------------------


@findings.command(
    "check",
    epilog=example(
        "findings check", "findings check BTC/USDT 1m --start -30d", "findings check --all 1h --json"
    ),
)
@any_series
@window_option
@json_option
def check(names: tuple[str, ...], everything: bool, start: int | None, end: int | None, as_json: bool) -> int:
    """Evaluate stored candles, and record what is suspicious about them, or no longer is.

    Without arguments every stored series; without --start from the oldest stored candle, without --end to the newest.
    The rule is `spike`: a price that goes out and comes back within one candle. A candle without a neighbour on either
    side (at the edge of a session, beside a gap, the newest one) is not evaluated. No candle is changed, no request is
    sent. Exit code 1 if a finding of a series is open, or if none of its candles could be evaluated.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.findings import open_findings
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    with usage():
        check_order(start, end)
    with open_database(settings) as database:
        stored = stored_series(database)
        catalog = Catalog(settings)
        chosen = choose_stored(catalog, names, everything, stored)
        if code := report_code(catalog, chosen, stored):
            return code
        _log_never_synced(chosen.series, stored)
        known = {one.key for one in stored}
        results = [_evaluated(database, one, start, end) for one in chosen.series if one.key in known]
        still_open = open_findings(database)
    done = [one for one in results if one is not None]
    if as_json:
        print_json([documents.evaluated(one, still_open.get(one.series.key, 0)) for one in done])
    else:
        for one in done:
            print_line(_text_of_check(one, still_open.get(one.series.key, 0)))
    return _code_of_check(done, failed=len(done) < len(results), still_open=still_open)


def _log_never_synced(series: Sequence[Series], stored: Sequence[Series]) -> None:
    known = {one.key for one in stored}
    if never := [one for one in series if one.key not in known]:
        log(
            f"{named(never)}: never synced, so there is no candle to evaluate; run `fks-backfill backfill` first."
        )


def _evaluated(database: Database, series: Series, start: int | None, end: int | None) -> Evaluated | None:
    """The result for one series; None, with a message, if its calendar is unknown."""
    from fks_backfill_dagster.app import now
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.timeframe import to_micros
    from fks_backfill_dagster.pipeline.evaluate import Evaluated, evaluate_series
    from fks_backfill_dagster.store.queries import sync_status

    (state,) = sync_status(database, series)
    if state.oldest_data_time is None or state.newest_data_time is None:
        return Evaluated(series, TimeRange(0, 0))
    oldest, newest = to_micros(state.oldest_data_time), to_micros(state.newest_data_time)
    first = max(oldest, oldest if start is None else start)
    close = newest + series.timeframe.micros
    past = close if end is None else min(close, end)
    if first >= past:
        return Evaluated(series, TimeRange(first, first))
    try:
        return evaluate_series(database, series, TimeRange(first, past), now())
    except ValueError as error:
        log(f"Error: {series}: {error}")
        return None


def _text_of_check(found: Evaluated, still_open: int) -> str:
    changes = [
        many(number, "finding") + f" {what}"
        for number, what in (
            (found.new, "new"),
            (found.reopened, "open again"),
            (found.corrected, "corrected"),
            (found.resolved, "resolved"),
        )
        if number
    ]
    return (
        f"{found.series}: {found.evaluated:,} of {many(found.candles, 'candle')} evaluated:"
        f" {', '.join(changes) or 'no change'}; {still_open:,} open"
    )


def _code_of_check(done: Sequence[Evaluated], *, failed: bool, still_open: dict[tuple[str, str], int]) -> int:
    if not sum(one.evaluated for one in done):
        log("No candle could be evaluated: see `fks-backfill status` for what is stored.")
        return 1
    unknown = [one.series for one in done if one.candles and not one.evaluated]
    if unknown:
        log(f"{named(unknown)}: no candle could be evaluated: too few are stored beside one another.")
    return int(failed or bool(unknown) or any(still_open.get(one.series.key) for one in done))


# list, show ---------------------------------------------------------------------------------------------


@findings.command(
    "list",
    epilog=example("findings list", "findings list BTC/USDT 1h --status resolved", "findings list --json"),
)
@any_series
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice(_STATUSES),
    help="Findings in this state; repeat it for several. Without it those that are open, confirmed or accepted.",
)
@click.option(
    "--rule", "rules", multiple=True, type=click.Choice(_RULES), help="Findings of this rule; may repeat."
)
@wide_option
@json_option
def list_findings(
    names: tuple[str, ...], everything: bool, statuses: tuple[str, ...], rules: tuple[str, ...], as_json: bool
) -> int:
    """List findings; without arguments of all series.

    Exit code 2 for a series that is neither configured nor stored, else 0.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.ledger.findings import FindingStatus, Rule
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store import findings as ledger
    from fks_backfill_dagster.store.queries import stored_series

    settings = load_settings()
    catalog, code = Catalog(settings), 0
    chosen_states = [FindingStatus(one) for one in statuses or _ACTIVE]
    with open_database(settings) as database:
        series = None
        if names or everything:
            stored = stored_series(database)
            chosen = choose(catalog, names, everything, stored)
            code = report_code(catalog, chosen, stored)
            series = chosen.series
            _log_never_synced(chosen.series, stored)
        found = ledger.findings(database, series, chosen_states, [Rule(one) for one in rules])
    if as_json:
        print_json([documents.finding(one) for one in found])
        return code
    print_table(_COLUMNS, [_row(one) for one in found])
    if not found and not code:
        log(f"No findings that are {', '.join(one.value for one in chosen_states)}.")
    return code


_COLUMNS = (
    "id",
    "series",
    "start (UTC)",
    "candles",
    "rule",
    "status",
    "first seen (UTC)",
    "evidence",
    "verdict",
)


def _row(found: StoredFinding) -> tuple[object, ...]:
    from fks_backfill_dagster.domain.timeframe import to_datetime

    one = found.finding
    return (
        one.number,
        str(found.series),
        to_datetime(one.start),
        one.candles,
        one.rule.value,
        one.status.value,
        to_datetime(one.first_seen_at),
        _evidence(one),
        None if one.verdict is None else f"{one.verdict.by}: {one.verdict.reason}",
    )


def _evidence(found: Finding) -> str:
    known = found.evidence
    if {"price", "leg_pct", "factor", "usual_pct"} <= known.keys():
        return (
            f"{known['price']} {known['leg_pct']} % away,"
            f" {known['factor']} times the usual {known['usual_pct']} %"
        )
    return ", ".join(f"{name} {value}" for name, value in known.items())


@findings.command("show", epilog=example("findings show 42", "findings show 42 --json"))
@click.argument("number", metavar="ID", type=_number)
@click.option(
    "--around",
    type=click.IntRange(0, 1_000),
    default=AROUND,
    show_default=True,
    help="Candles before and after it.",
)
@json_option
def show(number: int, around: int, as_json: bool) -> None:
    """Show a finding with its evidence, and the stored candles around it."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.findings import candles_around, findings_by_number

    with open_database(load_settings()) as database:
        with database.begin() as connection:
            found = findings_by_number(connection, [number]).get(number)
        if found is None:
            raise _unknown(number)
        window = TimeRange(found.finding.start, found.finding.end)
        candles = candles_around(database, found.series, window, around)
    if as_json:
        print_json(documents.finding(found) | {"around": documents.candles(candles)})
        return
    _print_finding(found)
    rows = [
        (
            "*" if window.contains(int(ts)) else "",
            _moment(int(ts)),
            *("-" if math.isnan(value) else f"{value:.10g}" for value in values),
        )
        for ts, *values in zip(*(column.tolist() for column in candles.columns()), strict=True)
    ]
    print_table(("", "open time (UTC)", "open", "high", "low", "close", "volume"), rows)


def _moment(micros: int) -> str:
    from fks_backfill_dagster.domain.timeframe import to_datetime

    return short(to_datetime(micros))


def _print_finding(found: StoredFinding) -> None:
    one = found.finding
    print_line(
        f"Finding {one.number}: {one.rule} in {found.series}, {_moment(one.start)} .. {_moment(one.end)} UTC,"
        f" {many(one.candles, 'candle')}"
    )
    print_line(
        f"{one.severity}, {one.status}; first seen {_moment(one.first_seen_at)}, last {_moment(one.last_seen_at)}"
    )
    if text := _evidence(one):
        print_line(text)
    if one.verdict is not None:
        print_line(f"accepted by {one.verdict.by} at {_moment(one.verdict.at)}: {one.verdict.reason}")


# accept, reopen -----------------------------------------------------------------------------------------


@findings.command("accept", epilog=example('findings accept 42 43 --reason "flash crash, in all sources"'))
@_numbers
@click.option("--reason", required=True, help="Why the candles are right as they are.")
@click.option("--by", help="Who accepts; without it the user of this account.")
@json_option
def accept(numbers: tuple[int, ...], reason: str, by: str | None, as_json: bool) -> None:
    """Accept findings: the candles are right, or stay although they are not.

    An acceptance holds for the values that the candles have now: if they change, the finding is corrected, and a new
    one is recorded if the new values are suspicious as well. All of the findings are accepted, or none.
    """
    from fks_backfill_dagster.app import now
    from fks_backfill_dagster.ledger.findings import Verdict, accepted

    if not reason.strip():
        raise click.UsageError("--reason is empty: state why the candles are right")
    with usage():
        who = named_author(by, option="--by", does="accepts")
    verdict = Verdict(who, now(), reason.strip())
    _decide(numbers, lambda one: accepted(one, verdict), as_json)


@findings.command("reopen", epilog=example("findings reopen 42"))
@_numbers
@json_option
def reopen(numbers: tuple[int, ...], as_json: bool) -> None:
    """Withdraw the acceptance or the confirmation of findings: they are open again.

    The former verdict stays in the evidence. All of the findings are reopened, or none.
    """
    from fks_backfill_dagster.ledger.findings import reopened

    _decide(numbers, reopened, as_json)


def _decide(numbers: Sequence[int], change: Callable[[Finding], Finding], as_json: bool) -> None:
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.writer.findings import decide

    with open_database(load_settings()) as database, usage():
        try:
            decided = decide(database, numbers, change)
        except KeyError as error:
            raise _unknown(error.args[0]) from None
    if as_json:
        print_json([documents.finding(one) for one in decided])
        return
    for one in decided:
        print_line(f"Finding {one.finding.number} of {one.series}: {one.finding.status}.")


def _unknown(number: int) -> click.UsageError:
    context = click.get_current_context(silent=True)
    return click.UsageError(f"there is no finding {number}; see `fks-backfill findings list`", context)
