"""The log lines of one sync."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.orchestration import run_log
from fks_backfill_dagster.orchestration.run_log import Lines, Progress, Story
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, Warned
from fks_backfill_dagster.pipeline.plan import Batch, Plan
from fks_backfill_dagster.pipeline.sync import SyncReport

SERIES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)


def day(n: int) -> TimeRange:
    return TimeRange(n * MICROS_PER_DAY, (n + 1) * MICROS_PER_DAY)


class Heard:
    """A log that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str, /) -> None:
        self.lines.append(message)

    def warning(self, message: str, /) -> None:
        self.warnings.append(message)


def heard(lines: Lines) -> Heard:
    log = Heard()
    lines.write(log)
    return log


def told(
    batches: int, failed: frozenset[int] = frozenset(), detailed: bool = True
) -> tuple[list[str], Lines, Story]:
    """The lines of a sync of so many batches, a day each."""
    lines = Lines()
    listener = Story(lines, detailed)
    hull = TimeRange(0, batches * MICROS_PER_DAY)
    parts = tuple(Batch(day(n), RangeSet([day(n)]), 1440) for n in range(batches))
    plan = Plan(SERIES, hull, 1440 * batches, 1440 * batches, RangeSet([hull]), parts)
    listener(Planned(SERIES, plan, ("binance",)))
    for n in range(batches):
        error = "binance: 503" if n in failed else None
        listener(BatchDone(SERIES, day(n), 0 if error else 1440, 0, ("binance",), error))
    return heard(lines).lines, lines, listener


def test_a_quick_sync_says_only_what_it_is_about() -> None:
    info, _, _ = told(100)
    assert len(info) == 1
    assert "144,000 of 144,000 candles are missing" in info[0]


@pytest.mark.parametrize("batches", [3, 10, 97, 1000])
def test_a_long_one_says_a_line_per_tenth(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0)
    info, _, _ = told(batches)
    assert len(info) == 1 + min(batches - 1, 9)  # the end is the result's to tell


def test_failed_windows_are_kept() -> None:
    assert told(5, frozenset({1, 3}))[2].failed_windows == [day(1), day(3)]


def test_one_of_many_says_nothing_and_notes_its_failures() -> None:
    info, _, listener = told(10, frozenset({7}), detailed=False)
    assert info == []
    assert listener.failed_windows == [day(7)]


def test_a_warning_is_one() -> None:
    _, lines, listener = told(1)
    listener(Warned(SERIES, "polygon is skipped: POLYGON_API_KEY is not set"))
    assert heard(lines).warnings == ["BTC/USDT 1m: polygon is skipped: POLYGON_API_KEY is not set"]


def test_the_same_warning_about_another_series_is_told_once() -> None:
    lines = Lines()
    other = Series("ETH/USDT", Timeframe.M1, AssetClass.CRYPTO)
    for series in (SERIES, other, SERIES):
        Story(lines)(Warned(series, "polygon is skipped: POLYGON_API_KEY is not set"))
    Story(lines)(Warned(other, "binance: answered 503"))
    assert heard(lines).warnings == [
        "BTC/USDT 1m: polygon is skipped: POLYGON_API_KEY is not set",
        "ETH/USDT 1m: binance: answered 503",
    ]


def test_many_warnings_are_cut_and_that_is_said() -> None:
    lines = Lines()
    for n in range(40):
        lines.warn(f"warning {n}")
    said = heard(lines).warnings
    assert said[:2] == ["warning 0", "warning 1"]
    assert len(said) == run_log.MOST_WARNINGS + 1
    assert "left out" in said[-1]
    lines.warn("one more")
    assert heard(lines).warnings == []


def test_many_series_take_ten_lines_and_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0)
    lines = Lines()
    progress = Progress(50, lines)
    for n in range(50):
        progress.add(SyncReport(SERIES, day(0), total_candles=2, requests=1, missing=int(n == 3)))
    progress.end()
    said = heard(lines).lines
    assert len(said) == 11
    assert said[-1].startswith("50 of 50 series: 100 candles stored in ")
    assert said[-1].endswith("50 requests); 1 of them are not complete")


def test_a_single_series_needs_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0)
    lines = Lines()
    progress = Progress(1, lines)
    progress.add(SyncReport(SERIES, day(0), total_candles=2, requests=1))
    progress.end()
    assert heard(lines).lines == []
