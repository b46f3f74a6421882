"""The ledger of gaps against a slow one that keeps every candle by itself."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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
)
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.reconcile import Recorded, Seen, judge
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap
from fks_backfill_dagster.ledger.settle import LONGEST_PAUSE, Findings, Settlement, settle
from fks_backfill_dagster_tests.domain.builders import at, grid, window

HALF_HOUR = 30 * MICROS_PER_MINUTE
# New York from the Wednesday before Thanksgiving 2023 on: a holiday, a half-day, weekends.
STOCKS = grid_of(Series("AAPL", Timeframe.H1, AssetClass.STOCKS))
CRYPTO = grid_of(Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO))
CANDLES = 40
FROM = at("2023-11-22T15:00Z")


@dataclass
class Hole:
    """What the slow ledger knows of one missing candle."""

    status: GapStatus
    attempts: int
    asked: dict[str, int]
    found_at: int
    due: int | None = None

    @property
    def kin(self) -> GapStatus:
        """Equal for neighbours that belong to one row."""
        return GapStatus.UNAVAILABLE if self.status == GapStatus.TOLERATED else self.status


@dataclass(frozen=True)
class Ask:
    """One window asked for: who answered (None: nobody was asked), and what is known besides."""

    window: TimeRange
    delivered: set[int]
    provider: str | None
    quiet: set[int]
    able: frozenset[str]
    tolerated: int
    now: int

    def state(self, asked: dict[str, int], ts: int) -> GapStatus:
        if ts in self.quiet:
            return GapStatus.NO_TRADE
        return GapStatus.UNAVAILABLE if self.able and self.able <= set(asked) else GapStatus.OPEN

    def waits(self, hole: Hole) -> bool:
        """Somebody was asked: not for this, though its time had come, or not by everybody."""
        if self.provider is None or hole.status is GapStatus.NO_TRADE:
            return False
        if self.now in hole.asked.values():
            return not self.able <= set(hole.asked)
        never = hole.status is GapStatus.OPEN and hole.due is None
        return never or (hole.due or self.now + 1) <= self.now or not self.able <= set(hole.asked)


@dataclass
class Slow:
    """Every candle by itself: absent from `known` if never asked for, None if stored, else a Hole."""

    opens: list[int]
    known: dict[int, Hole | None] = field(default_factory=dict)
    cuts: set[int] = field(default_factory=set)
    """Where a row begins though the hole before it is of its kind: one of them still waits to be asked for."""

    def ask(self, ask: Ask) -> set[int]:
        """Returns which holes were filled."""
        filled: set[int] = set()
        if not any(ask.window.contains(ts) for ts in self.opens):
            return filled
        touched = {ts for ts in self.opens if ask.window.contains(ts)}
        for run in self.runs():
            if run[0] < ask.window.end and run[-1] + MICROS_PER_HOUR > ask.window.start:
                touched.update(run)
        for ts in self.opens:
            if not ask.window.contains(ts):
                continue
            hole = self.known.get(ts)
            if ts in ask.delivered or (ts in self.known and hole is None):
                if hole is not None:
                    filled.add(ts)
                self.known[ts] = None
                continue
            hole = hole or Hole(GapStatus.OPEN, 0, {}, ask.now)
            self.known[ts] = hole
            if ask.provider is not None:
                asked = hole.asked | {ask.provider: ask.now}
                self.known[ts] = Hole(ask.state(asked, ts), hole.attempts + 1, asked, hole.found_at)
        for before, ts in itertools.pairwise(self.opens):
            if touched & {before, ts}:
                self.cuts.discard(ts)
                left, right = self.known.get(before), self.known.get(ts)
                if left and right and ask.waits(left) != ask.waits(right):
                    self.cuts.add(ts)
        for run in self.runs():
            self.settle(run, ask)
        return filled

    def settle(self, run: list[int], ask: Ask) -> None:
        """One outage, one row: its candles share what is known, and its length decides what it is."""
        holes = [self.hole(ts) for ts in run]
        asked: dict[str, int] = {}
        for hole in holes:
            for name, when in hole.asked.items():
                asked[name] = max(when, asked.get(name, when))
        attempts = max(hole.attempts for hole in holes)
        found_at = min(h.found_at for h in holes)
        dues = [h.due for h in holes if h.due is not None and h.found_at == found_at]
        due = min(dues, default=None)
        status = holes[0].status
        if status is not GapStatus.NO_TRADE and ask.now in asked.values():
            rest = min(max(5 * MICROS_PER_MINUTE, ask.now - found_at), MICROS_PER_DAY)
            short = False
            if status is not GapStatus.OPEN:
                short = len(run) <= ask.tolerated
                status = GapStatus.TOLERATED if short else GapStatus.UNAVAILABLE
                rest = min(max(MICROS_PER_HOUR, ask.now - found_at), 30 * MICROS_PER_DAY)
            due = None if short else min(*dues, ask.now + rest) if dues else ask.now + rest
        for hole in holes:
            hole.status, hole.asked, hole.attempts, hole.due = status, asked, attempts, due
            hole.found_at = found_at

    def hole(self, ts: int) -> Hole:
        hole = self.known[ts]
        assert hole is not None
        return hole

    def runs(self) -> list[list[int]]:
        """Holes that are neighbours in the grid and belong together."""
        runs: list[list[int]] = []
        for before, ts in itertools.pairwise([-1, *self.opens]):
            hole, last = self.known.get(ts), self.known.get(before)
            if hole is None:
                continue
            if last is None or last.kin != hole.kin or ts in self.cuts:
                runs.append([])
            runs[-1].append(ts)
        return runs


Row = tuple[int, int, int, GapStatus, int, dict[str, int], int | None, int | None]


def slow_rows(slow: Slow, grid: Grid) -> list[Row]:
    rows: list[Row] = []
    for run in slow.runs():
        hole, end = slow.hole(run[0]), int(grid.closes(np.array(run[-1:]))[0])
        numbers = (len(run), hole.status, hole.attempts, hole.asked, hole.found_at, hole.due)
        rows.append((run[0], end, *numbers))
    return rows


def rows_of(ledger: Sequence[LedgerGap]) -> list[Row]:
    return [
        (
            g.start,
            g.end,
            g.missing,
            g.status,
            g.attempts,
            {e.provider: e.asked_at for e in g.evidence},
            g.found_at,
            g.next_attempt_at,
        )
        for g in ledger
    ]


def around(ledger: Sequence[LedgerGap], window: TimeRange) -> list[LedgerGap]:
    """The rows that overlap the window and the nearest on either side."""
    left = [g for g in ledger if g.end <= window.start][-1:]
    right = [g for g in ledger if g.start >= window.end][:1]
    return [*left, *(g for g in ledger if g.start < window.end and g.end > window.start), *right]


def audited(ledger: Sequence[LedgerGap], synced: RangeSet, stored: list[int], grid: Grid) -> None:
    """The audit, which knows nothing of settling, finds nothing."""
    ends = (stored[0], stored[-1]) if stored else (None, None)
    ranks = grid.rank(np.array(stored, dtype=np.int64))
    seen = Seen(len(stored), *ends, RangeSet.from_arrays(ranks, ranks + 1))
    recorded = Recorded(True, synced, len(stored), *ends, tuple(ledger))
    found = judge(Series("ANY", Timeframe.H1, AssetClass.CRYPTO), grid, recorded, seen, synced.hull.end)
    assert (found.differences, found.removed, found.added) == ((), (), ())


STEP = st.tuples(
    st.integers(0, CANDLES),  # a window from this open ...
    st.integers(0, CANDLES),  # ... to that one,
    st.integers(-2, 2),  # its edges moved by so many half hours,
    st.integers(-2, 2),
    st.sets(st.integers(0, CANDLES - 1)) | st.just(set(range(CANDLES))),  # candles brought
    st.sampled_from([None, "binance", "polygon"]),  # who was asked
    st.sets(st.integers(0, CANDLES - 1), max_size=5),  # candles that were quiet
    st.sampled_from([frozenset(), frozenset({"binance"}), frozenset({"binance", "polygon"})]),  # who is able
    st.integers(0, 3),  # how many may be lacking
    st.sampled_from([1, 7, 61, 3_000, 90_000]).map(lambda n: n * MICROS_PER_MINUTE),  # how much later
)


@given(st.sampled_from([CRYPTO, STOCKS]), st.lists(STEP, min_size=1, max_size=8))
@settings(deadline=None, max_examples=300)
def test_any_history_gives_the_slow_ledger(grid: Grid, steps: list[tuple[Any, ...]]) -> None:
    opens = grid.opens(TimeRange(FROM, FROM + 60 * 24 * MICROS_PER_HOUR))[:CANDLES].tolist()
    edges = [*opens, opens[-1] + MICROS_PER_HOUR]
    slow = Slow(opens)
    ledger: list[LedgerGap] = []
    synced = RangeSet()
    now = 0
    for first, past, before, after, given_, provider, silent, able, tolerated, later in steps:
        now += later
        start, end = sorted([edges[first] + before * HALF_HOUR, edges[past] + after * HALF_HOUR])
        asked = TimeRange(*(min(max(edge, opens[0]), edges[-1]) for edge in (start, end)))
        if not asked:
            continue
        inside = [ts for ts in opens if asked.contains(ts)]
        delivered = {opens[n] for n in given_} & set(inside)
        absent = [ts for ts in inside if not (ts in slow.known and slow.known[ts] is None)]
        missing = np.array(sorted(set(absent) - delivered), dtype=np.int64)
        stored = np.array(sorted(delivered), dtype=np.int64)
        evidence = (Evidence(provider, now, "absent"),) if provider else ()

        quiet = {opens[n] for n in silent}
        findings = Findings(quiet=np.array(sorted(quiet), dtype=np.int64), able=able, tolerated=tolerated)

        change = settle(around(ledger, asked), asked, missing, stored, evidence, grid, findings)

        filled_then = slow.ask(Ask(asked, delivered, provider, quiet, able, tolerated, now))
        assert len(set(change.removed)) == len(change.removed)
        assert set(change.removed) <= {g.start for g in ledger}
        added = [replace(g, found_at=now if g.found_at is None else g.found_at) for g in change.added]
        filled = [g for g in added if g.status == GapStatus.FILLED]
        ledger = [g for g in ledger if g.start not in change.removed]
        ledger += [g for g in added if g.status != GapStatus.FILLED]
        ledger.sort(key=lambda g: g.start)
        assert rows_of(ledger) == slow_rows(slow, grid)
        synced = synced | RangeSet([asked])
        audited(ledger, synced, [ts for ts in opens if ts in slow.known and slow.known[ts] is None], grid)
        told = [ts for g in filled for ts in grid.opens(TimeRange(g.start, g.end)).tolist()]
        assert sorted(told) == sorted(filled_then)
        assert sum(g.missing for g in filled) == len(told)


def test_an_outage_that_two_batches_saw_is_one_gap() -> None:
    """Its two sides lie on either side of a weekend."""
    hours = grid("stocks", "1h")
    friday, monday = (
        window("2024-01-05T00:00Z", "2024-01-06T00:00Z"),
        window("2024-01-06T00:00Z", "2024-01-09T00:00Z"),
    )
    nothing = np.empty(0, dtype=np.int64)
    first = settle([], friday, hours.opens(friday)[-2:], nothing, (), hours).added
    second = settle(first, monday, hours.opens(monday)[:1], nothing, (), hours)
    assert second.removed == (first[0].start,)
    assert [(g.start, g.end, g.missing) for g in second.added] == [
        (at("2024-01-05T19:00Z"), at("2024-01-08T15:00Z"), 3)
    ]


# When a gap is asked for again ---------------------------------------------------------------------------

EVERYBODY = Findings(able=frozenset({"binance"}))


def absent(now: int) -> tuple[Evidence, ...]:
    return (Evidence("binance", now, "absent"),)


def in_vain(ledger: Sequence[LedgerGap], asked: TimeRange, now: int) -> list[LedgerGap]:
    """The rows after `asked` was asked for and nobody had it."""
    nothing = np.empty(0, dtype=np.int64)
    change = settle(
        around(ledger, asked), asked, CRYPTO.opens(asked), nothing, absent(now), CRYPTO, EVERYBODY
    )
    kept = [g for g in ledger if g.start not in change.removed]
    return sorted([*kept, *change.added], key=lambda g: g.start)


def hours(first: int, past: int) -> TimeRange:
    return TimeRange(FROM + first * MICROS_PER_HOUR, FROM + past * MICROS_PER_HOUR)


def test_an_outage_that_goes_on_does_not_put_off_its_beginning() -> None:
    """Each hour a candle more is missing; the gap that it lengthens is due when it was due before."""
    ledger = in_vain([], hours(0, 6), FROM + 6 * MICROS_PER_HOUR)
    ledger = in_vain(ledger, hours(0, 6), FROM + 16 * MICROS_PER_HOUR)
    assert [g.next_attempt_at for g in ledger] == [FROM + 26 * MICROS_PER_HOUR]
    for hour in range(6, 15):
        ledger = in_vain(ledger, hours(hour, hour + 1), FROM + (hour + 11) * MICROS_PER_HOUR)
        assert [(g.missing, g.next_attempt_at) for g in ledger] == [(hour + 1, FROM + 26 * MICROS_PER_HOUR)]
    ledger = in_vain(ledger, hours(0, 15), FROM + 26 * MICROS_PER_HOUR)
    assert [(g.missing, g.next_attempt_at) for g in ledger] == [(15, FROM + 46 * MICROS_PER_HOUR)]


def test_the_part_of_a_due_gap_that_was_not_asked_for_stays_due() -> None:
    """One of two months; the other one's run comes later, or never."""
    due = FROM + 7 * MICROS_PER_HOUR
    ledger = in_vain([], hours(0, 6), due - MICROS_PER_HOUR)
    assert [g.next_attempt_at for g in ledger] == [due]
    first, second = in_vain(ledger, hours(0, 2), due)
    assert (first.missing, first.next_attempt_at) == (2, due + MICROS_PER_HOUR)
    assert (second.missing, second.next_attempt_at) == (4, due)
    (whole,) = in_vain([first, second], hours(2, 6), due + MICROS_PER_MINUTE)
    assert (whole.missing, whole.attempts) == (6, 2)
    assert whole.next_attempt_at == due + MICROS_PER_HOUR


