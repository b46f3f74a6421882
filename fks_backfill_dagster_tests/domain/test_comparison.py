"""The comparison of two and more sources: random walks with planted differences, and the real candles of two venues."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.comparison import (
    EXTREMES,
    STORED,
    Spread,
    compare,
    odd_one_out,
    odd_ones,
)
from fks_backfill_dagster.domain.patterns import classify
from fks_backfill_dagster.domain.ranges import common
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster_tests.domain.builders import at, changed, random_walk, read_csv

TOLERANCE = 0.01
SEEDS = st.integers(0, 2**32 - 1)


@given(seed=SEEDS, tolerance=st.sampled_from([0.0, 0.001, 0.01, 0.5]))
def test_equal_candles_never_differ(seed: int, tolerance: float) -> None:
    mine = random_walk(seed, 200)
    its = changed(mine, volume=np.full(200, np.nan))
    found = compare(mine, its, tolerance)
    assert len(found) == 200
    assert not found.exceeded.any()
    assert found.worst(100) == []
    assert classify(mine, its, tolerance, 1) is None
    spread = Spread() + found
    assert [spread.largest_of(name) for name in PRICES] == [0.0] * 4
    assert spread.largest_of("volume") is None
    assert spread.quantile("volume", 0.99) is None


@given(seed=SEEDS, field=st.sampled_from(PRICES), share=st.floats(0.0001, 0.5), row=st.integers(0, 99))
def test_a_price_differs_beyond_its_tolerance_only(seed: int, field: str, share: float, row: int) -> None:
    mine = random_walk(seed, 100)
    allowed = TOLERANCE * (EXTREMES if field in ("high", "low") else 1.0)
    column = getattr(mine, field).copy()
    column[row] *= 1 + share
    found = compare(changed(mine, **{field: column}), mine, TOLERANCE)
    worst = found.worst(10)
    if abs(share - allowed) < 1e-9:  # rounding decides
        return
    assert len(worst) == (share > allowed)
    for one in worst:
        assert (one.ts, one.field, one.other) == (mine.ts[row], field, getattr(mine, field)[row])
        assert one.difference == pytest.approx(share)


@pytest.mark.parametrize(
    ("field", "share", "differs"),
    [
        ("close", 0.009, 0),
        ("close", 0.011, 1),
        ("open", 0.011, 1),
        ("high", 0.019, 0),
        ("high", 0.021, 1),
        ("low", 0.021, 1),
    ],
)
def test_high_and_low_have_twice_the_tolerance(field: str, share: float, differs: int) -> None:
    mine = random_walk(1, 1)
    found = compare(changed(mine, **{field: getattr(mine, field) * (1 + share)}), mine, 0.01)
    assert int(found.exceeded.sum()) == differs


def test_candles_of_one_source_only_are_not_compared() -> None:
    mine = random_walk(1, 50)
    found = compare(mine.take(slice(0, 30)), mine.take(slice(20, 50)), TOLERANCE)
    assert found.stored.ts.tolist() == found.other.ts.tolist() == mine.ts[20:30].tolist()
    assert not len(compare(mine, Candles.empty(), TOLERANCE))


def test_the_worst_come_first_and_are_bounded() -> None:
    mine = random_walk(2, 500)
    factors = np.linspace(1.02, 1.5, 500)
    found = compare(changed(mine, close=mine.close * factors), mine, TOLERANCE)
    worst = found.worst(100)
    assert len(worst) == 100
    assert [one.ts for one in worst] == mine.ts[::-1][:100].tolist()
    assert all(one.field == "close" for one in worst)


@given(seed=SEEDS, parts=st.integers(1, 5))
def test_the_spread_of_parts_is_that_of_the_whole(seed: int, parts: int) -> None:
    mine = random_walk(seed, 300)
    noise = np.exp(np.random.default_rng(seed).normal(0, 0.02, 300))
    its = changed(mine, close=mine.close * noise)
    whole = compare(mine, its, TOLERANCE)
    spread = Spread()
    for block in np.array_split(np.arange(300), parts):
        spread += compare(mine.take(block), its.take(block), TOLERANCE)
    for name, exact in zip(PRICES, whole.differences, strict=True):
        assert spread.largest_of(name) == exact.max()
        estimated = spread.quantile(name, 0.99)
        exact_quantile = np.sort(exact)[int(np.ceil(0.99 * 300)) - 1]
        assert estimated == pytest.approx(exact_quantile, rel=0.021, abs=1e-7)


@given(seed=SEEDS, odd=st.sampled_from(["stored", "first", "second", "third"]), others=st.integers(2, 3))
def test_the_odd_one_of_several_sources(seed: int, odd: str, others: int) -> None:
    names = [STORED, "first", "second", "third"][: others + 1]
    mine = random_walk(seed, 60)
    sources = dict.fromkeys(names, mine)
    if odd in names:
        sources[odd] = changed(mine, close=mine.close * 0.9)
    counts = odd_ones(sources, TOLERANCE)
    assert counts == {name: 60 if name == odd else 0 for name in names}
    assert odd_one_out(counts) == (odd if odd in names else None)


def test_two_sources_have_no_odd_one() -> None:
    mine = random_walk(3, 40)
    two = {STORED: mine, "first": changed(mine, close=mine.close * 2)}
    assert odd_one_out(odd_ones(two, TOLERANCE)) is None
    three = {**two, "second": changed(mine, close=mine.close * 4)}  # all three contradict one another
    counts = odd_ones(three, TOLERANCE)
    assert counts == {STORED: 0, "first": 0, "second": 0}
    assert odd_one_out(counts) is None
    assert odd_one_out({STORED: 3, "first": 3, "second": 1}) is None


def test_coinbase_and_bitstamp(shared_data: Callable[[str], Path]) -> None:
    """The figures of the manifest beside the files."""
    coinbase = read_csv(shared_data("coinbase/BTCUSD-1d.csv.gz"))
    bitstamp = read_csv(shared_data("bitstamp/BTCUSD-1d.csv.gz"))
    found = compare(coinbase, bitstamp, TOLERANCE)
    assert len(found) == 1318
    assert len(common(coinbase.ts, bitstamp.ts)) == 1318
    close = found.differences[PRICES.index("close")]
    assert round(float(np.median(close)) * 100, 2) == 0.31
    assert int(found.exceeded[PRICES.index("close")].sum()) == 164
    assert round(float(close.max()), 3) == 0.198
    assert found.stored.ts[int(close.argmax())] == at("2015-01-14T00:00Z")
    spread = Spread() + found
    assert spread.quantile("close", 0.5) == pytest.approx(float(np.median(close)), rel=0.03)
    # The low of the flash crash of 2017-04-15 is the worst: 0.06 dollars at Coinbase.
    assert found.worst(1)[0].field == "low"
    classified = classify(coinbase, bitstamp, TOLERANCE, MICROS_PER_DAY)
    assert classified is not None
    assert classified.pattern == "scattered"
