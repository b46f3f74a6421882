"""The story of a run in some twenty log lines: every line is an event in Dagster's database.

Of a few series: what is planned, a line per tenth of the way as long as that takes seconds, the result.
Of many: a line per tenth of the series, and the sum. Warnings always, up to a number.
"""

from __future__ import annotations

import time
from queue import Empty, SimpleQueue
from typing import Protocol

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, SyncEvent, Warned
from fks_backfill_dagster.pipeline.sync import SyncReport

STEPS = 10
QUIET_SECONDS = 2.0
MOST_WARNINGS = 8


class Log(Protocol):
    """What lines are written to in the end, such as Dagster's log."""

    def info(self, message: str, /) -> object: ...

    def warning(self, message: str, /) -> object: ...


class Lines:
    """What several threads have to say, until one of them writes it."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[bool, str, str]] = SimpleQueue()
        self._told: set[str] = set()
        self._warnings = 0

    def info(self, text: str) -> None:
        self._waiting.put((False, text, ""))

    def warn(self, text: str, about: str = "") -> None:
        """A key that is missing is missing for all series: the same text about another one is told once."""
        self._waiting.put((True, text, f"{about}: " if about else ""))

    def write(self, log: Log) -> None:
        """Writes what has come; of warnings the first ones only, and how to see the others."""
        while True:
            try:
                is_warning, text, about = self._waiting.get_nowait()
            except Empty:
                return
            if not is_warning:
                log.info(text)
                continue
            if text in self._told:
                continue
            self._told.add(text)
            self._warnings += 1
            if self._warnings <= MOST_WARNINGS:
                log.warning(f"{about}{text}")
            elif self._warnings == MOST_WARNINGS + 1:
                log.warning(
                    "Further warnings are left out; the partitions and checks tell what came of them."
                )


class Story:
    """The listener of one sync. `failed_windows` are the windows of the batches that failed."""

    def __init__(self, lines: Lines, detailed: bool = True) -> None:
        self._lines, self._detailed = lines, detailed
        self._batches = self._done = self._candles = self._told = 0
        self._spoke_at = time.monotonic()
        self.failed_windows: list[TimeRange] = []

    def __call__(self, event: SyncEvent) -> None:
        match event:
            case Planned():
                self._plan(event)
            case BatchDone():
                self._progress(event)
            case Warned():
                self._lines.warn(event.message, about=str(event.series))

    def end(self, report: SyncReport) -> None:
        if not self._detailed:
            return
        if not report.expected:
            self._lines.info(f"{report.series}: nothing is expected in {report.window}")
            return
        self._lines.info(
            f"{report.series}: {_stored(report.total_candles, report.requests, report.seconds)};"
            f" {report.missing:,} of {report.expected:,} expected are missing"
        )

    def _plan(self, event: Planned) -> None:
        plan = event.plan
        self._batches = len(plan.batches)
        if not plan.batches or not self._detailed:
            return  # the result says it all
        asked = ", ".join(event.providers) or "nobody"
        self._lines.info(
            f"{event.series}: {plan.missing:,} of {plan.expected:,} candles are missing in {plan.window};"
            f" asking {asked} in {self._batches} batches"
        )

    def _progress(self, event: BatchDone) -> None:
        self._done += 1
        self._candles += event.candles
        if event.error is not None:
            self.failed_windows.append(event.window)
        step = self._done * STEPS // self._batches
        quiet = time.monotonic() - self._spoke_at < QUIET_SECONDS
        if step == self._told or quiet or self._done == self._batches or not self._detailed:
            return
        self._told, self._spoke_at = step, time.monotonic()
        self._lines.info(
            f"{event.series}: {self._done} of {self._batches} batches, {self._candles:,} candles,"
            f" up to {event.window}"
        )


class Progress:
    """The story of a run of many series; of a single one its own story says it all."""

    def __init__(self, series: int, lines: Lines) -> None:
        self._series, self._lines = series, lines
        self._done = self._told = self._candles = self._requests = self._left = 0
        self._began = self._spoke_at = time.monotonic()

    def add(self, report: SyncReport) -> None:
        self._done += 1
        self._candles += report.total_candles
        self._requests += report.requests
        self._left += not report.complete
        step = self._done * STEPS // self._series
        quiet = time.monotonic() - self._spoke_at < QUIET_SECONDS
        if step == self._told or quiet or self._series == 1:
            return
        self._told, self._spoke_at = step, time.monotonic()
        self._lines.info(f"{self._done} of {self._series} series, {self._candles:,} candles")

    def end(self) -> None:
        if self._series == 1:
            return
        seconds = time.monotonic() - self._began
        self._lines.info(
            f"{self._done} of {self._series} series: {_stored(self._candles, self._requests, seconds)};"
            f" {self._left} of them are not complete"
        )


def _stored(candles: int, requests: int, seconds: float) -> str:
    speed = round(candles / seconds) if seconds else 0
    return f"{candles:,} candles stored in {seconds:.1f} s ({speed:,} a second, {requests:,} requests)"
