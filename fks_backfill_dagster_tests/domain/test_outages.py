"""Outages of a venue against a slow reference implementation, and by example."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.outages import Spans, VenueOutage, recognise
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
)
from fks_backfill_dagster_tests.domain.builders import at, window
from fks_backfill_dagster_tests.examples import examples

FRAMES = (Timeframe.M1, Timeframe.H1, Timeframe.D1)
Ranges = list[tuple[int, int]]
Entry = tuple[Series, Ranges, Ranges]  # a series, its synced ranges, its missing ranges


def crypto(symbol: str, timeframe: str = "1h") -> Series:
    return Series(f"{symbol}/USDT", Timeframe(timeframe), AssetClass.CRYPTO)


def spans(column: Sequence[Ranges]) -> Spans:
    rows = [(owner, a, b) for owner, ranges in enumerate(column) for a, b in ranges]
    table = np.array(rows, dtype=np.int64).reshape(-1, 3)
    return Spans(table[:, 0], table[:, 1], table[:, 2])


def found(*entries: Entry) -> tuple[VenueOutage, ...]:
    return recognise([e[0] for e in entries], spans([e[1] for e in entries]), spans([e[2] for e in entries]))


# The reference implementation: minute by minute, symbol by symbol -----------------------------------------

MINUTES = 24


def covers(ranges: Ranges, minute: int) -> bool:
    return any(a <= minute * MICROS_PER_MINUTE < b for a, b in ranges)


def affected(entries: Sequence[Entry], minute: int, timeframe: Timeframe) -> tuple[set[str], set[str]]:
    """The symbols that miss candles at a minute, and those that were synced there, up to a timeframe."""
    fine = [e for e in entries if e[0].timeframe.micros <= timeframe.micros]
    lacking = {one.symbol for one, _, missing in fine if covers(missing, minute)}
    return lacking, lacking | {one.symbol for one, synced, _ in fine if covers(synced, minute)}


def slowly(entries: Sequence[Entry]) -> tuple[VenueOutage, ...]:
    outages = []
    for venue in sorted({e[0].instrument.venue for e in entries}):
        mine = [e for e in entries if e[0].instrument.venue == venue]
        level: dict[int, Timeframe] = {}
        for minute in range(MINUTES):
            for timeframe in FRAMES:
                if not any(e[0].timeframe is timeframe for e in mine):
                    continue
                lacking, there = affected(mine, minute, timeframe)
                if len(lacking) >= 3 and 2 * len(lacking) >= len(there):
                    level[minute] = timeframe
        for first in sorted(minute for minute in level if minute - 1 not in level):
            past = next(minute for minute in range(first, MINUTES + 1) if minute not in level)
            coarsest = max((level[m] for m in range(first, past)), key=lambda timeframe: timeframe.micros)
            each = [affected(mine, minute, coarsest) for minute in range(first, past)]
            outages.append(
                VenueOutage(
                    venue,
                    TimeRange(first * MICROS_PER_MINUTE, past * MICROS_PER_MINUTE),
                    coarsest,
                    tuple(sorted(set.union(*(lacking for lacking, _ in each)))),
                    len(set.union(*(there for _, there in each))),
                )
            )
    return tuple(outages)


a_range = st.tuples(st.integers(0, MINUTES - 1), st.integers(1, 12)).map(
    lambda p: (p[0] * MICROS_PER_MINUTE, min(p[0] + p[1], MINUTES) * MICROS_PER_MINUTE)
)
some_ranges = st.lists(a_range, max_size=3)
a_series = st.builds(
    Series,
    st.sampled_from("ABCDEFG"),
    st.sampled_from(FRAMES),
    # A market with closed hours would join outages across them, which has its own test.
    st.just(AssetClass.CRYPTO),
)


@given(st.lists(st.tuples(a_series, some_ranges, some_ranges), max_size=14, unique_by=lambda e: e[0]))
@settings(max_examples=examples(300))
def test_against_the_slow_reference(entries: list[Entry]) -> None:
    entries = [*entries, (crypto("H", "1m"), [], [])]  # expected minutes, which separate the outages
    assert found(*entries) == slowly(entries)


# Examples -------------------------------------------------------------------------------------------------

DAY = [(at("2020-02-19T00:00Z"), at("2020-02-20T00:00Z"))]
HOLE = [(at("2020-02-19T11:00Z"), at("2020-02-19T17:00Z"))]


def test_three_symbols_that_miss_the_same_hours_are_one_outage() -> None:
    (outage,) = found(*((crypto(name), DAY, HOLE) for name in ("BTC", "ETH", "SOL")))
    assert outage == VenueOutage(
        "crypto",
        window("2020-02-19T11:00Z", "2020-02-19T17:00Z"),
        Timeframe.H1,
        ("BTC/USDT", "ETH/USDT", "SOL/USDT"),
        3,
    )


def test_two_are_not_enough_and_neither_are_three_of_seven() -> None:
    assert found(*((crypto(name), DAY, HOLE) for name in ("BTC", "ETH"))) == ()
    well: list[Entry] = [(crypto(name), DAY, []) for name in ("A", "B", "C", "D")]
    hit: list[Entry] = [(crypto(name), DAY, HOLE) for name in ("X", "Y", "Z")]
    assert found(*well, *hit) == ()
    (outage,) = found(*well[1:], *hit)
    assert (len(outage.symbols), outage.synced) == (3, 6)


def test_the_timeframes_of_a_symbol_count_once() -> None:
    frames = ("1m", "15m", "1h")
    assert found(*((crypto(name, frame), DAY, HOLE) for name in ("BTC", "ETH") for frame in frames)) == ()
    (outage,) = found(*((crypto(n, frame), DAY, HOLE) for n in ("BTC", "ETH", "SOL") for frame in frames))
    assert (outage.symbols, outage.synced) == (("BTC/USDT", "ETH/USDT", "SOL/USDT"), 3)


def test_an_outage_seen_by_minutes_and_by_hours_is_one() -> None:
    """It began at 10:52 and ended at 17:20: hours miss six candles, minutes show the exact times."""
    minutes = [(at("2020-02-19T10:52Z"), at("2020-02-19T17:20Z"))]
    names = ("BTC", "ETH", "SOL")
    (outage,) = found(
        *((crypto(name, "1m"), DAY, minutes) for name in names),
        *((crypto(name, "1h"), DAY, HOLE) for name in names),
        *((crypto(name, "1d"), DAY, []) for name in names),
    )
    assert outage.window == window("2020-02-19T10:52Z", "2020-02-19T17:20Z")


def test_series_that_are_too_coarse_for_an_outage_do_not_count() -> None:
    minutes = [(at("2020-02-19T11:00Z"), at("2020-02-19T11:40Z"))]
    by_minute: list[Entry] = [(crypto(f"M{n}", "1m"), DAY, minutes) for n in range(3)]
    by_day: list[Entry] = [(crypto(f"D{n}", "1d"), DAY, []) for n in range(20)]
    (outage,) = found(*by_minute, *by_day)
    assert (outage.timeframe, outage.synced) == (Timeframe.M1, 3)


def test_venues_are_separate() -> None:
    stocks = [Series(n, Timeframe.H1, AssetClass.STOCKS, c) for n, c in (("A", "XNYS"), ("B", "XLON"))]
    assert [one.instrument.venue for one in (*stocks, crypto("BTC"))] == ["XNYS", "XLON", "crypto"]
    mixed = [*stocks, crypto("BTC")]
    assert found(*((one, DAY, HOLE) for one in mixed)) == ()


def test_an_outage_continues_over_closed_hours() -> None:
    """Friday afternoon and Monday morning: two gaps of each series, one outage."""
    friday = (at("2024-01-05T19:00Z"), at("2024-01-05T21:00Z"))
    monday = (at("2024-01-08T14:00Z"), at("2024-01-08T16:00Z"))
    synced = [(at("2024-01-01T00:00Z"), at("2024-02-01T00:00Z"))]
    names = ("AAPL", "MSFT", "IBM")
    entries: list[Entry] = [
        (Series(n, Timeframe.H1, AssetClass.STOCKS), synced, [friday, monday]) for n in names
    ]
    (outage,) = found(*entries)
    assert outage.window == TimeRange(friday[0], monday[1])


def test_no_series_and_no_missing_candles_are_no_outage() -> None:
    assert found() == ()
    assert found(*((crypto(name), DAY, []) for name in ("BTC", "ETH", "SOL"))) == ()


def test_four_thousand_series_with_a_hundred_thousand_gaps_take_a_second() -> None:
    """500 symbols at 8 timeframes with 25 gaps each, some of them common to all series."""
    draw = np.random.default_rng(7)
    series = [crypto(f"S{n}", frame) for n in range(500) for frame in Timeframe]
    start, years = at("2016-01-01T00:00Z"), 8 * 365 * MICROS_PER_DAY
    owner = np.repeat(np.arange(4000), 25)
    starts = start + draw.integers(0, years // MICROS_PER_HOUR, 100_000) * MICROS_PER_HOUR
    common = start + np.arange(5) * 400 * MICROS_PER_DAY
    starts.reshape(4000, 25)[:, :5] = common
    missing = Spans(owner, starts, starts + draw.integers(1, 9, 100_000) * MICROS_PER_HOUR)
    everything = np.arange(4000)
    synced = Spans(everything, np.full(4000, start), np.full(4000, start + years + MICROS_PER_DAY))
    begun = time.process_time()
    outages = recognise(series, synced, missing)
    seconds = time.process_time() - begun
    assert [outage.window.start for outage in outages] == common.tolist()
    assert seconds < 3  # of CPU: 0.4 where nothing else runs