@pytest.mark.parametrize(
    ("series", "asked"),
    [
        ("stocks", window("2024-01-06T00:00Z", "2024-01-07T00:00Z")),  # a weekend
        ("crypto", window("2024-01-06T01:10Z", "2024-01-06T01:50Z")),  # a part of an hour
    ],
)
def test_a_window_without_a_candle_changes_nothing(series: str, asked: TimeRange) -> None:
    hours, nothing = grid(series, "1h"), np.empty(0, dtype=np.int64)
    whole = window("2024-01-05T20:00Z", "2024-01-08T15:00Z")
    row = LedgerGap(whole.start, whole.end, hours.count(whole), GapStatus.NO_TRADE, 1)
    assert settle([row], asked, nothing, nothing, (Evidence("a", 1, "absent"),), hours) == Settlement((), ())


@pytest.mark.parametrize("calendar", ["XSHG", "XNZE", "XNYS"])
@pytest.mark.parametrize("timeframe", ["1d", "1w"])
def test_no_exchange_is_closed_for_longer(calendar: str, timeframe: str) -> None:
    """The longest closures that exchange-calendars knows."""
    opens = grid("stocks", timeframe, calendar).opens(window("1986-01-01T00:00Z", "2026-01-01T00:00Z"))
    assert len(opens) > 1000
    assert np.diff(opens).max() < LONGEST_PAUSE


