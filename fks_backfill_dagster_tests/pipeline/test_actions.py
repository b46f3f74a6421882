"""Splits that a sync receives are stored with its candles, without a further request; adjusted candles use them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime

import numpy as np
import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.splits import Split
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.actions import stored_actions
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.domain.builders import at, window
from fks_backfill_dagster_tests.store.builders import fetch

NOW = to_micros(datetime(2020, 9, 11, 12, tzinfo=UTC))
SPLITS = (Split("AAPL", date(2014, 6, 9), 7), Split("AAPL", date(2020, 8, 31), 4))
SUMMER = window("2020-08-03T00:00Z", "2020-09-10T00:00Z")
DAYS = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)


@pytest.fixture(scope="module")
def exchange() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, now=NOW, splits=SPLITS)) as market:
        yield market


def context_of(database: Database, market: LocalMarket, key: str | None = "any") -> Context:
    market.reset_requests()
    urls = {"polygon": market.polygon_url, "yfinance": market.yahoo_url}
    pool, limiter = RequestPool(5), ProcessLimiter({})
    providers = {
        name: build(
            name,
            resolve_options(
                name, base_url=url, key=key if name == "polygon" else None, retry_budget_seconds=0.2
            ),
            pool,
            limiter,
            lambda: NOW,
        )
        for name, url in urls.items()
    }
    return Context(database, providers, lambda: NOW, priority=lambda _: ("polygon", "yfinance"))


def listed(database: Database) -> list[tuple[str, str, float | None, bool]]:
    return [
        (one.provider, str(one.action.ex_date), one.action.ratio, one.used)
        for one in stored_actions(database)
    ]


def test_a_sync_stores_the_splits_that_it_receives(database: Database, exchange: LocalMarket) -> None:
    context = context_of(database, exchange)
    report = sync(context, DAYS, SUMMER, ["yfinance"])
    assert (report.missing, report.errors) == (0, ())
    assert listed(database) == [("yfinance", "2020-08-31", 4, True)]  # the range has one of the two
    # The chart of the days, and the one that names the first trade.
    assert exchange.requests() == exchange.requests("yahoo") == 2


def test_a_second_sync_changes_no_action(database: Database, exchange: LocalMarket) -> None:
    context = context_of(database, exchange)
    sync(context, DAYS, TimeRange(SUMMER.start, at("2020-08-10T00:00Z")), ["yfinance"])
    rows = "SELECT a::text, xmin::text FROM fks.action a"
    before = fetch(database, rows)
    assert len(before) == 1
    sync(context, DAYS, SUMMER, ["yfinance"])
    sync(context, DAYS.at(Timeframe.M15), window("2020-08-27T00:00Z", "2020-09-03T00:00Z"), ["yfinance"])
    assert fetch(database, rows) == before


def test_weeks_are_made_of_days_that_list_splits(database: Database, exchange: LocalMarket) -> None:
    context = context_of(database, exchange)
    sync(context, DAYS.at(Timeframe.W1), SUMMER, ["yfinance"])
    assert listed(database) == [("yfinance", "2020-08-31", 4, True)]


def test_adjusted_days_are_those_of_the_market(database: Database, exchange: LocalMarket) -> None:
    """The market trades in today's shares below its splits: adjusted prices have no jump of a factor of four."""
    context = context_of(database, exchange)
    sync(context, DAYS, SUMMER, ["yfinance"])
    raw, found = (read(database, DAYS, SUMMER) for read in (queries.read_candles, queries.read_adjusted))
    before = raw.ts < at("2020-08-31T00:00Z")
    assert np.array_equal(found.close, np.where(before, raw.close / 4, raw.close))
    assert np.array_equal(found.volume, np.where(before, raw.volume * 4, raw.volume))
    assert np.abs(np.diff(np.log(found.close))).max() < 0.2 < np.abs(np.diff(np.log(raw.close))).max()
