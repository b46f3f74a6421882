"""Closed dates that are added after a fruitless request, and withdrawn: the ledger is settled without a request."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.audit import audit
from fks_backfill_dagster.pipeline.closures import settle_changed
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.fill import fill_gaps
from fks_backfill_dagster.pipeline.settings_changes import settle_closures
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.coverage import completeness
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.conftest import NOW
from fks_backfill_dagster_tests.pipeline.test_absence import opens_in
from fks_backfill_dagster_tests.pipeline.test_derived import MADE, Made
from fks_backfill_dagster_tests.pipeline.test_faults import Case, context_of

APPLE = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
WINDOW = days("2024-02-01", "2024-04-01")
DAY = date(2024, 3, 13)


def closing(context: Context, *dates: date) -> Context:
    return replace(context, closed_dates=lambda series: [(day, day) for day in dates])


def rows(database: Database, series: Series, window: TimeRange) -> list[tuple[object, ...]]:
    """The ledger without the times of the next attempts."""
    found = queries.ledger_gaps(database, series, window)
    return [(g.start, g.end, g.missing, g.status, g.attempts, g.evidence, g.found_at) for g in found]


def without(market: LocalMarket, case: Case, context: Context, day: date = DAY) -> Instants:
    """Plants an outage on that day; returns the missing opens."""
    opens = grid_of(case.series).opens(case.window)
    lost = opens[closing(context, day).declared(case.series).contains(opens)]
    close = int(grid_of(case.series).closes(lost[-1:])[0])
    market.plant_outage(case.market, TimeRange(int(lost[0]), close))
    return lost


@pytest.mark.parametrize("window", [WINDOW, days("2024-02-01", "2024-03-14")], ids=["middle", "end"])
@pytest.mark.parametrize(
    ("provider", "market_name", "series"),
    [
        ("polygon", "polygon", APPLE),
        ("yfinance", "yahoo", replace(APPLE, timeframe=Timeframe.D1)),
        ("oanda", "oanda", Series("EUR/USD", Timeframe.H1, AssetClass.FOREX)),
        # It gives every interval, traded or not: a missing one is an outage, unless the settings close the date.
        ("binance", "binance", Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)),
    ],
)
def test_a_date_that_is_closed_later_and_withdrawn(
    database: Database,
    market: LocalMarket,
    provider: str,
    market_name: str,
    series: Series,
    window: TimeRange,
) -> None:
    case = Case(provider, market_name, series, window)
    context = replace(context_of(database, market, case), priority=lambda series: (provider,))
    lost = without(market, case, context)
    sync(context, series, window, [provider])
    before = rows(database, series, window)
    assert np.isin(lost, opens_in(database, series, window, GapStatus.UNAVAILABLE)).all()
    counts = completeness(database, [series])[series]
    market.reset_requests()

    settle_closures(closing(context, DAY), [series])
    assert np.isin(lost, opens_in(database, series, window, GapStatus.NO_TRADE)).all()
    explained = completeness(database, [series])[series]
    assert (explained.missing, explained.no_trade) == (
        counts.missing - len(lost),
        counts.no_trade + len(lost),
    )
    settled = rows(database, series, window)
    settle_closures(closing(context, DAY), [series])
    assert rows(database, series, window) == settled
    assert audit(database, [series], lambda: NOW, repair=False).differences == 0

    settle_closures(context, [series])
    assert rows(database, series, window) == before
    assert market.requests() == 0


def test_a_sync_settles_changed_closures(database: Database, market: LocalMarket) -> None:
    """Without a request for the gap that is now explained."""
    case = Case("polygon", "polygon", APPLE, WINDOW)
    context = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    lost = without(market, case, context)
    assert sync(context, APPLE, WINDOW, ["polygon"]).missing >= len(lost)
    market.reset_requests()
    report = sync(closing(context, DAY), APPLE, WINDOW, ["polygon"])
    assert (report.missing, market.requests()) == (0, 0)
    assert report.complete
    assert sync(context, APPLE, WINDOW, ["polygon"]).missing == len(lost)


def test_a_failing_provider_explains_nothing(database: Database, market: LocalMarket) -> None:
    case = Case("polygon", "polygon", APPLE, WINDOW)
    context = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    market.plant_fault("polygon", "status", status=500, count=None)
    sync(context, APPLE, WINDOW, ["polygon"])
    settle_closures(closing(context, DAY), [APPLE])
    assert len(opens_in(database, APPLE, WINDOW, GapStatus.NO_TRADE)) == 0
    assert len(opens_in(database, APPLE, WINDOW, GapStatus.OPEN)) == grid_of(APPLE).count(WINDOW)


def test_history_that_was_never_synced_stays_pending(database: Database, market: LocalMarket) -> None:
    case = Case("polygon", "polygon", APPLE, days("2024-02-01", "2024-03-01"))
    context = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    sync(context, APPLE, case.window, ["polygon"])
    settle_closures(closing(context, DAY), [APPLE])
    assert rows(database, APPLE, WINDOW) == []


@pytest.mark.parametrize(
    ("one", "closed"), [(MADE[2], "2023-10-11"), (MADE[10], "2023-10-13"), (MADE[5], "2024-04-03")], ids=str
)
def test_the_week_over_a_date_that_is_closed_later(
    database: Database, market: LocalMarket, one: Made, closed: str
) -> None:
    """It is not derived while the day is missing; once the date is closed, it is due and derived from the others."""
    case, day = one.case, date.fromisoformat(closed)
    context = replace(context_of(database, market, case), priority=lambda series: (case.provider,))
    parts = grid_of(one.fine).opens(
        days("2024-04-02T21:00", "2024-04-03T21:00")
        if one.parts is Timeframe.H1
        else days(closed, closed + "T21:00")
    )
    market.plant_outage(case.market, one.covering(parts))
    assert sync(context, case.series, case.window, [case.provider]).missing == 1
    report = fill_gaps(closing(context, day), case.series, [case.provider])
    assert ([gap.success for gap in report.gaps], report.sync.missing) == ([True], 0)


def test_candles_of_a_closed_date_stay_and_are_reported(database: Database, market: LocalMarket) -> None:
    case = Case("polygon", "polygon", APPLE, WINDOW)
    context = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    sync(context, APPLE, WINDOW, ["polygon"])
    stored = queries.read_candles(database, APPLE, WINDOW)
    report = sync(closing(context, DAY), APPLE, WINDOW, ["polygon"])
    (warning,) = report.warnings
    assert warning.startswith("7 stored candles lie on dates that the settings now close, and are kept: ")
    assert sync(closing(context, DAY), APPLE, WINDOW, ["polygon"]).warnings == ()
    assert queries.read_candles(database, APPLE, WINDOW).equals(stored)


def test_candles_delivered_for_a_closed_date_are_stored_and_reported(
    database: Database, market: LocalMarket
) -> None:
    case = Case("polygon", "polygon", APPLE, WINDOW)
    context = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    report = sync(closing(context, DAY), APPLE, WINDOW, ["polygon"])
    assert report.complete
    (warning,) = report.warnings
    assert warning.startswith("7 candles were delivered for dates that the settings close, and are stored: ")


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    found: list[str] = []

    def note(*details: object) -> None:
        found.append(str(details[2]))

    sa.event.listen(database._engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        sa.event.remove(database._engine, "before_cursor_execute", note)


def test_two_thousand_series_cost_one_statement(database: Database) -> None:
    with database.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar, closed)"
            " SELECT 'S' || n, '1d', 'stocks', 'XNYS', '2024-03-13' FROM generate_series(1, 2000) n"
        )
    series = [Series(f"S{n}", Timeframe.D1, AssetClass.STOCKS) for n in range(1, 2001)]
    closed = {one: [(DAY, DAY)] for one in series}
    with statements(database) as found:
        assert settle_changed(database, closed, dict, lambda one: (), 5) == []
    assert len(found) == 1
