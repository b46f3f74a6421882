"""Derived candles end to end: none from incomplete parts, for every provider and position of missing parts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import pytest

from fks_backfill_dagster.domain.derive import parts_span
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, iso
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.test_faults import Case, accounted_for, context_of, quarantined


@dataclass(frozen=True)
class Made:
    """A series that a provider derives from `parts`. `hole`: the number of missing parts in a row that is too large
    for a no-trade interval in a market that has some."""

    case: Case
    parts: Timeframe
    hole: int = 2

    def __str__(self) -> str:
        return f"{self.case}-{self.case.series.timeframe}"

    @property
    def fine(self) -> Series:
        series = self.case.series
        return Series(series.symbol, self.parts, series.asset_class, series.calendar)

    def parts_of(self, candle: int) -> Instants:
        """The opens of the parts of a candle: of the first one after the middle of the window with the full number of
        parts, or of one after it."""
        coarse, fine = grid_of(self.case.series), grid_of(self.fine)
        opens = coarse.opens(self.case.window)
        ends = fine.rank(coarse.closes(opens))
        counts = np.diff(ends, prepend=fine.rank(np.array([parts_span(coarse, self.case.window).start])))
        whole = np.flatnonzero(counts == counts.max())
        start = int(opens[whole[whole >= len(opens) // 2][0] + candle])
        return fine.opens(parts_span(coarse, TimeRange(start, start + 1)))

    def covering(self, parts: Instants) -> TimeRange:
        return TimeRange(int(parts[0]), int(grid_of(self.fine).closes(parts[-1:])[0]))


def made(
    provider: str, symbol: str, timeframe: str, parts: str, window: tuple[str, str], hole: int = 2
) -> Made:
    asset_class = (
        AssetClass.STOCKS
        if "/" not in symbol
        else AssetClass.FOREX
        if symbol == "EUR/USD"
        else AssetClass.CRYPTO
    )
    market = {"yfinance": "yahoo"}.get(provider, provider)
    series = Series(symbol, Timeframe(timeframe), asset_class)
    return Made(Case(provider, market, series, days(*window)), Timeframe(parts), hole)


SPRING = ("2024-02-01", "2024-06-01")
MADE = [
    made("polygon", "AAPL", "1h", "30m", SPRING, 1),
    made("polygon", "AAPL", "4h", "30m", SPRING),
    made("polygon", "AAPL", "1w", "1d", ("2023-01-01", "2024-06-01"), 1),
    made("polygon", "EUR/USD", "4h", "1h", SPRING),
    made("polygon", "EUR/USD", "1d", "1h", SPRING),
    made("polygon", "EUR/USD", "1w", "1h", SPRING),
    made("polygon", "BTC/USDT", "4h", "1h", SPRING),
    made("polygon", "BTC/USDT", "1w", "1d", ("2023-01-01", "2024-06-01"), 1),
    made("yfinance", "AAPL", "1h", "15m", ("2024-05-01", "2024-06-13"), 3),
    made("yfinance", "AAPL", "4h", "15m", ("2024-05-01", "2024-06-13"), 3),
    made("yfinance", "AAPL", "1w", "1d", ("2023-01-01", "2024-06-01"), 1),
    made("alphavantage", "AAPL", "1h", "30m", SPRING, 1),
    made("alphavantage", "AAPL", "4h", "30m", SPRING),
    made("alphavantage", "AAPL", "1w", "1d", ("2023-01-01", "2024-06-01"), 1),
    made("coingecko", "BTC/USDT", "1h", "30m", ("2024-06-14T16:00", "2024-06-15T12:00"), 1),
    made("coingecko", "BTC/USDT", "1d", "4h", ("2024-05-20", "2024-06-14"), 1),
    made("coingecko", "BTC/USDT", "1w", "4h", ("2024-05-20", "2024-06-10"), 1),
]


def evidence(database: Database, case: Case) -> dict[int, list[str]]:
    """The details of the responses about each missing candle."""
    grid = grid_of(case.series)
    return {
        ts: [item.detail for item in gap.evidence]
        for gap in queries.ledger_gaps(database, case.series, case.window)
        for ts in grid.opens(TimeRange(gap.start, gap.end)).tolist()
    }


def touched(one: Made, holes: RangeSet) -> Instants:
    """The candles of the window with a part in the holes."""
    coarse, fine = grid_of(one.case.series), grid_of(one.fine)
    opens = coarse.opens(one.case.window)
    parts = np.concatenate([fine.opens(hole) for hole in holes])
    index = np.searchsorted(coarse.closes(opens), parts, side="right")
    return opens[np.unique(index[index < len(opens)])]


@pytest.mark.parametrize(
    ("one", "place"), thinned(MADE, ["middle", "first", "last", "all but one", "over an edge"], every=3)
)
def test_no_candle_from_incomplete_parts(
    database: Database, market: LocalMarket, one: Made, place: str
) -> None:
    case, parts, hole = one.case, one.parts_of(0), one.hole
    middle = (len(parts) - hole) // 2
    holes = {
        "middle": parts[middle : middle + hole],
        "first": parts[:hole],
        "last": parts[-hole:],
        "all but one": parts[1:],
        "over an edge": np.concatenate([parts[-hole:], one.parts_of(1)[:hole]]),
    }[place]
    market.plant_outage(case.market, one.covering(holes))
    truth = market.truth(case.market, case.series.symbol, case.series.timeframe, case.window)
    report = sync(context_of(database, market, case), case.series, case.window, [case.provider])
    stored = accounted_for(database, case, truth, report)
    absent = touched(one, RangeSet([one.covering(holes)]))
    assert not np.isin(absent, stored.ts).any()
    assert len(stored) >= 0.95 * len(truth), "almost all other candles are stored"
    assert not report.complete
    details = evidence(database, case)
    given = len(parts) - int(np.isin(parts, holes).sum())
    if given and place != "over an edge":  # two neighbours are one gap
        assert details[int(absent[0])] == [f"derived from {given} of {len(parts)} parts"]
    assert all(text.startswith("derived from ") for ts in absent.tolist() for text in details[ts])
    gaps = queries.ledger_gaps(database, case.series, case.window)
    assert not any(
        gap.status is GapStatus.NO_TRADE and gap.start <= ts < gap.end
        for gap in gaps
        for ts in absent.tolist()
    )


@pytest.mark.parametrize(
    ("one", "second"),
    [
        (MADE[0], "yfinance"),
        (MADE[2], "yfinance"),
        (MADE[3], "oanda"),
        (MADE[4], "oanda"),
        (MADE[5], "oanda"),
        (MADE[6], "binance"),
        (MADE[9], "polygon"),
        (MADE[12], "polygon"),
        (MADE[15], "binance"),
    ],
    ids=str,
)
def test_a_second_provider_fills_candles_with_incomplete_parts(
    database: Database, market: LocalMarket, one: Made, second: str
) -> None:
    case, parts = one.case, one.parts_of(0)
    other = Case(second, {"yfinance": "yahoo"}.get(second, second), case.series, case.window)
    market.plant_outage(case.market, one.covering(parts[1:]))
    window = case.window
    if second == "yfinance" and case.series.timeframe is not Timeframe.W1:  # its depth is 60 days
        window = days("2024-05-01", "2024-06-01")
        market.clear_outages()
        one = Made(Case(case.provider, case.market, case.series, window), one.parts, one.hole)
        parts = one.parts_of(0)
        market.plant_outage(case.market, one.covering(parts[1:]))
    report = sync(context_of(database, market, case, other), case.series, window, [case.provider, second])
    (mine,) = touched(one, RangeSet([one.covering(parts[1:])])).tolist()
    origins = queries.origins(database, case.series, TimeRange(mine, mine + 1))
    assert [origin.provider for origin in origins] == [second]
    assert report.missing <= 0.05 * report.expected


@pytest.mark.parametrize("one", [one for one in MADE if one.case.provider != "coingecko"], ids=str)
def test_no_trade_parts_do_not_prevent_the_candle(database: Database, market: LocalMarket, one: Made) -> None:
    """A trading halt in a market with other no-trade intervals."""
    case, parts = one.case, one.parts_of(0)
    if one.parts is Timeframe.D1:
        pytest.skip("a whole session or day is never no-trade")
    middle = len(parts) // 2
    halted = parts[middle : middle + 1]
    market.plant_halt(one.covering(halted))
    # The same market has no-trade intervals elsewhere, too.
    opens = grid_of(one.fine).opens(case.window)
    for at in opens[5 :: max(len(opens) // 40, 7)].tolist():
        market.plant_halt(TimeRange(at, at + one.parts.micros))
    truth = market.truth(case.market, case.series.symbol, case.series.timeframe, case.window)
    report = sync(context_of(database, market, case), case.series, case.window, [case.provider])
    stored = accounted_for(database, case, truth, report)
    assert np.isin(touched(one, RangeSet([one.covering(halted)])), stored.ts).all()
    assert len(stored) >= 0.97 * len(truth)


def test_parts_of_a_strict_provider_are_never_no_trade(database: Database, market: LocalMarket) -> None:
    """CoinGecko gives intervals without trades, too: each scattered absent half hour is an outage."""
    case = MADE[14].case
    halves = grid_of(MADE[14].fine).opens(case.window)[4:36:5]
    for at in halves.tolist():
        market.plant_outage("coingecko", TimeRange(at, at + 30 * 60_000_000))
    truth = market.truth("coingecko", "BTC/USDT", Timeframe.H1, case.window)
    report = sync(context_of(database, market, case), case.series, case.window, ["coingecko"])
    assert accounted_for(database, case, truth, report).equals(truth)
    assert (report.missing, report.no_trade) == (len(halves), 0)


@pytest.mark.parametrize("kind", ["off_grid", "negative", "high_below_low"])
@pytest.mark.parametrize("one", [MADE[1], MADE[4], MADE[9], MADE[12], MADE[15]], ids=str)
def test_a_bad_part_leaves_its_candle_absent(
    database: Database, market: LocalMarket, one: Made, kind: str
) -> None:
    case, parts = one.case, one.parts_of(0)
    bad = one.covering(parts[1:2])
    shift = one.parts.micros if case.provider == "coingecko" else 0  # its rows are stamped with the close
    market.plant_fault(case.market, kind, count=None, start=iso(bad.start + shift), end=iso(bad.end + shift))
    truth = market.truth(case.market, case.series.symbol, case.series.timeframe, case.window)
    report = sync(context_of(database, market, case), case.series, case.window, [case.provider])
    stored = accounted_for(database, case, truth, report)
    (mine,) = touched(one, RangeSet([bad])).tolist()
    assert mine not in stored.ts.tolist()
    assert set(quarantined(database)) <= {"off_grid", "not_positive", "high_low"}
    (gap,) = [
        gap for gap in queries.ledger_gaps(database, case.series, case.window) if gap.start <= mine < gap.end
    ]
    assert [item.outcome for item in gap.evidence] == ["rejected"]


@pytest.mark.parametrize(("one", "size"), thinned([MADE[0], MADE[3], MADE[11]], [1, 7, 30, 365], every=3))
def test_derived_candles_are_independent_of_the_batch_size(
    database: Database, market: LocalMarket, one: Made, size: int
) -> None:
    """A thin market: one part in twelve is absent, alone or in pairs, and one longer run is an outage."""
    case, random = one.case, np.random.default_rng(7)
    opens = grid_of(one.fine).opens(case.window)
    quiet = random.random(len(opens)) < 1 / 12
    for at in opens[quiet].tolist():
        market.plant_halt(TimeRange(at, at + one.parts.micros))
    middle = opens[len(opens) // 2 :][:9]
    market.plant_outage(case.market, one.covering(middle))
    context = replace(context_of(database, market, case), batch_size_days=size)
    sync(context, case.series, case.window, [case.provider])
    stored = queries.read_candles(database, case.series, case.window)
    expected = grid_of(case.series).opens(case.window)
    outage = touched(one, RangeSet([one.covering(middle)]))
    assert not np.isin(outage, stored.ts).any()
    halted = touched(one, RangeSet([TimeRange(at, at + 1) for at in opens[quiet].tolist()]))
    wholly = np.setdiff1d(np.setdiff1d(expected, stored.ts), outage)
    assert np.isin(wholly, halted).all()
    inner = (wholly > expected[60]) & (wholly < expected[-60])
    whole = [ts for ts in wholly[inner].tolist() if not _all_parts_quiet(one, ts, opens[quiet])]
    assert whole == []


def _all_parts_quiet(one: Made, candle: int, quiet: Instants) -> bool:
    parts = grid_of(one.fine).opens(parts_span(grid_of(one.case.series), TimeRange(candle, candle + 1)))
    return bool(np.isin(parts, quiet).all())


def test_a_bad_part_of_the_neighbourhood_is_ignored(database: Database, market: LocalMarket) -> None:
    """The second request extends far beyond the window: bad rows there belong to none of its candles."""
    case = MADE[4].case
    window = TimeRange(case.window.end - 7 * MICROS_PER_DAY, case.window.end)
    narrow = Case(case.provider, case.market, case.series, window)
    hole = window.start + 2 * MICROS_PER_DAY + 3 * MICROS_PER_HOUR
    market.plant_outage("polygon", TimeRange(hole, hole + 2 * MICROS_PER_HOUR))
    far = window.start - 5 * MICROS_PER_DAY
    market.plant_fault("polygon", "negative", count=None, start=iso(far), end=iso(far + MICROS_PER_HOUR))
    truth = market.truth("polygon", "EUR/USD", Timeframe.D1, window)
    report = sync(context_of(database, market, narrow), case.series, window, ["polygon"])
    assert accounted_for(database, narrow, truth, report).equals(truth)
    assert quarantined(database) == {}
    assert {item for details in evidence(database, narrow).values() for item in details} == {
        "derived from 22 of 24 parts"
    }


@pytest.mark.parametrize("is_closed", [True, False])
@pytest.mark.parametrize(
    ("one", "closed"), [(MADE[2], "2023-10-11"), (MADE[10], "2023-10-13"), (MADE[5], "2024-04-03")], ids=str
)
def test_a_closed_date_in_a_week(
    database: Database, market: LocalMarket, one: Made, closed: str, is_closed: bool
) -> None:
    """The week is derived from its other days if the settings close one."""
    case, day = one.case, date.fromisoformat(closed)
    parts = grid_of(one.fine).opens(days(closed, closed + "T21:00"))
    if one.parts is Timeframe.H1:  # the forex day ends at 17:00 New York
        parts = grid_of(one.fine).opens(days("2024-04-02T21:00", "2024-04-03T21:00"))
    market.plant_outage(case.market, one.covering(parts))
    context = replace(
        context_of(database, market, case),
        closed_dates=lambda series: [(day, day)] if is_closed else [],
    )
    report = sync(context, case.series, case.window, [case.provider])
    (week,) = touched(one, RangeSet([one.covering(parts)])).tolist()
    stored = queries.read_candles(database, case.series, case.window)
    assert (week in stored.ts.tolist()) == is_closed
    assert (report.missing, report.no_trade) == (0 if is_closed else 1, 0)
