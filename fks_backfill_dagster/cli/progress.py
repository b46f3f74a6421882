"""Progress of long commands: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fks_backfill_dagster.cli.output import log, many, short
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.pipeline.events import BatchDone, Listener, Planned, SyncEvent, Warned, silent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fks_backfill_dagster.domain.ranges import TimeRange


@contextmanager
def watched(also: Listener = silent, logged: set[str] | None = None) -> Iterator[Listener]:
    """A listener for syncs that run within the block; `also` receives each event first.

    `logged` holds the warnings so far and is extended: a missing key concerns all series and is
    logged once.
    """
    logged = set() if logged is None else logged
    with _progress_output() as show:

        def listen(event: SyncEvent) -> None:
            also(event)
            if isinstance(event, Warned):
                if event.message in logged:
                    return
                logged.add(event.message)
            show(event)

        yield listen


@contextmanager
def _progress_output() -> Iterator[Listener]:
    if not sys.stderr.isatty():
        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("batches, {task.fields[candles]:,} candles", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False, highlight=False)) as progress:
        yield _Bar(progress)


def line(event: SyncEvent) -> None:
    """An event as a plain line."""
    log(f"{event.series}: {_text(event)}")


class _Bar:
    """One bar per series; warnings and failed batches are lines above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._candles = 0

    def __call__(self, event: SyncEvent) -> None:
        match event:
            case Planned():
                self._candles = 0
                total = len(event.plan.batches)
                self._task = self._progress.add_task(str(event.series), total=total, candles=0)
            case BatchDone():
                self._candles += event.candles
                if self._task is not None:
                    self._progress.update(self._task, advance=1, candles=self._candles)
        if isinstance(event, Warned) or (isinstance(event, BatchDone) and event.error):
            self._progress.console.print(f"{event.series}: {_text(event)}")


def _text(event: SyncEvent) -> str:
    match event:
        case Planned(plan=plan, providers=names):
            if not plan.batches:
                return "nothing to fetch"
            wanted = sum(batch.candles for batch in plan.batches)
            source = ", ".join(names) or "no provider"
            return f"{many(wanted, 'candle')} to fetch in {many(len(plan.batches), 'batch')} from {source}"
        case BatchDone(error=str(error)):
            return f"{_span(event.window)}: failed: {error}"
        case BatchDone(candles=candles, missing=missing, providers=names):
            source = f" from {', '.join(names)}" if names else ""
            absent = f", {missing:,} missing" if missing else ""
            return f"{_span(event.window)}: {many(candles, 'candle')} written{source}{absent}"
        case Warned(message=message):
            return f"warning: {message}"
    raise AssertionError(event)


def _span(window: TimeRange) -> str:
    return f"{short(to_datetime(window.start))} .. {short(to_datetime(window.end))}"
