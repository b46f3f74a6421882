"""The log of a run, about twenty lines: every line is an event in Dagster's database.

Few series: the plan, a line per tenth of the batches if that takes seconds, the result. Many series: a line per
tenth of the series, and the total. Warnings in both cases, up to MOST_WARNINGS.
"""

from __future__ import annotations

import time
from queue import Empty, SimpleQueue
from typing import Protocol

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, SyncEvent, Warned
from fks_backfill_dagster.pipeline.report import SyncReport

STEPS = 10
QUIET_SECONDS = 2.0
MOST_WARNINGS = 8


class Log(Protocol):
    """The target of the lines, such as Dagster's log."""

    def info(self, message: str, /) -> object: ...

    def warning(self, message: str, /) -> object: ...


class Lines:
    """A queue of log lines from several threads; one thread writes them."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[tuple[bool, str, str]] = SimpleQueue()
        self._warned: set[str] = set()
        self._warnings = 0

    def info(self, text: str) -> None:
        self._waiting.put((False, text, ""))

    def warn(self, text: str, about: str = "") -> None:
        """Queues a warning. The same text about several series (a missing key) is logged once."""
        self._waiting.put((True, text, f"{about}: " if about else ""))

    def write(self, log: Log) -> None:
        """Writes the queued lines; of warnings the first MOST_WARNINGS only."""
        while True:
            try:
                is_warning, text, about = self._waiting.get_nowait()
            except Empty:
                return
            if not is_warning:
                log.info(text)
                continue
            if text in self._warned:
                continue
            self._warned.add(text)
            self._warnings += 1
            if self._warnings <= MOST_WARNINGS:
                log.warning(f"{about}{text}")
            elif self._warnings == MOST_WARNINGS + 1:
                log.warning(
                    "Further warnings are omitted; the metadata of partitions and checks shows the results."
                )


class SyncLogger:
    """The listener of one sync. `failed_windows`: the windows of failed batches."""

    def __init__(self, lines: Lines, detailed: bool = True) -> None:
        self._lines, self._detailed = lines, detailed
        self._batches = self._done = self._candles = self._step = 0
        self._logged_at = time.monotonic()
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
            f" {report.missing:,} of {report.expected:,} expected candles are missing"
        )

    def _plan(self, event: Planned) -> None:
        plan = event.plan
        self._batches = len(plan.batches)
        if not plan.batches or not self._detailed:
            return  # the result line is enough
        providers = ", ".join(event.providers) or "no provider"
        self._lines.info(
            f"{event.series}: {plan.missing:,} of {plan.expected:,} candles are missing in {plan.window};"
            f" requesting {self._batches} batches from {providers}"
        )

    def _progress(self, event: BatchDone) -> None:
        self._done += 1
        self._candles += event.candles
        if event.error is not None:
            self.failed_windows.append(event.window)
        step = self._done * STEPS // self._batches
        quiet = time.monotonic() - self._logged_at < QUIET_SECONDS
        if step == self._step or quiet or self._done == self._batches or not self._detailed:
            return
        self._step, self._logged_at = step, time.monotonic()
        self._lines.info(
            f"{event.series}: {self._done} of {self._batches} batches, {self._candles:,} candles,"
            f" up to {event.window}"
        )


class Progress:
    """The progress lines of a run of several series; for a single one its SyncLogger is enough."""

    def __init__(self, series: int, lines: Lines) -> None:
        self._series, self._lines = series, lines
        self._done = self._step = self._candles = self._requests = self._incomplete = 0
        self._began = self._logged_at = time.monotonic()

    def add(self, report: SyncReport) -> None:
        self._done += 1
        self._candles += report.total_candles
        self._requests += report.requests
        self._incomplete += not report.complete
        step = self._done * STEPS // self._series
        quiet = time.monotonic() - self._logged_at < QUIET_SECONDS
        if step == self._step or quiet or self._series == 1:
            return
        self._step, self._logged_at = step, time.monotonic()
        self._lines.info(f"{self._done} of {self._series} series, {self._candles:,} candles")

    def end(self) -> None:
        if self._series == 1:
            return
        seconds = time.monotonic() - self._began
        self._lines.info(
            f"{self._done} of {self._series} series: {_stored(self._candles, self._requests, seconds)};"
            f" {self._incomplete} of them are incomplete"
        )


def _stored(candles: int, requests: int, seconds: float) -> str:
    speed = round(candles / seconds) if seconds else 0
    return f"{candles:,} candles stored in {seconds:.1f} s ({speed:,} a second, {requests:,} requests)"
