"""Polygon's splits over HTTP: rows in the documented form, factors, pages."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Any

import pytest
import requests

from fks_backfill_dagster.simulator import LocalMarket, MarketConfig, Split
from fks_backfill_dagster.simulator.config import instant

pytestmark = pytest.mark.server

SPLITS = (
    Split("AAPL", date(2020, 8, 31), 4),
    Split("AAPL", date(2014, 6, 9), 7),
    Split("ACME", date(2019, 1, 2), 1, 10),
)


@pytest.fixture(scope="module")
def market() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=instant("2020-09-01"), splits=SPLITS)) as running:
        yield running


def get(market: LocalMarket, key: str = "any", **query: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return requests.get(f"{market.polygon_url}/stocks/v1/splits", query, headers=headers, timeout=10)


def test_rows_have_the_documented_fields(market: LocalMarket) -> None:
    page = get(market, ticker="AAPL").json()
    assert page.keys() == {"status", "request_id", "results"}
    newest, oldest = page["results"]
    assert len({one.pop("id") for one in (newest, oldest)}) == 2
    assert newest == {
        "ticker": "AAPL",
        "execution_date": "2020-08-31",
        "adjustment_type": "forward_split",
        "split_from": 1,
        "split_to": 4,
        "historical_adjustment_factor": 0.25,
    }
    assert (oldest["execution_date"], oldest["historical_adjustment_factor"]) == ("2014-06-09", 1 / 28)
    (reverse,) = get(market, ticker="ACME").json()["results"]
    assert (reverse["adjustment_type"], reverse["split_from"], reverse["split_to"]) == (
        "reverse_split",
        10,
        1,
    )
    assert reverse["historical_adjustment_factor"] == 10


def test_pages(market: LocalMarket) -> None:
    first = get(market, ticker="AAPL", limit=1, sort="execution_date.asc").json()
    assert [one["execution_date"] for one in first["results"]] == ["2014-06-09"]
    assert first["next_url"].startswith(f"{market.polygon_url}/stocks/v1/splits?cursor=")
    second = requests.get(first["next_url"], headers={"Authorization": "Bearer any"}, timeout=10).json()
    assert [one["execution_date"] for one in second["results"]] == ["2020-08-31"]
    assert "next_url" not in second


def test_a_split_of_the_future_and_another_ticker(market: LocalMarket) -> None:
    market.set_clock(instant("2020-08-30"))
    assert len(get(market, ticker="AAPL").json()["results"]) == 1
    market.set_clock(instant("2020-09-01"))
    assert get(market, ticker="NOPE").json()["results"] == []


@pytest.mark.parametrize(
    "query", [{"limit": 0}, {"limit": 5001}, {"limit": "x"}, {"sort": "ratio"}, {"cursor": "!"}]
)
def test_bad_requests(market: LocalMarket, query: dict[str, Any]) -> None:
    answer = get(market, ticker="AAPL", **query)
    assert (answer.status_code, answer.json()["status"]) == (400, "ERROR")


def test_keys(market: LocalMarket) -> None:
    assert [get(market, key).status_code for key in ("", "bad-key")] == [401, 401]
