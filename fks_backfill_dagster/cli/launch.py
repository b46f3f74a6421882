"""`fks-backfill launch`: a backfill through the running Dagster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.arguments import check_window, usage, window_option
from fks_backfill_dagster.cli.output import (
    Failed,
    answer,
    answer_json,
    example,
    json_option,
    last_words,
    many,
    tell,
)
from fks_backfill_dagster.cli.signals import signals

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.host.launch import Launched, Order, Seen
    from fks_backfill_dagster.settings.model import Settings

QUIET_SECONDS = 5.0
LONGEST_SILENCE = 30.0
"""Seconds after which a line is printed where nothing has changed."""

LOOK_SLACK = 5.0
"""Of which a look and its queries may take so many."""

MOST_NAMES = 12


@click.command(
    epilog=example(
        "launch BTC/USDT ETH/USDT --start 2023-01-01 --end 2024-01-01",
        "launch '*/USDT' --timeframe 1m --timeframe 1h --start 2024-01-01",
        "launch --all --no-wait",
    )
)
@click.argument("symbols", nargs=-1, metavar="SYMBOL...")
@click.option("--all", "everything", is_flag=True, help="All configured symbols.")
@click.option(
    "--timeframe",
    "timeframes",
    multiple=True,
    metavar="TIMEFRAME",
    help="This one only, may be repeated; without it all that the settings have of a symbol.",
)
@window_option
@click.option(
    "--no-wait", is_flag=True, help="Print the id of the backfill and its page, and do not watch it."
)
@json_option
def launch(
    symbols: tuple[str, ...],
    everything: bool,
    timeframes: tuple[str, ...],
    start: int | None,
    end: int | None,
    no_wait: bool,
    as_json: bool,
) -> int:
    """Have the running Dagster backfill whole partitions (months below 1h, years from 1h up).

    Every partition that the range reaches into, of configured symbols, watched to its end. Without
    --start from the start of each symbol on, without --end up to now. Needs `up`. Exit code 0 only if
    every partition was materialized; with --no-wait as soon as Dagster has the backfill.
    """
    from fks_backfill_dagster.host import launch
    from fks_backfill_dagster.host.graphql import DagsterRefused
    from fks_backfill_dagster.host.servers import ServersError
    from fks_backfill_dagster.settings.load import load_settings

    settings = load_settings()
    orders = _orders(settings, _chosen(settings, symbols, everything, timeframes), start, end)
    began = time.monotonic()
    try:
        web = launch.running_webserver(settings)
        identity = launch.start(web, orders, tell)
        page = f"{web.url}/runs/b/{identity}"
        partitions = many(sum(len(one.keys) for one in orders), "partition")
        tell(f"{partitions} of {many(len(orders), 'series')} launched: {page}")
        if no_wait:
            _hand_over(identity, page, orders, as_json)
            return 0
        with _shown(began) as see, _watched_only(page):
            done = launch.watch(web, identity, orders, see, tell)
    except (ServersError, DagsterRefused) as error:
        raise Failed(str(error)) from None
    if as_json:
        answer_json(_document(done, orders, page, time.monotonic() - began))
    else:
        _answer(done, orders, time.monotonic() - began)
    _tell_removed(done)
    return 0 if done.succeeded else 1


def _chosen(
    settings: Settings, symbols: Sequence[str], everything: bool, timeframes: Sequence[str]
) -> list[Series]:
    """Configured series only: others are no assets."""
    from fks_backfill_dagster.settings.types import parse_timeframe

    with usage():
        if bool(symbols) == everything:
            raise ValueError("give one SYMBOL or more, such as BTC/USDT, or --all")
        frames = {parse_timeframe(text) for text in timeframes}
        names = {name for text in (symbols or ["*"]) for name in _configured(settings, text)}
        found = [s for s in settings.series() if s.symbol in names and (not frames or s.timeframe in frames)]
        if not found:
            have = " ".join(dict.fromkeys(s.timeframe for s in settings.series() if s.symbol in names))
            raise ValueError(f"none of the symbols has that timeframe in the settings; they have {have}")
    return found


def _configured(settings: Settings, written: str) -> tuple[str, ...]:
    found = settings.match_symbols(written) or settings.match_symbols(written.upper())
    if not found:
        names = ", ".join(settings.match_symbols()) or "none"
        raise ValueError(f"{written!r} is not configured, so Dagster does not have it; there are: {names}")
    return found


def _orders(settings: Settings, chosen: Sequence[Series], start: int | None, end: int | None) -> list[Order]:
    from fks_backfill_dagster.app import now
    from fks_backfill_dagster.host.launch import order

    present = now()
    # The running partition is the last one that there is.
    window = check_window(
        settings.earliest_start if start is None else start,
        present if end is None else min(end, present),
        present,
    )
    orders, later = [], []
    for one in chosen:
        try:
            orders.append(order(settings, one, window))
        except ValueError as error:
            later.append((one, str(error)))
    with usage():
        if not orders:
            raise ValueError(later[0][1])
    if later:
        names = ", ".join(str(one) for one, _ in later[:MOST_NAMES]) + (
            ", ..." if len(later) > MOST_NAMES else ""
        )
        tell(
            f"Nothing is expected of {many(len(later), 'series')} in the range, which ends before their start: {names}"
        )
    return orders


# Showing it -------------------------------------------------------------------------------------------


@contextmanager
def _shown(began: float) -> Iterator[Callable[[Seen], None]]:
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

        def see(seen: Seen) -> None:
            done = seen.materialized + seen.failed
            progress.update(task, completed=done, total=seen.wanted, description=_words(seen))

        yield see


class _Lines:
    """A line when something has changed, every few seconds at most, and every half minute at least."""

    def __init__(self, began: float) -> None:
        self._began, self._spoke_at, self._said = began, float("-inf"), ""

    def __call__(self, seen: Seen) -> None:
        words = f"{seen.materialized:,} of {many(seen.wanted, 'partition')} materialized, {_words(seen)}"
        now = time.monotonic()
        quiet = now - self._spoke_at
        if quiet < QUIET_SECONDS and not seen.over:
            return
        if words == self._said and quiet < LONGEST_SILENCE - LOOK_SLACK:
            return
        self._said, self._spoke_at = words, now
        tell(f"{now - self._began:4.0f} s  {words}")


def _words(seen: Seen) -> str:
    if not seen.runs:
        return "waiting for the daemon, which looks every 30 s"
    return f"{seen.failed:,} failed, {seen.ended} of {many(len(seen.runs), 'run')} ended"


@contextmanager
def _watched_only(page: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        last_words(f"Not watched any more. The backfill goes on; see or cancel it at {page}")
        raise click.exceptions.Exit(signals().exit_code) from None


def _hand_over(identity: str, page: str, orders: Sequence[Order], as_json: bool) -> None:
    if not as_json:
        answer(f"{identity}  {page}")
        return
    answer_json({"backfill": identity, "url": page, "series": [_asked(one) for one in orders]})


def _asked(one: Order) -> dict[str, object]:
    return {
        "symbol": one.series.symbol,
        "timeframe": one.series.timeframe.value,
        "partitions": list(one.keys),
    }


def _answer(done: Launched, orders: Sequence[Order], seconds: float) -> None:
    failed = sum(len(keys) for keys in done.failed.values())
    total = sum(len(one.keys) for one in orders if one not in done.removed)
    answer(
        f"{total - failed:,} of {many(total, 'partition')} materialized, {failed:,} failed"
        f" ({many(len(done.runs), 'run')}, {seconds:.0f} s)"
    )
    for one, keys in done.failed.items():
        if keys:
            answer(f"  {one.series}: {', '.join(keys)}")
    for reason in done.reasons:
        tell(reason)


def _tell_removed(done: Launched) -> None:
    if done.removed:
        names = ", ".join(str(one.series) for one in done.removed[:MOST_NAMES])
        more = ", ..." if len(done.removed) > MOST_NAMES else ""
        symbols = " ".join(sorted({one.series.symbol for one in done.removed}))
        tell(
            f"{names}{more}: taken out of the settings meanwhile, and no part of the result. To have what is left"
            f" of it, add it again and run `fks-backfill launch {symbols}`."
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
            {**_asked(one), "failed": list(done.failed[one]), "removed": one in done.removed}
            for one in orders
        ],
        "errors": list(done.reasons),
    }
