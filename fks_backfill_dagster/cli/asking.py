"""Commands that tell what is there: `gaps`, `status`, `series`, `batches`; some of them also take back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import (
    any_series,
    choose,
    report_code,
    series_arguments,
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
    short,
    tell,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fks_backfill_dagster.cli.arguments import Chosen
    from fks_backfill_dagster.documents import Document
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.coverage import Coverage
    from fks_backfill_dagster.pipeline.gaps import FoundGap
    from fks_backfill_dagster.providers.base import Provider
    from fks_backfill_dagster.settings import Settings
    from fks_backfill_dagster.store.database import Database
    from fks_backfill_dagster.store.rate_limits import ProviderState
    from fks_backfill_dagster.tables import CoverageRow


# Gaps -------------------------------------------------------------------------------------------------


@click.command(
    epilog=example("gaps BTC/USDT 1h", "gaps BTC/USDT 1h --start 2024-01-01 --end 2024-02-01 --json")
)
@series_arguments
@window_option
@json_option
def gaps(names: tuple[str, ...], everything: bool, start: int | None, end: int | None, as_json: bool) -> int:
    """List the gaps of a series, in every state but filled.

    Without --start from the oldest stored candle, without --end to the last closed one. History
    that was never synced is no gap; what closed since the last sync is an open one. Of several series
    the outages of whole venues are told as well, each once. Exit code 2 for a series that is neither
    configured nor stored, else 0, whatever is missing.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.pipeline.gaps import earlier_gaps, find_gaps
    from fks_backfill_dagster.pipeline.outages import find_outages
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store.queries import stored_series

    settings, present = load_settings(), now()
    if start is not None and end is not None:
        with usage():
            TimeRange(start, end)
    with open_database(settings) as database:
        stored = stored_series(database)
        chosen = choose(settings, names, everything, stored)
        _settle_closures(settings, database, chosen)
        found = [
            (s, gap)
            for s in chosen.series
            for gap in find_gaps(database, s, present, start, sooner(end, settings.end_of(s)))
        ]
        early = [] if start is not None else [(s, earlier_gaps(database, s, present)) for s in chosen.series]
        past = present if end is None else end
        window = TimeRange(min(start or 0, past), past)
        outages = find_outages(database, chosen.series, window, settings.end_of) if chosen.many else ()
    code = report_code(settings, chosen, stored)
    if not code:
        tell_never_synced(chosen, stored)
    for one, missing in early:
        if missing:
            tell(
                f"{one}: {many(missing, 'candle')} missing before its oldest one: see them with --start 1970."
            )
    for outage in outages:
        tell(str(outage))
    if as_json:
        answer_json([documents.gap_of(*one) if chosen.many else documents.gap(one[1]) for one in found])
        return code
    rows = [_gap_row(series, gap) for series, gap in found]
    answer_table(("series", "start", "end", "missing", "status", "evidence"), rows)
    if stored and not found and not code:
        tell("No gaps.")
    return code


def _gap_row(series: Series, found: FoundGap) -> tuple[object, ...]:
    from fks_backfill_dagster.documents import NOT_ASKED
    from fks_backfill_dagster.domain.timeframe import to_datetime

    row = found.row
    words = "; ".join(f"{e.provider}: {e.said}" for e in row.evidence)
    return (
        series,
        to_datetime(row.start),
        to_datetime(row.end),
        row.missing,
        row.status.value,
        words if found.asked else NOT_ASKED,
    )


# Status -----------------------------------------------------------------------------------------------


