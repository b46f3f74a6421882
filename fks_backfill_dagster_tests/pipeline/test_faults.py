"""Each fault of each provider: stored candles are correct, missing ones are accounted for.

test_failures.py has more detailed cases of Binance, cli/test_backfill.py the exit codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import requests

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.oanda import PAGE_SIZE
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.coverage import part_states
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.examples import thinned
from fks_backfill_dagster_tests.pipeline.conftest import NOW


def days(start: str, end: str) -> TimeRange:
    return TimeRange.of(
        datetime.fromisoformat(start).replace(tzinfo=UTC), datetime.fromisoformat(end).replace(tzinfo=UTC)
    )


@dataclass(frozen=True)
class Case:
    """A series that a provider serves; `market` is the provider's name in the local market."""

    provider: str
    market: str
    series: Series
    window: TimeRange

    def __str__(self) -> str:
        return f"{self.provider}-{self.series.asset_class}"


BITCOIN = Series("BTC/USDT", Timeframe.M5, AssetClass.CRYPTO)
APPLE = Series("AAPL", Timeframe.M15, AssetClass.STOCKS)
EURO = Series("EUR/USD", Timeframe.M15, AssetClass.FOREX)
WEEK = days("2024-06-10", "2024-06-13")

HOUR = 3_600_000_000
COIN = Case(
    "coingecko",
    "coingecko",
    Series("BTC/USDT", Timeframe.H4, AssetClass.CRYPTO),
    days("2024-06-01", "2024-06-13"),
)

CASES = [
    Case("binance", "binance", BITCOIN, WEEK),
    Case("polygon", "polygon", BITCOIN, WEEK),
    Case("polygon", "polygon", APPLE, WEEK),
    Case("yfinance", "yahoo", APPLE, WEEK),
    Case("alphavantage", "alphavantage", APPLE, WEEK),
    Case("oanda", "oanda", EURO, WEEK),
    COIN,
]


@dataclass(frozen=True)
class Fault:
    """A planted fault, and its effect if it never ends.

    unanswered: no response, so nothing is stored and every candle is an open gap. rejected: the reasons in the
    quarantine. lacking: rows are absent from a response that looks complete. None of them: the fault is repaired,
    and nothing is missing.
    """

    name: str
    options: dict[str, Any]
    unanswered: bool = False
    rejected: frozenset[str] = frozenset()
    lacking: bool = False

    def __str__(self) -> str:
        return self.name


def unanswered(name: str, kind: str, **options: Any) -> Fault:
    return Fault(name, {"kind": kind, **options}, unanswered=True)


def rejected(kind: str, *reasons: str) -> Fault:
    return Fault(kind, {"kind": kind}, rejected=frozenset(reasons))


FAULTS = [
    *(unanswered(str(status), "status", status=status) for status in (500, 502, 503, 504)),
    *(unanswered(f"{status}-storm", "status", status=status, seconds=30) for status in (429, 418)),
    unanswered("hang", "hang", seconds=5),
    unanswered("slow-drip", "drip", seconds=2),
    unanswered("reset-in-the-middle", "reset"),
    unanswered("truncated-json", "truncated"),
    unanswered("html-with-200", "html"),
    Fault("empty-page", {"kind": "empty"}, lacking=True),
    Fault("short-page", {"kind": "short"}, lacking=True),
    Fault("missing-inner-rows", {"kind": "missing"}, lacking=True),
    Fault("duplicates", {"kind": "duplicated"}),
    Fault("unsorted", {"kind": "unsorted"}),
    rejected("off_grid", "off_grid"),
    rejected("nan", "not_finite"),
    rejected("negative", "not_positive"),
    rejected("high_below_low", "high_low"),
]


def context_of(
    database: Database,
    market: LocalMarket,
    case: Case,
    *others: Case,
    key: str = "premium",
    timeout: float = 5.0,
    archives: bool = False,
) -> Context:
    """The providers of the cases at the local market, with short timeouts and retry budgets."""
    options = {
        one.provider: resolve_options(
            one.provider,
            base_url=f"{market.url}/{one.market}",
            archive_url=market.archive_url if archives else None,
            key=key,
            retry_budget_seconds=0.3,
            longest_wait_seconds=0.3,
            timeout_seconds=timeout,
        )
        for one in (case, *others)
    }
    pool, limiter = RequestPool(5), ProcessLimiter({})
    providers = {name: build(name, one, pool, limiter, lambda: NOW) for name, one in options.items()}
    return Context(database, providers, lambda: NOW)


