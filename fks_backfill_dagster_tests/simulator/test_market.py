"""The synthetic market is exact, continuous and deterministic."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_MINUTE, Timeframe
from fks_backfill_dagster.simulator.bars import SUNDAY_WEEKS, Bars, Step, aggregate, decimal_texts
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.market import (
    LISTED,
    NO_END,
    NO_HALT,
    SyntheticMarket,
    newest,
    oldest,
)
from fks_backfill_dagster_tests.examples import examples

MARKET = SyntheticMarket()
SYMBOLS = st.sampled_from(["BTCUSDT", "ETHUSDT", "XRPUSDT", "LINKBTC", "PEPEUSDT", "ABCEUR"])
MINUTES = st.integers(LISTED // MICROS_PER_MINUTE, LISTED // MICROS_PER_MINUTE + 5_000_000)

RECORDED = ["29255.02", "30080.95", "29188.04", "30038.46", "59262.33020"]

FINGERPRINT = """
from hashlib import sha256
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.market import SyntheticMarket
window = TimeRange(instant("2021-03-01"), instant("2021-03-09"))
candles = SyntheticMarket().truth("LINKBTC", Timeframe.M5, window)
print(sha256(b"".join(column.tobytes() for column in candles.columns())).hexdigest())
"""


def minutes(symbol: str, window: TimeRange, outages: RangeSet = NO_HALT) -> Bars:
    return MARKET.bars(symbol, Step.of(Timeframe.M1), window, NO_END, outages)


def slow_aggregate(parts: Bars, step: Step) -> list[tuple[int, ...]]:
    """Reference implementation: group by open, row by row."""
    groups: dict[int, list[int]] = {}
    for index, ts in enumerate(parts.ts.tolist()):
        groups.setdefault(step.floor(ts), []).append(index)
    assert parts.volume is not None
    return [
        (
            opened,
            int(parts.open[rows[0]]),
            max(int(parts.high[r]) for r in rows),
            min(int(parts.low[r]) for r in rows),
            int(parts.close[rows[-1]]),
            sum(int(parts.volume[r]) for r in rows),
        )
        for opened, rows in groups.items()
    ]


def rows(bars: Bars) -> list[tuple[int, ...]]:
    assert bars.volume is not None
    columns = (bars.ts, bars.open, bars.high, bars.low, bars.close, bars.volume)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@settings(max_examples=examples(40))
@given(
    SYMBOLS,
    MINUTES,
    st.sampled_from(list(Timeframe)),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 3_000)), max_size=4),
)
def test_every_timeframe_is_the_exact_aggregate_of_existing_minutes(
    symbol: str, minute: int, timeframe: Timeframe, holes: list[tuple[int, int]]
) -> None:
    step = Step.of(timeframe)
    start = step.ceil(minute * MICROS_PER_MINUTE)
    window = TimeRange(start, start + 2 * step.length)
    outages = RangeSet(
        TimeRange(start + a * MICROS_PER_MINUTE, start + (a + n) * MICROS_PER_MINUTE) for a, n in holes
    )
    served = MARKET.bars(symbol, step, window, NO_END, outages)
    assert rows(served) == slow_aggregate(minutes(symbol, window, outages), step)


@settings(max_examples=examples(40))
@given(SYMBOLS, MINUTES, st.integers(1, 4000))
def test_minutes_are_sane_continuous_and_randomly_accessible(symbol: str, minute: int, count: int) -> None:
    start = minute * MICROS_PER_MINUTE
    block = minutes(symbol, TimeRange(start, start + count * MICROS_PER_MINUTE))
    assert len(block) == count
    assert block.volume is not None
    assert (block.low > 0).all()
    assert (block.volume > 0).all()
    assert (block.high >= np.maximum(block.open, block.close)).all()
    assert (block.low <= np.minimum(block.open, block.close)).all()
    assert (np.abs(block.open[1:] - block.close[:-1]) <= 1).all()
    middle = TimeRange(start + count // 3 * MICROS_PER_MINUTE, start + count * MICROS_PER_MINUTE)
    assert rows(minutes(symbol, middle)) == rows(block)[count // 3 :]


@settings(max_examples=examples(30))
@given(SYMBOLS, MINUTES)
def test_candles_are_the_correctly_rounded_decimal_texts(symbol: str, minute: int) -> None:
    start = minute * MICROS_PER_MINUTE
    block = minutes(symbol, TimeRange(start, start + 50 * MICROS_PER_MINUTE))
    for column, texts in zip(block.candles().columns()[1:], block.texts(), strict=True):
        assert column.tolist() == [float(text) for text in texts]


@given(st.lists(st.integers(0, 2**53)), st.integers(0, 8))
def test_decimal_texts_are_exact(values: list[int], digits: int) -> None:
    texts = decimal_texts(np.array(values, dtype=np.int64), digits)
    assert [int(text.replace(".", "")) for text in texts] == values
    assert all(len(text.partition(".")[2]) == digits for text in texts)


@pytest.mark.server
def test_the_same_in_another_process() -> None:
    window = TimeRange(instant("2021-03-01"), instant("2021-03-09"))
    candles = MARKET.truth("LINKBTC", Timeframe.M5, window)
    here = sha256(b"".join(column.tobytes() for column in candles.columns())).hexdigest()
    there = subprocess.run([sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_the_market_never_changes() -> None:
    """A recorded candle: a change of the generator invalidates every result quoted from it."""
    day = MARKET.bars("BTCUSDT", Step.of(Timeframe.D1), TimeRange(LISTED, LISTED + 1), NO_END, NO_HALT)
    assert [column[0] for column in day.texts()] == RECORDED


def test_seeds_and_symbols_differ() -> None:
    window = TimeRange(LISTED, LISTED + MICROS_PER_DAY)
    btc = MARKET.truth("BTCUSDT", Timeframe.M1, window)
    eth = MARKET.truth("ETHUSDT", Timeframe.M1, window)
    other = SyntheticMarket(seed=2).truth("BTCUSDT", Timeframe.M1, window)
    assert btc.low.min() > 2 * eth.high.max()
    assert not btc.equals(other)


def test_no_candles_before_the_listing_which_is_configurable() -> None:
    listed = instant("2020-05-06T07:08")
    market = SyntheticMarket(listed=(("SOLUSDT", listed),))
    window = TimeRange(instant("2020-05-01"), instant("2020-05-10"))
    assert market.truth("SOLUSDT", Timeframe.M1, window).ts[0] == listed
    assert market.truth("SOLUSDT", Timeframe.W1, TimeRange(0, instant("2020-05-20"))).ts[0] == instant(
        "2020-05-04"
    )
    assert len(MARKET.truth("SOLUSDT", Timeframe.M1, TimeRange(0, LISTED))) == 0
    assert MARKET.truth("SOLUSDT", Timeframe.D1, TimeRange(0, LISTED + 9 * MICROS_PER_DAY)).ts[0] == LISTED


@pytest.mark.parametrize(
    ("symbol", "known"),
    [
        ("BTCUSDT", True),
        ("FOOBTC", True),
        ("1INCHUSDT", True),
        ("BTCUSD", False),
        ("AAPL", False),
        ("NOPEUSDT", False),
        ("DOESNOTEXISTUSDT", False),
        ("USDT", False),
        ("btcusdt", False),
        ("BTC/USDT", False),
    ],
)
def test_known_symbols(symbol: str, known: bool) -> None:
    assert MARKET.has_symbol(symbol) is known


def test_the_forming_candle_grows_into_the_closed_one() -> None:
    step, start = Step.of(Timeframe.H1), instant("2024-03-01T10:00")
    window = TimeRange(start, start + step.length)
    final = MARKET.bars("BTCUSDT", step, window, NO_END, NO_HALT)
    before = MARKET.bars("BTCUSDT", step, window, start - 1, NO_HALT)
    assert len(before) == 0
    seen = [MARKET.bars("BTCUSDT", step, window, start + n * 17_000_000, NO_HALT) for n in range(0, 212, 7)]
    assert {len(s) for s in seen} == {1}
    volumes = [int(s.volume[0]) for s in seen if s.volume is not None]
    assert volumes == sorted(volumes)
    assert volumes[0] == 1
    assert final.volume is not None
    assert volumes[-1] < int(final.volume[0])
    assert all(int(s.high[0]) <= int(final.high[0]) and int(s.low[0]) >= int(final.low[0]) for s in seen)
    assert all(int(s.open[0]) == int(final.open[0]) for s in seen)
    whole = MARKET.bars("BTCUSDT", step, window, start + step.length, NO_HALT)
    assert rows(whole) == rows(final)


@settings(max_examples=examples(30))
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 300)), max_size=3),
    st.integers(1, 60),
    st.integers(0, 500),
)
def test_pages_skip_outages(holes: list[tuple[int, int]], limit: int, length: int) -> None:
    start = instant("2022-01-01")
    window = TimeRange(start, start + length * MICROS_PER_MINUTE)
    outages = RangeSet(
        TimeRange(start + a * MICROS_PER_MINUTE, start + (a + n) * MICROS_PER_MINUTE) for a, n in holes
    )

    def read(part: TimeRange) -> Bars:
        return minutes("BTCUSDT", part, outages)

    everything = rows(read(window))
    assert rows(oldest(read, MICROS_PER_MINUTE, window, limit)) == everything[:limit]
    assert rows(newest(read, MICROS_PER_MINUTE, window, limit)) == everything[-limit:]


def test_weeks_begin_on_monday_or_sunday() -> None:
    thursday = instant("2024-02-29T12:00")
    assert Step.of(Timeframe.W1).floor(thursday) == instant("2024-02-26")
    assert SUNDAY_WEEKS.floor(thursday) == instant("2024-02-25")


def test_chunks_of_a_long_range_are_contiguous() -> None:
    window = TimeRange(instant("2020-01-01"), instant("2021-01-01"))
    daily = MARKET.truth("BTCUSDT", Timeframe.D1, window)
    whole = aggregate(minutes("BTCUSDT", window), Step.of(Timeframe.D1)).candles()
    assert isinstance(daily, Candles)
    assert daily.equals(whole)
    assert len(daily) == 366