@click.command(epilog=example("status", "status BTC/USDT 1h --json", "status --check"))
@any_series
@click.option(
    "--check", is_flag=True, help="Exit with 1 if anything is stale, has open gaps or ended in an error."
)
@json_option
def status(names: tuple[str, ...], everything: bool, check: bool, as_json: bool) -> int:
    """Show the coverage of a series and how far it lags; without arguments of all of them.

    `expected`, `stored` and `coverage` are about what was synced; `lag` counts the closed candles since the
    newest stored one. Exit code 2 for a series that is neither configured nor stored, else 0, whatever
    it shows; with --check 1 if a series or a server of `up` needs attention. Errors, and providers in a cool-down,
    are named on stderr.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import closures, freshness_rule, now, open_database, provider_states
    from fks_backfill_dagster.host import keeper
    from fks_backfill_dagster.pipeline.calendars import calendar_changes
    from fks_backfill_dagster.pipeline.coverage import coverage
    from fks_backfill_dagster.pipeline.freshness import Rule
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store.queries import stored_series

    settings, present = load_settings(), now()
    for line in (unkept := keeper.problems(settings.home)):
        tell(line)
    with open_database(settings) as database:
        stored = stored_series(database)
        chosen = choose(settings, names, everything or not names, stored)
        _settle_closures(settings, database, chosen)
        changes = calendar_changes(database, chosen.series)
        # Without a verdict nothing need be known of providers, whose import takes a while.
        rule = freshness_rule(settings) if check else Rule(end_of=settings.end_of, closed=closures(settings))
        found = coverage(database, chosen.series, present, rule)
        silent = [] if check else _silent(settings, database, chosen)
        providers = provider_states(settings, database)
    code = report_code(settings, chosen, stored)
    for name, stands in providers.items():
        tell(f"{name}: {_standing(stands)}")
    for change in dict.fromkeys(changes.values()):
        tell(str(change))
    if check:
        # A series that was taken out of the settings is not kept fresh, so it cannot be stale.
        kept = set(settings.series())
        problems = [
            (one.series, reason) for one in found if (reason := one.problem(kept_fresh=one.series in kept))
        ]
        for series, reason in problems:
            tell(f"{series}: {reason}")
        code = code or int(bool(problems or changes or unkept))
    if as_json:
        shown = [documents.status(one) for one in found]
        answer_json(shown if chosen.many else shown[0])
        return code
    if code != 2:
        _answer_coverage(found, present, total=chosen.many)
        answer(f"Settings: {settings.config_file or 'no file, the defaults'}")
    for one in found:
        if not check and one.status is not None and one.status.error_message:
            tell(f"{one.series}: error: {one.status.error_message}")
    for line in silent:
        tell(line)
    return code


def _settle_closures(settings: Settings, database: Database, chosen: Chosen) -> None:
    """What the settings close counts at once, not from the next sync on; a role that may not write gets a warning."""
    from fks_backfill_dagster.app import settle_closures
    from fks_backfill_dagster.store.errors import StoreError

    try:
        settled = settle_closures(settings, database, chosen.series)
    except StoreError as error:
        tell(f"closed dates of the settings are not applied yet: {error}")
        return
    for one in settled:
        tell(f"{one.series}: {one}")


def _answer_coverage(found: Sequence[Coverage], now: int, *, total: bool) -> None:
    from fks_backfill_dagster import tables

    rows = [_coverage_row(one) for one in found]
    cells = [
        (*row.cells(now), one.status.status if one.status else "not_started")
        for row, one in zip(rows, found, strict=True)
    ]
    if total and rows:
        cells.append((*tables.coverage_total(rows, now), ""))
    answer_table((*tables.COVERAGE, "status"), cells)


def _coverage_row(found: Coverage) -> CoverageRow:
    from fks_backfill_dagster.tables import CoverageRow

    return CoverageRow(
        found.series,
        None if found.status is None else found.counts,
        found.counts.open_gaps,
        found.assessment.freshness.newest,
        found.assessment.freshness.lag,
        found.next_attempt,
    )


def _silent(settings: Settings, database: Database, chosen: Chosen) -> list[str]:
    """A line for every configured series of which no provider has had a candle for long."""
    from fks_backfill_dagster.domain.timeframe import to_datetime
    from fks_backfill_dagster.pipeline.refresh import quiet_until, silent_since
    from fks_backfill_dagster.store.checking import reaches

    lines, known, configured = [], reaches(database, chosen.series), set(settings.series())
    for series in chosen.series:
        since, wait = silent_since(known.get(series)), quiet_until(known.get(series))
        if since is not None and wait is not None and series in configured and not settings.end_of(series):
            lines.append(
                f"{series}: silent since {short(to_datetime(since))}: nobody has a newer candle. A refresh asks"
                f" again after {short(to_datetime(wait))}; if it was delisted, set its `end` in the settings."
            )
    return lines


# Series -----------------------------------------------------------------------------------------------


@click.group()
def series() -> None:
    """What is configured and stored, and who could provide it."""


@series.command("list", epilog=example("series list"))
@json_option
def list_series(as_json: bool) -> None:
    """List the configured and the stored series."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store.queries import stored_series, sync_status

    settings = load_settings()
    with open_database(settings) as database:
        stored = stored_series(database)
        states = {(s.symbol, s.timeframe): s for s in sync_status(database)}
    configured = {(s.symbol, s.timeframe) for s in settings.series()}
    chosen = choose(settings, (), True, stored).series if stored or configured else ()
    found = [(one, states.get((one.symbol, one.timeframe.value))) for one in chosen]
    if as_json:
        answer_json(
            [
                documents.series(
                    one, state, (one.symbol, one.timeframe) in configured, settings.priority(one)
                )
                for one, state in found
            ]
        )
        return
    rows = [
        (
            one.symbol,
            one.timeframe,
            one.asset_class,
            (one.symbol, one.timeframe) in configured,
            state.total_candles if state else 0,
            state.oldest_data_time if state else None,
            state.newest_data_time if state else None,
            ", ".join(settings.priority(one)),
        )
        for one, state in found
    ]
    header = ("symbol", "timeframe", "class", "configured", "candles", "oldest", "newest", "providers")
    answer_table(header, rows)