def hits(market: LocalMarket) -> int:
    """The number of requests that the planted faults affected."""
    planted: list[dict[str, int]] = requests.get(f"{market.url}/sim/faults", timeout=5).json()
    return sum(one["hits"] for one in planted)


def quarantined(database: Database) -> dict[str, int]:
    """Rows by reason."""
    with database.begin() as connection:
        rows = connection.exec_driver_sql("SELECT reason, count(*) FROM fks.quarantine GROUP BY reason")
        return {row[0]: row[1] for row in rows}


def accounted_for(database: Database, case: Case, truth: Candles, report: SyncReport) -> Candles:
    """The stored candles, checked: they equal the truth, and the report and the ledger account for the others."""
    stored = queries.read_candles(database, case.series, case.window)
    kept = truth.take(np.isin(truth.ts, stored.ts))
    assert np.array_equal(stored.ts, kept.ts)
    for name in PRICES:
        assert np.array_equal(getattr(stored, name), getattr(kept, name)), "stored candles equal the truth"
    gaps = queries.ledger_gaps(database, case.series, case.window)
    quiet = sum(gap.missing for gap in gaps if gap.status is GapStatus.NO_TRADE)
    absent = sum(gap.missing for gap in gaps if gap.status is not GapStatus.NO_TRADE)
    assert (report.stored, report.no_trade, report.missing) == (len(stored), quiet, absent)
    assert report.expected == len(stored) + quiet + absent, "candles that are not stored are in the ledger"
    assert all(gap.evidence for gap in gaps), "every gap has evidence"
    assert report.complete == (absent == 0 and not report.errors)
    part = part_states(database, case.series, {"": case.window})[""]
    assert (part.stored, part.no_trade, part.missing) == (len(stored), quiet, absent)
    return stored


@pytest.mark.parametrize(("case", "fault"), thinned(CASES, FAULTS, every=3))
def test_a_fault_is_never_stored_and_never_hidden(
    database: Database, market: LocalMarket, case: Case, fault: Fault
) -> None:
    truth = market.truth(case.market, case.series.symbol, case.series.timeframe, case.window)
    assert len(truth) > 20
    context = context_of(database, market, case, timeout=0.2 if fault.name in ("hang", "slow-drip") else 5)
    market.plant_fault(case.market, count=None, **fault.options)
    report = sync(context, case.series, case.window, [case.provider])
    assert hits(market), "the fault had an effect"
    stored = accounted_for(database, case, truth, report)
    gaps = queries.ledger_gaps(database, case.series, case.window)
    if fault.unanswered:
        assert (report.failed_batches, report.stored) == (report.total_batches, 0)
        assert len(report.errors) >= 1
        assert all(case.provider in error for error in report.errors)
        # Alpha Vantage responds to a rate limit as to a function that the key does not cover.
        unclear = (case.provider, fault.name) == ("alphavantage", "429-storm")
        assert {gap.status for gap in gaps} == {GapStatus.UNAVAILABLE if unclear else GapStatus.OPEN}
        assert {item.outcome for gap in gaps for item in gap.evidence} == {"refused" if unclear else "error"}
    elif fault.rejected and not report.errors:
        assert set(quarantined(database)) == fault.rejected
        assert len(stored) > 0
        # Candles that the second request does not repair are an open gap, with the reason.
        if len(stored) < len(truth):
            assert any(item.outcome == "rejected" for gap in gaps for item in gap.evidence)
            assert GapStatus.OPEN in {gap.status for gap in gaps}
    elif fault.lacking and not report.errors:
        assert report.failed_batches == 0
        assert GapStatus.OPEN not in {gap.status for gap in gaps}, "all have responded"
    else:
        assert stored.equals(truth) or report.errors
    market.clear_faults()
    # A gap that is no-trade by a response that looked complete is not retried automatically.
    healed = sync(
        context_of(database, market, case),
        case.series,
        case.window,
        [case.provider],
        recheck=True,
        scope=Scope.EVERYTHING if fault.lacking else Scope.MISSING,
    )
    assert (healed.failed_batches, healed.errors) == (0, ())
    assert accounted_for(database, case, truth, healed).equals(truth), "without the fault all of it is stored"


