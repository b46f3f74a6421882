"""Progress of long syncs: a bar on a terminal, plain lines elsewhere, always on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fks_backfill_dagster.cli.messages import Messages, is_about_a_provider, shown
from fks_backfill_dagster.cli.output import is_verbose, log, many, short
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.pipeline.events import BatchDone, Listener, Planned, SyncEvent, Warned, silent

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from fks_backfill_dagster.domain.ranges import TimeRange

QUIET_SECONDS = 10.0
"""The shortest time between two lines about the batches of a sync."""


@contextmanager
def watched(
    messages: Messages, also: Listener = silent, *, position: str | None = None
) -> Iterator[Listener]:
    """A listener for the sync that runs within the block; `also` receives each event first.

    `position`: that of the series among several, such as "3 of 300", which each have one line in the result: then its
    plan and the warnings that concern it alone are not logged here, and its bar disappears at the end.
    """
    with _progress_output(position) as show:

        def listen(event: SyncEvent) -> None:
            also(event)
            if not isinstance(event, Warned):
                show(event)
            elif position is None or is_about_a_provider(event.message):
                messages.warn(event.series, event.message, show.line)

        yield listen


@contextmanager
def _progress_output(position: str | None) -> Iterator[Lines | _Bar]:
    if not sys.stderr.isatty():
        yield Lines(position)
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
    console = Console(stderr=True, markup=False, highlight=False)
    with Progress(*columns, console=console, transient=position is not None) as progress:
        yield _Bar(progress, position)


class Lines:
    """The plan, then the batches so far, every few seconds; with `-v` every batch."""

    def __init__(self, position: str | None = None) -> None:
        self._verbose, self._position = is_verbose(), position
        self._total = self._batches = self._candles = 0
        self._logged_at = time.monotonic()

    def line(self, text: str) -> None:
        log(text)

    def __call__(self, event: SyncEvent) -> None:
        match event:
            case Planned():
                self._total += len(event.plan.batches)
            case BatchDone():
                self._batches += 1
                self._candles += event.candles
        if self._verbose or (isinstance(event, Planned) and self._position is None):
            log(f"{event.series}: {_text(event)}")
        elif isinstance(event, BatchDone) and self._is_due():
            place = "" if self._position is None else f" ({self._position} series)"
            log(
                f"{event.series}{place}: {self._batches:,} of {many(self._total, 'batch')} done,"
                f" {many(self._candles, 'candle')} written"
            )

    def _is_due(self) -> bool:
        now = time.monotonic()
        if now - self._logged_at < QUIET_SECONDS or self._batches >= self._total:
            return False
        self._logged_at = now
        return True


class _Bar:
    """One bar per series; warnings are lines above it, and with `-v` failed batches."""

    def __init__(self, progress: Progress, position: str | None) -> None:
        self._verbose, self._position = is_verbose(), position
        self._progress = progress
        self._task: TaskID | None = None
        self._candles = 0

    def line(self, text: str) -> None:
        self._progress.console.print(text)

    def __call__(self, event: SyncEvent) -> None:
        match event:
            case Planned():
                self._candles = 0
                total = len(event.plan.batches)
                place = "" if self._position is None else f"{self._position}  "
                self._task = self._progress.add_task(f"{place}{event.series}", total=total, candles=0)
            case BatchDone():
                self._candles += event.candles
                if self._task is not None:
                    self._progress.update(self._task, advance=1, candles=self._candles)
                if self._verbose and event.error:
                    self.line(f"{event.series}: {_text(event)}")


def _text(event: SyncEvent) -> str:
    match event:
        case Planned(plan=plan, providers=names):
            if not plan.batches:
                return "nothing to fetch"
            wanted = sum(batch.candles for batch in plan.batches)
            source = ", ".join(names) or "no provider"
            return f"{many(wanted, 'candle')} to fetch in {many(len(plan.batches), 'batch')} from {source}"
        case BatchDone(error=str(error)):
            return f"{_span(event.window)}: failed: {shown(error)}"
        case BatchDone(candles=candles, missing=missing, providers=names):
            source = f" from {', '.join(names)}" if names else ""
            absent = f", {missing:,} missing" if missing else ""
            return f"{_span(event.window)}: {many(candles, 'candle')} written{source}{absent}"
    raise AssertionError(event)


def _span(window: TimeRange) -> str:
    return f"{short(to_datetime(window.start))} .. {short(to_datetime(window.end))}"
