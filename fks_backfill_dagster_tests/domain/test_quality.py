"""Verification against a slow row-by-row reference implementation, and on real candles."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.quality import Reason, Verdict, verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, iso
from fks_backfill_dagster.ledger.gaps import find_gaps, missing_of
from fks_backfill_dagster_tests.domain.builders import at, candles, flat, grid, read_csv, window
from fks_backfill_dagster_tests.examples import examples

NAN, INF = math.nan, math.inf
Row = tuple[float, ...]
NOON = at("2024-01-03T12:00Z")
DAY = window("2024-01-03T12:00Z", "2024-01-04T00:00Z")
GOOD: Row = (NOON, 10.0, 12.0, 9.0, 11.0, 5.0)


def rows_of(block: Candles) -> list[Row]:
    return list(zip(*(column.tolist() for column in block.columns()), strict=True))


def reasons(verdict: Verdict) -> dict[str, list[int]]:
    return {str(part.reason): part.candles.ts.tolist() for part in verdict.rejected}


def verified(
    *rows: Row, asset_class: str = "crypto", span: TimeRange = DAY, closed_end: int = DAY.end
) -> Verdict:
    return verify(candles(*rows), span, grid(asset_class, "1h"), closed_end)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"open": NAN}, Reason.NOT_FINITE),
        ({"high": INF}, Reason.NOT_FINITE),
        ({"low": -INF}, Reason.NOT_FINITE),
        ({"close": NAN, "high": 1.0}, Reason.NOT_FINITE),
        ({"low": 0.0}, Reason.NOT_POSITIVE),
        ({"open": -1.0, "low": -1.0}, Reason.NOT_POSITIVE),
        ({"high": 8.0}, Reason.HIGH_LOW),
        ({"high": 10.5}, Reason.HIGH_LOW),
        ({"low": 10.5}, Reason.HIGH_LOW),
        ({"low": 13.0, "high": 9.0, "volume": -1.0}, Reason.HIGH_LOW),
        ({"volume": -0.5}, Reason.BAD_VOLUME),
        ({"volume": INF}, Reason.BAD_VOLUME),
        ({"ts": NOON + 1, "open": NAN}, Reason.OFF_GRID),
    ],
)
def test_reason(fields: dict[str, float], reason: Reason) -> None:
    names = ("ts", "open", "high", "low", "close", "volume")
    bad = tuple(fields.get(name, value) for name, value in zip(names, GOOD, strict=True))
    neighbour = (NOON + MICROS_PER_HOUR, *GOOD[1:])
    verdict = verified(bad, neighbour)
    assert reasons(verdict) == {str(reason): [bad[0]]}
    assert verdict.rejected[0].candles.equals(candles(bad))
    assert verdict.good.equals(candles(neighbour))
    assert verdict.dropped == 0


@pytest.mark.parametrize("volume", [NAN, 0.0, 1e300])
def test_volume_that_is_fine(volume: float) -> None:
    row = (*GOOD[:5], volume)
    assert verified(row).good.equals(candles(row))


def test_a_doji_is_fine() -> None:
    row = (NOON, 7.0, 7.0, 7.0, 7.0, 0.0)
    assert verified(row).good.equals(candles(row))


def test_range_and_forming_candle_are_dropped() -> None:
    hours = [NOON + n * MICROS_PER_HOUR for n in range(-1, 5)]
    verdict = verified(*((ts, *GOOD[1:]) for ts in hours), closed_end=hours[3])
    assert verdict.good.ts.tolist() == hours[1:3]
    assert (verdict.rejected, verdict.dropped) == ((), 4)


def test_off_grid_out_of_range_is_only_dropped() -> None:
    verdict = verified((NOON - 7, *GOOD[1:]), (DAY.end + 7, *GOOD[1:]))
    assert (len(verdict.good), verdict.rejected, verdict.dropped) == (0, (), 2)


def test_nothing_closed_yet() -> None:
    verdict = verified(GOOD, closed_end=DAY.start - 1)
    assert (len(verdict.good), verdict.rejected, verdict.dropped) == (0, (), 1)


def test_outside_the_session_is_dropped_and_off_the_clock_is_not() -> None:
    pre_market, first, stray, evening = (at(f"2024-01-03T{t}Z") for t in ("13:00", "14:00", "15:30", "21:00"))
    rows = [(ts, *GOOD[1:]) for ts in (pre_market, first, stray, evening)]
    verdict = verified(*rows, asset_class="stocks")
    assert verdict.good.ts.tolist() == [first]
    assert reasons(verdict) == {"off_grid": [stray]}
    assert verdict.dropped == 2


def test_repetitions() -> None:
    later = (NOON + MICROS_PER_HOUR, *GOOD[1:5], NAN)
    verdict = verified(later, GOOD, later, later)
    assert verdict.good.equals(candles(GOOD, later))
    assert (verdict.rejected, verdict.dropped) == ((), 2)


def test_a_conflict_rejects_all_its_rows_and_no_other() -> None:
    other = (*GOOD[:5], 6.0)
    later = (NOON + MICROS_PER_HOUR, *GOOD[1:])
    verdict = verified(GOOD, later, GOOD, other)
    assert verdict.good.equals(candles(later))
    assert reasons(verdict) == {"conflict": [NOON] * 3}
    assert verdict.dropped == 0


def test_a_missing_volume_conflicts_with_a_given_one() -> None:
    assert reasons(verified(GOOD, (*GOOD[:5], NAN))) == {"conflict": [NOON] * 2}


def test_an_insane_row_does_not_conflict_with_a_sane_one() -> None:
    insane = (NOON, 10.0, 1.0, 9.0, 11.0, 5.0)
    verdict = verified(insane, GOOD)
    assert verdict.good.equals(candles(GOOD))
    assert reasons(verdict) == {"high_low": [NOON]}


def test_columns_of_different_length() -> None:
    ok = flat(np.array([NOON]))
    crooked = Candles(ok.ts, ok.open, ok.high, ok.low, ok.close, np.ones(2))
    with pytest.raises(ValueError, match="of one length"):
        verify(crooked, DAY, grid("crypto", "1h"), DAY.end)


def test_empty() -> None:
    verdict = verified()
    assert (len(verdict.good), verdict.rejected, verdict.dropped) == (0, (), 0)


PRICES = st.sampled_from([1.0, 2.0, 3.0] * 4 + [0.0, -1.0, NAN, INF])
VOLUMES = st.sampled_from([1.0, 2.0, NAN, NAN, -1.0, INF])
OPENS = st.integers(-2, 13).map(lambda n: NOON + n * MICROS_PER_HOUR) | st.just(NOON + 1)
ROWS = st.lists(st.tuples(OPENS, PRICES, PRICES, PRICES, PRICES, VOLUMES), max_size=25)
SANE_ROWS = st.lists(
    st.tuples(
        OPENS, st.just(2.0), st.just(3.0), st.just(1.0), st.just(2.0), st.sampled_from([1.0, 2.0, NAN])
    ),
    max_size=25,
)


@given(ROWS | SANE_ROWS, st.sampled_from(["crypto", "stocks", "forex"]), st.integers(-1, 14))
@settings(max_examples=examples(300))
def test_against_row_by_row(rows: list[Row], asset_class: str, closed_hours: int) -> None:
    it, closed_end = grid(asset_class, "1h"), NOON + closed_hours * MICROS_PER_HOUR
    verdict = verify(candles(*rows), DAY, it, closed_end)
    good, rejected, dropped = slow_verdict(rows, DAY, it, closed_end)
    assert verdict.good.equals(candles(*good))
    assert verdict.dropped == dropped
    assert {part.reason: sorted(map(repr, rows_of(part.candles))) for part in verdict.rejected} == {
        reason: sorted(map(repr, part)) for reason, part in rejected.items()
    }
    assert [part.reason for part in verdict.rejected] == [r for r in Reason if r in rejected]


def slow_verdict(
    rows: list[Row], span: TimeRange, it: Grid, closed_end: int
) -> tuple[list[Row], dict[Reason, list[Row]], int]:
    rejected: dict[Reason, list[Row]] = defaultdict(list)
    sane: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        ts = int(row[0])
        if not span.start <= ts < min(span.end, closed_end):
            continue
        if not it.contains(np.array([ts]))[0]:
            if ts % MICROS_PER_HOUR:
                rejected[Reason.OFF_GRID].append(row)
        elif reason := slow_reason(row):
            rejected[reason].append(row)
        else:
            sane[row[0]].append(row)
    good = []
    for _, same in sorted(sane.items()):
        if len({repr(row) for row in same}) == 1:  # repr: NaN equals NaN
            good.append(same[0])
        else:
            rejected[Reason.CONFLICT] += same
    return good, dict(rejected), len(rows) - len(good) - sum(map(len, rejected.values()))


def slow_reason(row: Row) -> Reason | None:
    _, open_, high, low, close, volume = row
    prices = (open_, high, low, close)
    if not all(map(math.isfinite, prices)):
        return Reason.NOT_FINITE
    if min(prices) <= 0:
        return Reason.NOT_POSITIVE
    if high < max(open_, close, low) or low > min(open_, close, high):
        return Reason.HIGH_LOW
    if volume < 0 or volume == INF:
        return Reason.BAD_VOLUME
    return None


@pytest.mark.parametrize("asset_class", ["crypto", "forex"])
def test_clean_rows_are_cheap(asset_class: str) -> None:
    """A month of crypto minutes: 44,640 rows in less than 2 ms, without a copy."""
    it, span = grid(asset_class, "1m"), window("2024-01-01T00:00Z", "2024-03-01T00:00Z")
    block = flat(it.opens(span)[:44_640])
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        verdict = verify(block, span, it, span.end)
        seconds.append(time.perf_counter() - begun)
    assert len(verdict.good) == 44_640
    assert np.shares_memory(verdict.good.close, block.close)
    assert min(seconds) < 0.002


# --- real candles --------------------------------------------------------------------------------


def test_real_binance_hours_are_clean(shared_data: Callable[[str], Path]) -> None:
    block = read_csv(shared_data("binance/BTCUSDT-1h.csv.gz"))
    span = window("2020-11-17T00:00Z", "2021-05-16T00:00Z")
    verdict = verify(block, span, grid("crypto", "1h"), span.end)
    assert (len(verdict.good), verdict.rejected, verdict.dropped) == (4_308, (), 1)


def test_real_apple_hours(shared_data: Callable[[str], Path]) -> None:
    """47 rows after the close of a half-day are dropped; three session hours are absent."""
    block = read_csv(shared_data("equity/AAPL-1h.csv.gz"))
    it, span = grid("stocks", "1h"), TimeRange(int(block.ts[0]), int(block.ts[-1]) + 1)
    verdict = verify(block, span, it, span.end)
    assert (len(verdict.good), verdict.rejected, verdict.dropped) == (40_831 - 47, (), 47)
    absent = find_gaps(missing_of(it.opens(span), verdict.good.ts), it)
    assert [(iso(gap.start), gap.missing) for gap in absent] == [
        ("2002-09-11T13:00:00+00:00", 1),
        ("2013-08-22T17:00:00+00:00", 2),
    ]
