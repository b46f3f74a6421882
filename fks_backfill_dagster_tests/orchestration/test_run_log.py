"""The log lines of one sync."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.orchestration import run_log
from fks_backfill_dagster.orchestration.run_log import Lines, Progress, SyncLogger
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, Warned
from fks_backfill_dagster.pipeline.plan import Batch, Plan
from fks_backfill_dagster.pipeline.report import SyncReport

SERIES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)


def day(n: int) -> TimeRange:
    return TimeRange(n * MICROS_PER_DAY, (n + 1) * MICROS_PER_DAY)


class RecordingLog:
    """A log that records its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.warnings: list[str] = []

    def info(self, message: str, /) -> None:
        self.lines.append(message)

    def warning(self, message: str, /) -> None:
        self.warnings.append(message)


def written(lines: Lines) -> RecordingLog:
    log = RecordingLog()
    lines.write(log)
    return log


def log_of(
    batches: int, failed: frozenset[int] = frozenset(), detailed: bool = True
) -> tuple[list[str], Lines, SyncLogger]:
    """The lines of a sync of `batches` batches of a day each."""
    lines = Lines()
    listener = SyncLogger(lines, detailed)
    hull = TimeRange(0, batches * MICROS_PER_DAY)
    parts = tuple(Batch(day(n), RangeSet([day(n)]), 1440) for n in range(batches))
    plan = Plan(SERIES, hull, 1440 * batches, 1440 * batches, RangeSet([hull]), parts)
    listener(Planned(SERIES, plan, ("binance",)))
    for n in range(batches):
        error = "binance: 503" if n in failed else None
        listener(BatchDone(SERIES, day(n), 0 if error else 1440, 0, ("binance",), error))
    return written(lines).lines, lines, listener


def test_a_quick_sync_logs_only_its_plan() -> None:
    info, _, _ = log_of(100)
    assert len(info) == 1
    assert "144,000 of 144,000 candles are missing" in info[0]


@pytest.mark.parametrize("batches", [3, 10, 97, 1000])
def test_a_long_sync_logs_a_line_per_tenth(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0)
    info, _, _ = log_of(batches)
    assert len(info) == 1 + min(batches - 1, 9)  # the last batch is reported by the result line


def test_failed_windows_are_kept() -> None:
    assert log_of(5, frozenset({1, 3}))[2].failed_windows == [day(1), day(3)]


def test_one_of_many_series_logs_nothing_and_records_its_failures() -> None:
    info, _, listener = log_of(10, frozenset({7}), detailed=False)
    assert info == []
    assert listener.failed_windows == [day(7)]


def test_a_warning_is_logged_as_one() -> None:
    _, lines, listener = log_of(1)
    listener(Warned(SERIES, "polygon is skipped: POLYGON_API_KEY is not set"))
    assert written(lines).warnings == ["BTC/USDT 1m: polygon is skipped: POLYGON_API_KEY is not set"]


def test_the_same_warning_about_several_series_is_logged_once() -> None:
    lines = Lines()
    other = Series("ETH/USDT", Timeframe.M1, AssetClass.CRYPTO)
    for series in (SERIES, other, SERIES):
        SyncLogger(lines)(Warned(series, "polygon is skipped: POLYGON_API_KEY is not set"))
    SyncLogger(lines)(Warned(other, "binance: answered 503"))
    assert written(lines).warnings == [
        "BTC/USDT 1m: polygon is skipped: POLYGON_API_KEY is not set",
        "ETH/USDT 1m: binance: answered 503",
    ]


def test_further_warnings_are_omitted_with_a_note() -> None:
    lines = Lines()
    for n in range(40):
        lines.warn(f"warning {n}")
    written_lines = written(lines).warnings
    assert written_lines[:2] == ["warning 0", "warning 1"]
    assert len(written_lines) == run_log.MOST_WARNINGS + 1
    assert "omitted" in written_lines[-1]
    lines.warn("one more")
    assert written(lines).warnings == []


def test_many_series_log_ten_lines_and_a_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0)
    lines = Lines()
    progress = Progress(50, lines)
    for n in range(50):
        progress.add(SyncReport(SERIES, day(0), total_candles=2, requests=1, missing=int(n == 3)))
    progress.end()
    written_lines = written(lines).lines
    assert len(written_lines) == 11
    assert written_lines[-1].startswith("50 of 50 series: 100 candles stored in ")
    assert written_lines[-1].endswith("50 requests); 1 of them are incomplete")


def test_a_single_series_logs_no_total(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "QUIET_SECONDS", 0)
    lines = Lines()
    progress = Progress(1, lines)
    progress.add(SyncReport(SERIES, day(0), total_candles=2, requests=1))
    progress.end()
    assert written(lines).lines == []
