"""Reconciliation as a pure function: any stored candles against any tables, however wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.reconcile import Kind, Recorded, Seen, SeriesAudit, reconcile
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap, Outcome
from fks_backfill_dagster_tests.domain.builders import at
from fks_backfill_dagster_tests.examples import examples

SERIES = [
    Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO),
    Series("AAPL", Timeframe.H1, AssetClass.STOCKS),
    Series("AAPL", Timeframe.D1, AssetClass.STOCKS),
    Series("EUR/USD", Timeframe.H4, AssetClass.FOREX),
    Series("EUR/USD", Timeframe.W1, AssetClass.FOREX),
]
CANDLES = 40
FRIDAY = at("2024-03-08T15:00Z")  # a weekend, and a change of the clock, are in every series

UNFILLED = [status for status in GapStatus if status is not GapStatus.FILLED]


def opens_of(grid: Grid, timeframe: Timeframe) -> Instants:
    return grid.opens(TimeRange(FRIDAY, FRIDAY + 10 * CANDLES * timeframe.micros))[: CANDLES + 1]


@st.composite
def situations(draw: st.DrawFn) -> tuple[Series, Recorded, Seen, int]:
    """Any stored candles, any coverage, and any rows.

    Edges are opens, or lie beside one: in a candle, or in a closed hour before it.
    """
    series = draw(st.sampled_from(SERIES))
    grid = grid_of(series)
    opens = opens_of(grid, series.timeframe)
    number = st.integers(0, CANDLES)
    edge = st.builds(
        lambda n, shift: int(opens[n]) + shift,
        number,
        st.sampled_from([0, 0, 0, MICROS_PER_MINUTE, -MICROS_PER_MINUTE]),
    )
    spans = st.tuples(edge, edge).filter(lambda e: e[0] < e[1])
    synced = RangeSet([TimeRange(*pair) for pair in draw(st.lists(spans, max_size=4))])
    rows = {
        start: replace(
            LedgerGap(start, end, draw(st.integers(1, 12)), draw(st.sampled_from(UNFILLED))),
            **history_of(attempts),
        )
        for attempts, (start, end) in enumerate(draw(st.lists(spans, max_size=6)), 1)
    }
    stored = np.array(sorted(draw(st.sets(number))), dtype=np.int64)
    closed = draw(st.integers(CANDLES - 10, CANDLES))
    known = stored[stored < closed]
    ranks = grid.rank(opens[known])
    seen = Seen(
        len(stored),
        int(opens[stored[0]]) if len(stored) else None,
        int(opens[stored[-1]]) if len(stored) else None,
        RangeSet.from_arrays(ranks, ranks + 1),
    )
    total = draw(st.sampled_from([len(stored), 0]))
    gaps = tuple(rows[start] for start in sorted(rows))
    recorded = Recorded(draw(st.booleans()), synced, total, seen.oldest, seen.newest, gaps)
    return series, recorded, seen, int(opens[closed])


def history_of(attempts: int) -> dict[str, Any]:
    """A history that identifies its row."""
    return {
        "attempts": attempts,
        "evidence": evidence_of(attempts),
        "found_at": 100 - attempts,
        "next_attempt_at": None if attempts == 3 else 200 - attempts,
    }


def evidence_of(attempts: int) -> tuple[Evidence, ...]:
    return (Evidence(f"provider {attempts}", attempts, Outcome.ABSENT),)


def repaired(recorded: Recorded, found: SeriesAudit) -> Recorded:
    """The repair as the writer does it."""
    kept = [g for g in recorded.gaps if g.start not in found.removed]
    gaps = sorted([*kept, *found.added], key=lambda g: g.start)
    assert len({g.start for g in gaps}) == len(gaps)
    return Recorded(True, found.coverage, found.candles, found.oldest, found.newest, tuple(gaps))


@given(situations())
@settings(max_examples=examples(150))
def test_a_repair_leaves_no_difference(situation: tuple[Series, Recorded, Seen, int]) -> None:
    series, recorded, seen, closed_end = situation
    grid = grid_of(series)
    found = reconcile(series, grid, recorded, seen, closed_end)
    after = repaired(recorded, found)
    again = reconcile(series, grid, after, seen, closed_end)
    assert (again.differences, again.removed, again.added) == ((), (), ())
    assert again.coverage == found.coverage
    wrong = bool(found.removed or found.added or not recorded.exists or found.coverage != recorded.synced)
    assert bool(found.differences) == (wrong or recorded.total != seen.candles)


@given(situations())
@settings(max_examples=examples(150))
def test_the_ledger_matches_its_definition(situation: tuple[Series, Recorded, Seen, int]) -> None:
    series, recorded, seen, closed_end = situation
    grid = grid_of(series)
    found = reconcile(series, grid, recorded, seen, closed_end)
    gaps = repaired(recorded, found).gaps
    stored = [int(grid.at(np.array([r]))[0]) for run in seen.stored for r in range(run.start, run.end)]
    absent: list[int] = []
    for part in found.coverage:
        absent += [ts for ts in grid.opens(part).tolist() if ts not in stored]
    spanned = [grid.opens(TimeRange(g.start, g.end)).tolist() for g in gaps]
    assert [ts for part in spanned for ts in part] == absent
    assert [g.missing for g in gaps] == [len(part) for part in spanned]
    assert all(g.start == part[0] for g, part in zip(gaps, spanned, strict=True))
    assert all(g.end == grid.closes(np.array(part))[-1] for g, part in zip(gaps, spanned, strict=True))
    in_open_gaps = [ts for g, part in zip(gaps, spanned, strict=True) if g.status == "open" for ts in part]
    assert all(ts < closed_end for ts in absent)
    assert found.coverage.contains(np.array(stored, dtype=np.int64)).all()
    assert (found.missing, found.expected) == (len(absent), sum(grid.count(p) for p in found.coverage))
    assert found.explained == len(absent) - len(in_open_gaps)


@given(situations())
@settings(max_examples=examples(150))
def test_open_gaps_stay_open_and_history_is_kept(
    situation: tuple[Series, Recorded, Seen, int],
) -> None:
    series, recorded, seen, closed_end = situation
    grid = grid_of(series)
    found = reconcile(series, grid, recorded, seen, closed_end)
    for gap in repaired(recorded, found).gaps:
        assert gap.next_attempt_at in {None, *(g.next_attempt_at for g in recorded.gaps)}
        for ts in grid.opens(TimeRange(gap.start, gap.end)).tolist():
            before = [g for g in recorded.gaps if g.start <= ts < g.end]
            in_open_gaps = [g for g in before if g.status is GapStatus.OPEN]
            if in_open_gaps or not before:
                assert gap.status is GapStatus.OPEN
                for one in in_open_gaps[:1]:
                    assert gap.attempts >= one.attempts
                    assert gap.found_at is not None
                    assert gap.found_at <= (one.found_at or 0)
                    assert one.next_attempt_at is None or (gap.next_attempt_at or 0) <= one.next_attempt_at
                if not before and gap.attempts == 0:
                    assert (gap.evidence, gap.found_at, gap.next_attempt_at) == ((), None, None)
                assert {e for g in in_open_gaps[:1] for e in g.evidence} <= set(gap.evidence)
            else:
                assert replace(gap, start=0, end=0, missing=0) == replace(
                    before[0], start=0, end=0, missing=0
                )


@given(situations())
@settings(max_examples=examples(150))
def test_history_that_was_never_requested_does_not_become_a_gap(
    situation: tuple[Series, Recorded, Seen, int],
) -> None:
    """Except after the end of the coverage, up to a stored candle: the series is refreshed from that end."""
    series, recorded, seen, closed_end = situation
    grid = grid_of(series)
    found = reconcile(series, grid, recorded, seen, closed_end)
    kept = recorded.synced & RangeSet([TimeRange(0, closed_end)])
    for part in found.coverage - recorded.synced:
        if not kept or part.start < kept.hull.end:
            ranks = RangeSet([TimeRange(*(int(r) for r in grid.rank(np.array([part.start, part.end]))))])
            assert ranks - seen.stored == RangeSet()


def test_an_empty_series_is_in_order() -> None:
    nothing = Recorded(True, RangeSet(), 0, None, None, ())
    found = reconcile(SERIES[0], grid_of(SERIES[0]), nothing, Seen(0, None, None, RangeSet()), FRIDAY)
    assert found.differences == ()
    lost = reconcile(
        SERIES[0], grid_of(SERIES[0]), replace(nothing, exists=False), Seen(0, None, None, RangeSet()), 0
    )
    assert [d.kind for d in lost.differences] == [Kind.NO_STATUS]
