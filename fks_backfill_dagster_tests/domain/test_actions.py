"""Corporate actions: valid values, the begin of a date at an exchange, reports of several providers."""

from __future__ import annotations

import math
from datetime import UTC, date, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.actions import (
    Action,
    ActionKind,
    StoredAction,
    begins_at,
    combined,
    described,
    disputes,
    has_actions,
    split_of,
)
from fks_backfill_dagster.domain.series import AssetClass, Instrument
from fks_backfill_dagster_tests.examples import examples

NOW = datetime(2024, 1, 1, tzinfo=UTC)


def stored(
    provider: str, day: str, ratio: float, *, used: bool = False, symbol: str = "AAPL"
) -> StoredAction:
    return StoredAction(split_of(symbol, day, ratio), provider, NOW, NOW, used)


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf, 1e-7, 1e7])
def test_an_impossible_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"is not the new shares per old share of a split: it is above 0"):
        split_of("AAPL", "2020-08-31", ratio)


def test_splits_of_one_night_are_one() -> None:
    """A reverse split and a split that follows it: only whole shares are left of small holdings."""
    found = combined(
        [
            split_of("A", "2020-08-31", 500),
            split_of("A", "2014-06-09", 7),
            split_of("A", "2020-08-31", 1 / 500),
        ]
    )
    assert [(one.ex_date.year, one.ratio) for one in found] == [(2014, 7), (2020, 1)]


_ACTIONS = st.builds(
    Action,
    st.sampled_from(["A", "B"]),
    st.just(ActionKind.SPLIT),
    st.dates(date(2020, 1, 1), date(2020, 1, 5)),
    st.sampled_from([0.5, 2.0, 4.0]),
)


@given(actions=st.lists(_ACTIONS, max_size=12))
@settings(max_examples=examples(100), deadline=None)
def test_combining_keeps_the_product(actions: list[Action]) -> None:
    """In any order; every date of a symbol once."""
    found = combined(actions)
    keys = [(one.symbol, one.ex_date) for one in found]
    assert keys == sorted(set(keys)) == sorted({(one.symbol, one.ex_date) for one in actions})
    assert math.prod(one.ratio or 0 for one in found) == math.prod(one.ratio or 0 for one in actions)


@pytest.mark.parametrize(
    ("calendar", "day", "moment"),
    [
        ("XNYS", "2020-08-31", "2020-08-31T04:00+00:00"),
        ("XNYS", "2024-01-31", "2024-01-31T05:00+00:00"),
        ("XTKS", "2024-01-31", "2024-01-30T15:00+00:00"),
        ("XLON", "2024-01-31", "2024-01-31T00:00+00:00"),
    ],
)
def test_a_date_begins_at_midnight_of_the_exchange(calendar: str, day: str, moment: str) -> None:
    stock = Instrument("A", AssetClass.STOCKS, calendar)
    assert begins_at(stock, date.fromisoformat(day)) == datetime.fromisoformat(moment)


def test_an_unknown_exchange() -> None:
    with pytest.raises(ValueError, match="there is no exchange calendar 'XXXX'"):
        begins_at(Instrument("A", AssetClass.STOCKS, "XXXX"), date(2024, 1, 1))


def test_only_stocks_have_actions() -> None:
    assert [one for one in AssetClass if has_actions(Instrument("A", one))] == [AssetClass.STOCKS]


def test_a_split_in_words() -> None:
    assert described(split_of("A", "2020-08-31", 4)) == "a split of 4:1 on 2020-08-31"
    assert described(split_of("A", "2020-08-31", 0.1)) == "a split of 1:10 on 2020-08-31"


def test_reports_that_agree_are_no_dispute() -> None:
    """1/3 has other digits at each provider."""
    assert (
        disputes(
            [stored("polygon", "2020-08-31", 1 / 3, used=True), stored("yfinance", "2020-08-31", 0.33333)]
        )
        == ()
    )


@pytest.mark.parametrize(("day", "ratio"), [("2020-08-31", 5), ("2020-09-01", 4)])
def test_another_ratio_or_date_is_a_dispute(day: str, ratio: float) -> None:
    (found,) = disputes([stored("polygon", "2020-08-31", 4, used=True), stored("yfinance", day, ratio)])
    assert found.startswith("AAPL: yfinance reports a split of ")


def test_what_is_no_dispute() -> None:
    """A person has decided; another symbol; an action of its own that is not used yet."""
    used = stored("file", "2020-08-31", 4, used=True)
    assert disputes([used, stored("yfinance", "2020-08-31", 5)]) == ()
    assert (
        disputes(
            [stored("polygon", "2020-08-31", 4, used=True), stored("yfinance", "2020-08-31", 5, symbol="B")]
        )
        == ()
    )
    assert (
        disputes([stored("polygon", "2020-08-31", 4, used=True), stored("yfinance", "2090-08-31", 5)]) == ()
    )
