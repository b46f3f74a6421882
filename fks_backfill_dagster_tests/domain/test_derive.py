"""Derived candles against a slow reference implementation, and against real files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import derive, divides, owners, parts_span
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, MICROS_PER_WEEK
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster_tests.domain.builders import at, candles, flat, grid, read_csv, window

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"

# Valid derivations: (asset class, fine, coarse, calendar).
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


@dataclass(frozen=True)
class Slow:
    """The reference result for a window: the rows, and for each expected candle (parts, given, no-trade)."""

    rows: list[list[float]]
    counts: list[tuple[int, int, int, int]]


def slowly(parts: Candles, fine: Grid, coarse: Grid, requested: TimeRange, no_trade: Instants) -> Slow:
    """The reference implementation: candle by candle, part by part."""
    everything = TimeRange(requested.start - 5 * MICROS_PER_WEEK, requested.end + 2 * MICROS_PER_WEEK)
    opens = coarse.opens(everything)
    closes = coarse.closes(opens).tolist()
    given_rows = {row[0]: row for row in zip(*(c.tolist() for c in parts.columns()), strict=True)}
    no_trade_opens = set(no_trade.tolist())
    found = Slow([], [])
    for (since, until), start in zip(pairwise(closes), opens.tolist()[1:], strict=True):
        if not requested.contains(start):
            continue
        wanted = fine.opens(TimeRange(since, until)).tolist()
        rows = [given_rows[ts] for ts in wanted if ts in given_rows]
        explained = [ts for ts in wanted if ts not in given_rows and ts in no_trade_opens]
        found.counts.append((start, len(wanted), len(rows), len(explained)))
        if not rows or len(rows) + len(explained) < len(wanted):
            continue
        _, opened, high, low, closed, volume = map(list, zip(*rows, strict=True))
        found.rows.append([start, opened[0], max(high), min(low), closed[-1], math.fsum(volume)])
    return found


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
    absent=st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]),
    explained=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_against_the_slow_reference(
    pair: tuple[str, str, str, str],
    moment: str,
    hours: tuple[int, int],
    absent: float,
    explained: float,
    seed: int,
) -> None:
    asset_class, small, large, calendar = pair
    fine, coarse = grid(asset_class, small, calendar), grid(asset_class, large, calendar)
    start = at(f"{moment}T00:00:00Z") + hours[0] * MICROS_PER_HOUR
    requested = TimeRange(start, start + hours[1] * MICROS_PER_HOUR)
    random = np.random.default_rng(seed)
    ts = fine.opens(TimeRange(requested.start - 2 * MICROS_PER_WEEK, requested.end + 2 * MICROS_PER_WEEK))
    gone = random.random(len(ts)) < absent
    # Some no-trade intervals have a part all the same: the part is used.
    no_trade = ts[(gone & (random.random(len(ts)) < explained)) | (random.random(len(ts)) < 0.01)]
    parts = random_parts(ts[~gone], seed)

    made = derive(parts, fine, coarse, requested, no_trade)

    slow = slowly(parts, fine, coarse, requested, no_trade)
    rows = [list(row) for row in zip(*(column.tolist() for column in made.candles.columns()), strict=True)]
    assert rows == slow.rows
    counts = (made.opens, made.expected, made.present, made.no_trade)
    assert list(zip(*(one.tolist() for one in counts), strict=True)) == slow.counts
    assert made.opens[made.made].tolist() == [row[0] for row in slow.rows]
    assert made.partial.tolist() == [0 < given < of - without for _, of, given, without in slow.counts]


@pytest.mark.parametrize(("asset_class", "small", "large", "calendar"), PAIRS)
def test_the_span_of_the_parts_is_enough(asset_class: str, small: str, large: str, calendar: str) -> None:
    fine, coarse = grid(asset_class, small, calendar), grid(asset_class, large, calendar)
    requested = window("2015-11-20T00:00:00Z", "2016-01-10T00:00:00Z")
    span = parts_span(coarse, requested)
    made = derive(flat(fine.opens(span)), fine, coarse, requested)
    assert np.array_equal(made.candles.ts, coarse.opens(requested))
    assert len(made.candles) > 0
    assert span.start >= requested.start - MICROS_PER_DAY
    assert span.end <= requested.end + MICROS_PER_WEEK


def test_nothing_opens_in_the_window() -> None:
    sunday = window("2015-11-22T00:00:00Z", "2015-11-23T00:00:00Z")
    days = grid("stocks", "1d")
    assert not parts_span(days, sunday)
    made = derive(flat(np.array([], dtype=np.int64)), grid("stocks", "30m"), days, sunday)
    assert (len(made.candles), len(made.opens)) == (0, 0)


def test_a_sydney_day_begins_the_evening_before() -> None:
    requested = window("2015-11-24T00:00:00Z", "2015-11-25T00:00:00Z")
    assert parts_span(grid("stocks", "1d", "XASX"), requested).start <= at("2015-11-23T23:00:00Z")


H = MICROS_PER_HOUR
SANE = [(n * H, 2.0, 3.0, 1.0, 2.0, 1.0) for n in range(8)]
DAY = TimeRange(0, 8 * H)
HOURS, FOURS = grid("crypto", "1h"), grid("crypto", "4h")


@pytest.mark.parametrize(
    ("absent", "explained", "made"),
    [
        ((), (), [0, 4]),
        ((2,), (), [4]),
        ((0,), (), [4]),
        ((7,), (), [0]),
        ((0,), (0,), [0, 4]),  # a no-trade interval at an edge counts like one in the middle
        ((7,), (7,), [0, 4]),
        ((4, 5, 6), (4, 5, 6), [0, 4]),
        ((4, 5, 6), (4, 6), [0]),
        ((3, 4), (3,), [0]),
        ((0, 1, 2, 3), (0, 1, 2, 3), [4]),  # without parts there is no candle
    ],
)
def test_every_absent_part_must_be_a_no_trade_interval(
    absent: tuple[int, ...], explained: tuple[int, ...], made: list[int]
) -> None:
    parts = candles(*(row for n, row in enumerate(SANE) if n not in absent))
    derived = derive(parts, HOURS, FOURS, DAY, np.array([n * H for n in explained], dtype=np.int64))
    assert (derived.candles.ts // H).tolist() == made


def test_parts_beside_the_window_are_not_counted() -> None:
    derived = derive(candles(*SANE), HOURS, FOURS, TimeRange(4 * H, 8 * H), np.array([H, 2 * H]))
    assert (derived.expected.tolist(), derived.present.tolist(), derived.no_trade.tolist()) == ([4], [4], [0])


def test_owners_of_parts() -> None:
    opens = FOURS.opens(DAY)
    assert owners(opens, FOURS, np.array([0, 3 * H, 4 * H, 7 * H + 7])).tolist() == [0, 0, 4 * H, 4 * H]


def test_a_missing_volume_makes_the_sum_missing() -> None:
    parts = candles(*SANE[:7], (7 * H, 2.0, 3.0, 1.0, 2.0, math.nan))
    made = derive(parts, HOURS, FOURS, DAY).candles
    assert made.volume[0] == 4.0
    assert math.isnan(made.volume[1])


def test_a_grid_that_does_not_divide() -> None:
    requested = window("2015-11-24T00:00:00Z", "2015-11-25T00:00:00Z")
    fours, days = grid("forex", "4h"), grid("forex", "1d")  # a forex day begins at 22:00 UTC in winter
    with pytest.raises(ValueError, match="does not divide"):
        derive(flat(fours.opens(parts_span(days, requested))), fours, days, requested)


def test_real_apple_days_from_hours() -> None:
    if not SHARED.exists():
        pytest.skip("the folder with the real files does not exist")
    hours, days = (read_csv(SHARED / f"equity/AAPL-{timeframe}.csv.gz") for timeframe in ("1h", "1d"))
    requested = window("2009-01-01T00:00:00Z", "2021-03-31T00:00:00Z")
    fine, coarse = grid("stocks", "1h"), grid("stocks", "1d")
    hours = hours.take(fine.contains(hours.ts))  # as verified
    lacking = missing_of(fine.opens(requested), hours.ts)
    days = days.within(requested)
    made = derive(hours, fine, coarse, requested, lacking).candles
    assert np.array_equal(made.ts, days.ts)
    assert np.mean(np.isclose(made.high, days.high, rtol=1e-3)) > 0.9
    assert np.mean(np.isclose(made.low, days.low, rtol=1e-3)) > 0.9
    # Without an explanation each absent hour costs its day.
    whole = derive(hours, fine, coarse, requested)
    assert 0 < len(made) - len(whole.candles) == int(whole.partial.sum()) <= len(lacking)


@pytest.mark.parametrize(("kind", "fine", "coarse", "calendar"), PAIRS)
def test_a_grid_that_divides_another(kind: str, fine: str, coarse: str, calendar: str) -> None:
    spring = window("2024-02-20T00:00Z", "2024-04-20T00:00Z")
    assert divides(grid(kind, fine, calendar or "XNYS"), grid(kind, coarse, calendar or "XNYS"), spring)
    assert not divides(grid(kind, coarse, calendar or "XNYS"), grid(kind, fine, calendar or "XNYS"), spring)


def test_a_grid_that_does_not_divide_another() -> None:
    """A forex day ends at 17:00 New York, which is inside a candle of 4h."""
    spring = window("2024-02-20T00:00Z", "2024-04-20T00:00Z")
    assert not divides(grid("forex", "4h"), grid("forex", "1d"), spring)
    with pytest.raises(ValueError, match="does not divide"):
        derive(flat(grid("forex", "4h").opens(spring)), grid("forex", "4h"), grid("forex", "1d"), spring)
    assert not divides(
        grid("crypto", "1h"), grid("crypto", "4h"), window("2024-02-20T00:00Z", "2024-02-20T00:00Z")
    )
