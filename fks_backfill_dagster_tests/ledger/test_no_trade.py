"""The rule for no-trade intervals, against a slow reference implementation, real files and its guarantees."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.ledger.gaps import find_gaps, missing_of
from fks_backfill_dagster.ledger.no_trade import NEIGHBOURS, Absent, no_trade, quiet_tail
from fks_backfill_dagster_tests.domain.builders import at, grid, read_csv, window
from fks_backfill_dagster_tests.examples import examples

SHARED = Path(__file__).resolve().parents[2] / "../shared/data"

MONTH = window("2024-03-01T00:00:00Z", "2024-04-01T00:00:00Z")
NOWHERE = RangeSet()


def no_trade_opens(
    opens: Instants, missing: Instants, of: Grid, covered: TimeRange, closed: RangeSet = NOWHERE
) -> Instants:
    """The no-trade intervals if one provider confirms all missing candles."""
    return missing[no_trade(Absent.of(missing, missing), RangeSet([covered]), of, closed)]


def slowly(absent: Absent, covered: TimeRange, of: Grid, closed: RangeSet) -> list[bool]:
    """The reference implementation: run by run, candle by candle."""
    low, high = of.rank(np.array([covered.start, covered.end])).tolist()
    ranks = of.rank(absent.opens).tolist()
    absent_ranks = set(ranks)
    shut = dict(zip(ranks, closed.contains(absent.opens).tolist(), strict=True))
    possible = dict(zip(ranks, (absent.confirmed | absent.decided).tolist(), strict=True))
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    length = {run[0]: sum(not shut[r] for r in run) for run in runs}
    candidates = [run for run in runs if any(possible[r] for r in run) and length[run[0]]]
    fits = {}
    for run in runs:
        first, last, size = run[0], run[-1], length[run[0]]
        around = range(max(first - NEIGHBOURS, low), min(last + 1 + NEIGHBOURS, high))
        stored = sum(r not in absent_ranks for r in around)
        shorter = [
            other
            for other in candidates
            if other is not run
            and first - NEIGHBOURS <= other[0] < last + 1 + NEIGHBOURS
            and length[other[0]] < max(size, 2)
        ]
        share = len(shorter) / max(stored, 1)
        longer = sum(length[other[0]] > 1 for other in shorter)
        on = min((longer + 5 * share) / (len(shorter) + 5), 1.0)
        bracketed = first > low and last + 1 < high
        whole = bool(of.holds_session(np.array([first]), np.array([last]))[0])
        possible_run = bracketed and not whole
        fits[first] = (
            possible_run
            and run in candidates
            and len(shorter) >= min(max(size, 1), 5)
            and len(shorter) * on ** max(size - 1, 0) >= 0.001,
            possible_run,
        )
    mask = []
    for run in runs:
        for rank in run:
            index = ranks.index(rank)
            fit, possible_run = fits[run[0]]
            explained = shut[rank] or fit or (bool(absent.corroborated[index]) and possible_run)
            mask.append(bool(absent.decided[index]) or (bool(absent.confirmed[index]) and explained))
    return mask


KINDS = [
    ("crypto", "1m"),
    ("crypto", "1d"),
    ("stocks", "30m"),
    ("stocks", "1d"),
    ("forex", "1h"),
    ("stocks", "4h"),
]


@settings(max_examples=examples(60))
@given(
    kind=st.sampled_from(KINDS),
    days=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.02, 0.3, 0.9]),
    holes=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 60)), max_size=4),
    seed=st.integers(0, 2**32),
)
def test_against_the_slow_reference(
    kind: tuple[str, str], days: int, share: float, holes: list[tuple[int, int]], seed: int
) -> None:
    of = grid(*kind)
    length = min(days, 2) if kind[1] == "1m" else days * (20 if kind[1] == "1d" else 1)
    covered = TimeRange(MONTH.start, MONTH.start + length * MICROS_PER_DAY)
    opens = of.opens(covered)
    random = np.random.default_rng(seed)
    is_absent = random.random(len(opens)) < share
    for start, size in holes:
        is_absent[start % max(len(opens), 1) :][:size] = True
    missing = opens[is_absent]
    masks = random.random((3, len(missing))) < np.array([[0.9], [0.2], [0.05]])
    absent = Absent(missing, masks[0], masks[1], masks[2])
    closed = RangeSet([TimeRange(covered.start, covered.start + MICROS_PER_DAY)]) if seed % 2 else NOWHERE
    found = no_trade(absent, RangeSet([covered]), of, closed)
    assert found.tolist() == slowly(absent, covered, of, closed)


@settings(max_examples=examples(40))
@given(
    share=st.sampled_from([0.0, 0.01, 0.1, 0.4]),
    start=st.integers(600, 3000),
    size=st.integers(30, 2000),
    seed=st.integers(0, 2**32),
)
def test_an_outage_is_never_no_trade(share: float, start: int, size: int, seed: int) -> None:
    """Half an hour in a row is an outage, also in a thin market with up to forty per cent of quiet minutes."""
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + 5 * MICROS_PER_DAY)
    opens = minutes.opens(covered)
    is_absent = np.random.default_rng(seed).random(len(opens)) < share
    is_absent[start : start + size] = True
    assert not np.isin(
        opens[start : start + size], no_trade_opens(opens, opens[is_absent], minutes, covered)
    ).any()


@settings(max_examples=examples(30))
@given(share=st.sampled_from([0.03, 0.2, 0.56, 0.8]), seed=st.integers(0, 2**32))
def test_random_quiet_minutes_are_no_trade(share: float, seed: int) -> None:
    stocks = grid("stocks", "1m")
    opens = stocks.opens(MONTH)
    random = np.random.default_rng(seed)
    missing = opens[1:-1][random.random(len(opens) - 2) < share]
    left = missing_of(missing, no_trade_opens(opens, missing, stocks, MONTH))
    # A run that is expected once in a thousand neighbourhoods remains missing: one month in fifty has one.
    assert len(find_gaps(left, stocks)) <= 3


@settings(max_examples=examples(30))
@given(cuts=st.lists(st.integers(1, 4000), max_size=6), seed=st.integers(0, 2**32))
def test_candles_beyond_the_neighbourhood_change_nothing(cuts: list[int], seed: int) -> None:
    """The decision does not depend on batches: it is the same as soon as the neighbourhood is covered."""
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + 3 * MICROS_PER_DAY)
    opens = minutes.opens(covered)
    missing = opens[np.random.default_rng(seed).random(len(opens)) < 0.3]
    whole = no_trade(Absent.of(missing, missing), RangeSet([covered]), minutes, NOWHERE)
    edges = sorted({0, len(opens), *cuts})
    for first, last in pairwise(edges):
        low, high = max(first - 2 * NEIGHBOURS, 0), min(last + 2 * NEIGHBOURS, len(opens))
        part = TimeRange(int(opens[low]), int(opens[high - 1]) + 60_000_000)
        near = missing[(missing >= part.start) & (missing < part.end)]
        mask = no_trade(Absent.of(near, near), RangeSet([part]), minutes, NOWHERE)
        mine = (near >= opens[first]) & (near < opens[last - 1])
        inside = (missing >= opens[first]) & (missing < opens[last - 1])
        assert mask[mine].tolist() == whole[inside].tolist()


def test_two_outages_do_not_explain_one_another() -> None:
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + 3 * MICROS_PER_DAY)
    opens = minutes.opens(covered)
    missing = np.concatenate([opens[1000:1040], opens[1200:1240], opens[1400:1450]])
    assert len(no_trade_opens(opens, missing, minutes, covered)) == 0


def test_a_whole_session_is_never_no_trade_unless_the_exchange_was_closed() -> None:
    half_hours = grid("stocks", "30m")
    opens = half_hours.opens(MONTH)
    day = opens[(opens >= at("2024-03-13T00:00:00Z")) & (opens < at("2024-03-14T00:00:00Z"))]
    assert len(day) == 13
    twice = Absent.of(day, day, day)
    covered = RangeSet([MONTH])
    assert not no_trade(twice, covered, half_hours, NOWHERE).any()
    closed = RangeSet([window("2024-03-13T00:00:00Z", "2024-03-14T00:00:00Z")])
    assert no_trade(Absent.of(day, day), covered, half_hours, closed).all()
    assert no_trade(Absent.of(day[1:], day[1:], day[1:]), covered, half_hours, NOWHERE).all()


def test_a_day_of_a_stock_is_a_session() -> None:
    days = grid("stocks", "1d")
    opens = days.opens(window("2020-01-01T00:00:00Z", "2024-01-01T00:00:00Z"))
    missing = opens[100:900:7]
    covered = RangeSet([window("2020-01-01T00:00:00Z", "2024-01-01T00:00:00Z")])
    assert not no_trade(Absent.of(missing, missing, missing), covered, days, NOWHERE).any()


def test_an_absence_at_the_edge_is_not_decided() -> None:
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + MICROS_PER_DAY)
    opens = minutes.opens(covered)
    missing = np.concatenate([opens[:2], opens[10:1400:5], opens[-1:]])
    found = no_trade_opens(opens, missing, minutes, covered)
    assert np.array_equal(found, missing[2:-1])


# The end of a series --------------------------------------------------------------------------------------


def fits_in_the_middle(
    absent: Absent, first: int, length: int, covered: TimeRange, of: Grid, closed: RangeSet
) -> bool:
    """Whether a run of `length` from rank `first` on, and one stored candle after it, is no_trade as a whole."""
    run = of.at(np.arange(first, first + length))
    past = int(of.at(np.array([first + length + 1]))[0])
    joined = Absent(
        np.concatenate([absent.opens, run]),
        np.concatenate([absent.confirmed, np.ones(length, dtype=bool)]),
        np.concatenate([absent.corroborated, np.zeros(length, dtype=bool)]),
        np.concatenate([absent.decided, np.zeros(length, dtype=bool)]),
    )
    within = RangeSet([TimeRange(covered.start, past)])
    return bool(no_trade(joined, within, of, closed)[len(absent.opens) :].all())


def tail_of(of: Grid, covered: TimeRange, length: int) -> TimeRange:
    """The candles after `covered`, which ends with a stored one."""
    first = int(of.rank(np.array([covered.end]))[0])
    return TimeRange(covered.end, int(of.at(np.array([first + length]))[0]))


@settings(max_examples=examples(40))
@given(
    kind=st.sampled_from(KINDS),
    share=st.sampled_from([0.0, 0.02, 0.2, 0.5, 0.9]),
    holes=st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 60)), max_size=4),
    length=st.integers(1, 40),
    closed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_tail_is_quiet_if_it_may_become_a_no_trade_interval(
    kind: tuple[str, str], share: float, holes: list[tuple[int, int]], length: int, closed: bool, seed: int
) -> None:
    """By the rule itself: some run that begins like the tail would be one."""
    of = grid(*kind)
    random = np.random.default_rng(seed)
    days = 1 if kind[1] == "1m" else 600 if kind[1] == "1d" else 60
    last = of.at(of.rank(np.array([MONTH.start + days * MICROS_PER_DAY])) - 1)
    covered = TimeRange(MONTH.start, int(last[0]) + 1)
    opens = of.opens(covered)
    is_absent = random.random(len(opens)) < share
    for start, size in holes:
        is_absent[start % len(opens) :][:size] = True
    is_absent[-1] = False
    missing = opens[is_absent]
    masks = random.random((3, len(missing))) < np.array([[0.9], [0.2], [0.05]])
    absent = Absent(missing, masks[0], masks[1], masks[2])
    tail = tail_of(of, covered, length)
    shut = RangeSet()
    if closed:  # a day of the covered range, and a quarter of a day after the newest candle
        shut = RangeSet(
            [
                TimeRange(covered.start, covered.start + MICROS_PER_DAY),
                TimeRange(covered.end, covered.end + MICROS_PER_DAY // 4),
            ]
        )
    found = quiet_tail(absent, RangeSet([covered]), of, shut, tail)
    first, quiet = int(of.rank(np.array([tail.start]))[0]), int(shut.contains(of.opens(tail)).sum())
    beyond = int(of.rank(np.array([covered.end + MICROS_PER_DAY]))[0]) - first if closed else 0
    # A longer run may contain closed candles outside the tail, which are not expected.
    if closed and length < beyond:
        assert found >= quiet
        return
    may_become = any(
        fits_in_the_middle(absent, first, longer, covered, of, shut)
        for longer in range(length, NEIGHBOURS + quiet + 1)
    )
    assert found == (length if may_become else quiet)


def test_the_longest_tail_that_fits() -> None:
    """Thirty per cent of quiet minutes: short runs fit, and longer ones do not."""
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + MICROS_PER_DAY)
    opens = minutes.opens(covered)
    missing = opens[:-1][np.random.default_rng(1).random(len(opens) - 1) < 0.3]
    absent = Absent.of(missing, missing)
    first = int(minutes.rank(np.array([covered.end]))[0])
    fits = [fits_in_the_middle(absent, first, n, covered, minutes, NOWHERE) for n in range(1, 60)]
    longest = max(n for n, fit in enumerate(fits, 1) if fit)
    assert 4 <= longest <= 12
    known = RangeSet([covered])
    found = [
        quiet_tail(absent, known, minutes, NOWHERE, tail_of(minutes, covered, n)) for n in range(longest + 5)
    ]
    assert found == [*range(longest + 1), 0, 0, 0, 0]


def test_no_tail_of_a_liquid_market_is_quiet() -> None:
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + MICROS_PER_DAY)
    nothing = np.empty(0, dtype=np.int64)
    for missing in (nothing, minutes.opens(covered)[600:660]):  # or of one that had an outage
        absent = Absent.of(missing, missing)
        for length in (1, 2, 30):
            tail = tail_of(minutes, covered, length)
            assert quiet_tail(absent, RangeSet([covered]), minutes, NOWHERE, tail) == 0


def test_a_run_of_the_same_length_does_not_explain_a_tail() -> None:
    minutes = grid("crypto", "1m")
    covered = TimeRange(MONTH.start, MONTH.start + MICROS_PER_DAY)
    opens = minutes.opens(covered)
    missing = opens[[1000, 1100, 1101]]  # a run of one and one of two
    absent = Absent.of(missing, missing)
    first = int(minutes.rank(np.array([covered.end]))[0])
    for length, quiet in ((1, True), (2, False), (3, False)):
        tail = tail_of(minutes, covered, length)
        found = quiet_tail(absent, RangeSet([covered]), minutes, NOWHERE, tail)
        assert found == (length if quiet else 0)
        assert fits_in_the_middle(absent, first, length, covered, minutes, NOWHERE) is quiet


def test_a_tail_that_holds_a_whole_session_is_not_quiet() -> None:
    quarters = grid("stocks", "30m")
    covered = window("2024-03-01T00:00:00Z", "2024-03-12T20:00:00Z")
    opens = quarters.opens(covered)
    missing = opens[:-1][np.random.default_rng(3).random(len(opens) - 1) < 0.85]
    absent = Absent.of(missing, missing)

    def quiet(until: str, closed: RangeSet = NOWHERE) -> int:
        tail = TimeRange(covered.end, at(until))
        return quiet_tail(absent, RangeSet([covered]), quarters, closed, tail)

    assert quiet("2024-03-13T18:00:00Z") == 9
    assert quiet("2024-03-13T20:00:00Z") == 0
    date = RangeSet([window("2024-03-13T00:00:00Z", "2024-03-14T00:00:00Z")])
    assert quiet("2024-03-13T20:00:00Z", date) == 13


def test_the_closed_part_of_a_tail_is_always_quiet() -> None:
    hours = grid("forex", "1h")
    covered = window("2024-12-16T00:00:00Z", "2024-12-24T22:00:00Z")
    nothing = Absent.of(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
    holiday = RangeSet([window("2024-12-24T22:00:00Z", "2024-12-26T23:00:00Z")])
    for until, quiet in (
        ("2024-12-26T12:00:00Z", 38),
        ("2024-12-26T23:00:00Z", 49),
        ("2024-12-27T03:00:00Z", 49),
    ):
        tail = TimeRange(covered.end, at(until))
        assert quiet_tail(nothing, RangeSet([covered]), hours, holiday, tail) == quiet


@pytest.mark.skipif(not SHARED.exists(), reason="the folder with the real files does not exist")
class TestRealFiles:
    def test_ticks_of_euro_dollar(self) -> None:
        minutes = grid("forex", "1m")
        stored = read_csv(SHARED / "forex/EURUSD-1m.csv.gz").ts
        covered = TimeRange(int(stored[0]), int(stored[-1]) + 1)
        missing = missing_of(minutes.opens(covered), stored)
        assert (len(missing), len(no_trade_opens(stored, missing, minutes, covered))) == (474, 471)

    def test_hours_of_euro_dollar(self) -> None:
        hours = grid("forex", "1h")
        covered = window("2016-01-01T00:00:00Z", "2018-01-01T00:00:00Z")
        missing = missing_of(hours.opens(covered), read_csv(SHARED / "forex/EURUSD-1h.csv.gz").ts)
        assert len(missing) == 240
        assert len(no_trade_opens(missing, missing, hours, covered)) == 0

    def test_an_afternoon_without_coinbase(self) -> None:
        minutes = grid("crypto", "1m")
        stored = read_csv(SHARED / "coinbase/BTCUSD-1m.csv.gz").ts
        days = np.unique(stored - stored % MICROS_PER_DAY)
        covered = RangeSet.from_arrays(days, days + MICROS_PER_DAY)
        expected = np.concatenate([minutes.opens(day) for day in covered])
        missing = missing_of(expected, stored)
        found = missing[no_trade(Absent.of(missing, missing), covered, minutes, NOWHERE)]
        assert [g.missing for g in find_gaps(missing_of(missing, found), minutes)] == [1, 432]