@series.command("remove", epilog=example("series remove DOGE/USDT 1h --yes"))
@click.argument("symbol")
@click.argument("timeframe")
@click.option("--yes", is_flag=True, help="Really delete it.")
@json_option
def remove_series(symbol: str, timeframe: str, yes: bool, as_json: bool) -> int:
    """Delete a series from the database: candles, lineage, gaps, quarantine. The settings stay as they are."""
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store import commit
    from fks_backfill_dagster.store.queries import stored_series, sync_status

    settings = load_settings()
    with usage():
        found = settings.find_series(symbol, timeframe)
    with open_database(settings) as database:
        found = settings.find_series(symbol, timeframe, stored_series(database))
        state = next(iter(sync_status(database, found)), None)
        if state is None:
            tell(f"Error: nothing is stored of {found}; see `fks-backfill series list`.")
            return 1
        if not yes:
            raise click.UsageError(
                f"this would delete {many(state.total_candles, 'candle')} of {found}: add --yes to do it"
            )
        candles = commit.remove_series(database, found)
    if as_json:
        answer_json({"symbol": found.symbol, "timeframe": found.timeframe.value, "candles_removed": candles})
    else:
        answer(f"{found}: removed with {many(candles, 'candle')}.")
    return 0


@series.command("accept-calendar", epilog=example("series accept-calendar XHKG"))
@click.argument("calendar")
@json_option
def accept_calendar(calendar: str, as_json: bool) -> int:
    """Settle the gaps of all series of an exchange calendar by the present sessions of its library.

    For a calendar whose past has changed, which `status` reports. Sessions that are new become gaps, to be filled
    as any other; gaps on days that are no sessions any more go. Candles are never changed. Exit code 1 if something
    is left, such as candles on such days: each with its remedy, as `audit` reports it.
    """
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.cli.audit import differences
    from fks_backfill_dagster.pipeline.audit import audit, auditable
    from fks_backfill_dagster.pipeline.calendars import accept_calendar as accept
    from fks_backfill_dagster.pipeline.calendars import calendar_change
    from fks_backfill_dagster.settings import load_settings

    settings = load_settings()
    with open_database(settings) as database:
        with usage():
            change = calendar_change(database, calendar)
        if change is None:
            tell(f"{calendar}: nothing to accept: no series was synced by another calendar of this name.")
            if as_json:
                answer_json({"calendar": calendar, "new": [], "gone": [], "hours": [], "audit": None})
            return 0
        accept(database, change, now())
        concerned = [one for one in auditable(database, settings.series()) if change.concerns(one)]
        report = audit(database, concerned, now)
    if as_json:
        answer_json(
            {
                "calendar": calendar,
                **{
                    name: [str(day) for day in getattr(change.difference, name)]
                    for name in ("new", "gone", "hours")
                },
                "audit": documents.audit_report(report),
            }
        )
    else:
        answer(f"{calendar}: {change.difference}: accepted.")
        for line in differences(report):
            answer(line)
    return 1 if report.left else 0


