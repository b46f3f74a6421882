from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.timeframe import (
    FIRST_MONDAY,
    MICROS_PER_DAY,
    MICROS_PER_MINUTE,
    Timeframe,
    iso,
    to_datetime,
    to_micros,
)

MOMENTS = st.datetimes(
    timezones=st.sampled_from([UTC, timezone(timedelta(hours=-5)), timezone(timedelta(hours=9))])
)


def test_names() -> None:
    assert [str(t) for t in Timeframe] == ["1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w"]


def test_lengths() -> None:
    assert [t.minutes for t in Timeframe] == [1, 5, 15, 30, 60, 240, 1440, 10080]
    assert all(t.micros == t.minutes * MICROS_PER_MINUTE for t in Timeframe)
    assert [t for t in Timeframe if not t.is_intraday] == [Timeframe.D1, Timeframe.W1]


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="2h"):
        Timeframe("2h")


def test_first_monday() -> None:
    assert to_datetime(FIRST_MONDAY).weekday() == 0
    assert 0 <= FIRST_MONDAY < 7 * MICROS_PER_DAY


@given(MOMENTS)
def test_instants_are_exact(moment: datetime) -> None:
    assert to_datetime(to_micros(moment)) == moment
    assert datetime.fromisoformat(iso(to_micros(moment))) == moment


def test_naive_is_refused() -> None:
    with pytest.raises(ValueError, match="no time zone"):
        to_micros(datetime(2024, 1, 1))  # noqa: DTZ001


def test_iso_names_its_zone() -> None:
    assert iso(1_704_067_200_000_000) == "2024-01-01T00:00:00+00:00"
