"""Plans against the wanted candles, one by one."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
    to_datetime,
)
from fks_backfill_dagster.ledger.gaps import GapStatus, find_gaps
from fks_backfill_dagster.ledger.records import Known, LedgerGap
from fks_backfill_dagster.pipeline.plan import GRACE, Batch, Plan, Scope, closed_window, make_plan
from fks_backfill_dagster_tests.domain.builders import at, window
from fks_backfill_dagster_tests.examples import examples

CRYPTO_1H = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
CRYPTO_1D = Series("BTC/USDT", Timeframe.D1, AssetClass.CRYPTO)
CRYPTO_1W = Series("BTC/USDT", Timeframe.W1, AssetClass.CRYPTO)
STOCKS_1H = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
STOCKS_1D = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)
FOREX_4H = Series("EUR/USD", Timeframe.H4, AssetClass.FOREX)
SERIES = st.sampled_from([CRYPTO_1H, CRYPTO_1D, CRYPTO_1W, STOCKS_1H, STOCKS_1D, FOREX_4H])

NOTHING = Known(RangeSet(), ())
JANUARY = window("2024-01-01T00:00Z", "2024-02-01T00:00Z")


@dataclass(frozen=True)
class Case:
    """A series with some stored candles, and the missing ones that a plan has to request."""

    series: Series
    window: TimeRange
    known: Known
    wanted: list[int]

    @property
    def grid(self) -> Grid:
        return grid_of(self.series)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    series = draw(SERIES)
    start = at("2023-12-20T00:00Z") + draw(st.integers(0, 40 * 24)) * MICROS_PER_HOUR
    whole = TimeRange(start, start + draw(st.integers(0, 130 * 24)) * MICROS_PER_HOUR)
    grid = grid_of(series)
    opens = grid.opens(whole)
    runs = draw(
        st.lists(st.tuples(st.sampled_from(["never", "stored", "open", "no_trade"]), st.integers(1, 60)))
    )
    states = [state for state, length in runs for _ in range(length)][: len(opens)]
    states += ["never"] * (len(opens) - len(states))
    edges = [*opens.tolist(), whole.end]
    synced = RangeSet([TimeRange(edges[n], edges[n + 1]) for n, s in enumerate(states) if s != "never"])
    gaps = [
        LedgerGap(g.start, g.end, g.missing, GapStatus(status))
        for status in ("open", "no_trade")
        for g in find_gaps(opens[[s == status for s in states]], grid)
    ]
    wanted = [ts for ts, s in zip(opens.tolist(), states, strict=True) if s in ("never", "open")]
    return Case(series, whole, Known(synced, tuple(sorted(gaps, key=lambda g: g.start))), wanted)


def plan_of(case: Case, days: int = 30, scope: Scope = Scope.MISSING) -> Plan:
    return make_plan(case.series, case.window, case.known, case.grid, batch_size_days=days, scope=scope)


def opens_of(batches: Sequence[Batch], grid: Grid) -> list[int]:
    return [ts for batch in batches for part in batch.wanted for ts in grid.opens(part).tolist()]


@given(cases(), st.integers(1, 400))
@settings(deadline=None)
def test_the_batches_contain_exactly_the_wanted_candles(case: Case, days: int) -> None:
    plan = plan_of(case, days)
    assert opens_of(plan.batches, case.grid) == case.wanted  # each once, ascending
    assert plan.missing == len(case.wanted)
    assert plan.expected == len(case.grid.opens(case.window))
    for batch in plan.batches:
        assert batch.candles == len(opens_of([batch], case.grid)) > 0
        assert batch.window == batch.wanted.hull
        assert case.window.start <= batch.window.start
        assert batch.window.end <= case.window.end
    for left, right in itertools.pairwise(plan.batches):
        assert left.window.end <= right.window.start


@given(cases(), st.integers(1, 400))
@settings(deadline=None)
def test_a_refetch_requests_everything_and_counts_the_missing(case: Case, days: int) -> None:
    plan = plan_of(case, days, Scope.EVERYTHING)
    assert opens_of(plan.batches, case.grid) == case.grid.opens(case.window).tolist()
    assert plan.missing == len(case.wanted)


@given(cases(), st.integers(28, 59))
@settings(deadline=None)
def test_batches_of_a_month_are_calendar_months(case: Case, days: int) -> None:
    months = [
        (to_datetime(b.window.start).strftime("%Y-%m"), to_datetime(b.window.end - 1).strftime("%Y-%m"))
        for b in plan_of(case, days).batches
    ]
    assert all(first == last for first, last in months)
    assert len(set(months)) == len(months)


@pytest.mark.parametrize(
    ("days", "starts"),
    [(28, [1, 2, 3, 4, 5, 6, 7]), (60, [1, 3, 5, 7]), (90, [1, 4, 7]), (365, [1])],
)
def test_longer_batches_are_several_months(days: int, starts: list[int]) -> None:
    half = window("2024-01-01T00:00Z", "2024-07-15T00:00Z")
    plan = make_plan(CRYPTO_1D, half, NOTHING, grid_of(CRYPTO_1D), batch_size_days=days)
    assert [to_datetime(b.window.start).month for b in plan.batches] == starts
    assert all(to_datetime(b.window.start).day == 1 for b in plan.batches)


@given(cases(), st.integers(1, 27))
@settings(deadline=None)
def test_shorter_batches_are_cells_of_days(case: Case, days: int) -> None:
    batches = plan_of(case, days).batches
    if not batches:
        return
    # Cells begin on the first day on which something may be wanted, with or without a candle.
    first = case.known.missing(case.window).hull.start // MICROS_PER_DAY
    cells = [
        {(edge // MICROS_PER_DAY - first) // days for edge in (b.window.start, b.window.end - 1)}
        for b in batches
    ]
    assert all(len(cell) == 1 for cell in cells)
    assert len(set.union(*cells)) == len(cells)


@given(cases(), st.integers(1, 60), st.integers(1, 3000))
@settings(deadline=None)
def test_spans_fill_a_page_and_no_more(case: Case, days: int, page: int) -> None:
    plan = plan_of(case, days)
    spans = plan.spans(page)
    assert tuple(itertools.chain.from_iterable(spans)) == plan.batches
    for span in spans:
        assert len(span) == 1 or sum(b.candles for b in span) <= page
        assert all(a.window.end == b.window.start for a, b in itertools.pairwise(span))
    for left, right in itertools.pairwise(spans):
        touching = left[-1].window.end == right[0].window.start
        assert not touching or sum(b.candles for b in left) + right[0].candles > page


def test_a_weekend_needs_no_batch() -> None:
    weekend = window("2024-01-06T00:00Z", "2024-01-08T00:00Z")
    plan = make_plan(
        STOCKS_1H, weekend, NOTHING, grid_of(STOCKS_1H), batch_size_days=30, scope=Scope.EVERYTHING
    )
    assert (plan.expected, plan.missing, plan.batches) == (0, 0, ())


def test_stored_candles_between_two_wanted_parts_are_not_requested() -> None:
    day = MICROS_PER_DAY
    synced = RangeSet([TimeRange(JANUARY.start + 10 * day, JANUARY.start + 20 * day)])
    plan = make_plan(CRYPTO_1D, JANUARY, Known(synced, ()), grid_of(CRYPTO_1D), batch_size_days=30)
    (batch,) = plan.batches
    assert batch.window == JANUARY
    assert batch.wanted == RangeSet([JANUARY]) - synced
    assert batch.candles == 21


def test_a_decade_with_many_gaps_is_planned_quickly() -> None:
    """50,000 open gaps, cut into days: the cost is not proportional to gaps times days."""
    decade = window("2014-01-01T00:00Z", "2024-01-01T00:00Z")
    series = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
    grid = grid_of(series)
    starts = np.linspace(decade.start, decade.end, 50_000, endpoint=False, dtype=np.int64)
    starts -= starts % MICROS_PER_MINUTE
    gaps = tuple(LedgerGap(s, s + MICROS_PER_MINUTE, 1, GapStatus.OPEN) for s in starts.tolist())
    known, begun = Known(RangeSet([decade]), gaps), time.process_time()
    plan = make_plan(series, decade, known, grid, batch_size_days=1)
    assert time.process_time() - begun < 5
    assert plan.missing == 50_000
    assert len(plan.batches) == 3652


# Expected candles -----------------------------------------------------------------------------------------


@given(
    SERIES,
    st.integers(0, 100 * 24 * 60),
    st.integers(0, 60 * 24 * 60),
    st.none() | st.integers(-30 * 24 * 60, 200 * 24 * 60),
    st.integers(-10 * 24 * 60, 200 * 24 * 60),
)
@settings(max_examples=examples(300))
def test_only_listed_and_closed_candles_are_expected(
    series: Series, start: int, length: int, listed: int | None, now: int
) -> None:
    """Every argument is in minutes from an instant in 2023; against the definition, candle by candle."""
    grid, origin = grid_of(series), at("2023-10-20T07:00Z")
    requested = TimeRange(origin + start * MICROS_PER_MINUTE, origin + (start + length) * MICROS_PER_MINUTE)
    listed_at = None if listed is None else origin + listed * MICROS_PER_MINUTE
    moment = origin + now * MICROS_PER_MINUTE
    found = closed_window(requested, grid, moment, listed_at)
    assert requested.start <= found.start <= found.end <= requested.end
    opens = grid.opens(requested)
    closes = grid.closes(opens)
    can_exist = closes <= moment - GRACE
    if listed_at is not None:
        can_exist &= closes > listed_at
    assert grid.opens(found).tolist() == opens[can_exist].tolist()


def test_the_day_of_the_listing_is_part_of_it() -> None:
    """Binance began on 2017-08-17 at 04:00, and its candle of that day opens at 00:00."""
    requested = window("2017-01-01T00:00Z", "2018-01-01T00:00Z")
    found = closed_window(requested, grid_of(CRYPTO_1D), at("2024-01-01T00:00Z"), at("2017-08-17T04:00Z"))
    assert found == window("2017-08-17T00:00Z", "2018-01-01T00:00Z")


def test_a_candle_exists_when_the_grace_is_over() -> None:
    requested, grid = window("2024-01-01T00:00Z", "2024-01-01T12:00Z"), grid_of(CRYPTO_1H)
    close = at("2024-01-01T05:00Z")
    assert closed_window(requested, grid, close + GRACE - 1, None).end == at("2024-01-01T04:00Z")
    assert closed_window(requested, grid, close + GRACE, None).end == close


def test_listed_after_the_range() -> None:
    found = closed_window(JANUARY, grid_of(CRYPTO_1H), at("2025-01-01T00:00Z"), at("2024-03-01T00:00Z"))
    assert not found
    plan = make_plan(
        CRYPTO_1H, found, NOTHING, grid_of(CRYPTO_1H), batch_size_days=30, scope=Scope.EVERYTHING
    )
    assert plan.batches == ()


def test_hours_of_a_half_day() -> None:
    """On 2023-11-24 New York closed at 13:00: at 18:00 UTC the day is over."""
    friday = window("2023-11-24T00:00Z", "2023-11-25T00:00Z")
    now = at("2023-11-24T18:00Z") + GRACE
    found = closed_window(friday, grid_of(STOCKS_1H), now, None)
    opens = [to_datetime(ts) for ts in grid_of(STOCKS_1H).opens(found).tolist()]
    assert [o.astimezone(UTC).hour for o in opens] == [14, 15, 16, 17]
    assert opens[-1] + timedelta(hours=1) == to_datetime(now - GRACE)
