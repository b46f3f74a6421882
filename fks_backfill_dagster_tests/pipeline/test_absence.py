"""No-trade intervals in real syncs: the rule is independent of batches and their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from fks_backfill_dagster.domain.closures import forex_holidays
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.no_trade import Absent, no_trade
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.fill import fill_gaps
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.test_faults import Case, context_of
from fks_backfill_dagster_tests.pipeline.test_real_candles import invented, replay, write_csv

BITCOIN = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
MINUTES = replace(BITCOIN, timeframe=Timeframe.M1)
EURO = Series("EUR/USD", Timeframe.H1, AssetClass.FOREX)
SPY = Series("SPY", Timeframe.M1, AssetClass.STOCKS)
NOWHERE = RangeSet()


def opens_in(database: Database, series: Series, window: TimeRange, *states: GapStatus) -> Instants:
    grid = grid_of(series)
    gaps = [gap for gap in queries.ledger_gaps(database, series, window) if gap.status in states]
    return np.concatenate(
        [np.empty(0, dtype=np.int64), *(grid.opens(TimeRange(g.start, g.end)) for g in gaps)]
    )


def halted(market: LocalMarket, series: Series, opens: Instants) -> None:
    """Plants halts (no trades) over these intervals, neighbours as one halt."""
    for part in RangeSet.from_arrays(opens, grid_of(series).closes(opens)):
        market.plant_halt(part, series.symbol)


# Batches and order ----------------------------------------------------------------------------------------

WINTER = days("2024-01-01", "2024-04-01")
MONTHS = [
    days("2024-01-01", "2024-02-01"),
    days("2024-02-01", "2024-03-01"),
    days("2024-03-01", "2024-04-01"),
]
ODD = [days("2024-01-01", "2024-01-20"), days("2024-01-13", "2024-03-11"), days("2024-03-11", "2024-04-01")]


@pytest.mark.parametrize(
    ("size", "windows"),
    [
        *((size, [WINTER]) for size in (1, 7, 30, 365)),
        (30, MONTHS),
        (30, MONTHS[::-1]),
        (7, [MONTHS[0], MONTHS[2], MONTHS[1]]),
        (7, ODD),
        (365, ODD[::-1]),
        (1, [MONTHS[1], WINTER]),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else f"{len(value)}from{value[0].start // 10**12}",
)
def test_neither_batches_nor_their_order_decide(
    database: Database, market: LocalMarket, size: int, windows: Sequence[TimeRange]
) -> None:
    """A thin market with two outages, one of them beside a boundary of months."""
    case = Case("polygon", "polygon", BITCOIN, WINTER)
    opens = grid_of(BITCOIN).opens(WINTER)
    gone = np.random.default_rng(3).random(len(opens)) < 0.04
    gone[[0, -1]] = False
    halted(market, BITCOIN, opens[gone])
    for hole in (days("2024-02-29T15:00", "2024-03-01T08:00"), days("2024-01-17T04:00", "2024-01-17T21:00")):
        market.plant_outage("polygon", hole)
        gone |= (opens >= hole.start) & (opens < hole.end)
    expected = opens[gone]
    by_the_rule = expected[
        no_trade(Absent.of(expected, expected), RangeSet([WINTER]), grid_of(BITCOIN), NOWHERE)
    ]
    assert 30 < len(by_the_rule) < len(expected) - 33
    context = replace(
        context_of(database, market, case), batch_size_days=size, priority=lambda series: ("polygon",)
    )
    for window in windows:
        sync(context, BITCOIN, window, ["polygon"])
    assert np.array_equal(opens_in(database, BITCOIN, WINTER, GapStatus.NO_TRADE), by_the_rule)
    left = np.setdiff1d(expected, by_the_rule)
    assert np.array_equal(opens_in(database, BITCOIN, WINTER, GapStatus.UNAVAILABLE), left)


@pytest.mark.parametrize(("timeframe", "size"), thinned(["30m", "1h", "1d"], [1, 30, 365], every=3))
def test_ninety_absent_sessions_are_never_no_trade(
    database: Database, market: LocalMarket, timeframe: str, size: int
) -> None:
    series, window = Series("AAPL", Timeframe(timeframe), AssetClass.STOCKS), days("2023-03-01", "2024-03-01")
    hole = days("2023-06-01", "2023-10-10")
    sessions = grid_of(replace(series, timeframe=Timeframe.D1)).opens(hole)
    assert len(sessions) >= 90
    opens = grid_of(series).opens(window)
    outside = opens[((opens < hole.start) | (opens >= hole.end)) & (opens > opens[9]) & (opens < opens[-9])]
    if timeframe != "1d":  # a thin market does not make the absent sessions no-trade
        halted(market, series, outside[np.random.default_rng(1).random(len(outside)) < 0.03])
    market.plant_outage("polygon", hole)
    case = Case("polygon", "polygon", series, window)
    context = replace(
        context_of(database, market, case), batch_size_days=size, priority=lambda series: ("polygon",)
    )
    report = sync(context, series, window, ["polygon"])
    lost = grid_of(series).opens(hole)
    missing = opens_in(database, series, window, GapStatus.UNAVAILABLE)
    assert np.isin(lost, missing).all()
    assert not report.complete


# Closed markets -------------------------------------------------------------------------------------------


def test_holidays_of_forex_are_no_trade_and_an_outage_is_not(database: Database, tmp_path: Path) -> None:
    """Invented hours of a winter from one provider alone."""
    window = days("2016-12-01", "2017-02-01")
    opens = grid_of(EURO).opens(window)
    holidays = forex_holidays(window).contains(opens)
    outage = (opens >= days("2017-01-18T02:00", "2017-01-18T19:00").start) & (
        opens < days("2017-01-18T02:00", "2017-01-18T19:00").end
    )
    assert (int(holidays.sum()), int(outage.sum())) == (50, 17)
    write_csv(tmp_path / "forex" / "EURUSD-1h.csv", invented(opens[~holidays & ~outage]))
    with replay(database, tmp_path) as context:
        report = sync(context, EURO, window, ["oanda"])
    assert (report.no_trade, report.missing) == (50, 17)
    assert np.array_equal(opens_in(database, EURO, window, GapStatus.NO_TRADE), opens[holidays])
    assert np.array_equal(opens_in(database, EURO, window, GapStatus.UNAVAILABLE), opens[outage])


@pytest.mark.parametrize("provider", ["oanda", "polygon"])
@pytest.mark.parametrize(
    "window",
    [
        days("2016-12-25T03:00", "2016-12-25T23:00"),
        days("2016-12-26T05:00", "2017-01-01T23:00"),
        days("2015-12-25T03:00", "2015-12-25T04:00"),
        days("2015-12-28", "2016-01-01T09:00"),
    ],
    ids=str,
)
def test_a_range_that_begins_or_ends_in_a_holiday(
    database: Database, tmp_path: Path, provider: str, window: TimeRange
) -> None:
    """Also one inside a holiday: no candle of the response shows that it is complete."""
    around = days("2015-12-01", "2017-02-01")
    opens = grid_of(EURO).opens(around)
    write_csv(tmp_path / "forex" / "EURUSD-1h.csv", invented(opens[~forex_holidays(around).contains(opens)]))
    with replay(database, tmp_path) as context:
        report = sync(context, EURO, window, [provider])
    requested = grid_of(EURO).opens(window)
    closed = int(forex_holidays(around).contains(requested).sum())
    assert closed or not len(requested)
    assert (report.no_trade, report.missing) == (closed, 0)


def test_a_holiday_of_forex_that_traded_is_stored(database: Database, tmp_path: Path) -> None:
    window = days("2016-12-01", "2017-02-01")
    opens = grid_of(EURO).opens(window)
    write_csv(tmp_path / "forex" / "EURUSD-1h.csv", invented(opens))
    with replay(database, tmp_path) as context:
        report = sync(context, EURO, window, ["oanda"])
    assert (report.stored, report.no_trade, report.missing) == (len(opens), 0, 0)


@pytest.mark.parametrize("is_closed", [True, False])
@pytest.mark.parametrize(
    ("provider", "series"),
    [
        ("polygon", Series("AAPL", Timeframe.M30, AssetClass.STOCKS)),
        ("polygon", Series("AAPL", Timeframe.H1, AssetClass.STOCKS)),
        ("alphavantage", Series("AAPL", Timeframe.D1, AssetClass.STOCKS)),
        ("oanda", EURO),
        ("polygon", BITCOIN),
    ],
    ids=lambda value: str(value),
)
def test_a_date_that_the_settings_close(
    database: Database, market: LocalMarket, provider: str, series: Series, is_closed: bool
) -> None:
    window, day = days("2024-02-01", "2024-04-01"), date(2024, 3, 13)
    case = Case(provider, provider, series, window)
    context = replace(
        context_of(database, market, case),
        closed_dates=lambda series: [(day, day)] if is_closed else [],
        priority=lambda series: (provider,),
    )
    grid = grid_of(series)
    closed = replace(context, closed_dates=lambda series: [(day, day)]).closed(series, window)
    opens = grid.opens(window)
    lost = opens[closed.contains(opens)]
    assert len(lost) >= 1
    market.plant_outage(provider, TimeRange(int(lost[0]), int(grid.closes(lost[-1:])[0])))
    report = sync(context, series, window, [provider])
    state = GapStatus.NO_TRADE if is_closed else GapStatus.UNAVAILABLE
    assert np.isin(lost, opens_in(database, series, window, state)).all()
    if is_closed:
        assert report.missing <= 2  # the local market has occasional no-trade intervals


# A new key ------------------------------------------------------------------------------------------------

QUIET = [days("2024-03-01", "2024-03-01").start + n * MICROS_PER_MINUTE for n in range(100, 2800, 150)]
MARCH = days("2024-03-01", "2024-03-03")


def thin(database: Database, market: LocalMarket) -> tuple[Context, Context]:
    """Single minutes that are no-trade by Polygon alone; returns contexts with Polygon, and with Binance as well."""
    case = Case("polygon", "polygon", MINUTES, MARCH)
    for start in QUIET:
        market.plant_outage("polygon", TimeRange(start, start + MICROS_PER_MINUTE))
    alone = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    sync(alone, MINUTES, MARCH, ["polygon"])
    assert opens_in(database, MINUTES, MARCH, GapStatus.NO_TRADE).tolist() == QUIET
    both = context_of(database, market, case, Case("binance", "binance", MINUTES, MARCH))
    return alone, replace(both, priority=lambda series: ("polygon", "binance"))


def test_a_new_provider_reopens_gaps_explained_by_one_response(
    database: Database, market: LocalMarket
) -> None:
    alone, both = thin(database, market)
    market.reset_requests()
    assert sync(alone, MINUTES, MARCH, ["polygon"]).complete
    assert market.requests() == 0, "nothing is requested from the same providers again"
    report = sync(both, MINUTES, MARCH, ["polygon", "binance"])
    assert (report.complete, report.no_trade) == (True, 0)
    assert report.providers["binance"].delivered == len(QUIET)


def test_a_new_provider_reopens_it_for_fill_gaps(database: Database, market: LocalMarket) -> None:
    alone, both = thin(database, market)
    assert fill_gaps(alone, MINUTES, ["polygon"]).gaps == ()
    report = fill_gaps(both, MINUTES, ["polygon", "binance"])
    assert sum(one.filled for one in report.gaps) == len(QUIET)
    assert report.complete


def test_an_absence_at_a_strict_provider_too_is_an_outage(database: Database, market: LocalMarket) -> None:
    _, both = thin(database, market)
    for start in QUIET:
        market.plant_outage("binance", TimeRange(start, start + MICROS_PER_MINUTE))
    sync(both, MINUTES, MARCH, ["polygon", "binance"])
    gone = opens_in(database, MINUTES, MARCH, GapStatus.TOLERATED, GapStatus.UNAVAILABLE)
    assert gone.tolist() == QUIET
    market.reset_requests()
    sync(both, MINUTES, MARCH, ["polygon", "binance"])
    assert market.requests() == 0


def test_two_providers_that_omit_intervals_agree(database: Database, market: LocalMarket) -> None:
    """A halt of twenty minutes fits no density; a complete response of another provider corroborates it."""
    window = days("2024-06-03", "2024-06-12")
    halt = days("2024-06-05T15:00", "2024-06-05T15:20")
    series = Series("AAPL", Timeframe.M1, AssetClass.STOCKS)
    market.plant_halt(halt, "AAPL")
    case, second = Case("polygon", "polygon", series, window), Case("yfinance", "yahoo", series, window)
    alone = replace(context_of(database, market, case), priority=lambda series: ("polygon",))
    sync(alone, series, window, ["polygon"])
    halves = grid_of(series).opens(halt)
    assert np.isin(halves, opens_in(database, series, window, GapStatus.UNAVAILABLE)).all()
    both = replace(
        context_of(database, market, case, second), priority=lambda series: ("polygon", "yfinance")
    )
    sync(both, series, window, ["polygon", "yfinance"])
    assert np.isin(halves, opens_in(database, series, window, GapStatus.NO_TRADE)).all()


# Thin minutes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "name", "window"),
    [
        ("yfinance", "yahoo", days("2024-05-17", "2024-06-14")),
        ("polygon", "polygon", days("2024-05-01", "2024-06-01")),
        ("alphavantage", "alphavantage", days("2024-05-01", "2024-06-01")),
    ],
)
def test_a_month_of_thin_minutes(
    database: Database, market: LocalMarket, provider: str, name: str, window: TimeRange
) -> None:
    """One minute in forty has no trade, and almost none of them counts as missing."""
    case = Case(provider, name, SPY, window)
    context = replace(context_of(database, market, case), priority=lambda series: (provider,))
    report = sync(context, SPY, window, [provider])
    truth = market.truth(name, "SPY", Timeframe.M1, window)
    assert queries.read_candles(database, SPY, window).ts.tolist() == truth.ts.tolist()
    assert report.no_trade > 0.015 * report.expected
    gaps = queries.ledger_gaps(database, SPY, window)
    lengths = [gap.missing for gap in gaps if gap.status is not GapStatus.NO_TRADE]
    # The local market has occasional pauses of a quarter of an hour, which no density explains.
    assert len(lengths) <= 2
    assert all(length > 10 for length in lengths)
