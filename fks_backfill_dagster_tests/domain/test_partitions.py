"""Grains: the keys and windows of months and years."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.partitions import Grain, asset_path
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Instrument, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster_tests.domain.builders import at

moments = st.integers(0, 2_500_000_000_000_000)
grains = st.sampled_from(list(Grain))


def test_months_below_an_hour_and_years_from_an_hour_up() -> None:
    months = [frame.value for frame in Timeframe if Grain.of(frame) is Grain.MONTH]
    assert months == ["1m", "5m", "15m", "30m"]


@pytest.mark.parametrize(
    ("grain", "moment", "offset", "start"),
    [
        (Grain.MONTH, "2024-02-29T23:59:59Z", 0, "2024-02-01"),
        (Grain.MONTH, "2024-12-31T00:00Z", 1, "2025-01-01"),
        (Grain.MONTH, "2024-01-01T00:00Z", -1, "2023-12-01"),
        (Grain.MONTH, "2024-03-05T00:00Z", -14, "2023-01-01"),
        (Grain.MONTH, "2024-03-05T00:00Z", 10, "2025-01-01"),
        (Grain.MONTH, "2024-01-31T23:59Z", -24, "2022-01-01"),
        (Grain.YEAR, "2024-12-31T23:59Z", 0, "2024-01-01"),
        (Grain.YEAR, "2024-02-29T00:00Z", 1, "2025-01-01"),
        (Grain.YEAR, "2024-02-29T00:00Z", -1, "2023-01-01"),
    ],
)
def test_starts_of_a_partition_and_of_its_neighbours(
    grain: Grain, moment: str, offset: int, start: str
) -> None:
    assert grain.start(at(moment), offset) == at(f"{start}T00:00Z")


@given(grain=grains, begin=moments, length=st.integers(1, 5 * 366 * 86_400_000_000))
def test_the_partitions_of_a_range_cover_it_without_overlap(grain: Grain, begin: int, length: int) -> None:
    window = TimeRange(begin, begin + length)
    keys = grain.keys(window)
    windows = [grain.window(key) for key in keys]
    assert windows[0].start <= window.start < windows[0].end
    assert windows[-1].start < window.end <= windows[-1].end
    assert all(one.end == other.start for one, other in pairwise(windows))
    assert [iso(one.start)[:10] for one in windows] == keys == [grain.key(one.end - 1) for one in windows]


def test_a_series_has_the_fields_of_its_instrument_and_a_key() -> None:
    series = Series("BRK.B", Timeframe.H1, AssetClass.STOCKS, "XLON", (("polygon", "BRK/B"),))
    assert series.instrument == Instrument("BRK.B", AssetClass.STOCKS, "XLON")
    again = series.instrument.at(Timeframe.H1)
    assert again == series
    assert again.provider_symbol("polygon") == "BRK/B"
    assert series.at(Timeframe.D1).key == ("BRK.B", "1d")
    assert series.at(Timeframe.D1).provider_symbol("polygon") == "BRK/B"
    assert asset_path(series) == ("ohlcv", "BRK_B", "1h")
