"""Monthly and yearly partitions."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.orchestration.partitions import partitions_for, windows_of

LISTING = to_micros(datetime(2017, 8, 17, 4, tzinfo=UTC))


def moment(text: str) -> int:
    return to_micros(datetime.fromisoformat(text).replace(tzinfo=UTC))


@pytest.mark.parametrize("timeframe", ["1m", "5m", "15m", "30m"])
def test_below_an_hour_they_are_months_from_the_start_rounded_down(timeframe: str) -> None:
    keys = partitions_for(Timeframe(timeframe), LISTING).get_partition_keys(
        current_time=datetime(2017, 10, 31, 23, 59, tzinfo=UTC)
    )
    assert keys == ["2017-08-01", "2017-09-01", "2017-10-01"]


@pytest.mark.parametrize("timeframe", ["1h", "4h", "1d", "1w"])
def test_from_an_hour_up_they_are_years(timeframe: str) -> None:
    keys = partitions_for(Timeframe(timeframe), LISTING).get_partition_keys(
        current_time=datetime(2019, 1, 1, tzinfo=UTC)
    )
    assert keys == ["2017-01-01", "2018-01-01", "2019-01-01"]


def test_a_start_on_a_partition_edge_is_kept() -> None:
    months = partitions_for(Timeframe.M1, moment("2024-03-01"))
    assert months.get_first_partition_key() == "2024-03-01"


def test_the_windows_are_half_open_and_contiguous() -> None:
    windows = windows_of(partitions_for(Timeframe.M1, LISTING), ["2024-02-01", "2024-03-01"])
    assert windows == {
        "2024-02-01": TimeRange(moment("2024-02-01"), moment("2024-03-01")),
        "2024-03-01": TimeRange(moment("2024-03-01"), moment("2024-04-01")),
    }


def test_one_grain_is_one_object() -> None:
    assert partitions_for(Timeframe.M1, LISTING) is partitions_for(Timeframe.M30, LISTING)
    assert partitions_for(Timeframe.M1, LISTING) != partitions_for(Timeframe.H1, LISTING)
