"""The gap ledger against a slow reference ledger that tracks every candle separately."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.reconcile import Recorded, Seen, reconcile
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap, Outcome
from fks_backfill_dagster.ledger.settle import Response, Rules, Settlement, settle
from fks_backfill_dagster_tests.domain.builders import at, grid, window
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.ledger.slow_ledger import Attempt, Slow, rows_of, slow_rows

HALF_HOUR = 30 * MICROS_PER_MINUTE
# New York from the Wednesday before Thanksgiving 2023 on: a holiday, a half-day, weekends.
STOCKS = grid_of(Series("AAPL", Timeframe.H1, AssetClass.STOCKS))
CRYPTO = grid_of(Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO))
CANDLES = 40
FROM = at("2023-11-22T15:00Z")


def audited(ledger: Sequence[LedgerGap], synced: RangeSet, stored: list[int], grid: Grid) -> None:
    """The audit, which is independent of settlement, finds no difference."""
    oldest, newest = (stored[0], stored[-1]) if stored else (None, None)
    ranks = grid.rank(np.array(stored, dtype=np.int64))
    seen = Seen(len(stored), oldest, newest, RangeSet.from_arrays(ranks, ranks + 1))
    recorded = Recorded(True, synced, len(stored), oldest, newest, tuple(ledger))
    found = reconcile(Series("ANY", Timeframe.H1, AssetClass.CRYPTO), grid, recorded, seen, synced.hull.end)
    assert (found.differences, found.removed, found.added) == ((), (), ())


def responded(
    provider: str, now: int, missing: Instants, confirmed: Instants | None = None
) -> list[Response]:
    """Responses of a provider without any of the missing candles, some of them confirmed."""
    sure = np.empty(0, dtype=np.int64) if confirmed is None else confirmed
    return [
        Response(Evidence(provider, now, Outcome.ABSENT), np.setdiff1d(missing, sure)),
        Response(Evidence(provider, now, Outcome.ABSENT, confirmed=True), sure),
    ]


STEP = st.tuples(
    st.integers(0, CANDLES),  # a window from this open ...
    st.integers(0, CANDLES),  # ... to that one,
    st.integers(-2, 2),  # its edges moved by so many half hours,
    st.integers(-2, 2),
    st.sets(st.integers(0, CANDLES - 1)) | st.just(set(range(CANDLES))),  # candles delivered
    st.sampled_from([None, "binance", "polygon"]),  # which provider responded
    st.sets(st.integers(0, CANDLES - 1)) | st.just(set(range(CANDLES))),  # candles whose absence is confirmed
    st.sampled_from(
        [frozenset(), frozenset({"binance"}), frozenset({"binance", "polygon"})]
    ),  # which are eligible
    st.integers(0, 3),  # how many missing candles are tolerated
    st.sampled_from([1, 7, 61, 3_000, 90_000]).map(lambda n: n * MICROS_PER_MINUTE),  # how much later
)


@given(st.sampled_from([CRYPTO, STOCKS]), st.lists(STEP, min_size=1, max_size=8))
@settings(max_examples=examples(300))
def test_any_history_matches_the_slow_ledger(grid: Grid, steps: list[tuple[Any, ...]]) -> None:
    opens = grid.opens(TimeRange(FROM, FROM + 60 * 24 * MICROS_PER_HOUR))[:CANDLES].tolist()
    edges = [*opens, opens[-1] + MICROS_PER_HOUR]
    slow = Slow(opens, grid)
    ledger: list[LedgerGap] = []
    synced = RangeSet()
    now = 0
    for first, past, before, after, given_, provider, confirmable, eligible, tolerated, later in steps:
        now += later
        start, end = sorted([edges[first] + before * HALF_HOUR, edges[past] + after * HALF_HOUR])
        requested = TimeRange(*(min(max(edge, opens[0]), edges[-1]) for edge in (start, end)))
        if not requested:
            continue
        inside = [ts for ts in opens if requested.contains(ts)]
        delivered = {opens[n] for n in given_} & set(inside)
        absent = [ts for ts in inside if not (ts in slow.known and slow.known[ts] is None)]
        missing = np.array(sorted(set(absent) - delivered), dtype=np.int64)
        stored = np.array(sorted(delivered), dtype=np.int64)
        sure = {opens[n] for n in confirmable}
        confirmed = np.array(sorted(sure & set(missing.tolist())), dtype=np.int64)
        rules = Rules(eligible=eligible, tolerated=tolerated)

        responses = responded(provider, now, missing, confirmed) if provider else []
        change = settle(ledger, requested, missing, stored, responses, grid, synced, rules)

        filled_then = slow.apply(Attempt(requested, delivered, provider, sure, eligible, tolerated, now))
        assert len(set(change.removed)) == len(change.removed)
        assert set(change.removed) <= {g.start for g in ledger}
        added = [replace(g, found_at=now if g.found_at is None else g.found_at) for g in change.added]
        filled = [g for g in added if g.status == GapStatus.FILLED]
        ledger = [g for g in ledger if g.start not in change.removed]
        ledger += [g for g in added if g.status != GapStatus.FILLED]
        ledger.sort(key=lambda g: g.start)
        assert rows_of(ledger) == slow_rows(slow, grid)
        synced = synced | RangeSet([requested])
        audited(ledger, synced, [ts for ts in opens if ts in slow.known and slow.known[ts] is None], grid)
        reported = [ts for g in filled for ts in grid.opens(TimeRange(g.start, g.end)).tolist()]
        assert sorted(reported) == sorted(filled_then)
        assert sum(g.missing for g in filled) == len(reported)


def test_an_outage_across_two_batches_is_one_gap() -> None:
    """Its two sides lie on either side of a weekend."""
    hours = grid("stocks", "1h")
    friday, monday = (
        window("2024-01-05T00:00Z", "2024-01-06T00:00Z"),
        window("2024-01-06T00:00Z", "2024-01-09T00:00Z"),
    )
    nothing = np.empty(0, dtype=np.int64)
    first = settle([], friday, hours.opens(friday)[-2:], nothing, (), hours, RangeSet()).added
    second = settle(first, monday, hours.opens(monday)[:1], nothing, (), hours, RangeSet([friday]))
    assert second.removed == (first[0].start,)
    assert [(g.start, g.end, g.missing) for g in second.added] == [
        (at("2024-01-05T19:00Z"), at("2024-01-08T15:00Z"), 3)
    ]


# Retries -------------------------------------------------------------------------------------------------

BINANCE = Rules(eligible=frozenset({"binance"}))


def after_failure(ledger: Sequence[LedgerGap], requested: TimeRange, now: int) -> list[LedgerGap]:
    """The rows after a request of `requested` that returned no candle."""
    nothing = np.empty(0, dtype=np.int64)
    missing = CRYPTO.opens(requested)
    responses = responded("binance", now, missing)
    change = settle(ledger, requested, missing, nothing, responses, CRYPTO, RangeSet([requested]), BINANCE)
    kept = [g for g in ledger if g.start not in change.removed]
    return sorted([*kept, *change.added], key=lambda g: g.start)


def hours(first: int, past: int) -> TimeRange:
    return TimeRange(FROM + first * MICROS_PER_HOUR, FROM + past * MICROS_PER_HOUR)


def test_an_ongoing_outage_does_not_delay_its_first_part() -> None:
    """Each hour one more candle is missing; the extended gap is due when it was due before."""
    ledger = after_failure([], hours(0, 6), FROM + 6 * MICROS_PER_HOUR)
    ledger = after_failure(ledger, hours(0, 6), FROM + 16 * MICROS_PER_HOUR)
    assert [g.next_attempt_at for g in ledger] == [FROM + 26 * MICROS_PER_HOUR]
    for hour in range(6, 15):
        ledger = after_failure(ledger, hours(hour, hour + 1), FROM + (hour + 11) * MICROS_PER_HOUR)
        assert [(g.missing, g.next_attempt_at) for g in ledger] == [(hour + 1, FROM + 26 * MICROS_PER_HOUR)]
    ledger = after_failure(ledger, hours(0, 15), FROM + 26 * MICROS_PER_HOUR)
    assert [(g.missing, g.next_attempt_at) for g in ledger] == [(15, FROM + 46 * MICROS_PER_HOUR)]


def test_the_part_of_a_due_gap_that_was_not_requested_stays_due() -> None:
    """One of two months; the other one is requested later, or never."""
    due = FROM + 7 * MICROS_PER_HOUR
    ledger = after_failure([], hours(0, 6), due - MICROS_PER_HOUR)
    assert [g.next_attempt_at for g in ledger] == [due]
    first, second = after_failure(ledger, hours(0, 2), due)
    assert (first.missing, first.next_attempt_at) == (2, due + MICROS_PER_HOUR)
    assert (second.missing, second.next_attempt_at) == (4, due)
    (whole,) = after_failure([first, second], hours(2, 6), due + MICROS_PER_MINUTE)
    assert (whole.missing, whole.attempts) == (6, 2)
    assert whole.next_attempt_at == due + MICROS_PER_HOUR


@pytest.mark.parametrize(
    ("series", "requested"),
    [
        ("stocks", window("2024-01-06T00:00Z", "2024-01-07T00:00Z")),  # a weekend
        ("crypto", window("2024-01-06T01:10Z", "2024-01-06T01:50Z")),  # a part of an hour
    ],
)
def test_a_window_without_a_candle_changes_nothing(series: str, requested: TimeRange) -> None:
    hours, nothing = grid(series, "1h"), np.empty(0, dtype=np.int64)
    whole = window("2024-01-05T20:00Z", "2024-01-08T15:00Z")
    row = LedgerGap(whole.start, whole.end, hours.count(whole), GapStatus.NO_TRADE, 1)
    responses = responded("a", 1, nothing)
    assert settle([row], requested, nothing, nothing, responses, hours, RangeSet([whole])) == Settlement(
        (), ()
    )


def test_a_giant_gap_is_filled_month_by_month_quickly() -> None:
    """Five million minutes; each settlement takes less than 50 ms."""
    minutes = grid("crypto", "1m")
    months = [at(f"{2015 + n // 12}-{n % 12 + 1:02}-01T00:00Z") for n in range(115)]
    whole = TimeRange(months[0], months[-1])
    ledger = [LedgerGap(whole.start, whole.end, minutes.count(whole), GapStatus.OPEN)]
    nothing, slowest = np.empty(0, dtype=np.int64), 0.0
    for month in itertools.starmap(TimeRange, itertools.pairwise(months)):
        stored = minutes.opens(month)
        begun = time.process_time()
        change = settle(ledger, month, nothing, stored, (), minutes, RangeSet([whole]))
        slowest = max(slowest, time.process_time() - begun)
        ledger = [g for g in change.added if g.status != GapStatus.FILLED]
        assert sum(g.missing for g in ledger) == minutes.count(TimeRange(month.end, whole.end))
    assert slowest < 0.05


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        (Outcome.REFUSED, GapStatus.NO_TRADE),  # for example beyond its depth
        (Outcome.ABSENT, GapStatus.UNAVAILABLE),
        (Outcome.ERROR, GapStatus.OPEN),
    ],
)
def test_a_provider_that_gives_every_interval_decides(outcome: Outcome, status: GapStatus) -> None:
    hours, days = grid("crypto", "1h"), window("2024-01-01T00:00Z", "2024-01-11T00:00Z")
    opens = hours.opens(days)
    missing, stored = opens[5:235:7], np.empty(0, dtype=np.int64)
    responses = [
        Response(Evidence("polygon", 1, Outcome.ABSENT, confirmed=True), missing),
        Response(Evidence("yfinance", 1, outcome), missing),
    ]
    rules = Rules(strict=frozenset({"yfinance"}), eligible=frozenset({"polygon", "yfinance"}))
    rows = settle([], days, missing, stored, responses, hours, RangeSet(), rules).added
    assert {row.status for row in rows} == {status}
    assert len(rows) == len(missing)


# No-trade intervals ---------------------------------------------------------------------------------------

MINUTES = grid("stocks", "1m")
POLYGON = Rules(eligible=frozenset({"polygon"}))


def settled(
    order: Sequence[TimeRange], missing: Instants, rules: Rules = POLYGON, ledger: Sequence[LedgerGap] = ()
) -> list[LedgerGap]:
    """The ledger after requests of these windows to Polygon, which confirms all missing candles."""
    nothing, synced = np.empty(0, dtype=np.int64), RangeSet()
    rows = list(ledger)
    for now, requested in enumerate(order):
        mine = missing[(missing >= requested.start) & (missing < requested.end)]
        change = settle(
            rows, requested, mine, nothing, responded("polygon", 1 + now, mine, mine), MINUTES, synced, rules
        )
        rows = [g for g in rows if g.start not in change.removed]
        rows = sorted([*rows, *change.added], key=lambda g: g.start)
        synced = synced | RangeSet([requested])
    return rows


def opens_of(rows: Sequence[LedgerGap], status: GapStatus) -> list[int]:
    return [
        ts for g in rows if g.status is status for ts in MINUTES.opens(TimeRange(g.start, g.end)).tolist()
    ]


@settings(max_examples=examples(25))
@given(
    share=st.sampled_from([0.02, 0.2, 0.5]),
    hole=st.tuples(st.integers(1, 3000), st.integers(1, 500)),
    cuts=st.lists(st.integers(1, 20), max_size=6, unique=True),
    seed=st.integers(0, 2**32),
    shuffled=st.randoms(),
)
def test_neither_batches_nor_their_order_decide(
    share: float, hole: tuple[int, int], cuts: list[int], seed: int, shuffled: Any
) -> None:
    """Any division of a month into windows, requested in any order, gives the same no-trade intervals."""
    month = window("2024-03-01T00:00Z", "2024-04-01T00:00Z")
    opens = MINUTES.opens(month)
    gone = np.random.default_rng(seed).random(len(opens)) < share
    gone[hole[0] : sum(hole)] = True
    missing = opens[gone]
    edges = [
        month.start,
        *(month.start + n * MICROS_PER_DAY + 15 * MICROS_PER_HOUR for n in sorted(cuts)),
        month.end,
    ]
    parts = [TimeRange(*pair) for pair in itertools.pairwise(edges)]
    shuffled.shuffle(parts)
    whole, pieces = settled([month], missing), settled(parts, missing)
    for status in (GapStatus.NO_TRADE, GapStatus.UNAVAILABLE):
        assert opens_of(pieces, status) == opens_of(whole, status)


def test_a_closed_day_explains_a_session_and_nothing_beside_it() -> None:
    month = window("2024-03-01T00:00Z", "2024-04-01T00:00Z")
    opens = MINUTES.opens(month)
    day = (opens >= at("2024-03-13T00:00Z")) & (opens < at("2024-03-14T00:00Z"))
    missing = np.union1d(opens[day], opens[np.flatnonzero(day)[-1] + 1 :][:30])
    closed = RangeSet([window("2024-03-13T00:00Z", "2024-03-14T00:00Z")])
    rows = settled([month], missing, Rules(eligible=frozenset({"polygon"}), closed=closed))
    assert [(g.missing, g.status) for g in rows] == [(390, GapStatus.NO_TRADE), (30, GapStatus.UNAVAILABLE)]


def test_no_trade_of_an_earlier_version_stays_until_it_is_requested() -> None:
    month = window("2024-03-01T00:00Z", "2024-03-21T00:00Z")
    later = window("2024-03-21T00:00Z", "2024-04-01T00:00Z")
    opens = MINUTES.opens(month)
    hole = opens[-200:-100]
    old = Evidence("polygon", 0, Outcome.ABSENT)
    row = LedgerGap(int(hole[0]), int(hole[-1]) + MICROS_PER_MINUTE, 100, GapStatus.NO_TRADE, 1, (old,), 0)
    nothing = np.empty(0, dtype=np.int64)
    change = settle([row], later, nothing, nothing, (), MINUTES, RangeSet([month]), POLYGON)
    assert change == Settlement((), ())
    responses = responded("polygon", 5, hole, hole)
    (now,) = settle([row], month, hole, nothing, responses, MINUTES, RangeSet([month]), POLYGON).added
    assert (now.status, now.missing, now.attempts) == (GapStatus.UNAVAILABLE, 100, 2)
