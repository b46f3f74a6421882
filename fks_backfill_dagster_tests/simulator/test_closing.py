"""Stocks and currency pairs: trading hours, minutes without trades, aggregation from minutes."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
    to_micros,
)
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.closing import SyntheticClosing
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.frames import (
    EvenRuler,
    Frame,
    Ruler,
    SessionRuler,
    WallRuler,
    WeekRuler,
    ceil,
    fill,
    floor,
)
from fks_backfill_dagster.simulator.market import LISTED, NO_END, NO_HALT
from fks_backfill_dagster.simulator.sessions import stock_sessions, utc, wall
from fks_backfill_dagster.simulator.splits import Split, adjusted, as_traded
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.simulator.wire import window

STOCKS, FOREX = SyntheticClosing(AssetClass.STOCKS), SyntheticClosing(AssetClass.FOREX)
MARKETS = {"AAPL": STOCKS, "BRK.B": STOCKS, "EURUSD": FOREX, "USDJPY": FOREX}
NEW_YORK = ZoneInfo("America/New_York")
MINUTES = EvenRuler(Step(MICROS_PER_MINUTE))
ALL_MINUTES = EvenRuler(Step(MICROS_PER_MINUTE), extended=True)
LATER = instant("2040-01-01")
DAYS = st.integers(LISTED // MICROS_PER_DAY, LISTED // MICROS_PER_DAY + 3000)


def minutes(symbol: str, of: TimeRange, now: int = NO_END, extended: bool = False) -> Bars:
    ruler = ALL_MINUTES if extended else MINUTES
    return MARKETS[symbol].bars(symbol, ruler.frame(of), now, NO_HALT)


def rows(bars: Bars) -> list[tuple[int, ...]]:
    columns = [bars.ts, bars.open, bars.high, bars.low, bars.close]
    columns += [] if bars.volume is None else [bars.volume]
    return list(zip(*(column.tolist() for column in columns), strict=True))


def slow(parts: Bars, opens: list[int], closes: list[int]) -> list[tuple[int, ...]]:
    """Reference implementation, candle by candle."""
    made = []
    for opened, closed in zip(opens, closes, strict=True):
        inside = [row for row in rows(parts) if opened <= row[0] < closed]
        if inside:
            highs, lows = max(row[2] for row in inside), min(row[3] for row in inside)
            sums = () if parts.volume is None else (sum(row[5] for row in inside),)
            made.append((opened, inside[0][1], highs, lows, inside[-1][4], *sums))
    return made


@settings(max_examples=examples(40))
@given(st.sampled_from(sorted(MARKETS)), st.sampled_from(list(Timeframe)), DAYS)
def test_truth_is_aggregated_from_regular_minutes_only(symbol: str, timeframe: Timeframe, day: int) -> None:
    market = MARKETS[symbol]
    start = day * MICROS_PER_DAY
    of = TimeRange(start, start + (8 if timeframe is Timeframe.W1 else 2) * MICROS_PER_DAY)
    truth = market.truth(symbol, timeframe, of, LATER, NO_HALT)
    grid = grid_of(Series("", timeframe, market.asset_class))
    opens = grid.opens(of)
    closes = grid.closes(opens)
    parts = minutes(symbol, TimeRange(start, int(closes.max(initial=start))))
    expected = slow(parts, opens.tolist(), closes.tolist())
    if market.asset_class is AssetClass.FOREX:  # ticks are not a volume
        expected = [row[:5] for row in expected]
    found = rows(truth)
    if (
        market.asset_class is AssetClass.STOCKS and not timeframe.is_intraday
    ):  # auctions are not in the minutes
        for (ts, _, high, low, _, volume), one in zip(expected, found, strict=True):
            assert (ts, high, low) == (one[0], one[2], one[3])
            assert volume < one[5] < 1.2 * volume
        return
    assert found == expected


@settings(max_examples=examples(30))
@given(st.sampled_from(sorted(MARKETS)), DAYS, st.integers(0, 1440), st.integers(1, 3000))
def test_minutes_are_randomly_accessible_and_sane(symbol: str, day: int, first: int, count: int) -> None:
    start = day * MICROS_PER_DAY
    whole = minutes(symbol, TimeRange(start, start + 4 * MICROS_PER_DAY), extended=True)
    part = TimeRange(start + first * MICROS_PER_MINUTE, start + (first + count) * MICROS_PER_MINUTE)
    assert rows(minutes(symbol, part, extended=True)) == rows(whole.within(part))
    assert (whole.low > 0).all()
    assert (whole.high >= np.maximum(whole.open, whole.close)).all()
    assert (whole.low <= np.minimum(whole.open, whole.close)).all()
    assert whole.volume is not None
    assert (whole.volume > 0).all()


def test_a_stock_trades_before_in_and_after_the_session() -> None:
    # A winter day, a summer day, the half-day after Thanksgiving, and Christmas.
    for day, edges in {
        "2024-01-05": (9, 14.5, 21, 25),
        "2024-07-05": (8, 13.5, 20, 24),
        "2024-11-29": (9, 14.5, 18, 22),
    }.items():
        start = instant(day)
        span = TimeRange(start + 5 * MICROS_PER_HOUR, start + 29 * MICROS_PER_HOUR)  # midnight New York
        hours = (minutes("AAPL", span, extended=True).ts - start) / MICROS_PER_HOUR
        pre, opened, closed, post = edges
        regular = (hours >= opened) & (hours < closed)
        length = (closed - opened) * 60
        assert 0.9 * length < regular.sum() < length, day
        assert 0.05 < (~regular).sum() / ((closed - pre) * 60 - length + (post - closed) * 60) < 0.25
        assert hours.min() >= pre
        assert hours.max() < post
    assert len(minutes("AAPL", window("2024-12-25", "2024-12-26"), extended=True)) == 0
    assert len(minutes("AAPL", window("2024-01-06T06:00", "2024-01-08"), extended=True)) == 0


def test_forex_trades_from_sunday_to_friday_five_in_new_york() -> None:
    week = minutes("EURUSD", window("2024-03-08", "2024-03-16"))  # summer time begins in between
    times = [datetime.fromtimestamp(ts / 1e6, UTC).astimezone(NEW_YORK) for ts in week.ts.tolist()]
    gap = np.flatnonzero(np.diff(week.ts) > 10 * MICROS_PER_HOUR)
    (weekend,) = gap.tolist()
    assert times[weekend].strftime("%a %H") == "Fri 16"
    assert times[weekend + 1].strftime("%a %H") == "Sun 17"
    assert times[-1].strftime("%a %H") == "Fri 16"
    assert 0.9 < len(week) / (22 * 60 + 5 * 1440) < 1


def test_some_minutes_and_quarters_have_no_trades() -> None:
    of = window("2024-01-01", "2024-07-01")
    expected = grid_of(Series("", Timeframe.M15, AssetClass.STOCKS)).count(of)
    quarters = STOCKS.truth("AAPL", Timeframe.M15, of, LATER, NO_HALT)
    assert 0.99 < len(quarters) / expected < 0.999
    other = STOCKS.truth("MSFT", Timeframe.M15, of, LATER, NO_HALT)
    assert rows(quarters)[:5] != rows(other)[:5]


@pytest.mark.parametrize(
    ("symbol", "stock", "pair"),
    [
        ("AAPL", True, False),
        ("BRK.B", True, False),
        ("F", True, False),
        ("NOPE", False, False),
        ("TOOLONG", False, False),
        ("aapl", False, False),
        ("EURUSD", False, True),
        ("USDUSD", False, False),
        ("EURXXX", False, False),
    ],
)
def test_known_symbols(symbol: str, stock: bool, pair: bool) -> None:
    assert STOCKS.has_symbol(symbol) is stock
    assert FOREX.has_symbol(symbol) is pair


def test_the_forming_candle_and_the_listing() -> None:
    start = instant("2024-01-05T15:00")
    hour = Frame(np.array([start]), np.array([start + MICROS_PER_HOUR]), MICROS_PER_HOUR)
    whole = STOCKS.bars("AAPL", hour, NO_END, NO_HALT)
    half = STOCKS.bars("AAPL", hour, start + MICROS_PER_HOUR // 2, NO_HALT)
    assert whole.volume is not None
    assert half.volume is not None
    assert 0 < int(half.volume[0]) < int(whole.volume[0])
    assert len(STOCKS.bars("AAPL", hour, start - 1, NO_HALT)) == 0
    late = SyntheticClosing(AssetClass.STOCKS, listed=(("AAPL", start),))
    days = late.truth("AAPL", Timeframe.D1, window("2024-01-01", "2024-01-09"), LATER, NO_HALT)
    assert days.ts[0] == instant("2024-01-05")


def test_adjusting_reverts_the_effect_of_splits() -> None:
    splits = (Split("AAPL", date(2024, 1, 3), 7), Split("AAPL", date(2024, 1, 5), 1, 10))
    of = window("2024-01-02", "2024-01-06")
    today, traded = (
        SyntheticClosing(AssetClass.STOCKS, splits=s).bars("AAPL", ALL_MINUTES.frame(of), NO_END, NO_HALT)
        for s in ((), splits)
    )
    assert rows(as_traded(today, splits)) == rows(traded)
    local = wall(today.ts, "America/New_York")
    second, fourth = local < instant("2024-01-03"), local >= instant("2024-01-05")
    assert (traded.open[second] == today.open[second] * 7 // 10).all()
    assert (traded.open[fourth] == today.open[fourth]).all()
    back = adjusted(traded, splits)
    assert back.scale.price == 9
    assert back.candles().open[second] == pytest.approx(traded.candles().open[second] / 0.7, rel=1e-9)
    assert back.candles().open[fourth].tolist() == today.candles().open[fourth].tolist()
    assert adjusted(traded, ()) is traded


@pytest.mark.parametrize(("new", "old"), [(1, 1), (0, 1), (2, 0)])
def test_an_invalid_split_is_rejected(new: int, old: int) -> None:
    with pytest.raises(ValueError, match="is invalid"):
        Split("AAPL", date(2024, 1, 3), new, old)


@given(st.integers(0, 40_000), st.integers(0, 1439))
def test_local_times_agree_with_the_standard_library(day: int, minute: int) -> None:
    ts = day * MICROS_PER_DAY + minute * MICROS_PER_MINUTE
    there = datetime.fromtimestamp(ts / 1e6, UTC).astimezone(NEW_YORK)
    (shown,) = wall(np.array([ts]), "America/New_York").tolist()
    assert shown == to_micros(there.replace(tzinfo=UTC))
    (back,) = utc(np.array([shown]), "America/New_York").tolist()
    assert ts - back in (0, MICROS_PER_HOUR)  # an ambiguous hour is the first one


RULERS: list[Ruler] = [
    EvenRuler(Step(MICROS_PER_HOUR)),
    WallRuler(MICROS_PER_DAY),
    WallRuler(MICROS_PER_DAY, hour=17),
    WallRuler(4 * MICROS_PER_HOUR, hour=17),
    WallRuler(4 * MICROS_PER_HOUR, "UTC"),
    WeekRuler(weekday=6, hour=17),
    SessionRuler(MICROS_PER_HOUR),
    SessionRuler(30 * MICROS_PER_MINUTE, extended=True),
]


@settings(max_examples=examples(100))
@given(st.sampled_from(RULERS), DAYS, st.integers(0, 1439), st.integers(1, 20))
def test_frames_are_contiguous(ruler: Ruler, day: int, minute: int, days: int) -> None:
    start = day * MICROS_PER_DAY
    whole = ruler.frame(TimeRange(start, start + 30 * MICROS_PER_DAY))
    cut = start + days * MICROS_PER_DAY + minute * MICROS_PER_MINUTE
    parts = [
        ruler.frame(TimeRange(start, cut)).opens,
        ruler.frame(TimeRange(cut, start + 30 * MICROS_PER_DAY)).opens,
    ]
    assert np.concatenate(parts).tolist() == whole.opens.tolist()
    assert (whole.ends > whole.opens).all()
    assert (whole.opens[1:] >= whole.ends[:-1]).all()


@settings(max_examples=examples(50))
@given(st.sampled_from(RULERS[:6]), DAYS, st.integers(0, 1439))
def test_floor_and_ceil(ruler: Ruler, day: int, minute: int) -> None:
    at = day * MICROS_PER_DAY + minute * MICROS_PER_MINUTE
    low, high = floor(ruler, at), ceil(ruler, at)
    assert low <= at <= high
    assert ruler.frame(TimeRange(low, high + 1)).opens.tolist() in ([low], [low, high])


def test_alignment_of_new_york_bars() -> None:
    def local(ruler: Ruler, of: TimeRange) -> list[str]:
        return [
            datetime.fromtimestamp(ts / 1e6, NEW_YORK).strftime("%a %H:%M")
            for ts in ruler.frame(of).opens.tolist()
        ]

    spring = window("2024-03-09T12:00", "2024-03-12")
    assert local(WallRuler(MICROS_PER_DAY, hour=17), spring) == ["Sat 17:00", "Sun 17:00", "Mon 17:00"]
    assert local(SessionRuler(MICROS_PER_HOUR), window("2024-03-11", "2024-03-12")) == [
        f"Mon {hour:02d}:30" for hour in range(9, 16)
    ]
    half = SessionRuler(MICROS_PER_HOUR, extended=True).frame(window("2024-11-29", "2024-11-30"))
    assert local(SessionRuler(MICROS_PER_HOUR), window("2024-11-29", "2024-11-30"))[-1] == "Fri 12:30"
    assert half.ends[-1] == instant("2024-11-29T22:00")
    assert local(WeekRuler(weekday=6, hour=17), window("2024-03-01", "2024-03-12")) == ["Sun 17:00"] * 2


def test_sessions_agree_with_the_grid() -> None:
    sessions = stock_sessions().within(window("2024-01-01", "2025-01-01"))
    assert len(sessions.dates) == 252
    first = grid_of(Series("", Timeframe.M1, AssetClass.STOCKS)).contains(sessions.opens)
    assert first.all()
    (inside,) = stock_sessions().within(window("2024-01-05T20:00", "2024-01-05T20:01")).dates.tolist()
    assert inside == instant("2024-01-05")


def test_filling_drops_parts_between_bars() -> None:
    parts = minutes("AAPL", window("2024-01-05", "2024-01-06"), extended=True)
    frame = SessionRuler(MICROS_PER_HOUR).frame(window("2024-01-05", "2024-01-06"))
    filled = fill(parts, frame)
    assert rows(filled) == slow(parts, frame.opens.tolist(), frame.ends.tolist())
    assert len(fill(parts, frame.take(slice(0, 0)))) == 0
