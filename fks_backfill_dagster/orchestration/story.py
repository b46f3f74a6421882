"""The story of one sync in a few log lines: every line is an event in Dagster's database.

What is planned, a line per tenth of the way as long as that takes seconds, warnings, the result.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, SyncEvent, Warned
from fks_backfill_dagster.pipeline.sync import SyncReport

STEPS = 10
QUIET_SECONDS = 2.0

Log = Callable[[str], object]


class Story:
    """The listener of one sync. `failed_windows` are the windows of the batches that failed."""

    def __init__(self, info: Log, warn: Log) -> None:
        self._info, self._warn = info, warn
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
                self._warn(f"{event.series}: {event.message}")

    def end(self, report: SyncReport) -> None:
        speed = round(report.total_candles / report.seconds) if report.seconds else 0
        self._info(
            f"{report.series}: {report.total_candles:,} candles stored in {report.seconds:.1f} s"
            f" ({speed:,} a second, {report.requests:,} requests);"
            f" {report.missing:,} of {report.expected:,} expected are missing"
        )

    def _plan(self, event: Planned) -> None:
        plan = event.plan
        self._batches = len(plan.batches)
        if not plan.batches:
            return  # the result says it all
        asked = ", ".join(event.providers) or "nobody"
        self._info(
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
        if step == self._told or quiet or self._done == self._batches:
            return
        self._told, self._spoke_at = step, time.monotonic()
        self._info(
            f"{event.series}: {self._done} of {self._batches} batches, {self._candles:,} candles,"
            f" up to {event.window}"
        )
