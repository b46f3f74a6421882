"""Past sessions of an exchange calendar: stored form, and comparison with another version of the library."""

from __future__ import annotations

from datetime import date

import numpy as np
import pytest

from fks_backfill_dagster.domain.calendars import (
    PastSessions,
    compare,
    digest_of,
    past_sessions,
    start_of_day,
)
from fks_backfill_dagster.domain.grid import sessions_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster_tests.calendars import Update, update
from fks_backfill_dagster_tests.domain.builders import at

__all__ = ["update"]

UNTIL = at("2024-06-15T00:00Z")
TYPHOON = ("2023-09-01", "2023-09-08")


@pytest.mark.parametrize("calendar", ["XHKG", "XNYS", "CMES", "24/7"])
def test_packing_is_reversible(calendar: str) -> None:
    past = past_sessions(calendar, UNTIL)
    packed = past.packed()
    assert np.array_equal(PastSessions.unpacked(packed).rows, past.rows)
    assert PastSessions.unpacked(packed).digest == past.digest == digest_of(calendar, UNTIL)
    assert len(packed) < 20_000
    known = sessions_of(calendar)
    assert sorted(past.by_date()) == [day for day in known.dates.tolist() if day < UNTIL]
    assert not compare(past, past)


def test_no_sessions_before_a_calendar_begins() -> None:
    past = past_sessions("XTKS", at("1970-01-01T00:00Z"))
    assert len(past.rows) == 0
    assert np.array_equal(PastSessions.unpacked(past.packed()).rows, past.rows)


def test_only_the_past_is_compared(update: Update) -> None:
    """A future closure does not change the digest of the past."""
    before = digest_of("XHKG", UNTIL)
    update("XHKG", closed=["2024-06-17"])
    assert digest_of("XHKG", UNTIL) == before
    week = UNTIL + 7 * MICROS_PER_DAY
    with_closure = digest_of("XHKG", week)
    update("XHKG")
    assert digest_of("XHKG", week) != with_closure


def test_sessions_that_are_gone_new_and_shorter(update: Update) -> None:
    update("XHKG", closed=["2022-11-02"], early=["2021-10-12"])
    before = past_sessions("XHKG", UNTIL)
    update("XHKG", closed=TYPHOON, early=["2023-07-18"])
    now = past_sessions("XHKG", UNTIL)
    found = compare(before, now)
    assert [str(day) for day in found.gone] == list(TYPHOON)
    assert found.new == (date(2022, 11, 2),)
    assert found.hours == (date(2021, 10, 12), date(2023, 7, 18))
    assert str(found) == (
        "2022-11-02 is a new session, 2023-09-01 and 2023-09-08 are no sessions any more,"
        " the hours of 2021-10-12 and 2023-07-18 have changed"
    )
    # From the date, which is the open of the day's candle, to the later close of the two versions.
    assert list(found.spans) == [
        TimeRange(at(f"{day}T00:00Z"), at(f"{day}T08:00Z"))
        for day in ("2021-10-12", "2022-11-02", "2023-07-18", "2023-09-01", "2023-09-08")
    ]
    back = compare(now, before)
    assert (back.new, back.gone, back.hours) == (found.gone, found.new, found.hours)


def test_many_dates_are_counted(update: Update) -> None:
    before = past_sessions("XNYS", UNTIL)
    update("XNYS", closed=[f"2024-03-{day}" for day in (11, 12, 13, 14, 15, 18, 19)])
    text = str(compare(before, past_sessions("XNYS", UNTIL)))
    assert text == (
        "2024-03-11, 2024-03-12, 2024-03-13, 2024-03-14, 2024-03-15 and 2 more dates are no sessions any more"
    )


def test_start_of_day() -> None:
    assert start_of_day(at("2024-06-15T12:34Z")) == UNTIL == start_of_day(UNTIL)
