"""Lag in closed candles, the allowed lag, and the verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.freshness import (
    Freshness,
    Thresholds,
    Verdict,
    assess,
    polling_interval,
    recent_start,
)
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster_tests.domain.builders import at, grid, window

FRESH, PENDING, LATE, STALE = Verdict.FRESH, Verdict.PENDING, Verdict.LATE, Verdict.STALE


def assessed(
    asset_class: str,
    timeframe: str,
    newest: str | None,
    now: str,
    *,
    publication: int = 0,
    synced: TimeRange | None = None,
    quiet_tail: int = 0,
    end: int | None = None,
) -> Freshness:
    """The freshness of a series, by default synced from 2020 up to `now`."""
    moment = at(now)
    return assess(
        grid(asset_class, timeframe),
        None if newest is None else at(newest),
        synced or TimeRange(at("2020-01-01T00:00Z"), moment),
        moment,
        delay=polling_interval(Timeframe(timeframe)) + publication,
        quiet_tail=quiet_tail,
        end=end,
    )


@pytest.mark.parametrize(
    ("timeframe", "newest", "now", "lag", "allowed", "verdict"),
    [
        ("1m", "2024-03-05T11:59Z", "2024-03-05T12:00Z", 0, 15, FRESH),
        ("1m", "2024-03-05T11:41Z", "2024-03-05T12:00Z", 18, 15, FRESH),
        ("1m", "2024-03-05T11:40Z", "2024-03-05T12:00Z", 19, 15, LATE),
        ("1m", "2024-03-05T11:34Z", "2024-03-05T12:00Z", 25, 15, LATE),
        ("1m", "2024-03-05T11:33Z", "2024-03-05T12:00Z", 26, 15, STALE),
        ("15m", "2024-03-05T10:45Z", "2024-03-05T12:00Z", 4, 1, FRESH),
        ("15m", "2024-03-05T10:30Z", "2024-03-05T12:00Z", 5, 1, LATE),
        ("1h", "2024-03-05T07:00Z", "2024-03-05T12:59Z", 4, 1, FRESH),
        ("1h", "2024-03-05T06:00Z", "2024-03-05T12:00Z", 5, 1, LATE),
        ("4h", "2024-03-04T12:00Z", "2024-03-05T12:59Z", 5, 1, LATE),
        ("4h", "2024-03-04T12:00Z", "2024-03-05T11:59Z", 4, 0, LATE),  # none closed within the last hour
        ("1d", "2024-03-04T00:00Z", "2024-03-05T23:00Z", 0, 0, FRESH),
        ("1d", "2024-03-01T00:00Z", "2024-03-05T00:30Z", 3, 1, FRESH),
        ("1d", "2024-02-29T00:00Z", "2024-03-05T02:00Z", 4, 0, LATE),
        ("1d", "2024-02-20T00:00Z", "2024-03-05T02:00Z", 13, 0, STALE),
        ("1w", "2024-01-29T00:00Z", "2024-03-05T02:00Z", 4, 0, LATE),
    ],
)
def test_crypto(timeframe: str, newest: str, now: str, lag: int, allowed: int, verdict: Verdict) -> None:
    found = assessed("crypto", timeframe, newest, now)
    assert (found.lag, found.allowed, found.verdict) == (lag, allowed, verdict)


@pytest.mark.parametrize(
    ("asset_class", "timeframe", "newest", "now", "lag", "verdict"),
    [
        # Friday's last minute, through the weekend and up to the first minutes of Monday.
        ("stocks", "1m", "2024-03-08T20:59Z", "2024-03-10T12:00Z", 0, FRESH),
        ("stocks", "1m", "2024-03-08T20:59Z", "2024-03-11T13:30Z", 0, FRESH),
        ("stocks", "1m", "2024-03-08T20:59Z", "2024-03-11T13:48Z", 18, FRESH),
        ("stocks", "1m", "2024-03-08T20:59Z", "2024-03-11T13:49Z", 19, LATE),
        # At night all candles are due: the session ended hours ago.
        ("stocks", "1m", "2024-03-08T20:56Z", "2024-03-09T02:00Z", 3, FRESH),
        ("stocks", "1m", "2024-03-08T20:55Z", "2024-03-09T02:00Z", 4, LATE),
        # Good Friday is no session, so four days later one is missing.
        ("stocks", "1d", "2024-03-27T00:00Z", "2024-04-01T12:00Z", 1, FRESH),
        ("forex", "1h", "2024-03-08T21:00Z", "2024-03-10T20:00Z", 0, FRESH),
        ("forex", "1h", "2024-03-08T21:00Z", "2024-03-11T02:00Z", 5, LATE),
    ],
)
def test_closed_hours_are_no_lag(
    asset_class: str, timeframe: str, newest: str, now: str, lag: int, verdict: Verdict
) -> None:
    found = assessed(asset_class, timeframe, newest, now)
    assert (found.lag, found.verdict) == (lag, verdict)


def test_a_publication_delay_is_allowed() -> None:
    """An end-of-day plan publishes the whole session late; more lag is not allowed."""
    late = assessed("stocks", "1m", "2024-03-08T20:59Z", "2024-03-11T20:30Z", publication=MICROS_PER_DAY)
    assert (late.lag, late.allowed, late.overdue, late.verdict) == (390, 390, 0, FRESH)
    later = assessed("stocks", "1m", "2024-03-08T20:59Z", "2024-03-12T15:00Z", publication=MICROS_PER_DAY)
    assert later.verdict is STALE
    assert later.overdue == 75  # the candles that had closed on Monday by 14:45


def test_a_quiet_tail_is_no_lag() -> None:
    found = assessed("crypto", "1m", "2024-03-05T11:00Z", "2024-03-05T12:00Z", quiet_tail=45)
    assert (found.lag, found.verdict) == (14, FRESH)
    all_of_it = assessed("crypto", "1m", "2024-03-05T11:00Z", "2024-03-05T12:00Z", quiet_tail=10_000)
    assert (all_of_it.lag, all_of_it.verdict) == (0, FRESH)


def test_from_its_end_on_nothing_is_expected() -> None:
    end, now = at("2024-03-01T00:00Z"), "2024-03-05T12:00Z"
    whole = assessed("crypto", "1h", "2024-02-29T23:00Z", now, end=end)
    assert (whole.lag, whole.verdict) == (0, FRESH)
    # Synced up to its end: candles missing before are a gap, and no newer candle is expected.
    gap = assessed("crypto", "1h", "2024-02-29T03:00Z", now, end=end)
    assert (gap.lag, gap.verdict) == (20, FRESH)
    halfway = assessed(
        "crypto",
        "1h",
        "2024-02-29T03:00Z",
        now,
        end=end,
        synced=window("2024-01-01T00:00Z", "2024-02-29T04:00Z"),
    )
    assert (halfway.lag, halfway.verdict) == (20, STALE)
    announced = assessed("crypto", "1h", "2024-03-05T03:00Z", now, end=at("2024-06-01T00:00Z"))
    assert (announced.lag, announced.verdict) == (8, LATE)


def test_a_series_without_a_candle_is_never_fresh() -> None:
    now = at("2024-03-05T12:00Z")
    never = assess(grid("crypto", "1h"), None, None, now, delay=0)
    assert (never.lag, never.verdict, never.fresh) == (None, PENDING, False)
    empty = assessed(
        "crypto", "1h", None, "2024-03-05T12:00Z", synced=window("2024-03-05T09:00Z", "2024-03-05T12:00Z")
    )
    assert (empty.lag, empty.newest, empty.verdict) == (3, None, LATE)
    long = assessed("crypto", "1h", None, "2024-03-05T12:00Z")
    assert long.verdict is STALE


@given(
    asset_class=st.sampled_from(["crypto", "stocks", "forex"]),
    timeframe=st.sampled_from([one.value for one in Timeframe]),
    now=st.integers(at("2019-01-01T00:00Z"), at("2026-01-01T00:00Z")),
    behind=st.integers(0, 60),
    quiet=st.integers(0, 70),
    publication=st.integers(0, 3 * MICROS_PER_DAY),
)
def test_the_verdict_follows_from_the_candles_that_are_overdue(
    asset_class: str, timeframe: str, now: int, behind: int, quiet: int, publication: int
) -> None:
    """Counted one by one, for any calendar: a candle is overdue if it closed before the delay."""
    expected = grid(asset_class, timeframe)
    opens = expected.opens(TimeRange(now - 800 * MICROS_PER_DAY, now + 1))
    closed = opens[expected.closes(opens) <= now]
    newest = int(closed[-1 - behind])
    delay = polling_interval(Timeframe(timeframe)) + publication
    found = assess(expected, newest, TimeRange(0, now), now, delay=delay, quiet_tail=quiet)
    missing = closed[closed > newest]
    assert found.lag == max(0, len(missing) - quiet)
    assert found.allowed == len(closed) - int((expected.closes(closed) <= now - delay).sum())
    over = found.lag - found.allowed
    assert found.verdict is (FRESH if over <= 3 else LATE if over <= 10 else STALE)
    assert found.overdue == max(0, over)


@given(
    newest=st.integers(0, 400), now=st.integers(401, 500), warn=st.integers(0, 20), more=st.integers(0, 20)
)
def test_time_never_improves_the_verdict(newest: int, now: int, warn: int, more: int) -> None:
    order = [FRESH, LATE, STALE]
    thresholds = Thresholds(warn, warn + more)

    def verdict(minute: int) -> int:
        found = assess(
            grid("crypto", "1m"),
            newest * MICROS_PER_MINUTE,
            TimeRange(0, MICROS_PER_MINUTE),
            minute * MICROS_PER_MINUTE,
            delay=15 * MICROS_PER_MINUTE,
            thresholds=thresholds,
        )
        return order.index(found.verdict)

    assert verdict(now) <= verdict(now + 1)


@pytest.mark.parametrize(
    ("asset_class", "timeframe", "now", "start"),
    [
        ("crypto", "1m", "2024-03-05T12:00:30Z", "2024-03-04T12:00Z"),
        ("crypto", "4h", "2024-03-05T12:00Z", "2024-03-04T12:00Z"),
        ("crypto", "1d", "2024-03-05T12:00Z", "2024-03-02T00:00Z"),
        ("crypto", "1w", "2024-03-06T12:00Z", "2024-02-12T00:00Z"),
        ("stocks", "1m", "2024-03-10T12:00Z", "2024-03-07T21:00Z"),  # a Sunday: from Thursday's close on
        ("stocks", "1d", "2024-03-10T12:00Z", "2024-03-06T00:00Z"),
        ("forex", "1h", "2024-03-10T12:00Z", "2024-03-07T22:00Z"),
    ],
)
def test_start_of_the_recent_candles(asset_class: str, timeframe: str, now: str, start: str) -> None:
    assert recent_start(grid(asset_class, timeframe), at(now)) == at(start)
