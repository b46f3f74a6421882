from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.gaps import Gap, GapStatus, find_gaps, missing_of
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, Timeframe, iso
from fks_backfill_dagster_tests.domain.builders import at, grid, read_csv, window

SMALL = st.sets(st.integers(0, 40)).map(lambda s: np.array(sorted(s), dtype=np.int64))


@given(SMALL, SMALL)
def test_missing_of_is_a_set_difference(expected: np.ndarray, present: np.ndarray) -> None:
    missing = missing_of(expected, present)
    assert missing.dtype == np.int64
    assert missing.tolist() == sorted(set(expected.tolist()) - set(present.tolist()))


@given(
    st.sampled_from(["crypto", "stocks", "forex"]),
    st.sampled_from(list(Timeframe)),
    st.sets(st.integers(0, 59)),
)
@settings(deadline=None)
def test_gaps_one_by_one(asset_class: str, timeframe: Timeframe, absent: set[int]) -> None:
    """Walks over sixty neighbouring candles, weekends between them or not."""
    it = grid(asset_class, timeframe)
    opens = it.opens(window("2023-10-20T19:00Z", "2025-12-31T00:00Z"))[:60]
    closes = it.closes(opens)
    expected: list[Gap] = []
    for n in sorted(absent):
        start, count = int(opens[n]), 0
        if n - 1 in absent:
            previous = expected.pop()
            start, count = previous.start, previous.missing
        expected.append(Gap(start, int(closes[n]), count + 1))
    assert find_gaps(opens[sorted(absent)], it) == tuple(expected)


def test_a_stock_gap_spans_the_night() -> None:
    missing = np.array([at(f"2024-01-{t}Z") for t in ("05T20:00", "08T14:00", "08T16:00")])
    assert find_gaps(missing, grid("stocks", "1h")) == (
        Gap(at("2024-01-05T20:00Z"), at("2024-01-08T15:00Z"), 2),
        Gap(at("2024-01-08T16:00Z"), at("2024-01-08T17:00Z"), 1),
    )


def test_a_gap_ends_with_the_session() -> None:
    (gap,) = find_gaps(np.array([at("2015-12-24T17:00Z")]), grid("stocks", "4h"))
    assert (gap.end, gap.duration) == (at("2015-12-24T18:00Z"), MICROS_PER_HOUR)


def test_no_gap() -> None:
    assert find_gaps(np.empty(0, dtype=np.int64), grid("crypto", "1m")) == ()


def test_far_apart_minutes_cost_no_grid() -> None:
    missing = np.array([at("1980-01-01T00:00Z"), at("2040-01-01T00:00Z")])
    gaps = find_gaps(missing, grid("crypto", "1m"))
    assert [gap.duration for gap in gaps] == [MICROS_PER_MINUTE] * 2


def test_states() -> None:
    assert [str(s) for s in GapStatus] == ["open", "filled", "no_trade", "unavailable", "tolerated"]


def test_real_binance_outages(shared_data: Callable[[str], Path]) -> None:
    """The seven outages of the MANIFEST, exact to the hour."""
    block = read_csv(shared_data("binance/BTCUSDT-1h.csv.gz"))
    it, span = grid("crypto", "1h"), window("2020-11-17T00:00Z", "2021-05-16T00:00Z")
    gaps = find_gaps(missing_of(it.opens(span), block.ts), it)
    assert [(iso(gap.start)[:13], iso(gap.end)[:13], gap.missing) for gap in gaps] == [
        ("2020-11-30T06", "2020-11-30T07", 1),
        ("2020-12-21T15", "2020-12-21T18", 3),
        ("2020-12-25T02", "2020-12-25T03", 1),
        ("2021-02-11T04", "2021-02-11T05", 1),
        ("2021-03-06T02", "2021-03-06T03", 1),
        ("2021-04-20T02", "2021-04-20T04", 2),
        ("2021-04-25T05", "2021-04-25T08", 3),
    ]
    assert sum(gap.missing for gap in gaps) == 12
