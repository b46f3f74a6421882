"""Polygon's splits: rows, pages, the key, and the local market's truth."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import orjson
import pytest

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers.base import (
    ActionSource,
    InvalidResponse,
    NotEntitled,
    PermanentError,
    Provider,
    RateLimited,
    WrongKey,
)
from fks_backfill_dagster.providers.polygon_splits import MOST_PAGES, read_splits
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, json_said, serve, us

SHARED = Path(__file__).resolve().parents[2] / "../shared/wire/recordings/polygon"
APPLE = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)
SPLITS = (
    Split("AAPL", date(2020, 8, 31), 4),
    Split("AAPL", date(2014, 6, 9), 7),
    Split("ACME", date(2019, 1, 2), 1, 10),
)


def row(**other: Any) -> dict[str, Any]:
    """A row in the documented form."""
    return {
        "id": "E90a77bdf742661741ed7c8fc086415f0457c2816c45899d73aaa88bdc8ff6025",
        "ticker": "AAPL",
        "execution_date": "2020-08-31",
        "adjustment_type": "forward_split",
        "split_from": 1,
        "split_to": 4,
        "historical_adjustment_factor": 0.25,
    } | other


def said(rows: Any, **more: Any) -> Scripted:
    return json_said({"status": "OK", "request_id": "1", "results": rows, **more})


def fetched(provider: Provider, series: Series = APPLE) -> ReportedActions:
    assert isinstance(provider, ActionSource)
    return provider.fetch_actions(series)


def brief(found: ReportedActions) -> list[tuple[str, float | None]]:
    return [(str(one.ex_date), one.ratio) for one in found.actions]


@pytest.fixture(scope="module")
def market() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=us("2020-09-11T12:00"), splits=SPLITS)) as running:
        yield running


# --- rows


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"split_to": 0}, "split_from and split_to are not numbers of shares above 0"),
        ({"split_from": -1}, "split_from and split_to are not"),
        ({"split_from": None}, "split_from and split_to are not"),
        ({"split_to": "4"}, "split_from and split_to are not"),
        ({"split_to": True}, "split_from and split_to are not"),
        ({"split_to": 1e12}, "ratio 1e+12 is not the new shares per old share"),
        ({"execution_date": "08/31/2020"}, "ex_date '08/31/2020' is not a date such as 2020-08-31"),
        ({"execution_date": None}, "ex_date 'None' is not a date"),
        ({"execution_date": "1020-08-31"}, "is not between 1900-01-01 and 2100-01-01"),
        ({"ticker": "MSFT"}, "a split of another ticker than AAPL"),
        ({"ticker": None}, "a split of another ticker than AAPL"),
    ],
)
def test_a_bad_row_is_refused_and_the_good_one_kept(other: dict[str, Any], reason: str) -> None:
    good = row(execution_date="2014-06-09", split_to=7)
    actions, refused = read_splits([row(**other), good], "polygon", "AAPL", "AAPL")
    assert [(str(one.ex_date), one.ratio) for one in actions] == [("2014-06-09", 7)]
    (sentence,) = refused
    assert sentence.startswith("polygon: AAPL: ")
    assert reason in sentence


@pytest.mark.parametrize("bad", [4, None, "x", []])
def test_a_row_of_another_shape(bad: object) -> None:
    actions, (refused,) = read_splits([bad, row()], "polygon", "AAPL", "AAPL")
    assert len(actions) == 1
    assert "a split of another shape" in refused


def test_a_row_that_is_listed_twice_counts_once() -> None:
    """Two splits of one night count as one with the product of their ratios."""
    twice = [row(), row(id="another"), row(split_from=2, split_to=1)]
    actions, refused = read_splits(twice, "polygon", "AAPL", "AAPL")
    assert ([one.ratio for one in actions], refused) == ([2], ())


def test_a_reverse_split_and_a_stock_dividend() -> None:
    rows = [row(split_from=10, split_to=1), row(execution_date="2014-06-09", split_from=1, split_to=1.05)]
    actions, _ = read_splits(rows, "polygon", "AAPL", "AAPL")
    assert [one.ratio for one in actions] == [1.05, 0.1]


def test_the_recorded_rows() -> None:
    """The deprecated endpoint has the same names, without id and factor."""
    file = SHARED / "official-v3_reference_splits.json"
    if not file.exists():
        pytest.skip("real candles are not here")
    rows = orjson.loads(file.read_bytes())["results"]
    for ticker, expected in {
        "GOOG": [20.0],
        "CTO": [3.0],
        "SHOP": [10.0, 10.0],
        "BRW": [0.5],
        "CIG.C": [4 / 3],
    }.items():
        actions, refused = read_splits(rows, "polygon", ticker, ticker)
        assert [one.ratio for one in actions] == expected
        assert len(refused) == len(rows) - len(expected)


# --- requests


@pytest.mark.server
def test_the_request_and_the_key(make: Make) -> None:
    with serve(lambda _: said([row()])) as server:
        found = fetched(make("polygon", server.url, key="secret", clock=lambda: us("2024-01-01")))
        (request,) = server.requests
    assert request.path == "/stocks/v1/splits"
    assert request.query == {"ticker": "AAPL", "limit": "5000", "sort": "execution_date.asc"}
    assert request.headers["Authorization"] == "Bearer secret"
    assert found == ReportedActions("polygon", us("2024-01-01"), found.actions)
    assert brief(found) == [("2020-08-31", 4)]


@pytest.mark.server
def test_without_splits(make: Make) -> None:
    with serve(lambda _: json_said({"status": "OK", "request_id": "1"})) as server:
        assert fetched(make("polygon", server.url, key="any")).actions == ()


@pytest.mark.server
@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (json_said({"status": "ERROR", "error": "Unknown API Key"}, 401), WrongKey),
        (json_said({"status": "NOT_AUTHORIZED", "message": "You are not entitled"}, 403), NotEntitled),
        (json_said({"status": "ERROR", "error": "maximum requests per minute"}, 429), RateLimited),
        (said({"AAPL": 4}), InvalidResponse),
        (json_said([1]), InvalidResponse),
    ],
)
def test_errors(make: Make, answer: Scripted, error: type[Exception]) -> None:
    with serve(lambda _: answer) as server, pytest.raises(error):
        fetched(make("polygon", server.url, key="any", retry_budget_seconds=0))


def test_without_a_key_nothing_is_requested(make: Make) -> None:
    with pytest.raises(WrongKey, match="set POLYGON_API_KEY"):
        fetched(make("polygon", "http://127.0.0.1:1"))


@pytest.mark.server
@pytest.mark.parametrize(
    "elsewhere", ["http://127.0.0.2:9/x", "https://127.0.0.1/x", "//evil/x", "file:///x"]
)
def test_the_key_is_sent_to_no_other_host(make: Make, elsewhere: str) -> None:
    with serve(lambda _: said([row()], next_url=elsewhere)) as server:
        with pytest.raises(PermanentError, match=r"providers\.polygon\.base_url"):
            fetched(make("polygon", server.url, key="any"))
        assert len(server.requests) == 1


@pytest.mark.server
def test_pages_without_an_end(make: Make) -> None:
    def answer(asked: Received) -> Scripted:
        return said([row()], next_url=f"/stocks/v1/splits?cursor={len(server.requests)}")

    with serve(answer) as server:
        with pytest.raises(InvalidResponse, match=f"link page after page: more than {MOST_PAGES} pages"):
            fetched(make("polygon", server.url, key="any", requests_per_minute=1000))
        assert len(server.requests) == MOST_PAGES


@pytest.mark.server
def test_the_splits_of_the_local_market(make: Make, market: LocalMarket) -> None:
    provider = make("polygon", market.polygon_url, key="any")
    assert brief(fetched(provider)) == [("2014-06-09", 7), ("2020-08-31", 4)]
    acme = fetched(provider, Series("ACME", Timeframe.D1, AssetClass.STOCKS))
    assert (brief(acme), acme.refused) == ([("2019-01-02", 0.1)], ())


@pytest.mark.server
def test_pages_of_the_local_market(make: Make, market: LocalMarket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fks_backfill_dagster.providers.polygon_splits.LIMIT", 1)
    market.reset_requests()
    assert brief(fetched(make("polygon", market.polygon_url, key="any"))) == [
        ("2014-06-09", 7),
        ("2020-08-31", 4),
    ]
    assert market.requests("polygon") == 2


@pytest.mark.server
def test_both_providers_list_the_same_splits(make: Make, market: LocalMarket) -> None:
    polygon = fetched(make("polygon", market.polygon_url, key="any"))
    yahoo = fetched(make("yfinance", market.yahoo_url, clock=lambda: us("2020-09-11T12:00")))
    assert polygon.actions == yahoo.actions
