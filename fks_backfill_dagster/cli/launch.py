"""`fks-backfill launch`: a backfill through the running Dagster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import named, nearest_symbols, split, usage
from fks_backfill_dagster.cli.completion import complete_series, complete_timeframe
from fks_backfill_dagster.cli.output import (
    Failed,
    example,
    is_verbose,
    json_option,
    log,
    log_if_possible,
    many,
    print_json,
    print_line,
    verbose_option,
)
from fks_backfill_dagster.cli.signals import signals
from fks_backfill_dagster.cli.times import check_window, window_option

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.host.launch import Launched, Order, Seen
    from fks_backfill_dagster.settings.catalog import Catalog

QUIET_SECONDS = 5.0
LONGEST_SILENCE = 30.0
"""Seconds after which a line is printed even if nothing has changed."""

POLL_SLACK = 5.0
"""Seconds of it that one poll and its queries may take."""


@click.command(
    epilog=example(
        "launch BTC/USDT ETH/USDT --start 2023 --end 2024",
        "launch BTC/USDT 1h --start -30d",
        "launch '*/USDT' --timeframe 1m --timeframe 1h --start 2024-01-01",
        "launch --all --no-wait",
    )
)
@click.argument("names", nargs=-1, metavar="SYMBOL... [TIMEFRAME]", shell_complete=complete_series)
@click.option("--all", "everything", is_flag=True, help="All configured symbols.")
@click.option(
    "--timeframe",
    "timeframes",
    multiple=True,
    metavar="TIMEFRAME",
    shell_complete=complete_timeframe,
    help="As the argument TIMEFRAME; may be repeated. Without any all configured timeframes of a symbol.",
)
@window_option
@click.option(
    "--no-wait", is_flag=True, help="Print the id of the backfill and its page, and do not wait for its end."
)
@verbose_option
@json_option
def launch(
    names: tuple[str, ...],
    everything: bool,
    timeframes: tuple[str, ...],
    start: int | None,
    end: int | None,
    no_wait: bool,
    as_json: bool,
) -> int:
    """Launch a Dagster backfill of whole partitions (months below 1h, years from 1h up).

    Takes every partition of configured symbols that overlaps the range, and waits for its end. Without
    --start from the start of each symbol, without --end up to now. Needs `up`. Exit code 0 only if
    every partition was materialized; with --no-wait as soon as Dagster has accepted the backfill.
    """
    from fks_backfill_dagster.host import launch
    from fks_backfill_dagster.host.graphql import DagsterError
    from fks_backfill_dagster.host.servers import ServersError
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    catalog = Catalog(settings)
    orders = _orders(catalog, _chosen(catalog, names, everything, timeframes), start, end)
    began = time.monotonic()
    try:
        web = launch.running_webserver(settings)
        identity = launch.start(web, orders, log)
        page = f"{web.url}/runs/b/{identity}"
        partitions = many(sum(len(one.keys) for one in orders), "partition")
        log(f"{partitions} of {many(len(orders), 'series')} launched: {page}")
        if is_verbose():
            for one in orders:
                log(f"  {one.series}: {many(len(one.keys), 'partition')}, {one.keys[0]} .. {one.keys[-1]}")
        if no_wait:
            _print_launched(identity, page, orders, as_json)
            return 0
        with _progress_output(began) as show, _stop_waiting_on_interrupt(page):
            done = launch.watch(web, identity, orders, show, log)
    except (ServersError, DagsterError) as error:
        raise Failed(str(error)) from None
    if as_json:
        print_json(_document(done, orders, page, time.monotonic() - began))
    else:
        _print_report(done, orders, time.monotonic() - began)
    _log_removed(done)
    return 0 if done.succeeded else 1


def _chosen(
    catalog: Catalog, names: Sequence[str], everything: bool, timeframes: Sequence[str]
) -> list[Series]:
    """Configured series only: only these are assets. `names`: symbols and globs, then perhaps a timeframe."""
    from fks_backfill_dagster.settings.types import parse_timeframe

    with usage():
        given, timeframe = split(names)
        if bool(given) == everything:
            raise ValueError("give one SYMBOL or more, such as BTC/USDT, or --all")
        frames = {parse_timeframe(text) for text in (*timeframes, *([timeframe] if timeframe else []))}
        symbols = {symbol for text in (given or ["*"]) for symbol in _configured(catalog, text)}
        found = [s for s in catalog.series if s.symbol in symbols and (not frames or s.timeframe in frames)]
        if not found:
            have = " ".join(dict.fromkeys(s.timeframe for s in catalog.series if s.symbol in symbols))
            raise ValueError(f"none of these symbols is configured with that timeframe; they have {have}")
    return found


def _configured(catalog: Catalog, written: str) -> tuple[str, ...]:
    found = catalog.match_symbols(written) or catalog.match_symbols(written.upper())
    if not found:
        raise ValueError(
            f"{written!r} is not configured, so it is no asset in Dagster;"
            f" {nearest_symbols(written, catalog.match_symbols())}"
        )
    return found


def _orders(catalog: Catalog, chosen: Sequence[Series], start: int | None, end: int | None) -> list[Order]:
    from fks_backfill_dagster.app import now
    from fks_backfill_dagster.host.launch import order

    present = now()
    # The current partition is the last one.
    window = check_window(
        catalog.earliest_start if start is None else start,
        present if end is None else min(end, present),
        present,
    )
    orders: list[Order] = []
    later: list[Series] = []
    reason = ""
    for one in chosen:
        try:
            orders.append(order(catalog, one, window))
        except ValueError as error:
            later.append(one)
            reason = reason or str(error)
    with usage():
        if not orders:
            raise ValueError(reason)
    if later:
        log(
            f"The range ends before the start of {many(len(later), 'series')}, so none of their candles is expected:"
            f" {named(later)}"
        )
    return orders


# Output -----------------------------------------------------------------------------------------------


@contextmanager
def _progress_output(began: float) -> Iterator[Callable[[Seen], None]]:
    """A bar on a terminal, a line every few seconds elsewhere; always on stderr."""
    if not sys.stderr.isatty():
        yield _Lines(began)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("partitions, {task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False, highlight=False)) as progress:
        task = progress.add_task("waiting for the daemon", total=None)

        def show(seen: Seen) -> None:
            done = seen.materialized + seen.failed
            progress.update(task, completed=done, total=seen.wanted, description=_text(seen))

        yield show


class _Lines:
    """Logs changes every few seconds at most, and a line every half minute at least."""

    def __init__(self, began: float) -> None:
        self._began, self._logged_at, self._logged_text = began, float("-inf"), ""

    def __call__(self, seen: Seen) -> None:
        text = f"{seen.materialized:,} of {many(seen.wanted, 'partition')} materialized, {_text(seen)}"
        now = time.monotonic()
        pause = now - self._logged_at
        if pause < QUIET_SECONDS and not seen.over:
            return
        if text == self._logged_text and pause < LONGEST_SILENCE - POLL_SLACK:
            return
        self._logged_text, self._logged_at = text, now
        log(f"{now - self._began:4.0f} s  {text}")


def _text(seen: Seen) -> str:
    if not seen.runs:
        return "waiting for the daemon, which polls every 30 s"
    return f"{seen.failed:,} failed, {seen.ended} of {many(len(seen.runs), 'run')} ended"


@contextmanager
def _stop_waiting_on_interrupt(page: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        log_if_possible(f"Stopped waiting. The backfill goes on; view or cancel it at {page}")
        raise click.exceptions.Exit(signals().exit_code) from None


def _print_launched(identity: str, page: str, orders: Sequence[Order], as_json: bool) -> None:
    if not as_json:
        print_line(f"{identity}  {page}")
        return
    print_json({"backfill": identity, "url": page, "series": [_requested(one) for one in orders]})


def _requested(one: Order) -> dict[str, object]:
    return {
        "symbol": one.series.symbol,
        "timeframe": one.series.timeframe.value,
        "partitions": list(one.keys),
    }


def _print_report(done: Launched, orders: Sequence[Order], seconds: float) -> None:
    failed = sum(len(keys) for keys in done.failed.values())
    total = sum(len(one.keys) for one in orders if one not in done.removed)
    print_line(
        f"{total - failed:,} of {many(total, 'partition')} materialized, {failed:,} failed"
        f" ({many(len(done.runs), 'run')}, {seconds:.0f} s)"
    )
    for one, keys in done.failed.items():
        if keys:
            print_line(f"  {one.series}: {', '.join(keys)}")
    for reason in done.reasons:
        log(reason)


def _log_removed(done: Launched) -> None:
    if done.removed:
        names = named([one.series for one in done.removed])
        symbols = " ".join(sorted({one.series.symbol for one in done.removed}))
        log(
            f"{names}: removed from the settings during the backfill, and not part of the result. To"
            f" materialize the remaining partitions, add it again and run `fks-backfill launch {symbols}`."
        )


def _document(done: Launched, orders: Sequence[Order], page: str, seconds: float) -> dict[str, object]:
    return {
        "backfill": done.id,
        "url": page,
        "followed_by": list(done.followed),
        "succeeded": done.succeeded,
        "seconds": round(seconds, 3),
        "runs": [{"id": run.id, "status": run.status} for run in done.runs],
        "series": [
            {**_requested(one), "failed": list(done.failed[one]), "removed": one in done.removed}
            for one in orders
        ],
        "errors": list(done.reasons),
    }
