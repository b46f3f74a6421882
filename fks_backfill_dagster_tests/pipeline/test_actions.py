"""Splits that a sync receives are stored with its candles, without a further request; adjusted candles use them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, date, datetime

import numpy as np
import pytest

from fks_backfill_dagster.domain.actions import ReportedActions, disputes, split_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros
from fks_backfill_dagster.pipeline.actions import (
    ActionSources,
    RefreshedActions,
    action_sources,
    import_actions,
    refresh_actions,
)
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
from fks_backfill_dagster.store.writer.actions import write_actions
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


# --- refresh

APPLE, ACME = DAYS.instrument, Series("ACME", Timeframe.D1, AssetClass.STOCKS).instrument


def refreshed(context: Context, *names: str) -> list[RefreshedActions]:
    return list(refresh_actions(context, [(APPLE, names), (ACME, names)]))


def test_a_refresh_stores_what_every_provider_lists(database: Database, exchange: LocalMarket) -> None:
    context = context_of(database, exchange)
    found = refreshed(context, "polygon", "yfinance")
    assert [(one.instrument.symbol, one.provider, one.listed, one.written.inserted) for one in found] == [
        ("AAPL", "polygon", 2, 2),
        ("AAPL", "yfinance", 2, 2),
        ("ACME", "polygon", 0, 0),
        ("ACME", "yfinance", 0, 0),
    ]
    assert {(one.refused, one.gone, one.error) for one in found} == {((), (), None)}
    assert listed(database) == [
        ("polygon", "2014-06-09", 7, True),
        ("yfinance", "2014-06-09", 7, False),
        ("polygon", "2020-08-31", 4, True),
        ("yfinance", "2020-08-31", 4, False),
    ]
    assert disputes(stored_actions(database)) == ()
    again = refreshed(context, "polygon", "yfinance")
    assert {(one.written.inserted, one.written.updated) for one in again} == {(0, 0)}


def test_a_split_that_is_no_longer_listed_is_kept_and_reported(
    database: Database, exchange: LocalMarket
) -> None:
    context = context_of(database, exchange)
    reported = ReportedActions("polygon", NOW, (split_of("AAPL", "2005-02-28", 2),))
    import_actions(database, {APPLE: [split_of("AAPL", "2000-06-21", 2)]}, lambda _: (), NOW)
    with database.begin() as connection:
        write_actions(connection, APPLE, reported, ("polygon",))
    found = refreshed(context, "polygon")[0]
    assert found.gone == (
        "polygon: AAPL: a split of 2:1 on 2005-02-28 is stored, and no longer listed: it is kept; import it with the"
        " ratio 1 if it did not happen",
    )
    assert ("polygon", "2005-02-28", 2, True) in listed(database)
    import_actions(database, {APPLE: [split_of("AAPL", "2005-02-28", 1)]}, lambda _: (), NOW)
    assert refreshed(context, "polygon")[0].gone == ()


def test_a_provider_that_fails_twice_is_not_requested_again(
    database: Database, exchange: LocalMarket
) -> None:
    context = context_of(database, exchange, key="bad-key")
    wanted = [(one, ("polygon", "yfinance")) for one in (APPLE, ACME, APPLE)]
    found = list(refresh_actions(context, wanted))
    errors = [one.error for one in found if one.provider == "polygon"]
    assert [("API Key" in (error or ""), "failed 2 times in a row" in (error or "")) for error in errors] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert exchange.requests("polygon") == 2
    assert [one.listed for one in found if one.provider == "yfinance"] == [2, 0, 2]
    assert {provider for provider, *_ in listed(database)} == {"yfinance"}


def test_a_provider_without_its_key_or_without_actions(database: Database, exchange: LocalMarket) -> None:
    context = context_of(database, exchange, key=None)
    found = action_sources(context.providers, ["polygon", "alphavantage", "yfinance", "yfinance"])
    assert found == ActionSources(("yfinance",), ("polygon is skipped: POLYGON_API_KEY is not set",))