# Of Binance's archives: for any fault the daily files and REST have the candles.
ARCHIVE_FAULTS = [
    *(fault for fault in FAULTS if fault.name not in ("empty-page", "short-page", "missing-inner-rows")),
    Fault("zip-without-rows", {"kind": "empty"}),
    Fault("zip-without-a-day", {"kind": "missing", "start": "2024-05-10", "end": "2024-05-11"}),
    Fault("missing-inner-rows", {"kind": "missing"}),
    Fault("wrong-checksum", {"kind": "wrong_checksum"}),
    Fault("corrupt-zip", {"kind": "corrupt_zip"}),
    Fault("not-there", {"kind": "archive_404"}),
]
MAY = Case("binance", "binance", replace(BITCOIN, timeframe=Timeframe.M15), days("2024-05-01", "2024-06-01"))


@pytest.mark.parametrize(("fault", "path"), thinned(ARCHIVE_FAULTS, ["/monthly/", ".zip"], every=2))
def test_a_fault_of_an_archive_is_repaired(
    database: Database, market: LocalMarket, fault: Fault, path: str
) -> None:
    truth = market.truth("binance", "BTC/USDT", Timeframe.M15, MAY.window)
    market.plant_fault("archive", count=None, path=path, **fault.options)
    timeout = 0.2 if fault.name in ("hang", "slow-drip") else 5
    report = sync(
        context_of(database, market, MAY, timeout=timeout, archives=True), MAY.series, MAY.window, ["binance"]
    )
    assert hits(market), "the fault had an effect"
    assert accounted_for(database, MAY, truth, report).equals(truth)
    assert (report.complete, report.failed_batches) == (True, 0)


# Another market under the right name ----------------------------------------------------------------------

BESIDE = days("2024-06-06", "2024-06-08")


@pytest.mark.parametrize(
    "case",
    [
        Case("polygon", "polygon", BITCOIN, WEEK),
        Case("polygon", "polygon", EURO, WEEK),
        Case("oanda", "oanda", EURO, WEEK),
    ],
    ids=str,
)
def test_another_symbols_candles_beside_stored_ones_are_quarantined(
    database: Database, market: LocalMarket, case: Case
) -> None:
    """Of a first provider: its stored neighbours are requested, too."""
    before = replace(case, window=BESIDE)
    sync(context_of(database, market, before), before.series, before.window, [case.provider])
    after = replace(case, window=TimeRange(BESIDE.end, case.window.end))
    market.plant_fault(case.market, "other_symbol", count=None)
    report = sync(context_of(database, market, after), after.series, after.window, [case.provider])
    assert (report.stored, report.providers[case.provider].delivered) == (0, 0)
    assert quarantined(database) == {"splice": report.providers[case.provider].rejected}
    assert any("it quotes another market" in warning for warning in report.warnings)
    assert not report.complete
    market.clear_faults()
    healed = sync(
        context_of(database, market, after), after.series, after.window, [case.provider], recheck=True
    )
    truth = market.truth(case.market, case.series.symbol, case.series.timeframe, after.window)
    assert accounted_for(database, after, truth, healed).equals(truth)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (CASES[0], Case("polygon", "polygon", BITCOIN, WEEK)),
        (replace(COIN, provider="binance", market="binance"), COIN),
        (Case("polygon", "polygon", APPLE, WEEK), Case("yfinance", "yahoo", APPLE, WEEK)),
        (Case("polygon", "polygon", APPLE, WEEK), Case("alphavantage", "alphavantage", APPLE, WEEK)),
        (Case("oanda", "oanda", EURO, WEEK), Case("polygon", "polygon", EURO, WEEK)),
    ],
    ids=lambda case: str(case),
)
def test_candles_of_another_symbol_fill_no_gap(
    database: Database, market: LocalMarket, first: Case, second: Case
) -> None:
    """Of a fallback: it is compared with the candles beside the gap."""
    hole = days("2024-06-11", "2024-06-11").start
    market.plant_outage(first.market, TimeRange(hole + 12 * HOUR, hole + 20 * HOUR))
    market.plant_fault(second.market, "other_symbol", count=None)
    report = sync(
        context_of(database, market, first, second),
        first.series,
        first.window,
        [first.provider, second.provider],
    )
    assert report.providers[second.provider].delivered == 0
    assert report.providers[second.provider].rejected > 0
    assert set(quarantined(database)) == {"splice"}
    truth = market.truth(first.market, first.series.symbol, first.series.timeframe, first.window)
    assert accounted_for(database, first, truth, report).equals(truth)