def test_a_giant_gap_is_filled_month_by_month_in_no_time() -> None:
    """Five million minutes; each settlement has to stay well below 50 ms."""
    minutes = grid("crypto", "1m")
    months = [at(f"{2015 + n // 12}-{n % 12 + 1:02}-01T00:00Z") for n in range(115)]
    whole = TimeRange(months[0], months[-1])
    ledger = [LedgerGap(whole.start, whole.end, minutes.count(whole), GapStatus.OPEN)]
    nothing, slowest = np.empty(0, dtype=np.int64), 0.0
    for month in itertools.starmap(TimeRange, itertools.pairwise(months)):
        stored = minutes.opens(month)
        begun = time.process_time()
        change = settle(around(ledger, month), month, nothing, stored, (), minutes)
        slowest = max(slowest, time.process_time() - begun)
        ledger = [g for g in change.added if g.status != GapStatus.FILLED]
        assert sum(g.missing for g in ledger) == minutes.count(TimeRange(month.end, whole.end))
    assert slowest < 0.05


@pytest.mark.parametrize(
    ("outcome", "status"),
    [
        ("refused", GapStatus.NO_TRADE),  # the interval lies beyond its depth, say
        ("absent", GapStatus.UNAVAILABLE),
        ("error", GapStatus.OPEN),
    ],
)
def test_who_gives_every_interval_decides_what_was_quiet(outcome: str, status: GapStatus) -> None:
    hours, day = grid("crypto", "1h"), window("2024-01-05T00:00Z", "2024-01-06T00:00Z")
    quiet, able = hours.opens(day)[5:7], frozenset({"polygon", "yfinance"})
    words = (Evidence("polygon", 1, "absent"), Evidence("yfinance", 1, outcome))
    findings = Findings(quiet=quiet, strict=frozenset({"yfinance"}), able=able)
    (row,) = settle([], day, quiet, hours.opens(day)[:0], words, hours, findings).added
    assert row.status is status
