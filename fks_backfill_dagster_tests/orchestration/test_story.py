"""The log lines of one sync."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.orchestration import story
from fks_backfill_dagster.orchestration.story import Story
from fks_backfill_dagster.pipeline.events import BatchDone, Planned, Warned
from fks_backfill_dagster.pipeline.plan import Batch, Plan

SERIES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)


def day(n: int) -> TimeRange:
    return TimeRange(n * MICROS_PER_DAY, (n + 1) * MICROS_PER_DAY)


def told(batches: int, failed: frozenset[int] = frozenset()) -> tuple[list[str], list[str], Story]:
    """The lines of a sync of so many batches, a day each: information and warnings."""
    info: list[str] = []
    warnings: list[str] = []
    listener = Story(info.append, warnings.append)
    hull = TimeRange(0, batches * MICROS_PER_DAY)
    parts = tuple(Batch(day(n), RangeSet([day(n)]), 1440) for n in range(batches))
    plan = Plan(SERIES, hull, 1440 * batches, 1440 * batches, RangeSet([hull]), parts)
    listener(Planned(SERIES, plan, ("binance",)))
    for n in range(batches):
        error = "binance: 503" if n in failed else None
        listener(BatchDone(SERIES, day(n), 0 if error else 1440, 0, ("binance",), error))
    return info, warnings, listener


def test_a_quick_sync_says_only_what_it_is_about() -> None:
    info, _, _ = told(100)
    assert len(info) == 1
    assert "144,000 of 144,000 candles are missing" in info[0]


@pytest.mark.parametrize("batches", [3, 10, 97, 1000])
def test_a_long_one_says_a_line_per_tenth(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "QUIET_SECONDS", 0)
    info, _, _ = told(batches)
    assert len(info) == 1 + min(batches - 1, 9)  # the end is the result's to tell


def test_failed_windows_are_kept() -> None:
    assert told(5, frozenset({1, 3}))[2].failed_windows == [day(1), day(3)]


def test_a_warning_is_one() -> None:
    info, warnings, listener = told(1)
    listener(Warned(SERIES, "polygon is skipped: POLYGON_API_KEY is not set"))
    assert warnings == ["BTC/USDT 1m: polygon is skipped: POLYGON_API_KEY is not set"]
    assert len(info) == 1
