"""`fks-backfill launch`: a backfill through the running Dagster."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from fks_backfill_dagster.cli.choosing import check_window, usage, window_option
from fks_backfill_dagster.cli.speaking import (
    Failed,
    answer,
    answer_json,
    example,
    json_option,
    many,
    tell,
)

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.orchestration.launching import Launched, Order, Seen
    from fks_backfill_dagster.settings import Settings

QUIET_SECONDS = 5.0


@click.command(
    epilog=example(
        "launch BTC/USDT ETH/USDT --start 2023-01-01 --end 2024-01-01",
        "launch '*/USDT' --timeframe 1m --timeframe 1h --start 2024-01-01",
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
@json_option
def launch(
    symbols: tuple[str, ...],
    everything: bool,
    timeframes: tuple[str, ...],
    start: int | None,
    end: int | None,
    as_json: bool,
) -> int:
    """Have the running Dagster backfill whole partitions (months below 1h, years from 1h up).

    Every partition that the range reaches into, of configured symbols, watched to its end. Without
    --start from history_start on, without --end up to now. Needs `up`. Exit code 0 only if every
    partition was materialized.
    """
    from fks_backfill_dagster.orchestration import launching
    from fks_backfill_dagster.orchestration.servers import ServersError
    from fks_backfill_dagster.orchestration.webserver import DagsterRefused
    from fks_backfill_dagster.settings import load_settings

    settings = load_settings()
    orders = _orders(settings, _chosen(settings, symbols, everything, timeframes), start, end)
    began = time.monotonic()
    try:
        web = launching.running_webserver(settings)
        identity = launching.start(web, orders)
        page = f"{web.url}/runs/b/{identity}"
        partitions = many(sum(len(one.keys) for one in orders), "partition")
        tell(f"{partitions} of {many(len(orders), 'series')} launched: {page}")
        with _shown(began) as see, _watched_only(page):
            done = launching.watch(web, identity, orders, see)
    except (ServersError, DagsterRefused) as error:
        raise Failed(str(error)) from None
    if as_json:
        answer_json(_document(done, orders, page, time.monotonic() - began))
    else:
        _answer(done, orders, time.monotonic() - began)
    return 0 if done.succeeded else 1


def _chosen(
    settings: Settings, symbols: Sequence[str], everything: bool, timeframes: Sequence[str]
) -> list[Series]:
    """Configured series only: others are no assets."""
    from fks_backfill_dagster.settings import parse_timeframe

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
    from fks_backfill_dagster.orchestration.launching import order
    from fks_backfill_dagster.wiring import now

    present = now()
    # The running partition is the last one that there is.
    window = check_window(
        settings.history_start if start is None else start,
        present if end is None else min(end, present),
        present,
    )
    with usage():
        return [order(settings, one, window) for one in chosen]


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
            words = _words(seen)
            progress.update(task, completed=seen.partitions, total=seen.wanted, description=words)

        yield see


class _Lines:
    """What has changed, and a sign of life now and then."""

    def __init__(self, began: float) -> None:
        self._began, self._spoke_at, self._said = began, 0.0, ""

    def __call__(self, seen: Seen) -> None:
        words = f"{seen.partitions:,} of {many(seen.wanted, 'partition')} done, {_words(seen)}"
        now = time.monotonic()
        if words == self._said or (now - self._spoke_at < QUIET_SECONDS and not seen.over):
            return
        self._said, self._spoke_at = words, now
        tell(f"{now - self._began:4.0f} s  {words}")


def _words(seen: Seen) -> str:
    if not seen.runs:
        return "waiting for the daemon, which looks every 30 s"
    return f"{seen.ended} of {many(len(seen.runs), 'run')} ended"


@contextmanager
def _watched_only(page: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        tell(f"Not watched any more. The backfill goes on; see or cancel it at {page}")
        raise click.exceptions.Exit(130) from None


def _answer(done: Launched, orders: Sequence[Order], seconds: float) -> None:
    failed = sum(len(keys) for keys in done.failed.values())
    total = sum(len(one.keys) for one in orders)
    answer(
        f"{total - failed:,} of {many(total, 'partition')} materialized, {failed:,} failed"
        f" ({many(len(done.runs), 'run')}, {seconds:.0f} s)"
    )
    for one, keys in done.failed.items():
        if keys:
            answer(f"  {one.series}: {', '.join(keys)}")
    for reason in done.reasons:
        tell(reason)


def _document(done: Launched, orders: Sequence[Order], page: str, seconds: float) -> dict[str, object]:
    return {
        "backfill": done.id,
        "url": page,
        "succeeded": done.succeeded,
        "seconds": round(seconds, 3),
        "runs": [{"id": run.id, "status": run.status} for run in done.runs],
        "series": [
            {
                "symbol": one.series.symbol,
                "timeframe": one.series.timeframe.value,
                "partitions": list(one.keys),
                "failed": list(done.failed[one]),
            }
            for one in orders
        ],
        "errors": list(done.reasons),
    }
