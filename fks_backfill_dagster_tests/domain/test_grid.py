"""The grid against golden files (data/grid), slow reference implementations, and real candles."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from zoneinfo import ZoneInfo

import exchange_calendars
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.calendars import past_sessions
from fks_backfill_dagster.domain.grid import Grid, _intraday, _is_ignored, grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
    iso,
    to_datetime,
    to_micros,
)
from fks_backfill_dagster.ledger.gaps import find_gaps, missing_of
from fks_backfill_dagster_tests.domain.builders import at, grid, read_csv, window
from fks_backfill_dagster_tests.examples import examples

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "grid"
NEW_YORK = ZoneInfo("America/New_York")
CALENDARS = ("XNYS", "XLON", "XTKS", "XHKG", "XBOM", "XASX", "CMES", "24/7")
INTRADAY = [t for t in Timeframe if t.is_intraday]
EVERY_GRID = [(a, t, "XNYS") for a in ("crypto", "stocks", "forex") for t in Timeframe] + [
    ("stocks", t, calendar) for calendar in ("XTKS", "CMES", "XNZE") for t in Timeframe
]


CASES = list(csv.DictReader((GOLDEN / "cases.csv").read_text().splitlines()))


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_golden(case: dict[str, str]) -> None:
    expected = [tuple(row) for row in csv.reader((GOLDEN / f"{case['name']}.csv").read_text().splitlines())][
        1:
    ]
    it = grid(case["asset_class"], case["timeframe"], case["calendar"])
    opens = it.opens(window(case["start"], case["end"]))
    closes = it.closes(opens)
    assert [(stamp(a), stamp(b)) for a, b in zip(opens, closes, strict=True)] == expected


def stamp(instant: np.int64) -> str:
    return to_datetime(int(instant)).strftime("%Y-%m-%dT%H:%M:%SZ")


def test_every_golden_file_is_in_use() -> None:
    assert {path.stem for path in GOLDEN.glob("*.csv")} == {case["name"] for case in CASES} | {
        "cases",
        "calendars",
    }


# --- laws that hold for every grid ---------------------------------------------------------------


@st.composite
def grids_and_windows(draw: st.DrawFn) -> tuple[Grid, TimeRange, int]:
    """A grid, a window of at most some 300 candles with ragged edges, and the nominal step."""
    asset_class, timeframe, calendar = draw(st.sampled_from(EVERY_GRID))
    start = draw(st.integers(at("1998-01-01T00:00Z"), at("2030-01-01T00:00Z")) | near_new_york_weekend())
    length = draw(st.integers(0, 300)) * timeframe.micros + draw(st.integers(-5, 5))
    return grid(asset_class, timeframe, calendar), TimeRange(start, start + max(length, 0)), timeframe.micros


def near_new_york_weekend() -> st.SearchStrategy[int]:
    fridays = st.integers(0, 1600).map(lambda n: datetime(1998, 1, 2, 12, tzinfo=UTC) + timedelta(weeks=n))
    return st.tuples(fridays, st.integers(0, 72)).map(lambda p: to_micros(p[0] + timedelta(hours=p[1])))


@given(grids_and_windows())
@settings(max_examples=examples(150))
def test_the_methods_of_a_grid_agree(drawn: tuple[Grid, TimeRange, int]) -> None:
    it, span, step = drawn
    opens = it.opens(span)
    assert opens.dtype == np.int64
    assert it.count(span) == len(opens)
    assert it.contains(opens).all()
    assert it.on_clock(opens).all()
    assert (np.diff(it.rank(opens)) == 1).all()
    assert np.array_equal(it.at(it.rank(opens)), opens)
    assert all(span.contains(ts) for ts in opens.tolist())

    closes = it.closes(opens)
    assert (closes > opens).all()
    assert (closes[:-1] <= opens[1:]).all()
    if step < MICROS_PER_DAY:
        assert (closes <= opens + step).all()

    around = np.concatenate(
        [opens + shift for shift in (-step, -MICROS_PER_MINUTE, -1, 1, MICROS_PER_MINUTE, step)]
    )
    inside = around[(around >= span.start) & (around < span.end)]
    assert np.array_equal(it.contains(inside), np.isin(inside, opens))


@given(grids_and_windows())
@settings(max_examples=examples(100))
def test_the_halves_of_a_window_have_the_same_opens(drawn: tuple[Grid, TimeRange, int]) -> None:
    it, span, _ = drawn
    middle = (span.start + span.end) // 2
    halves = [it.opens(TimeRange(span.start, middle)), it.opens(TimeRange(middle, span.end))]
    assert np.array_equal(np.concatenate(halves), it.opens(span))


@given(grids_and_windows(), st.integers(-3, 3))
@settings(max_examples=examples(150))
def test_closed_end(drawn: tuple[Grid, TimeRange, int], shift: int) -> None:
    """Against its definition: in the middle of the window, and around the last closes in it."""
    it, span, step = drawn
    margin = 20 * MICROS_PER_DAY + 3 * step  # no market was ever closed for so long
    opens = it.opens(TimeRange(span.start - margin, span.end + margin))
    closes = it.closes(opens)
    for now in [(span.start + span.end) // 2, *(closes[closes <= span.end][-3:] + shift).tolist()]:
        first_not_closed = int(np.flatnonzero(closes > now)[0])
        assert first_not_closed > 0
        assert it.closed_end(now) == opens[first_not_closed]


@pytest.mark.parametrize(("asset_class", "timeframe", "calendar"), EVERY_GRID)
def test_empty_window(asset_class: str, timeframe: str, calendar: str) -> None:
    it = grid(asset_class, timeframe, calendar)
    somewhere = TimeRange(at("2024-01-03T15:00Z"), at("2024-01-03T15:00Z"))
    assert len(it.opens(somewhere)) == it.count(somewhere) == 0
    none = np.empty(0, dtype=np.int64)
    assert all(len(f(none)) == 0 for f in (it.closes, it.contains, it.rank, it.at, it.on_clock))


# --- slow definitions ----------------------------------------------------------------------------


@given(st.integers(0, 78 * 52), st.sampled_from(INTRADAY))
@settings(max_examples=examples(25))
def test_forex_minute_by_minute(week: int, timeframe: Timeframe) -> None:
    """Every minute of a week against the time zone database: in session or not."""
    start = datetime(1970, 1, 8, tzinfo=UTC) + timedelta(weeks=week)  # a Thursday
    minutes = [start + timedelta(minutes=n) for n in range(7 * 24 * 60)]
    trading = [to_micros(m) for m in minutes if forex_is_open(m)]
    span = TimeRange(to_micros(minutes[0]), to_micros(minutes[-1]) + MICROS_PER_MINUTE)
    expected = bars_of_minutes(np.array(trading), np.zeros(len(trading), dtype=np.int64), timeframe.micros)
    assert_grid_is(grid("forex", timeframe), span, expected)


def forex_is_open(minute: datetime) -> bool:
    there = minute.astimezone(NEW_YORK)
    match there.weekday():
        case 4:
            return there.hour < 17
        case 5:
            return False
        case 6:
            return there.hour >= 17
        case _:
            return True


@given(st.integers(0, 78 * 52))
@settings(max_examples=examples(25))
def test_forex_days_and_weeks(week: int) -> None:
    sunday = datetime(1970, 1, 4, 17, tzinfo=NEW_YORK) + timedelta(weeks=week)  # wall clock arithmetic
    fives = [to_micros(sunday + timedelta(days=n)) for n in range(6)]
    span = TimeRange(fives[0] - 12 * MICROS_PER_HOUR, fives[0] + 6 * MICROS_PER_DAY)
    assert_grid_is(grid("forex", "1d"), span, dict(pairwise(fives)))
    assert_grid_is(grid("forex", "1w"), span, {fives[0]: fives[5]})


def bars_of_minutes(minutes: np.ndarray, offsets: np.ndarray, step: int) -> dict[int, int]:
    """Open -> close of the clock bars that hold at least one of the trading minutes."""
    bars = (minutes + offsets) // step * step - offsets
    return {int(b): int(m) + MICROS_PER_MINUTE for b, m in zip(bars.tolist(), minutes.tolist(), strict=True)}


def assert_grid_is(it: Grid, span: TimeRange, expected: dict[int, int]) -> None:
    opens = it.opens(span)
    found = dict(zip(opens.tolist(), it.closes(opens).tolist(), strict=True))
    assert found == expected


@pytest.mark.parametrize("calendar", CALENDARS)
@pytest.mark.parametrize("timeframe", INTRADAY)
def test_stocks_against_the_calendars_own_minutes(calendar: str, timeframe: Timeframe) -> None:
    """Fifteen months, weekends, holidays, half-days and clock changes included."""
    truth = exchange_calendars.get_calendar(calendar, start="2023-10-02", end="2024-12-31")
    minutes = truth.minutes.tz_convert(None).to_numpy().astype("datetime64[us]").view(np.int64)
    local = truth.minutes.tz_convert(truth.tz).tz_localize(None).to_numpy()
    offsets = local.astype("datetime64[us]").view(np.int64) - minutes
    step = timeframe.micros
    expected = bars_of_minutes(minutes, offsets, step)
    span = TimeRange(at("2023-10-03T12:00Z"), at("2024-12-20T12:00Z"))
    assert_grid_is(
        grid("stocks", timeframe, calendar), span, {a: b for a, b in expected.items() if span.contains(a)}
    )


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 12)), min_size=1, max_size=8),
    st.sampled_from([Timeframe.M1, Timeframe.M5]),
    st.integers(0, 4),
)
def test_sessions_that_share_bars(parts: list[tuple[int, int]], timeframe: Timeframe, offset: int) -> None:
    """Breaks shorter than a bar, sessions shorter than a bar, several in one bar: no real calendar has all of them."""
    edges = np.cumsum(np.array(parts).ravel()).reshape(-1, 2)
    starts, ends = edges[:, 0] * MICROS_PER_MINUTE, edges[:, 1] * MICROS_PER_MINUTE
    offsets = np.full_like(starts, offset * MICROS_PER_MINUTE)
    minutes = np.concatenate([np.arange(a, b, MICROS_PER_MINUTE) for a, b in zip(starts, ends, strict=True)])
    it = _intraday("a made-up calendar", timeframe.micros, starts, ends, offsets)
    expected = bars_of_minutes(minutes, np.full_like(minutes, offsets[0]), timeframe.micros)
    assert_grid_is(it, TimeRange(-MICROS_PER_DAY, MICROS_PER_DAY), expected)
    for now in range(0, int(ends[-1]), MICROS_PER_MINUTE):
        assert it.closed_end(now) == min(ts for ts, close in expected.items() if close > now)


@pytest.mark.parametrize("calendar", CALENDARS)
def test_stock_days_and_weeks(calendar: str) -> None:
    truth = exchange_calendars.get_calendar(calendar, start="2010-01-04", end="2024-12-31")
    days = {to_micros(d.tz_localize("UTC")): to_micros(truth.session_close(d)) for d in truth.sessions}
    span = window("2010-01-04T00:00Z", "2024-12-30T00:00Z")
    within = {ts: close for ts, close in days.items() if span.contains(ts)}
    assert_grid_is(grid("stocks", "1d", calendar), span, within)

    weeks: dict[int, int] = {}
    for ts, close in within.items():
        date = to_datetime(ts)
        weeks[to_micros(date - timedelta(days=date.weekday()))] = close
    assert_grid_is(grid("stocks", "1w", calendar), span, weeks)


# --- edges ---------------------------------------------------------------------------------------


def test_on_clock_distinguishes_a_foreign_hour_from_a_stray_row() -> None:
    it = grid("stocks", "1h")
    pre_market, holiday, stray = (
        at(t) for t in ("2024-01-03T10:00Z", "2024-12-25T15:00Z", "2024-01-03T15:07Z")
    )
    instants = np.array([pre_market, holiday, stray])
    assert it.contains(instants).tolist() == [False, False, False]
    assert it.on_clock(instants).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("asset_class", "timeframe", "instant", "expected", "on_clock"),
    [
        ("stocks", "4h", "2016-03-14T04:00-04:00", False, True),  # the clock changed since Friday
        ("stocks", "4h", "2016-03-12T20:00-05:00", False, True),  # and has not yet
        ("stocks", "4h", "2016-03-14T06:00-04:00", False, False),
        ("stocks", "1d", "2024-01-01T00:00Z", False, True),  # New Year
        ("stocks", "1d", "2024-01-02T05:00Z", False, False),  # midnight in New York
        ("stocks", "1w", "2024-01-01T00:00Z", True, True),  # its week all the same
        ("stocks", "1w", "2024-01-07T00:00Z", False, False),  # Sunday
        ("forex", "1d", "2024-01-06T17:00-05:00", False, True),  # Saturday
        ("forex", "1d", "2024-01-08T00:00Z", False, False),
    ],
)
def test_on_clock_between_sessions(
    asset_class: str, timeframe: str, instant: str, expected: bool, on_clock: bool
) -> None:
    it, instants = grid(asset_class, timeframe), np.array([at(instant)])
    assert (it.contains(instants)[0], it.on_clock(instants)[0]) == (expected, on_clock)


def test_closed_end_over_a_weekend() -> None:
    it = grid("stocks", "1h")
    assert iso(it.closed_end(at("2024-01-05T20:59:59Z"))) == "2024-01-05T20:00:00+00:00"
    for now in ("2024-01-05T21:00Z", "2024-01-07T12:00Z", "2024-01-08T14:59Z"):
        assert iso(it.closed_end(at(now))) == "2024-01-08T14:00:00+00:00"


def test_a_day_is_closed_at_the_end_of_its_session() -> None:
    it = grid("stocks", "1d")
    assert iso(it.closed_end(at("2015-12-24T17:59Z"))) == "2015-12-24T00:00:00+00:00"
    assert iso(it.closed_end(at("2015-12-24T18:00Z"))) == "2015-12-28T00:00:00+00:00"


def test_nothing_is_expected_before_a_calendar_begins() -> None:
    assert grid("stocks", "1d", "XTKS").count(window("1900-01-01T00:00Z", "1997-01-01T00:00Z")) == 0
    assert grid("stocks", "1d", "XNYS").count(window("1970-01-01T00:00Z", "1971-01-01T00:00Z")) == 254
    first, before = at("1970-01-02T00:00Z"), at("1970-01-01T00:00Z")
    assert grid("stocks", "1d").contains(np.array([first, before])).tolist() == [True, False]


def test_an_exhausted_calendar_raises() -> None:
    for it, name in ((grid("stocks", "1h"), "XNYS"), (grid("forex", "1d"), "forex")):
        with pytest.raises(ValueError, match=rf"{name}.* known up to 20\d\d-.* upgrade exchange-calendars"):
            it.closed_end(at("2060-01-01T00:00Z"))


def test_unknown_calendar() -> None:
    series = Series("AAPL", Timeframe.D1, AssetClass.STOCKS, "XFOO")
    with pytest.raises(ValueError, match=r"no exchange calendar 'XFOO'.*such as XNYS"):
        grid_of(series)


def test_grids_are_cached() -> None:
    one = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
    assert grid_of(one) is grid_of(Series("MSFT", Timeframe.H1, AssetClass.STOCKS))
    assert grid_of(one) is not grid_of(Series("MSFT", Timeframe.H1, AssetClass.STOCKS, "XLON"))
    crypto = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO, "XNYS")
    assert grid_of(crypto) is grid_of(Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO, "XLON"))


def test_ten_years_of_minutes_are_quick() -> None:
    it, span = grid("stocks", "1m"), window("2014-01-01T00:00Z", "2024-01-01T00:00Z")
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        opens = it.opens(span)
        seconds.append(time.perf_counter() - begun)
    assert len(opens) == 977_640
    assert min(seconds) < 0.05


# --- real candles --------------------------------------------------------------------------------


def test_real_apple_days(shared_data: Callable[[str], Path]) -> None:
    """Exactly 5,849 sessions of 23 years, closures of 2001 and 2012 included."""
    ts = read_csv(shared_data("equity/AAPL-1d.csv.gz")).ts
    assert len(ts) == 5_849
    expected = grid("stocks", "1d").opens(TimeRange(int(ts[0]), int(ts[-1]) + 1))
    assert np.array_equal(ts, expected)


def test_real_euro_hours(shared_data: Callable[[str], Path]) -> None:
    """Twelve years with two clock changes each: no row outside the session.

    The absent hours of 2016 and 2017 are holidays and the provider's holes listed in the MANIFEST.
    """
    ts = read_csv(shared_data("forex/EURUSD-1h.csv.gz")).ts
    it, span = grid("forex", "1h"), window("2016-01-01T00:00Z", "2018-01-01T00:00Z")
    assert it.contains(ts).all()
    absent = find_gaps(missing_of(it.opens(span), ts), it)
    assert [(iso(gap.start)[:13], iso(gap.end)[:13], gap.missing) for gap in absent] == [
        ("2016-01-01T00", "2016-01-01T22", 22),
        ("2016-12-11T22", "2016-12-16T05", 103),
        ("2016-12-25T22", "2016-12-26T23", 25),
        ("2016-12-30T19", "2017-01-02T23", 28),
        ("2017-03-31T04", "2017-03-31T21", 17),
        ("2017-10-06T04", "2017-10-06T21", 17),
        ("2017-12-24T22", "2017-12-26T00", 26),
        ("2017-12-31T22", "2018-01-01T00", 2),
    ]


# --- every calendar of the library ---------------------------------------------------------------

# Sessions from 1970 to 2025, their first and last date and the hours of trading in all of them, as
# exchange-calendars 4.13.2 gives them with pandas 2.3.3. Regenerate them for a new version of the library.
EVERY_CALENDAR = {
    row["calendar"]: row for row in csv.DictReader((GOLDEN / "calendars.csv").read_text().splitlines())
}
# Orthodox Easter; single Saturdays and Sundays.
SHORT = ("ASEX", "XBOM")


def test_every_calendar_of_the_library_is_known() -> None:
    names = exchange_calendars.get_calendar_names(include_aliases=True)
    assert {exchange_calendars.resolve_alias(name) for name in names} == set(EVERY_CALENDAR)


@pytest.mark.parametrize(
    "calendar",
    [name if name in SHORT else pytest.param(name, marks=pytest.mark.slow) for name in EVERY_CALENDAR],
)
def test_every_calendar_has_its_sessions(calendar: str) -> None:
    past = past_sessions(calendar, at("2026-01-01T00:00Z"))
    days = [to_datetime(day).date() for day in past.by_date()]
    starts, ends = past.rows[:, 1], past.rows[:, 2]
    assert EVERY_CALENDAR[calendar] == {
        "calendar": calendar,
        "sessions": str(len(days)),
        "first": str(days[0]),
        "last": str(days[-1]),
        "hours": str(int((ends - starts).sum()) // MICROS_PER_HOUR),
    }


def test_a_pandas_that_ignores_a_calendars_weeks_is_detected() -> None:
    """From 3.1 on pandas calls another method than the one that such a calendar overrides."""
    first, last = "2024-01-01", "2024-01-31"
    for calendar, ignored in (("XBOM", True), ("XNYS", False), ("ASEX", False)):
        day = exchange_calendars.get_calendar(calendar, start=first, end=last).day
        assert _is_ignored(day, renamed=True) == ignored
        assert not _is_ignored(day, renamed=False)