@series.command("providers", epilog=example("series providers", "series providers --reset binance"))
@click.option(
    "--reset", metavar="NAME", help="End the wait or the cool-down of this provider, and forget its failures."
)
@json_option
def list_providers(reset: str | None, as_json: bool) -> None:
    """Tell which provider has which timeframes, how far back, and whether it can be asked.

    With --reset NAME instead: request this provider again at once, though it has asked to wait or failed
    again and again. Other processes may run; what was spent of its limits still counts.
    """
    from fks_backfill_dagster.app import build_providers, open_database, provider_states
    from fks_backfill_dagster.providers.http import RequestPool
    from fks_backfill_dagster.settings import PROVIDER_NAMES, load_settings

    settings = load_settings()
    if reset is not None:
        _reset_provider(settings, reset, as_json)
        return
    pool = RequestPool(1)
    built = build_providers(settings, pool)
    pool.close()
    with open_database(settings) as database:
        states = provider_states(settings, database)
    rows = [
        row
        for name in PROVIDER_NAMES
        for row in _provider_rows(settings, name, built.get(name), states.get(name))
    ]
    if as_json:
        answer_json(rows)
        return
    header = ("provider", "state", "class", "timeframes", "depth", "candles a request", "volume", "address")
    answer_table(
        header,
        [
            (
                row["provider"],
                row["state"],
                row["asset_class"],
                " ".join(row["timeframes"]),  # type: ignore[arg-type]
                _depth(row),
                row["page_size"],
                row["has_volume"],
                row["custom_address"] or "default",
            )
            for row in rows
        ],
    )


def _reset_provider(settings: Settings, name: str, as_json: bool) -> None:
    from fks_backfill_dagster.app import open_database, reset_provider

    with usage():
        settings.provider(name)
    with open_database(settings) as database:
        found = reset_provider(settings, database, name)
    if as_json:
        ended = [
            {
                "provider": one.provider,
                "told_to_wait_seconds": one.told_to_wait,
                "cool_down_seconds": None if one.rest is None else one.rest.seconds,
                "failures": one.failures,
                "reason": one.reason,
            }
            for one in found
        ]
        answer_json({"provider": name, "ended": ended})
        return
    for one in found:
        answer(f"{one.provider}: ended {' and '.join(_ended(one))}.")
    if not found:
        answer(f"{name}: there is nothing to end: it is requested as usual.")


def _ended(state: ProviderState) -> list[str]:
    parts = []
    if state.told_to_wait is not None:
        parts.append(f"the wait of another {state.told_to_wait:,.0f} s that it asked for")
    if state.rest is not None:
        parts.append(f"the cool-down of another {state.rest.seconds:,.0f} s")
    if state.failures:
        parts.append(f"the count of its failures ({state.failures}, the last one: {state.reason})")
    return parts


