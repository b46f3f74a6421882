"""A new version of the calendar library changes past sessions: reported, and settled once accepted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.reconcile import Kind
from fks_backfill_dagster.pipeline import calendars
from fks_backfill_dagster.pipeline.audit import audit
from fks_backfill_dagster.pipeline.calendars import (
    CalendarWatch,
    accept_calendar,
    calendar_change,
    calendar_changes,
    keep_calendar,
)
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.fill import fill_gaps
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster_tests.calendars import Update, update
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.conftest import NOW
from fks_backfill_dagster_tests.pipeline.test_absence import opens_in
from fks_backfill_dagster_tests.pipeline.test_closures import rows, statements
from fks_backfill_dagster_tests.pipeline.test_faults import Case, context_of

__all__ = ["update"]

HOURS = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
DAYS, WEEKS = replace(HOURS, timeframe=Timeframe.D1), replace(HOURS, timeframe=Timeframe.W1)
WINDOW = days("2024-02-01", "2024-04-01")
MIDWEEK = "2024-03-13"
ALL = GapStatus.OPEN, GapStatus.UNAVAILABLE, GapStatus.TOLERATED, GapStatus.NO_TRADE


def later(context: Context) -> Context:
    """The same context in a later process."""
    return replace(context, calendars=CalendarWatch())


def market_of(database: Database, market: LocalMarket) -> Context:
    case = Case("polygon", "polygon", HOURS, WINDOW)
    return replace(context_of(database, market, case), priority=lambda series: ("polygon",))


def test_an_update_that_changes_nothing_of_the_past_is_not_reported(
    database: Database, market: LocalMarket, update: Update
) -> None:
    context = market_of(database, market)
    assert sync(context, DAYS, WINDOW, ["polygon"]).warnings == ()
    update("XNYS", closed=["2024-06-20"])
    assert sync(later(context), DAYS, WINDOW, ["polygon"]).warnings == ()
    assert calendar_changes(database, [DAYS]) == {}


def test_a_change_of_unsynced_sessions_is_recorded_without_a_warning(
    database: Database, market: LocalMarket, update: Update
) -> None:
    context = market_of(database, market)
    sync(context, DAYS, WINDOW, ["polygon"])
    update("XNYS", closed=["1999-03-10", "2024-04-03"])
    assert calendar_changes(database, [DAYS]) == {}
    assert sync(later(context), DAYS, WINDOW, ["polygon"]).warnings == ()
    update("XNYS", closed=["1999-03-10", "2024-04-03"])
    assert sync(later(context), DAYS, days("2024-02-01", "2024-04-10"), ["polygon"]).warnings == ()
    assert calendar_changes(database, [DAYS]) == {}


def test_a_new_session(database: Database, market: LocalMarket, update: Update) -> None:
    """Neither a gap nor a request before the change is accepted; then an ordinary gap."""
    context = market_of(database, market)
    update("XNYS", closed=[MIDWEEK])
    for series in (HOURS, DAYS, WEEKS):
        assert sync(context, series, WINDOW, ["polygon"]).complete
    before = {series: rows(database, series, WINDOW) for series in (HOURS, DAYS, WEEKS)}
    update("XNYS")
    market.reset_requests()
    for series in (HOURS, DAYS, WEEKS):
        report = sync(later(context), series, WINDOW, ["polygon"])
        (warning,) = report.warnings
        assert warning.startswith("the calendar XNYS has changed (exchange-calendars 4.")
        assert f": {MIDWEEK} is a new session; gaps and candles are unchanged" in warning
        assert fill_gaps(later(context), series, ["polygon"]).gaps == ()
    assert market.requests() == 0
    audited = audit(database, [HOURS, DAYS, WEEKS], lambda: NOW)
    assert [one.kind for found in audited.series for one in found.differences] == [Kind.CALENDAR_CHANGED] * 3
    assert {series: rows(database, series, WINDOW) for series in before} == before

    change = calendar_change(database, "XNYS")
    assert change is not None
    assert change.series == (DAYS, HOURS, WEEKS)
    accept_calendar(database, change, NOW)
    assert calendar_change(database, "XNYS") is None
    assert audit(database, change.series, lambda: NOW).left == 0
    day = days(MIDWEEK, "2024-03-14")
    for series in (HOURS, DAYS):
        new = grid_of(series).opens(day)
        assert opens_in(database, series, WINDOW, GapStatus.OPEN).tolist() == new.tolist()
        assert all(gap.success for gap in fill_gaps(later(context), series, ["polygon"]).gaps)
        assert np.isin(new, queries.read_candles(database, series, WINDOW).ts).all()
    assert sync(later(context), DAYS, WINDOW, ["polygon"]).warnings == ()


def test_sessions_that_are_gone_or_shorter(database: Database, market: LocalMarket, update: Update) -> None:
    """A day that no provider has, one that is stored, and the hours after an early close."""
    context = market_of(database, market)
    lost = days("2024-03-08", "2024-03-09")
    market.plant_outage("polygon", lost)
    late = TimeRange(
        days("2024-02-20", "2024-02-21").start + 17 * 3_600_000_000, days("2024-02-21", "2024-02-22").start
    )
    market.plant_outage("polygon", late)
    for series in (HOURS, DAYS):
        sync(context, series, WINDOW, ["polygon"])
    stored = {series: queries.read_candles(database, series, WINDOW) for series in (HOURS, DAYS)}
    before = {series: rows(database, series, WINDOW) for series in (HOURS, DAYS)}
    assert before[HOURS]
    assert before[DAYS]

    update("XNYS", closed=[MIDWEEK, "2024-03-08"], early=["2024-02-20"])
    change = calendar_changes(database, [HOURS, DAYS])[HOURS]
    assert (
        "2024-03-08 and 2024-03-13 are no sessions any more, the hours of 2024-02-20 have changed; "
        in str(change)
    )
    audit(database, [HOURS, DAYS], lambda: NOW)
    assert {series: rows(database, series, WINDOW) for series in before} == before

    accept_calendar(database, change, NOW)
    report = audit(database, change.series, lambda: NOW)
    assert {one.kind for found in report.series for one in found.left} == {Kind.OFF_GRID}
    for series in (HOURS, DAYS):
        assert len(opens_in(database, series, lost, *ALL)) == 0
        assert queries.read_candles(database, series, WINDOW).equals(stored[series])
    assert len(opens_in(database, HOURS, late, *ALL)) == 0


def test_another_process_accepts_first(database: Database, market: LocalMarket, update: Update) -> None:
    sync(market_of(database, market), DAYS, WINDOW, ["polygon"])
    update("XNYS", closed=[MIDWEEK])
    change = calendar_change(database, "XNYS")
    assert change is not None
    accept_calendar(database, change, NOW)
    with pytest.raises(StoreError, match="recorded by another process"):
        accept_calendar(database, change, NOW)


def test_a_calendar_is_recorded_once_a_day(database: Database) -> None:
    def kept() -> list[tuple[object, ...]]:
        with database.begin() as connection:
            rows = connection.exec_driver_sql("SELECT name, until::text, xmin::text FROM fks.calendar")
            return [tuple(row) for row in rows]

    assert keep_calendar(database, "XHKG", NOW) is None
    (first,) = kept()
    assert first[:2] == ("XHKG", "2024-06-15")
    keep_calendar(database, "XHKG", NOW + MICROS_PER_DAY // 4)
    keep_calendar(database, "XHKG", NOW - 3 * MICROS_PER_DAY)
    assert kept() == [first]
    keep_calendar(database, "XHKG", NOW + MICROS_PER_DAY)
    assert kept()[0][:2] == ("XHKG", "2024-06-16")


def test_two_thousand_series_cost_one_statement(database: Database) -> None:
    series = [Series(f"S{n}", Timeframe.D1, AssetClass.STOCKS, ("XNYS", "XHKG")[n % 2]) for n in range(2000)]
    watch = CalendarWatch()
    for one in series[:2]:
        watch.change_for(database, one, lambda: NOW)
    with statements(database) as found:
        assert calendar_changes(database, series) == {}
        assert all(watch.change_for(database, one, lambda: NOW) is None for one in series)
    assert len(found) == 1
    crypto = Series("BTC/USDT", Timeframe.D1, AssetClass.CRYPTO)
    with statements(database) as found:
        assert calendars.calendar_changes(database, [crypto]) == {}
    assert found == []
