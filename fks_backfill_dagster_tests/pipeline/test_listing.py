"""Listing times: claims that are late, refuted, corrected, or in the future; silent providers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.store import ledger, queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import ListingKind
from fks_backfill_dagster_tests.pipeline.builders import days
from fks_backfill_dagster_tests.pipeline.conftest import NOW, make_context
from fks_backfill_dagster_tests.providers.markets import new_york_midnight
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    Server,
    SmallBinance,
    json_said,
    serve,
    us,
)
from fks_backfill_dagster_tests.providers.test_yfinance import SECOND, chart, session_opens, traded

DAILY = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)
WEEKLY = replace(DAILY, timeframe=Timeframe.W1)
WINTER = days("2024-01-01", "2024-04-01")
TRUTH = traded(Timeframe.D1, days("2021-01-01", "2024-06-15"))


@dataclass
class Days:
    """Days of a stock at Yahoo, which reports a first trade, and at Polygon, which does not; each has them from its
    own date on."""

    claim: str = "2021-01-04"
    yahoo: str = "2021-01-04"
    polygon: str = "2021-01-04"
    polygon_fails: int = 0

    def __call__(self, asked: Received) -> Scripted:
        if asked.path.startswith("/polygon"):
            if self.polygon_fails:
                self.polygon_fails -= 1
                return json_said({"error": "down"}, 500)
            return self._polygon(asked)
        start, end = (int(asked.query[name]) * SECOND for name in ("period1", "period2"))
        days_of_it = TRUTH.take(TRUTH.ts >= us(self.yahoo))
        bars = replace(days_of_it, ts=session_opens(days_of_it)).within(TimeRange(start, end))
        first = us(self.claim) + 14 * 3600 * SECOND + 1800 * SECOND
        made = chart(
            bars, asked.query["interval"], regularMarketTime=NOW // SECOND, firstTradeDate=first // SECOND
        )
        return json_said(made)

    def _polygon(self, asked: Received) -> Scripted:
        *_, ticker, _, _, _, first, last = asked.path.split("/")
        stamps = np.array([new_york_midnight(ts) for ts in TRUTH.ts.tolist()])
        requested = (
            (stamps >= int(first) * 1000) & (stamps <= int(last) * 1000) & (TRUTH.ts >= us(self.polygon))
        )
        rows = [
            {"t": at // 1000, "o": o, "h": h, "l": low, "c": c, "v": v}
            for at, (_, o, h, low, c, v) in zip(
                stamps[requested].tolist(),
                zip(*(column.tolist() for column in TRUTH.take(requested).columns()), strict=True),
                strict=True,
            )
        ]
        return json_said({"ticker": ticker, "status": "OK", "resultsCount": len(rows), "results": rows})


@pytest.fixture
def market() -> Days:
    return Days()


@pytest.fixture
def server(market: Days) -> Iterator[Server]:
    with serve(market) as running:
        yield running


@pytest.fixture
def context(database: Database, server: Server) -> Context:
    pool, limiter = RequestPool(5), ProcessLimiter({})
    options = {
        name: resolve_options(
            name,
            base_url=f"{server.url}/{name}".removesuffix("/yfinance"),
            key="any",
            retry_budget_seconds=0.1,
        )
        for name in ("yfinance", "polygon")
    }
    providers = {name: build(name, one, pool, limiter, lambda: NOW) for name, one in options.items()}
    return Context(database, providers, lambda: NOW)


def synced(
    context: Context, *priority: str, window: TimeRange = WINTER, series: Series = DAILY
) -> SyncReport:
    """A sync like that of the command (`recheck`)."""
    return sync(context, series, window, priority, recheck=True)


def sessions(start: str, end: str = "2024-04-01") -> Instants:
    return grid_of(DAILY).opens(days(start, end))


def stored(database: Database, series: Series = DAILY) -> Instants:
    return queries.read_candles(database, series, days("2020-01-01", "2024-06-15")).ts


def known(database: Database) -> dict[str, tuple[int, ListingKind]]:
    with database.begin() as connection:
        found = ledger.listings(connection, "AAPL")
    return {name: (one.listed_at, one.kind) for name, one in found.items()}


def test_nothing_is_expected_before_a_true_claim(database: Database, market: Days, context: Context) -> None:
    market.claim = market.yahoo = "2024-02-14"
    report = synced(context, "yfinance")
    assert np.array_equal(stored(database), sessions("2024-02-14"))
    assert (report.complete, report.expected) == (True, len(sessions("2024-02-14")))
    assert report.listing == "yfinance lists it since 2024-02-14T14:30:00+00:00"
    assert any("history begins at 2024-02-14" in warning for warning in report.warnings)


@pytest.mark.parametrize("claim", ["2024-02-14", "2024-02-01", "2024-03-01", "2024-01-02", "2024-03-28"])
def test_a_late_claim_is_refuted_by_its_own_rows(
    database: Database, market: Days, context: Context, claim: str
) -> None:
    """Also if it is the first day of a month."""
    market.claim = claim
    report = synced(context, "yfinance")
    assert np.array_equal(stored(database), sessions("2024-01-01"))
    assert (report.complete, report.expected, report.listing) == (True, len(sessions("2024-01-01")), None)
    if claim > "2024-01-02":
        assert any("its claim is ignored" in warning for warning in report.warnings)
    again = synced(context, "yfinance")
    assert (again.expected, again.complete, again.total_candles) == (report.expected, True, 0)
    if claim == "2024-01-02":  # no stored row refutes it
        return
    # The beginning of its rows is not known yet: earlier ranges are requested, for example by partitions.
    earlier = sync(context, DAILY, days("2022-01-01", "2023-01-01"), ["yfinance"])
    assert (earlier.complete, earlier.expected) == (True, len(sessions("2022-01-01", "2023-01-01")))


@pytest.mark.parametrize("priority", [("yfinance", "polygon"), ("polygon", "yfinance")], ids=str)
@pytest.mark.parametrize("own", ["2021-01-04", "2024-02-14"], ids=["its own rows too", "not its own"])
def test_a_late_claim_does_not_limit_the_others(
    database: Database, market: Days, context: Context, priority: tuple[str, str], own: str
) -> None:
    market.claim, market.yahoo = "2024-02-14", own
    report = synced(context, *priority)
    assert np.array_equal(stored(database), sessions("2024-01-01"))
    assert (report.complete, report.expected) == (True, len(sessions("2024-01-01")))
    assert report.listing is None


def test_rows_that_begin_before_a_refuted_claim(database: Database, market: Days, context: Context) -> None:
    """The rows begin inside the range: nothing is expected before them."""
    market.claim, market.yahoo = "2024-03-14", "2024-01-22"
    report = synced(context, "yfinance")
    assert np.array_equal(stored(database), sessions("2024-01-22"))
    assert (report.complete, report.expected) == (True, len(sessions("2024-01-22")))
    assert report.listing == "yfinance has it since 2024-01-22T00:00:00+00:00"
    market.claim = "2021-01-04"


@pytest.mark.parametrize(
    ("first", "then"), [("2024-02-14", "2021-01-04"), ("2023-11-01", "2024-02-14")], ids=["earlier", "later"]
)
def test_a_claim_that_is_corrected(
    database: Database, market: Days, context: Context, first: str, then: str
) -> None:
    market.claim, market.yahoo = first, "2024-02-14"
    before = synced(context, "yfinance")
    assert before.complete == (first == "2024-02-14")
    market.claim = market.yahoo = then
    window = days("2023-10-01", "2024-04-01")
    report = synced(context, "yfinance", window=window)
    begins = max(then, "2023-10-01")
    assert np.array_equal(stored(database), sessions(begins))
    assert (report.complete, report.expected) == (True, len(sessions(begins)))


def test_a_claim_in_the_future_is_no_claim(database: Database, market: Days, context: Context) -> None:
    market.claim = "2024-12-02"
    report = synced(context, "yfinance")
    assert np.array_equal(stored(database), sessions("2024-01-01"))
    assert report.complete
    assert known(database) == {}


def test_a_first_claim_is_refuted_by_rows_that_were_stored_without_one(
    database: Database, market: Days, context: Context
) -> None:
    market.claim = "2024-12-02"
    synced(context, "yfinance")
    assert known(database) == {}
    market.claim = "2024-05-01"
    earlier = days("2022-01-01", "2023-01-01")
    report = sync(context, DAILY, earlier, ["yfinance"])
    assert (report.complete, report.expected) == (True, len(sessions("2022-01-01", "2023-01-01")))


def test_a_claim_in_the_future_that_was_kept_is_no_claim_either(
    database: Database, market: Days, context: Context
) -> None:
    """As written by an earlier version."""
    with database.begin() as connection:
        ledger.remember_listing(connection, "yfinance", "AAPL", us("2024-12-02"), ListingKind.CLAIM)
    report = sync(context, DAILY, WINTER, ["yfinance"])
    assert np.array_equal(stored(database), sessions("2024-01-01"))
    assert report.complete


# A provider without a claim -------------------------------------------------------------------------------


@pytest.mark.parametrize("polygon", ["2024-02-14", "2024-03-14", "2024-06-01"])
@pytest.mark.parametrize("priority", [("yfinance", "polygon"), ("polygon", "yfinance")], ids=str)
def test_a_silent_provider_is_requested_once_for_the_time_before_a_claim(
    database: Database,
    market: Days,
    context: Context,
    server: Server,
    priority: tuple[str, str],
    polygon: str,
) -> None:
    market.claim = market.yahoo = "2024-02-14"
    market.polygon = polygon
    first = synced(context, *priority)
    assert np.array_equal(stored(database), sessions("2024-02-14"))
    assert (first.complete, first.expected) == (True, len(sessions("2024-02-14")))
    assert [asked for asked in server.requests if asked.path.startswith("/polygon")]
    assert known(database)["polygon"][1] is ListingKind.OBSERVATION
    server.requests.clear()
    again = synced(context, *priority)
    assert (again.complete, again.expected, again.requests) == (True, first.expected, 0)
    assert [asked for asked in server.requests if asked.path.startswith("/polygon")] == []


@pytest.mark.parametrize("priority", [("yfinance", "polygon"), ("polygon", "yfinance")], ids=str)
def test_a_failure_of_a_silent_provider_is_no_observation(
    database: Database, market: Days, context: Context, priority: tuple[str, str]
) -> None:
    market.claim = market.yahoo = "2024-02-14"
    market.polygon_fails = 1  # the request for the time before the claim; the next ones succeed
    context = replace(context, max_concurrent_requests=1)
    report = synced(context, *priority)
    assert not report.complete
    assert report.errors
    assert "polygon" not in known(database)
    synced(context, *priority)
    assert np.array_equal(stored(database), sessions("2024-01-01"))


def test_a_range_before_any_listing(database: Database, market: Days, context: Context) -> None:
    market.claim = market.yahoo = market.polygon = "2024-02-14"
    report = synced(context, "yfinance", "polygon", window=days("2023-01-01", "2023-07-01"))
    assert (report.expected, report.complete, len(stored(database))) == (0, True, 0)
    report = synced(context, "yfinance", "polygon")
    assert np.array_equal(stored(database), sessions("2024-02-14"))
    assert report.complete


# Timeframes of one symbol ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(WEEKLY, DAILY), (DAILY, WEEKLY)], ids=["1w first", "1d first"])
@pytest.mark.parametrize("listed", ["2024-02-14", "2024-02-02", "2024-03-01"])
@pytest.mark.parametrize("priority", [("yfinance",), ("polygon",), ("polygon", "yfinance")], ids=str)
def test_a_second_timeframe_has_the_same_beginning(
    database: Database,
    market: Days,
    context: Context,
    order: tuple[Series, Series],
    listed: str,
    priority: tuple[str, ...],
) -> None:
    market.claim = market.yahoo = market.polygon = listed
    reports = {one: synced(context, *priority, series=one) for one in order}
    assert np.array_equal(stored(database, DAILY), sessions(listed))
    assert stored(database, WEEKLY).min() >= us(listed) - 7 * MICROS_PER_DAY
    if priority != ("polygon",):  # without any claim the time before the listing is a gap
        assert (reports[DAILY].complete, reports[DAILY].expected) == (True, len(sessions(listed)))
        assert reports[WEEKLY].missing <= 1  # the week of the listing is incomplete
        again = {one: synced(context, *priority, series=one) for one in order}
        assert again[DAILY].expected == reports[DAILY].expected
        assert again[DAILY].requests == 0


@pytest.mark.parametrize("listed", ["2023-08-01T14:20", "2023-08-03T00:00", "2023-07-31T09:00"])
@pytest.mark.parametrize("order", [("1w", "1m"), ("1m", "1w"), ("1d", "1h"), ("4h", "1w")], ids=str)
def test_the_candle_that_contains_the_listing(
    database: Database, listed: str, order: tuple[str, str]
) -> None:
    """For example a week that opens in the month before, and a minute."""
    window = days("2023-06-20", "2023-08-08")
    with serve(SmallBinance(listed=us(listed))) as server:
        context = make_context(database, server.url)
        for name in order:
            series = Series("BTC/USDT", Timeframe(name), AssetClass.CRYPTO)
            report = sync(context, series, window, ["binance"], recheck=True)
            found = queries.read_candles(database, series, window)
            first = us(listed) - us(listed) % series.timeframe.micros
            grid = grid_of(series)
            begins = grid.previous_open(us(listed) + 1)
            assert begins is not None
            # This market may have no candle that opens before the listing.
            assert found.ts[0] in (begins, grid.next_open(us(listed))), first
            assert report.complete == (found.ts[0] == begins)


# Archives from before the REST listing --------------------------------------------------------------------


@pytest.mark.parametrize("with_listing", ["2024-02-14T06:00", "2024-02-01T00:00"])
def test_an_archive_from_before_the_listing_is_kept(database: Database, with_listing: str) -> None:
    """REST begins with the listing; the monthly archives contain earlier candles."""
    quarters = Series("BTC/USDT", Timeframe.M15, AssetClass.CRYPTO)
    market, early = SmallBinance(listed=us("2024-01-10T00:00")), us(with_listing)

    def from_listing(asked: Received, honest: Scripted) -> Scripted:
        later = {**asked.query, "startTime": max(int(asked.query.get("startTime", 0)), early // 1000)}
        return market._klines(replace(asked, query={name: str(value) for name, value in later.items()}))

    market.rest = from_listing
    window = days("2024-01-01", "2024-04-01")
    with serve(market) as server:
        context = make_context(database, server.url, archive_url=server.url)
        report = sync(context, quarters, window, ["binance"], recheck=True)
        found = queries.read_candles(database, quarters, window)
        assert found.equals(market.truth(quarters, window))
        assert (report.complete, report.expected) == (True, len(found))
        again = sync(context, quarters, window, ["binance"], recheck=True)
    assert (again.total_candles, again.expected, again.complete) == (0, len(found), True)