def _provider_rows(
    settings: Settings, name: str, provider: Provider | None, stands: ProviderState | None
) -> list[Document]:
    """One row an asset class and depth. `depth_days` null: as far back as the provider has the symbol.
    `custom_address` null: the provider's default one."""
    from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe

    enabled, address = settings.provider(name).enabled, settings.custom_addresses().get(name)
    if provider is None:
        state = "disabled"
        none: Document = {
            "asset_class": None,
            "timeframes": [],
            "depth_days": None,
            "page_size": None,
            "has_volume": None,
            "custom_address": None,
        }
        return [{"provider": name, "state": state, "enabled": enabled, "key": None, "key_set": None} | none]
    can, missing = provider.capabilities, provider.missing_key()
    return [
        {
            "provider": name,
            "state": f"{missing} is not set" if missing else _standing(stands),
            "enabled": enabled,
            "key": can.needs_key,
            "key_set": None if can.needs_key is None else missing is None,
            "asset_class": asset_class.value,
            "timeframes": [t.value for t in Timeframe if t in timeframes and can.depth.get(t) == depth],
            "depth_days": None if depth is None else depth // MICROS_PER_DAY,
            "page_size": can.page_size,
            "has_volume": can.has_volume,
            "custom_address": address,
        }
        for asset_class, timeframes in can.timeframes.items()
        for depth in dict.fromkeys(can.depth.get(t) for t in Timeframe if t in timeframes)
    ]


def _depth(row: Document) -> str | None:
    if row["asset_class"] is None:
        return None
    return "since listing" if row["depth_days"] is None else many(int(str(row["depth_days"])), "day")


def _standing(state: ProviderState | None) -> str:
    if state is not None and state.rest is not None:
        return f"left alone for {state.rest.seconds:.0f} s: {state.rest.reason}"
    if state is not None and state.told_to_wait is not None:
        return f"told us to wait another {state.told_to_wait:.0f} s"
    return "ready"


# Batches ----------------------------------------------------------------------------------------------


@click.group()
def batches() -> None:
    """Lineage: which batch brought what, and taking one back."""


@batches.command("list", epilog=example("batches list", "batches list BTC/USDT 1h --limit 5 --json"))
@click.argument("names", nargs=-1, metavar="[SYMBOL TIMEFRAME]")
@click.option(
    "--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The newest so many."
)
@json_option
def list_batches(names: tuple[str, ...], limit: int, as_json: bool) -> None:
    """List what was committed, newest first: provider, transport, range, source, host."""
    from fks_backfill_dagster import documents
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store import queries

    settings = load_settings()
    if len(names) not in (0, 2):
        raise click.UsageError("give a SYMBOL and a TIMEFRAME, or neither")
    with usage():
        wanted = settings.find_series(names[0], names[1]) if names else None
    with open_database(settings) as database:
        if names:
            wanted = settings.find_series(names[0], names[1], queries.stored_series(database))
        found = queries.batches(database, wanted, limit)
    if as_json:
        answer_json([documents.batch(one) for one in found])
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
    answer_table(columns, rows)
    if not found:
        tell("No batches.")


@batches.command("undo", epilog=example("batches undo 42"))
@click.argument("batch_id", metavar="ID", type=click.IntRange(1, 2**31 - 1))
@json_option
def undo(batch_id: int, as_json: bool) -> int:
    """Take back a batch: insertions go, corrections give way to the values before, withdrawn candles return.

    The undo is a batch of its own. What goes becomes an open gap, so the next backfill asks for it.
    """
    from fks_backfill_dagster.app import open_database
    from fks_backfill_dagster.domain.grid import grid_of
    from fks_backfill_dagster.settings import load_settings
    from fks_backfill_dagster.store import queries
    from fks_backfill_dagster.store.commit import undo_batch
    from fks_backfill_dagster.store.ledger import series_id

    with open_database(load_settings()) as database:
        found = queries.series_of_batch(database, batch_id)
        if found is None:
            raise click.UsageError(f"there is no batch {batch_id}; see `fks-backfill batches list`")
        with database.begin() as connection:
            identity = series_id(connection, found)
        assert identity is not None
        done = undo_batch(database, found, identity, batch_id, grid_of(found))
    if as_json:
        answer_json(
            {
                "batch": batch_id,
                "symbol": found.symbol,
                "timeframe": found.timeframe.value,
                "candles_taken_back": done.updated,
                "missing": done.missing,
            }
        )
    else:
        answer(f"{found}: {many(done.updated, 'candle')} of batch {batch_id} taken back.")
    return 0
