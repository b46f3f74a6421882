"""Missing candles of a gap by day: against a count of the opens, and the audit's arithmetic against the writer's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.ledger.days import missing_by_day
from fks_backfill_dagster.ledger.gaps import GapStatus, find_gaps
from fks_backfill_dagster.ledger.reconcile import Kind, SeriesAudit
from fks_backfill_dagster.ledger.reconcile_days import with_days
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.ledger.test_reconcile import FRIDAY, SERIES


@st.composite
def gaps(draw: st.DrawFn) -> tuple[Series, LedgerGap]:
    """A run of missing candles of any market, over a weekend and a change of the clock."""
    series = draw(st.sampled_from(SERIES))
    grid = grid_of(series)
    opens = grid.opens(TimeRange(FRIDAY, FRIDAY + 60 * max(series.timeframe.micros, MICROS_PER_DAY // 4)))
    first = draw(st.integers(0, len(opens) - 1))
    past = draw(st.integers(first + 1, len(opens)))
    (found,) = find_gaps(opens[first:past], grid)
    return series, LedgerGap(found.start, found.end, found.missing, GapStatus.OPEN)


def counted(series: Series, gap: LedgerGap) -> list[int]:
    """The reference: every open, by its date."""
    dates = grid_of(series).opens(TimeRange(gap.start, gap.end)) // MICROS_PER_DAY
    first, last = gap.start // MICROS_PER_DAY, (gap.end - 1) // MICROS_PER_DAY
    return [int((dates == day).sum()) for day in range(first, last + 1)]


@settings(max_examples=examples(300))
@given(found=gaps())
def test_against_a_count_of_the_opens(found: tuple[Series, LedgerGap]) -> None:
    series, gap = found
    by_day = missing_by_day(gap, grid_of(series))
    assert list(by_day) == counted(series, gap)
    assert sum(by_day) == gap.missing


@settings(max_examples=examples(300))
@given(found=gaps(), data=st.data())
def test_the_audit_finds_wrong_counts_only(found: tuple[Series, LedgerGap], data: st.DataObject) -> None:
    series, gap = found
    grid, clean = grid_of(series), SeriesAudit(series)
    right = list(missing_by_day(gap, grid))
    assert with_days(clean, [gap], {gap.start: right}, grid) == clean
    place = data.draw(st.integers(0, len(right) - 1))
    wrong = [[*right, 0], np.add(right, np.arange(len(right)) == place).tolist(), right[:-1], None]
    for by_day in wrong:
        audit = with_days(clean, [gap], {gap.start: by_day}, grid)
        (difference,) = audit.differences
        assert (difference.kind, difference.start, difference.end) == (Kind.GAP_DAYS, gap.start, gap.end)
        assert difference.kind.repairable
        assert (audit.removed, audit.added) == ((gap.start,), (gap,))


@pytest.mark.parametrize("series", SERIES[:1])
def test_a_gap_that_is_replaced_anyway_is_not_reported_twice(series: Series) -> None:
    gap = LedgerGap(FRIDAY, FRIDAY + series.timeframe.micros, 1, GapStatus.OPEN)
    audit = SeriesAudit(series, removed=(gap.start,))
    assert with_days(audit, [gap], {gap.start: None}, grid_of(series)) == audit