# Pages of OANDA -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, None], ids=["once", "always"])
def test_candles_missing_between_two_pages_are_in_the_ledger(
    database: Database, market: LocalMarket, times: int | None
) -> None:
    """5,000 candles per page: the last ones of the first page and the first ones of the second are missing."""
    case = Case("oanda", "oanda", replace(EURO, timeframe=Timeframe.M1), days("2024-06-03", "2024-06-08"))
    truth = market.truth("oanda", "EUR/USD", Timeframe.M1, case.window)
    edge = case.window.start + PAGE_SIZE * 60_000_000
    skipped = TimeRange(edge - 10 * 60_000_000, edge + 10 * 60_000_000)
    market.plant_fault("oanda", "missing", count=times, start=iso(skipped.start), end=iso(skipped.end))
    report = sync(context_of(database, market, case), case.series, case.window, ["oanda"])
    assert hits(market)
    stored = accounted_for(database, case, truth, report)
    lost = truth.ts[~np.isin(truth.ts, stored.ts)]
    if times == 1:
        assert len(lost) == 0, "missing candles of a page are requested a second time"
    else:
        assert len(lost) > 15
        gaps = queries.ledger_gaps(database, case.series, case.window)
        assert all(any(gap.start <= ts < gap.end for gap in gaps) for ts in lost.tolist())


def test_candles_beyond_the_depth_of_all_providers_are_explained_without_a_request(
    database: Database, market: LocalMarket
) -> None:
    case = Case("yfinance", "yahoo", APPLE, days("2023-06-12", "2023-06-15"))
    context = context_of(database, market, case)
    sync(context, APPLE, WEEK, ["yfinance"])  # the listing time is known from here on
    market.reset_requests()
    report = sync(context, APPLE, case.window, ["yfinance"])
    assert market.requests() == 0
    assert report.errors == ("yfinance: it lies beyond its depth",)
    (gap,) = queries.ledger_gaps(database, APPLE, case.window)
    assert (gap.status, gap.missing) == (GapStatus.UNAVAILABLE, report.expected)


def test_a_free_key_delivers_its_range_after_a_refusal_of_older_batches(
    database: Database, market: LocalMarket
) -> None:
    """Alpha Vantage gives a free key the last 100 days; the batches of four years come before them."""
    case = Case(
        "alphavantage",
        "alphavantage",
        replace(APPLE, timeframe=Timeframe.D1),
        days("2020-06-01", "2024-06-15"),
    )
    context = replace(context_of(database, market, case, key="free"), batch_size_days=100)
    market.reset_requests()
    report = sync(context, case.series, case.window, ["alphavantage"])
    truth = market.truth("alphavantage", "AAPL", Timeframe.D1, case.window)
    stored = queries.read_candles(database, case.series, case.window)
    assert stored.equals(truth.take(slice(-100, None)))
    assert report.failed_batches == 0
    assert any("the last 100 days only" in warning for warning in report.warnings)
    assert market.requests() == 2, "one for the history, refused, and one for the last days"
    gaps = queries.ledger_gaps(database, case.series, case.window)
    assert sum(gap.missing for gap in gaps) == report.missing == report.expected - 100
    assert all("the last 100 days only" in gap.evidence[0].detail for gap in gaps)
