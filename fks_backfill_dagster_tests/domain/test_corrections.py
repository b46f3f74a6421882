"""Corrections against a slow row-by-row reference: which rows are invalid, and what the valid ones change."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import FIELDS, PRICES, Candles
from fks_backfill_dagster.domain.corrections import (
    MOST_PROBLEMS,
    Changes,
    CorrectionError,
    CorrectionRows,
    check_rows,
    resolve,
)
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR
from fks_backfill_dagster_tests.domain.builders import at, candles, grid

NOON = at("2024-01-03T12:00Z")
CLOSED_END = NOON + 20 * MICROS_PER_HOUR
HOURS = grid("crypto", "1h")
NAN = math.nan
Row = tuple[float, ...]


def rows_of(fields: frozenset[str], *rows: Row) -> CorrectionRows:
    """Rows of (ts, *FIELDS); a field that is not given becomes NaN."""
    block = candles(*rows)
    columns = [getattr(block, name) if name in fields else np.full(len(block), np.nan) for name in FIELDS]
    return CorrectionRows.of(
        Candles(block.ts, *columns), fields, np.arange(2, len(block) + 2, dtype=np.int64)
    )


def changes_of(rows: CorrectionRows, stored: Candles) -> Changes:
    return resolve(check_rows(rows, HOURS, CLOSED_END), stored, HOURS, CLOSED_END)


ALL = frozenset(FIELDS)
OFFSETS = st.integers(-1, 22)
VALUES = st.sampled_from([1.0, 2.0, 3.0, NAN, -1.0, math.inf])
ROWS = st.lists(st.tuples(OFFSETS, st.booleans(), *[VALUES] * 5), max_size=8)
STORED = st.dictionaries(OFFSETS, st.tuples(st.just(2.0), st.just(3.0), st.just(1.0), VALUES), max_size=8)


@given(rows=ROWS, stored=STORED, fields=st.frozensets(st.sampled_from(FIELDS), min_size=1))
def test_any_rows(
    rows: list[tuple[float, ...]], stored: dict[int, tuple[float, ...]], fields: frozenset[str]
) -> None:
    given_rows = [
        (NOON + int(hour) * MICROS_PER_HOUR + (1 if is_off else 0), *values) for hour, is_off, *values in rows
    ]
    kept = {
        NOON + hour * MICROS_PER_HOUR: (o, h, low, o, v if v > 0 and math.isfinite(v) else NAN)
        for hour, (o, h, low, v) in sorted(stored.items())
    }
    block = candles(*((ts, *values) for ts, values in kept.items()))
    wanted = {ts for ts, *_ in given_rows}
    at_rows = block.take(np.isin(block.ts, np.array(sorted(wanted), dtype=np.int64)))
    bad, after, unchanged = reference(given_rows, kept, fields)
    checked = rows_of(fields, *given_rows)
    if bad:
        with pytest.raises(CorrectionError) as error:
            changes_of(checked, at_rows)
        assert error.value.total == len(bad)
        assert [one.line - 2 for one in error.value.first] == bad[:MOST_PROBLEMS]
        return
    found = changes_of(checked, at_rows)
    assert found.unchanged == unchanged
    assert found.after.equals(candles(*((ts, *values) for ts, values in sorted(after.items()))))
    assert found.is_new.tolist() == [ts not in kept for ts in sorted(after)]
    was = [(ts, *kept.get(ts, (NAN,) * 5)) for ts in sorted(after)]
    assert found.before.equals(candles(*was))


def reference(
    rows: list[Row], kept: Mapping[int, Row], fields: frozenset[str]
) -> tuple[list[int], dict[int, Row], int]:
    """The numbers of invalid rows, the changed candles, and the number of unchanged ones."""
    possible = [n for n, (ts, *_) in enumerate(rows) if ts % MICROS_PER_HOUR == 0 and ts < CLOSED_END]
    times = [rows[n][0] for n in possible]
    bad, after, unchanged = [], {}, 0
    for n, (ts, *values) in enumerate(rows):
        if n not in possible or times.count(ts) > 1:
            bad.append(n)
            continue
        was = kept.get(int(ts), (NAN,) * 5)
        merged = [new if name in fields else old for name, new, old in zip(FIELDS, values, was, strict=True)]
        if not sane(merged) or (int(ts) not in kept and not fields >= set(PRICES)):
            bad.append(n)
        elif int(ts) in kept and all(same(a, b) for a, b in zip(merged, was, strict=True)):
            unchanged += 1
        else:
            after[int(ts)] = tuple(merged)
    return bad, after, unchanged


def sane(values: list[float]) -> bool:
    *prices, volume = values
    first, high, low, last = prices
    return (
        all(math.isfinite(price) and price > 0 for price in prices)
        and high >= max(first, last, low)
        and low <= min(first, last)
        and (math.isnan(volume) or (volume >= 0 and math.isfinite(volume)))
    )


def same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


@pytest.mark.parametrize(
    ("ts", "asset_class", "reason"),
    [
        ("2024-01-03T12:30Z", "crypto", "off the grid: no candle of this timeframe opens then"),
        ("2024-01-06T12:00Z", "stocks", "outside the calendar: the market is closed then"),
        ("2024-01-04T08:00Z", "crypto", "not closed yet"),
        ("1969-12-31T00:00Z", "crypto", "before 1970"),
    ],
)
def test_a_candle_that_cannot_exist(ts: str, asset_class: str, reason: str) -> None:
    rows = rows_of(ALL, (at(ts), 2.0, 3.0, 1.0, 2.0, 1.0))
    assert check_rows(
        rows, grid(asset_class, "1h"), CLOSED_END + 72 * MICROS_PER_HOUR * (asset_class == "stocks")
    ).reasons.tolist() == [reason]


def test_all_problems_are_counted_and_the_first_by_line_are_named() -> None:
    row = (NOON + 1, 2.0, 3.0, 1.0, 2.0, 1.0)
    with pytest.raises(CorrectionError, match="30 invalid rows") as error:
        changes_of(rows_of(ALL, *[row] * 30), Candles.empty())
    assert (error.value.total, [one.line for one in error.value.first]) == (30, list(range(2, 22)))


def test_a_hundred_thousand_rows_have_no_loop() -> None:
    ts = NOON - np.arange(100_000, dtype=np.int64) * MICROS_PER_HOUR
    one = np.full(len(ts), 2.0)
    rows = CorrectionRows.of(Candles(ts, one, one, one, one, one), ALL, np.arange(2, len(ts) + 2))
    found = changes_of(rows, Candles(ts[::-2], one[::2], one[::2], one[::2], one[::2], one[::2] + 1).sorted())
    assert (found.inserted, found.updated, found.unchanged) == (50_000, 50_000, 0)
