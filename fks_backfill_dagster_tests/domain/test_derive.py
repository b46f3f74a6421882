"""Coarse candles against a slow obvious definition, and against real files."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import derive, parts_span
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_WEEK
from fks_backfill_dagster_tests.domain.builders import at, candles, flat, grid, read_csv, window

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"

# What may be derived from what: (asset class, fine, coarse, calendar).
PAIRS = [
    ("crypto", "1m", "5m", ""),
    ("crypto", "1h", "4h", ""),
    ("crypto", "1d", "1w", ""),
    ("crypto", "4h", "1w", ""),
    ("forex", "1h", "4h", ""),
    ("forex", "1h", "1d", ""),
    ("forex", "1h", "1w", ""),
    ("forex", "1d", "1w", ""),
    ("stocks", "30m", "1h", "XNYS"),
    ("stocks", "15m", "4h", "XNYS"),
    ("stocks", "30m", "1d", "XNYS"),
    ("stocks", "1d", "1w", "XNYS"),
    ("stocks", "30m", "1d", "XASX"),
    ("stocks", "30m", "1w", "XASX"),
    ("stocks", "30m", "4h", "XTKS"),
]
# Weeks with a change of the clock, a half-day (2015-12-24), a closure of a week (2001-09-11).
MOMENTS = ["2015-03-06", "2015-11-20", "2015-12-21", "2001-09-07", "2016-10-28"]


def slowly(parts: Candles, fine: Grid, coarse: Grid, asked: TimeRange, quiet_ok: bool) -> list[list[float]]:
    """One candle after the other, one part after the other."""
    everything = TimeRange(asked.start - 5 * MICROS_PER_WEEK, asked.end + 2 * MICROS_PER_WEEK)
    opens = coarse.opens(everything)
    closes = coarse.closes(opens).tolist()
    given_rows = {row[0]: row for row in zip(*(c.tolist() for c in parts.columns()), strict=True)}
    made = []
    for (since, until), start in zip(pairwise(closes), opens.tolist()[1:], strict=True):
        if not asked.contains(start):
            continue
        wanted = fine.opens(TimeRange(since, until)).tolist()
        rows = [given_rows[ts] for ts in wanted if ts in given_rows]
        if not rows or (len(rows) < len(wanted) and not quiet_ok):
            continue
        if len(rows) < len(wanted) and not (min(given_rows) <= wanted[0] and wanted[-1] <= max(given_rows)):
            continue
        _, opened, high, low, closed, volume = map(list, zip(*rows, strict=True))
        made.append([start, opened[0], max(high), min(low), closed[-1], math.fsum(volume)])
    return made


def random_parts(ts: np.ndarray, seed: int) -> Candles:
    """Sane candles; volumes are quarters, so that their sums are exact."""
    random = np.random.default_rng(seed)
    prices = random.integers(1, 1000, (4, len(ts))) / 8
    volume = random.integers(0, 100, len(ts)) / 4
    return Candles(ts, prices[0], prices.max(axis=0), prices.min(axis=0), prices[3], volume)


@settings(deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    moment=st.sampled_from(MOMENTS),
    hours=st.tuples(st.integers(0, 200), st.integers(0, 400)),
    absent=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    seed=st.integers(0, 2**32),
    quiet_ok=st.booleans(),
)
def test_like_the_slow_definition(
    pair: tuple[str, str, str, str],
    moment: str,
    hours: tuple[int, int],
    absent: float,
    seed: int,
    quiet_ok: bool,
) -> None:
    asset_class, small, large, calendar = pair
    fine, coarse = grid(asset_class, small, calendar), grid(asset_class, large, calendar)
    start = at(f"{moment}T00:00:00Z") + hours[0] * MICROS_PER_HOUR
    asked = TimeRange(start, start + hours[1] * MICROS_PER_HOUR)
    random = np.random.default_rng(seed)
    ts = fine.opens(TimeRange(asked.start - 2 * MICROS_PER_WEEK, asked.end + 2 * MICROS_PER_WEEK))
    parts = random_parts(ts[random.random(len(ts)) >= absent], seed)
    shuffled = parts.take(random.permutation(len(parts)))

    made = derive(shuffled, fine, coarse, asked, quiet_ok=quiet_ok)

    rows = [list(row) for row in zip(*(column.tolist() for column in made.columns()), strict=True)]
    assert rows == slowly(parts, fine, coarse, asked, quiet_ok)


@pytest.mark.parametrize(("asset_class", "small", "large", "calendar"), PAIRS)
def test_the_span_of_the_parts_is_enough(asset_class: str, small: str, large: str, calendar: str) -> None:
    fine, coarse = grid(asset_class, small, calendar), grid(asset_class, large, calendar)
    asked = window("2015-11-20T00:00:00Z", "2016-01-10T00:00:00Z")
    span = parts_span(coarse, asked)
    made = derive(flat(fine.opens(span)), fine, coarse, asked, quiet_ok=False)
    assert np.array_equal(made.ts, coarse.opens(asked))
    assert len(made) > 0
    assert span.start >= asked.start - MICROS_PER_DAY
    assert span.end <= asked.end + MICROS_PER_WEEK


def test_nothing_opens_in_the_window() -> None:
    sunday = window("2015-11-22T00:00:00Z", "2015-11-23T00:00:00Z")
    days = grid("stocks", "1d")
    assert not parts_span(days, sunday)
    assert (
        len(derive(flat(np.array([], dtype=np.int64)), grid("stocks", "30m"), days, sunday, quiet_ok=True))
        == 0
    )


def test_a_sydney_day_begins_the_evening_before() -> None:
    asked = window("2015-11-24T00:00:00Z", "2015-11-25T00:00:00Z")
    assert parts_span(grid("stocks", "1d", "XASX"), asked).start <= at("2015-11-23T23:00:00Z")


def test_pre_market_is_passed_over() -> None:
    asked = window("2015-11-24T00:00:00Z", "2015-11-25T00:00:00Z")
    fine, coarse = grid("stocks", "30m"), grid("stocks", "1h")
    whole = np.arange(asked.start, asked.end, 30 * 60_000_000)
    calm = flat(whole)
    high = np.where(fine.contains(whole), 1.0, 99.0)
    wild = Candles(whole, calm.open, high, calm.low, calm.close, calm.volume)
    made = derive(wild, fine, coarse, asked, quiet_ok=False)
    assert np.array_equal(made.ts, coarse.opens(asked))
    assert made.high.tolist() == [1.0] * 7
    assert made.volume.tolist() == [1.0] + [2.0] * 6  # the first hour holds 09:30 to 10:00 only


H = MICROS_PER_HOUR
SANE = [(n * H, 2.0, 3.0, 1.0, 2.0, 1.0) for n in range(8)]
DAY = TimeRange(0, 8 * H)


@pytest.mark.parametrize("quiet_ok", [True, False])
@pytest.mark.parametrize(
    "bad",
    [
        (5 * H, 2.0, math.nan, 1.0, 2.0, 1.0),
        (5 * H, 2.0, 1.0, 3.0, 2.0, 1.0),
        (5 * H, -2.0, 3.0, -2.0, 2.0, 1.0),
        (5 * H, 2.0, 3.0, 1.0, 2.0, -1.0),
        (5 * H + 7, 2.0, 3.0, 1.0, 2.0, 1.0),
    ],
    ids=["nan", "high below low", "negative", "bad volume", "off the grid"],
)
def test_a_bad_part_spoils_its_candle(bad: tuple[float, ...], quiet_ok: bool) -> None:
    parts = candles(*SANE[:5], bad, *SANE[6:])
    made = derive(parts, grid("crypto", "1h"), grid("crypto", "4h"), DAY, quiet_ok=quiet_ok)
    assert made.ts.tolist() == [0, 4 * H]
    assert made.high[0] == 3.0
    assert all(math.isnan(price[1]) for price in (made.open, made.high, made.low, made.close))


def test_repeated_parts() -> None:
    hours, fours = grid("crypto", "1h"), grid("crypto", "4h")
    once = derive(candles(*SANE), hours, fours, DAY, quiet_ok=False)
    assert derive(candles(*SANE, *SANE), hours, fours, DAY, quiet_ok=False).equals(once)
    conflict = derive(candles(*SANE, (0, 2.0, 3.5, 1.0, 2.0, 1.0)), hours, fours, DAY, quiet_ok=True)
    assert np.isnan(conflict.open).tolist() == [True, False]


@pytest.mark.parametrize(
    ("absent", "made"),
    [((2,), [0, 4]), ((0,), [4]), ((7,), [0]), ((4, 5, 6), [0, 4]), ((3, 4), [0, 4]), ((0, 1, 2, 3), [4])],
)
def test_quiet_is_what_lies_between_two_parts(absent: tuple[int, ...], made: list[int]) -> None:
    parts = candles(*(row for n, row in enumerate(SANE) if n not in absent))
    derived = derive(parts, grid("crypto", "1h"), grid("crypto", "4h"), DAY, quiet_ok=True)
    assert (derived.ts // H).tolist() == made


def test_no_volume_makes_no_volume() -> None:
    parts = candles(*SANE[:7], (7 * H, 2.0, 3.0, 1.0, 2.0, math.nan))
    made = derive(parts, grid("crypto", "1h"), grid("crypto", "4h"), DAY, quiet_ok=False)
    assert made.volume[0] == 4.0
    assert math.isnan(made.volume[1])


def test_a_grid_that_does_not_divide() -> None:
    asked = window("2015-11-24T00:00:00Z", "2015-11-25T00:00:00Z")
    fours, days = grid("forex", "4h"), grid("forex", "1d")  # a forex day begins at 22:00 UTC in winter
    with pytest.raises(ValueError, match="does not divide"):
        derive(flat(fours.opens(parts_span(days, asked))), fours, days, asked, quiet_ok=True)


def test_real_apple_days_from_hours() -> None:
    if not SHARED.exists():
        pytest.skip("the real files are only there beside the shared folder")
    hours, days = (read_csv(SHARED / f"equity/AAPL-{timeframe}.csv.gz") for timeframe in ("1h", "1d"))
    asked = window("2009-01-01T00:00:00Z", "2021-03-31T00:00:00Z")
    made = derive(hours, grid("stocks", "1h"), grid("stocks", "1d"), asked, quiet_ok=True)
    days = days.within(asked)
    assert np.array_equal(made.ts, days.ts)
    assert np.mean(np.isclose(made.high, days.high, rtol=1e-3)) > 0.9
    assert np.mean(np.isclose(made.low, days.low, rtol=1e-3)) > 0.9
