"""Results as text tables."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe
from fks_backfill_dagster.store.coverage import Counts
from fks_backfill_dagster.tables import COVERAGE, CoverageRow, coverage_total, lines, percent
from fks_backfill_dagster_tests.domain.builders import at

NOW = at("2024-03-05T12:00Z")
BTC, ETH = (Series(f"{name}/USDT", Timeframe.H1, AssetClass.CRYPTO) for name in ("BTC", "ETH"))


def test_numbers_and_shares_are_right_aligned() -> None:
    when = datetime(2024, 3, 5, 4, 30, tzinfo=UTC)
    assert lines(("name", "count", "share", "when"), [("a", 12345, 0.5, when), ("bcd", None, 1.0, None)]) == [
        "name   count    share  when",
        "a     12,345  50.00 %  2024-03-05 04:30",
        "bcd        -    100 %  -",
    ]
    assert lines(("name",), []) == []


def test_a_table_fits_a_width_by_its_longest_texts() -> None:
    header = ("series", "missing", "note", "evidence")
    rows = [
        ("BTC/USDT 1h", 1234567, None, "binance: absent; polygon: absent"),
        ("ETH/USDT 1h", 1, None, "short"),
    ]
    assert lines(header, rows, 200) == lines(header, rows)
    assert lines(header, rows, 48) == [
        "series         missing  evidence",
        "BTC/USDT 1h  1,234,567  binance: absent; polygo…",
        "ETH/USDT 1h          1  short",
    ], "the column without a value goes first"
    assert lines(header, rows, 10) == [
        "series         missing  evidence",
        "BTC/USDT 1h  1,234,567  binance…",
        "ETH/USDT 1h          1  short",
    ], "neither names nor numbers are cut"


def test_times_stay_whole_as_long_as_texts_and_headings_can_be_shorter() -> None:
    header = ("series", "next attempt (UTC)", "evidence")
    rows = [("BTC/USDT 1h", datetime(2024, 3, 5, 4, 30, tzinfo=UTC), "binance: absent")]
    assert lines(header, rows, 39) == [
        "series       next attempt (U…  evidence",
        "BTC/USDT 1h  2024-03-05 04:30  binance…",
    ]
    assert lines(header, rows, 31)[1] == "BTC/USDT 1h  2024-03…  binance…"


@given(
    rows=st.lists(
        st.tuples(st.text("ab", max_size=12), st.integers(0, 10**7), st.text("xyz", max_size=60)), min_size=1
    ),
    width=st.integers(1, 120),
)
def test_a_width_that_suffices_for_the_least_table_is_never_exceeded(
    rows: list[tuple[str, int, str]], width: int
) -> None:
    found = lines(("name", "count", "evidence"), rows, width)
    least = lines(("name", "count", "evidence"), rows, 1)
    assert max(map(len, found)) <= max(width, *map(len, least))
    assert len(found) == len(rows) + 1


@pytest.mark.parametrize(
    ("share", "shown"), [(1.0, "100 %"), (0.9999999, "99.99 %"), (0.12345, "12.35 %"), (0.0, "0.00 %")]
)
def test_a_share_is_never_rounded_up_to_100_percent(share: float, shown: str) -> None:
    assert percent(share) == shown


def test_the_table_of_coverage_and_its_total() -> None:
    counts = Counts(expected=1000, missing=5, no_trade=10)
    row = CoverageRow(BTC, counts, 2, at("2024-03-05T10:00Z"), 1, NOW + MICROS_PER_HOUR)
    due = CoverageRow(BTC, counts, 2, at("2024-03-05T10:00Z"), 1, NOW)
    never = CoverageRow(ETH, None, 0, None, None, None)
    assert lines(COVERAGE, [row.cells(NOW), never.cells(NOW), coverage_total([row, due, never], NOW)]) == [
        "series       expected  stored  coverage  open gaps  newest (UTC)      lag  next attempt (UTC)",
        "BTC/USDT 1h     1,000     985   99.50 %          2  2024-03-05 10:00    1  2024-03-05 13:00",
        "ETH/USDT 1h         -       -         -          -  -                   -  -",
        "total of 3      2,000   1,970   99.50 %          4  -                   -  due now",
    ]


def test_nothing_expected_has_no_coverage() -> None:
    row = CoverageRow(BTC, Counts(), 0, None, None, None)
    assert row.cells(NOW)[3] is None
    assert coverage_total([], NOW)[1:5] == (0, 0, None, 0)


@pytest.mark.parametrize(
    ("missing", "rounded"), [(0, 1.0), (1, 0.999999), (3_333_333, 0.666667), (4_300_000, 0.57)]
)
def test_a_rounded_coverage_is_1_only_if_nothing_is_missing(missing: int, rounded: float) -> None:
    assert Counts(expected=10_000_000, missing=missing).rounded_coverage == rounded


@given(missing=st.integers(0, 10**9), expected=st.integers(1, 10**9))
def test_a_rounded_coverage_is_within_a_millionth(missing: int, expected: int) -> None:
    counts = Counts(expected=expected, missing=min(missing, expected))
    assert abs(counts.rounded_coverage - counts.coverage) <= 1e-6
    assert (counts.rounded_coverage == 1) == (counts.missing == 0)
