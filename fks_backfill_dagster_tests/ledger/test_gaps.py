"""Gap detection: against a reference implementation, golden files (data/gaps), and real candles."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, Timeframe, iso
from fks_backfill_dagster.ledger.gaps import Gap, GapStatus, find_gaps, missing_of
from fks_backfill_dagster_tests.domain.builders import at, grid, read_csv, window

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "gaps"
CASES = list(csv.DictReader((GOLDEN / "cases.csv").read_text().splitlines()))
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


def test_distant_minutes_do_not_build_a_grid() -> None:
    missing = np.array([at("1980-01-01T00:00Z"), at("2040-01-01T00:00Z")])
    gaps = find_gaps(missing, grid("crypto", "1m"))
    assert [gap.duration for gap in gaps] == [MICROS_PER_MINUTE] * 2


@pytest.mark.parametrize("case", [pytest.param(case, id=case["name"]) for case in CASES])
def test_golden(case: dict[str, str]) -> None:
    """A file lists candles and the expected gaps between them, in order."""
    rows = list(csv.DictReader((GOLDEN / f"{case['name']}.csv").read_text().splitlines()))
    present = np.array([at(row["start"]) for row in rows if row["what"] == "candle"], dtype=np.int64)
    expected = tuple(
        Gap(at(row["start"]), at(row["end"]), int(row["candles"])) for row in rows if row["what"] == "gap"
    )
    it = grid(case["asset_class"], case["timeframe"], case["calendar"])
    assert find_gaps(missing_of(it.opens(window(case["start"], case["end"])), present), it) == expected


def test_the_golden_cases_are_in_use_and_cover_all_timeframes() -> None:
    assert {path.stem for path in GOLDEN.glob("*.csv")} == {case["name"] for case in CASES} | {"cases"}
    assert {case["timeframe"] for case in CASES} == {timeframe.value for timeframe in Timeframe}


def test_states() -> None:
    assert [str(s) for s in GapStatus] == ["open", "filled", "no_trade", "unavailable", "tolerated"]


def test_real_binance_outages(shared_data: Callable[[str], Path]) -> None:
    """The seven outages of the MANIFEST, exact to the hour."""
    block = read_csv(shared_data("binance/BTCUSDT-1h.csv.gz"))
    it, span = grid("crypto", "1h"), window("2020-11-17T00:00Z", "2021-05-16T00:00Z")
    gaps = found(block.ts, it, span)
    assert gaps == [
        ("2020-11-30T06", "2020-11-30T07", 1),
        ("2020-12-21T15", "2020-12-21T18", 3),
        ("2020-12-25T02", "2020-12-25T03", 1),
        ("2021-02-11T04", "2021-02-11T05", 1),
        ("2021-03-06T02", "2021-03-06T03", 1),
        ("2021-04-20T02", "2021-04-20T04", 2),
        ("2021-04-25T05", "2021-04-25T08", 3),
    ]
    assert sum(missing for *_, missing in gaps) == 12


def test_real_apple_days_have_no_gap(shared_data: Callable[[str], Path]) -> None:
    ts = read_csv(shared_data("equity/AAPL-1d.csv.gz")).ts
    it, span = grid("stocks", "1d"), window("1998-01-02T00:00Z", "2021-04-01T00:00Z")
    assert len(ts) == it.count(span) == 5_849
    assert find_gaps(missing_of(it.opens(span), ts), it) == ()


def test_real_apple_hours_miss_three(shared_data: Callable[[str], Path]) -> None:
    """Of 40,787 session hours. 47 rows of the file lie after the close of a half-day and fill nothing."""
    ts = read_csv(shared_data("equity/AAPL-1h.csv.gz")).ts
    it, span = grid("stocks", "1h"), window("1998-01-02T00:00Z", "2021-04-01T00:00Z")
    assert found(ts, it, span) == [
        ("2002-09-11T13", "2002-09-11T14", 1),
        ("2013-08-22T17", "2013-08-22T19", 2),
    ]
    assert int((~it.contains(ts)).sum()) == 47
    assert it.count(span) == len(ts) - 47 + 3


def test_real_euro_hours_miss_holidays_and_holes(shared_data: Callable[[str], Path]) -> None:
    """Twelve years. The holes of 2007, 2015 and October 2018 are real, too, but not listed in the MANIFEST."""
    ts = read_csv(shared_data("forex/EURUSD-1h.csv.gz")).ts
    it, span = grid("forex", "1h"), TimeRange(int(ts[0]), int(ts[-1]) + 1)
    gaps = found(ts, it, span)
    assert (len(gaps), sum(missing for *_, missing in gaps)) == (28, 682)
    assert [gap for gap in gaps if not holiday(gap)] == [
        ("2007-01-08T23", "2007-01-09T21", 22),
        ("2015-08-20T19", "2015-08-21T04", 9),
        ("2016-12-11T22", "2016-12-16T05", 103),
        ("2017-03-31T04", "2017-03-31T21", 17),
        ("2017-10-06T04", "2017-10-06T21", 17),
        ("2018-06-08T04", "2018-06-08T21", 17),
        ("2018-10-28T21", "2018-10-29T00", 3),
    ]


def found(ts: Instants, it: Grid, span: TimeRange) -> list[tuple[str, str, int]]:
    """The gaps to the hour: start, end, candles."""
    gaps = find_gaps(missing_of(it.opens(span), ts), it)
    return [(iso(gap.start)[:13], iso(gap.end)[:13], gap.missing) for gap in gaps]


def holiday(gap: tuple[str, str, int]) -> bool:
    """Whether a day of Christmas or New Year lies in a gap."""
    start, end, _ = gap
    year = int(end[:4])
    return any(
        start <= f"{y}-{day}T21" and f"{y}-{day}T00" <= end
        for y in (year - 1, year)
        for day in ("12-25", "12-26", "01-01")
    )
