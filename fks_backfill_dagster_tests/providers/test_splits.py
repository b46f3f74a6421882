"""Undoing split adjustment: the result is the traded price, or it is declined."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.providers.splits import Traded, as_traded
from fks_backfill_dagster_tests.domain.builders import read_csv
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.providers.scripted import us

START = us("2015-01-05")
RATIOS = [2.0, 3.0, 4.0, 7.0, 10.0, 20.0, 1.5, 1.25, 1.1, 1.05, 1.046, 0.5, 0.1, 1 / 3, 1 / 20, 1 / 190]
CLEAR = [2.0, 3.0, 4.0, 7.0, 10.0, 0.5, 0.1, 1 / 20, 1 / 190]


def candles_of(days: Instants, prices: Floats, volume: Floats) -> Candles:
    """`prices`: the rows are open, high, low and close."""
    open_, high, low, close = prices
    return Candles(days, open_, high, low, close, volume)


@dataclass
class History:
    """A true history of days, and the version of the provider.

    nights: the logarithms of the moves from close to open. splits: (first day with the new shares, ratio, whether it is
    applied to earlier prices). edge: (day, index of a split): before that day the split is applied the opposite way.
    """

    nights: list[float]
    splits: list[tuple[int, float, bool]]
    edge: tuple[int, int] | None = None
    level: float = 60.0
    cents: bool = False
    float32: bool = True

    def __post_init__(self) -> None:
        n = len(self.nights)
        intraday = 0.02 * np.sin(np.arange(n))
        opens = np.log(self.level) + np.cumsum(self.nights) + np.concatenate([[0], np.cumsum(intraday)[:-1]])
        closes = opens + intraday
        old = np.ones(n)
        for at, ratio, _ in self.splits:
            old[:at] *= ratio
        prices = np.exp(
            np.stack([opens, np.maximum(opens, closes) + 0.01, np.minimum(opens, closes) - 0.01, closes])
        )
        prices = prices * old
        if self.cents:
            prices = np.where(prices < 1, np.round(prices, 4), np.round(prices, 2))  # Rule 612 of the SEC
        volume = np.rint(1e6 * (2 + np.cos(np.arange(n))) / old) + 1
        self.days = START + np.arange(n) * MICROS_PER_DAY
        self.true = candles_of(self.days, prices, volume)
        self.split_dates = np.array(
            [self.days[0] + at * MICROS_PER_DAY for at, _, _ in self.splits], dtype=np.int64
        )
        self.ratios = np.array([ratio for _, ratio, _ in self.splits])
        applied = np.ones(n)
        for index, (at, ratio, is_applied) in enumerate(self.splits):
            here = np.full(n, is_applied)
            if self.edge is not None and self.edge[1] == index:
                here[: self.edge[0]] = not is_applied
            applied[:at] *= np.where(here, ratio, 1.0)[:at]
        given_prices = prices / applied
        if self.float32:
            given_prices = given_prices.astype(np.float32).astype(np.float64)
        self.given = candles_of(self.days, given_prices, np.rint(volume * applied))

    def read(self) -> Traded:
        return as_traded(self.given, self.days, self.split_dates, self.ratios)

    def check(self, traded: Traded) -> None:
        """All certain prices are true; bars with a missing price are excluded (quarantined later)."""
        prices = np.stack(self.given.columns()[1:5])
        whole = np.all(np.isfinite(prices) & (prices > 0), axis=0)
        kept = np.flatnonzero(whole & (np.arange(prices.shape[1]) >= traded.first))
        for name in ("open", "high", "low", "close"):
            np.testing.assert_allclose(
                getattr(traded.bars, name)[kept],
                getattr(self.true, name)[kept],
                rtol=2e-6,
                err_msg=traded.doubt,
            )
        np.testing.assert_allclose(traded.bars.volume[kept], self.true.volume[kept], rtol=1e-5, atol=200)
        assert bool(traded.first) <= bool(traded.doubt)


@st.composite
def histories(
    draw: st.DrawFn, *, ratios: list[float] = RATIOS, wild: float = 0.19, edges: bool = True, apart: int = 0
) -> History:
    n = draw(st.integers(2, 90))
    nights = draw(
        st.one_of(
            st.lists(st.floats(-wild, wild), min_size=n, max_size=n),
            st.integers(0, 2**32 - 1).map(
                lambda seed: np.random.default_rng(seed).normal(0, wild / 8, n).clip(-wild, wild).tolist()
            ),
        )
    )
    days = draw(st.lists(st.integers(0, n), max_size=4))
    if apart:
        days = [day for day in days if apart <= day <= n - apart][:1]
    splits = [(day, draw(st.sampled_from(ratios)), draw(st.booleans())) for day in sorted(days)]
    level, cents, float32 = (
        draw(st.sampled_from([3.0, 60.0, 900.0])),
        draw(st.booleans()),
        draw(st.booleans()),
    )
    edge = None
    if edges and splits and not cents and draw(st.booleans()):
        # Not on the night of a split: that would look like another ratio of it. Nor where ticks may decide: single
        # bars are in whole ticks by chance.
        day = draw(st.integers(0, n).filter(lambda day: day not in days))
        edge = (day, draw(st.integers(0, len(splits) - 1)))
    return History(nights, splits, edge, level, cents, float32)


class TestAny:
    @settings(max_examples=examples(400))
    @given(histories())
    def test_certain_prices_are_true(self, history: History) -> None:
        """Any splits, applied, not applied or applied to a part: a market that moves less than 20 % overnight."""
        history.check(history.read())

    @settings(max_examples=examples(150))
    @given(histories(ratios=CLEAR, wild=0.05, edges=False, apart=3))
    def test_a_clear_split_is_decided(self, history: History) -> None:
        traded = history.read()
        assert (traded.first, traded.doubt) == (0, "")
        history.check(traded)

    @settings(max_examples=examples(100))
    @given(histories(), st.integers(0, 10**6))
    def test_bars_with_holes(self, history: History, seed: int) -> None:
        random = np.random.default_rng(seed)
        for name in ("open", "high", "low", "close"):
            column = getattr(history.given, name)
            column[random.random(len(column)) < 0.1] = np.nan
        history.check(history.read())


def quiet(n: int, seed: int = 7, scale: float = 0.012) -> list[float]:
    return list(np.random.default_rng(seed).normal(0, scale, n).clip(-0.05, 0.05))


class TestKinds:
    @pytest.mark.parametrize("ratio", [4.0, 1.5, 1 / 10, 1 / 190])
    @pytest.mark.parametrize("is_applied", [True, False])
    @pytest.mark.parametrize("day", [1, 2, 30, 58, 59])
    def test_one_split(self, ratio: float, is_applied: bool, day: int) -> None:
        history = History(quiet(60), [(day, ratio, is_applied)])
        traded = history.read()
        assert traded.first == 0
        history.check(traded)

    @pytest.mark.parametrize("day", [0, 60])
    def test_before_the_first_bar_or_after_the_last(self, day: int) -> None:
        """Nothing precedes the first; after the last bar no open shows whether the split is applied."""
        history = History(quiet(60), [(day, 4.0, True)])
        traded = history.read()
        assert traded.first == day
        history.check(traded)

    def test_ticks_decide_after_the_last_bar(self) -> None:
        history = History(quiet(60), [(60, 4.0, True)], cents=True)
        traded = history.read()
        assert traded.first == 0
        history.check(traded)

    @pytest.mark.parametrize("which", range(3))
    def test_one_of_several_is_not_applied(self, which: int) -> None:
        splits = [
            (day, ratio, at != which) for at, (day, ratio) in enumerate([(20, 7.0), (50, 1 / 8), (80, 4.0)])
        ]
        history = History(quiet(100), splits)
        traded = history.read()
        assert traded.first == 0
        history.check(traded)

    @pytest.mark.parametrize("is_applied", [True, False])
    def test_a_part_only(self, is_applied: bool) -> None:
        history = History(quiet(200), [(150, 4.0, is_applied)], edge=(60, 0))
        traded = history.read()
        assert traded.first == 60
        assert "2015-03-06" in traded.doubt
        history.check(traded)

    def test_a_step_next_to_the_listed_day(self) -> None:
        """The split is listed a day early: its real day is unknown."""
        history = History(quiet(100), [(50, 4.0, False)])
        history.split_dates = history.split_dates - MICROS_PER_DAY
        traded = history.read()
        assert traded.first == 50, "the listed day may contain old shares too"
        assert "split of 4:1 on 2015-02-23" in traded.doubt

    def test_a_crash_on_another_day_is_not_a_split(self) -> None:
        nights = quiet(200)
        nights[20] = -0.3
        history = History(nights, [(150, 4.0, True)])
        traded = history.read()
        assert traded.first == 0
        history.check(traded)

    @pytest.mark.parametrize("ratio", [1.05, 1.046, 1.281, 1.1])
    @pytest.mark.parametrize("is_applied", [True, False])
    def test_small_ratios_are_decided_by_ticks(self, ratio: float, is_applied: bool) -> None:
        history = History(quiet(100), [(40, ratio, is_applied)], cents=True, level=120.0)
        traded = history.read()
        assert traded.first == 0
        history.check(traded)

    @pytest.mark.parametrize("ratio", [1.05, 1.1])
    def test_without_ticks_small_ratios_are_declined(self, ratio: float) -> None:
        traded = History(quiet(100), [(40, ratio, True)]).read()
        assert traded.first == 40
        assert f"the split of {ratio:g}:1 on 2015-02-14" in traded.doubt

    def test_a_part_only_of_a_small_ratio(self) -> None:
        history = History(quiet(200), [(150, 1.05, True)], edge=(60, 0), cents=True, level=120.0)
        traded = history.read()
        assert 60 <= traded.first <= 66, "a bar may be in whole cents by chance"
        history.check(traded)

    def test_a_stock_dividend_before_a_split(self) -> None:
        history = History(quiet(100), [(40, 1.05, True), (70, 2.0, True)], cents=True, level=120.0)
        traded = history.read()
        assert traded.first == 0
        history.check(traded)

    def test_two_splits_of_one_night(self) -> None:
        for applied in [(True, True), (True, False), (False, True), (False, False)]:
            history = History(quiet(60), [(30, 3.0, applied[0]), (30, 0.1, applied[1])])
            traded = history.read()
            assert traded.first == 0
            history.check(traded)

    def test_too_many_of_one_night_are_declined(self) -> None:
        history = History(quiet(60), [(30, 1.5, True)] * 5)
        traded = history.read()
        assert traded.first == 30
        history.check(traded)

    def test_a_split_on_a_day_without_a_session(self) -> None:
        history = History(quiet(60), [(30, 4.0, False)])
        kept = np.delete(np.arange(60), [28, 29, 30, 31])
        traded = as_traded(history.given.take(kept), history.days[kept], history.split_dates, history.ratios)
        assert traded.first == 0
        np.testing.assert_allclose(traded.bars.close, history.true.close[kept], rtol=1e-6)

    def test_undecided_after_months_without_a_bar(self) -> None:
        history = History(quiet(60), [(30, 4.0, True)])
        kept = np.delete(np.arange(60), np.arange(20, 40))
        traded = as_traded(history.given.take(kept), history.days[kept], history.split_dates, history.ratios)
        assert traded.first == 20

    def test_no_split(self) -> None:
        history = History(quiet(30), [])
        traded = history.read()
        assert traded.bars.close.tolist() == np.round(history.given.close, 5).tolist() or traded.first == 0
        history.check(traded)

    def test_no_bars(self) -> None:
        none = np.empty(0, dtype=np.int64)
        traded = as_traded(Candles.empty(), none, np.array([START]), np.array([4.0]))
        assert (len(traded.bars), traded.first, traded.doubt) == (0, 0, "")


SHARED = Path(__file__).resolve().parents[2] / "../shared"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real candles are not beside the checkout")
@pytest.mark.parametrize("applied", list(product([True, False], repeat=4)))
def test_apple_since_1998(applied: tuple[bool, ...]) -> None:
    """Four splits and a night of -45 % that looks like one: all are decided, for any combination applied."""
    true = read_csv(SHARED / "data/equity/AAPL-1d.csv.gz")
    dates = np.array([us(text) for text in ("2000-06-21", "2005-02-28", "2014-06-09", "2020-08-31")])
    ratios = np.array([2.0, 2.0, 7.0, 4.0])
    adjusted = np.array([np.prod(ratios[(dates > at) & applied]) for at in true.ts.tolist()])
    prices = (np.stack(true.columns()[1:5]) / adjusted).astype(np.float32).astype(np.float64)
    given = candles_of(true.ts, prices, np.rint(true.volume * adjusted))
    traded = as_traded(given, true.ts, dates, ratios)
    assert (traded.first, traded.doubt) == (0, "")
    np.testing.assert_allclose(traded.bars.close, true.close, rtol=3e-7)
    np.testing.assert_allclose(traded.bars.volume, true.volume, atol=0.51)


LABELLED = SHARED / "wire/recordings/labelled-errors"


@pytest.mark.skipif(not LABELLED.is_dir(), reason="the labelled series are not beside the checkout")
@pytest.mark.parametrize("name", ["4063-T", "ALPHA-PA", "CNE-L", "LA-V", "MOB-ST", "SPM-MI"])
def test_real_series_with_labelled_errors(name: str) -> None:
    """Series of Yahoo in which single bars, or all of a part, are adjusted twice or not at all.

    The label is the correctly adjusted series. No delivered candle differs from it.
    """
    (bad, splits), (label, _) = (
        read_frame(LABELLED / f"{name}-1d-bad-stock-split{end}.csv") for end in ("", "-fixed")
    )
    dates, ratios = splits
    traded = as_traded(bad, bad.ts, dates, ratios)
    assert traded.doubt
    true = label.close * np.array([np.prod(ratios[dates > at]) for at in label.ts.tolist()])
    assert np.array_equal(bad.ts, label.ts)
    np.testing.assert_allclose(traded.bars.close[traded.first :], true[traded.first :], rtol=1e-5)
    assert traded.first < len(bad), "later candles are delivered"


def read_frame(path: Path) -> tuple[Candles, tuple[np.ndarray, np.ndarray]]:
    """Bars, ascending, and the splits among them: their dates and ratios."""
    frame = pd.read_csv(path)
    frame["ts"] = [us(text[:10]) for text in frame["Date"]]
    frame = frame.sort_values("ts")
    columns = [frame[name].to_numpy(float) for name in ("Open", "High", "Low", "Close", "Volume")]
    split = frame[frame["Stock Splits"] != 0]
    return Candles(frame["ts"].to_numpy(), *columns), (
        split["ts"].to_numpy(),
        split["Stock Splits"].to_numpy(float),
    )
