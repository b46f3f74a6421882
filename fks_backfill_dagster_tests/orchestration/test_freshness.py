"""Freshness in Dagster: the evaluations and materializations of a refresh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from dagster import (
    AssetCheckEvaluation,
    AssetCheckKey,
    AssetCheckResult,
    AssetCheckSeverity,
    AssetKey,
    DagsterEventType,
    DagsterInstance,
    ExecuteInProcessResult,
)

from fks_backfill_dagster.app import freshness_rule, now
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import (
    MICROS_PER_DAY,
    MICROS_PER_HOUR,
    MICROS_PER_MINUTE,
    Timeframe,
    to_datetime,
)
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.checks import evaluate
from fks_backfill_dagster.orchestration.freshness import FRESHNESS, events_to_log
from fks_backfill_dagster.orchestration.groups import groups_of
from fks_backfill_dagster.orchestration.resources import ProviderResource, TimescaleDB
from fks_backfill_dagster.pipeline.coverage import coverage
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import ProviderPriority, Providers, SymbolSettings
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project
from fks_backfill_dagster_tests.orchestration.test_assets import plant_failure
from fks_backfill_dagster_tests.store.builders import execute

SYMBOLS = ("BTC/USDT", "ETH/USDT")
QUARTER = 15 * MICROS_PER_MINUTE


@pytest.fixture
def kept(project: MakeProject) -> Project:
    """Two 15m series, stored up to now."""
    start = to_datetime(now() - 3 * MICROS_PER_DAY)
    mine = project(*SYMBOLS, start=f"{start:%Y-%m-01}")
    assert refresh(mine).success
    return mine


def refresh(project: Project, *symbols: str, frame: str = "15m") -> ExecuteInProcessResult:
    """The run that a tick requests: assets without their checks, over the newest two partitions."""
    keys = frozenset(project.key(name, frame) for name in symbols or project.catalog.match_symbols())
    job = project.definitions.resolve_job_def("ohlcv_months").get_subset(
        asset_selection=keys, asset_check_selection=frozenset()
    )
    partitions = project.definitions.resolve_asset_graph().get(next(iter(keys))).partitions_def
    assert partitions is not None
    last = partitions.get_partition_keys()[-2:]
    tags = {
        "fks/refresh": frame,
        "dagster/asset_partition_range_start": last[0],
        "dagster/asset_partition_range_end": last[-1],
    }
    return job.execute_in_process(instance=project.instance, tags=tags, raise_on_error=False)


def cut_back(database: Database, candles: int, *symbols: str) -> int:
    """Removes the last 15m candles and their coverage, as if no refresh had run. Returns the new end."""
    cut = (now() // QUARTER - candles) * QUARTER
    moment = to_datetime(cut).isoformat()
    for symbol in symbols or SYMBOLS:
        series = f"(SELECT id FROM fks.series WHERE symbol = '{symbol}')"
        execute(
            database,
            f"DELETE FROM fks.\"candles_15m\" WHERE ts >= '{moment}' AND series_id = {series}",
            f"UPDATE fks.sync_state SET synced = synced * tstzmultirange(tstzrange(NULL, '{moment}')),"
            f' newest = (SELECT max(ts) FROM fks."candles_15m" WHERE series_id = {series}),'
            f' total_candles = (SELECT count(*) FROM fks."candles_15m" WHERE series_id = {series})'
            f" WHERE series_id = {series}",
        )
    return cut


def evaluations(project: Project, done: ExecuteInProcessResult) -> dict[str, AssetCheckEvaluation]:
    """The run's evaluations in Dagster's event log; the result object omits those before a failure."""
    logged = project.instance.all_logs(done.run_id, of_type=DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [entry.dagster_event.asset_check_evaluation_data for entry in logged if entry.dagster_event]
    assert {one.check_name for one in found} <= {FRESHNESS}
    assert len({one.asset_key for one in found}) == len(found), "one per series"
    return {one.asset_key.path[1]: one for one in found}


def materialized(project: Project, done: ExecuteInProcessResult) -> set[str]:
    logged = project.instance.all_logs(done.run_id, of_type=DagsterEventType.ASSET_MATERIALIZATION)
    keys = {entry.dagster_event.asset_key for entry in logged if entry.dagster_event}
    return {key.path[1] for key in keys if key is not None}


def outcome(evaluation: AssetCheckEvaluation) -> tuple[bool, AssetCheckSeverity | None]:
    return evaluation.passed, None if evaluation.passed else evaluation.severity


def test_a_refresh_logs_once_that_its_series_are_fresh(project: MakeProject, database: Database) -> None:
    start = to_datetime(now() - 3 * MICROS_PER_DAY)
    mine = project(*SYMBOLS, start=f"{start:%Y-%m-01}")
    began = now()
    first = evaluations(mine, refresh(mine))
    assert {symbol: one.passed for symbol, one in first.items()} == {"BTC_USDT": True, "ETH_USDT": True}
    newest = first["BTC_USDT"].metadata["newest"].value
    # A quarter may have ended within the grace, or while the refresh ran.
    possible = {at // QUARTER * QUARTER - QUARTER for at in (began - GRACE, now())}
    assert newest in {to_datetime(ts).isoformat() for ts in possible}
    assert first["BTC_USDT"].metadata["lag"].value in (0, 1)
    again = refresh(mine)
    assert evaluations(mine, again) == {}, "nothing has changed, and the last one is not an hour old"
    assert materialized(mine, again) == {"BTC_USDT", "ETH_USDT"}, (
        "no candle was due, so the series are materialized"
    )


def test_a_refresh_without_due_candles_materializes_nothing(
    kept: Project, market: LocalMarket, database: Database
) -> None:
    """The provider responds without the candles: no error, and the run succeeds."""
    cut = cut_back(database, 20, "BTC/USDT")
    market.plant_outage("binance", TimeRange(cut, now() + MICROS_PER_DAY), "BTCUSDT")
    done = refresh(kept)
    assert done.success
    assert materialized(kept, done) == {"ETH_USDT"}
    found = evaluations(kept, done)
    assert {symbol: outcome(one) for symbol, one in found.items()} == {
        "BTC_USDT": (False, AssetCheckSeverity.ERROR)
    }
    assert found["BTC_USDT"].metadata["lag"].value in (19, 20, 21)  # as a quarter ends
    assert found["BTC_USDT"].metadata["allowed"].value == 1
    # The result is the same at the next tick and is not logged again.
    assert evaluations(kept, refresh(kept)) == {}
    market.clear_outages()
    execute(database, "UPDATE fks.gap SET next_attempt_at = '2024-01-01T00:00Z'")
    recovered = refresh(kept)
    assert materialized(kept, recovered) == {"BTC_USDT", "ETH_USDT"}
    assert outcome(evaluations(kept, recovered)["BTC_USDT"]) == (True, None)


@pytest.mark.parametrize(
    ("candles", "severity"), [(20, AssetCheckSeverity.ERROR), (7, AssetCheckSeverity.WARN)]
)
def test_a_failed_refresh_logs_stale_series(
    kept: Project, market: LocalMarket, database: Database, candles: int, severity: AssetCheckSeverity
) -> None:
    cut = cut_back(database, candles)
    plant_failure(
        market,
        "ETHUSDT",
        to_datetime(cut - MICROS_PER_DAY).isoformat(),
        to_datetime(now() + MICROS_PER_DAY).isoformat(),
    )
    done = refresh(kept)
    assert not done.success, "the run of a refresh without a response fails"
    assert materialized(kept, done) == {"BTC_USDT"}
    assert {symbol: outcome(one) for symbol, one in evaluations(kept, done).items()} == {
        "ETH_USDT": (False, severity)
    }
    market.clear_faults()
    again = refresh(kept)
    assert again.success
    assert materialized(kept, again) == {"BTC_USDT", "ETH_USDT"}
    assert outcome(evaluations(kept, again)["ETH_USDT"]) == (True, None)


def test_a_series_without_any_candle_is_not_fresh(project: MakeProject, market: LocalMarket) -> None:
    start = to_datetime(now() - 3 * MICROS_PER_DAY)
    mine = project(*SYMBOLS, start=f"{start:%Y-%m-01}")
    market.plant_fault("binance", "status", count=None, status=503, seconds=0)
    market.plant_fault("archive", "status", count=None, status=503, seconds=0)
    done = refresh(mine)
    assert not done.success
    assert materialized(mine, done) == set()
    assert {one.passed for one in evaluations(mine, done).values()} == {False}


# Rarely traded symbols --------------------------------------------------------------------------------------


@pytest.fixture
def traded(database_url: str, tmp_path: Path) -> Iterator[Callable[[float, int], Project]]:
    """`traded(share, silent)`: a 1m series of Polygon with trades in that share of the minutes, without trades in the
    last `silent` ones."""
    with ExitStack() as stack:

        def make(share: float, silent: int) -> Project:
            last = now() // MICROS_PER_MINUTE * MICROS_PER_MINUTE - (silent + 1) * MICROS_PER_MINUTE
            opens = np.arange(last - MICROS_PER_DAY, last + 1, MICROS_PER_MINUTE)
            traded_opens = opens[
                (np.random.default_rng(5).random(len(opens)) < share) | np.isin(opens, [opens[0], last])
            ]
            rows = "".join(
                f"{to_datetime(ts):%Y-%m-%dT%H:%M:%SZ},100,101,99,100.5,3\n" for ts in traded_opens.tolist()
            )
            (tmp_path / "coinbase").mkdir()
            (tmp_path / "coinbase/THINUSD-1m.csv").write_text(f"ts,open,high,low,close,volume\n{rows}")
            market = stack.enter_context(LocalMarket(MarketConfig(limits=False, replay=tmp_path)))
            settings = Settings(
                symbols=(
                    SymbolSettings(
                        asset_class=AssetClass.CRYPTO, symbol="THIN/USD", timeframes=(Timeframe.M1,)
                    ),
                ),
                history_start=f"{to_datetime(last - MICROS_PER_DAY):%Y-%m-01}",  # type: ignore[arg-type]
                provider_priority=ProviderPriority(crypto=("polygon",)),
                keys={"polygon": "any"},  # type: ignore[dict-item]
                providers=Providers.model_validate({"polygon": {"requests_per_minute": 6000}}),
            )
            overrides = {
                "timescaledb": TimescaleDB(url=database_url),
                "polygon": ProviderResource(provider="polygon", base_url=market.polygon_url),
            }
            instance = stack.enter_context(DagsterInstance.ephemeral())
            return Project(settings, build_defs(settings=settings, resource_overrides=overrides), instance)

        yield make


@pytest.mark.parametrize(("share", "silent", "quiet"), [(0.2, 20, True), (0.995, 40, False)])
def test_a_rarely_traded_symbol_is_fresh_without_a_new_candle(
    traded: Callable[[float, int], Project], database: Database, share: float, silent: int, quiet: bool
) -> None:
    mine = traded(share, silent)
    series, key = mine.series("THIN/USD", "1m"), mine.key("THIN/USD", "1m")
    first = refresh(mine, frame="1m")
    assert materialized(mine, first) == {"THIN_USD"}, "it has stored the candles of a day"
    found = evaluations(mine, first)["THIN_USD"]
    assert outcome(found) == ((True, None) if quiet else (False, AssetCheckSeverity.ERROR))
    lag = found.metadata["lag"].value
    assert lag == 0 if quiet else lag in range(silent - 2, silent + 4)
    again = refresh(mine, frame="1m")
    assert again.success
    assert materialized(mine, again) == ({"THIN_USD"} if quiet else set())
    (status,) = queries.sync_status(database, series)
    assert status.status == "completed"
    (group,) = groups_of(mine.catalog)
    checks = evaluate(
        database, group, mine.settings, {AssetCheckKey(key, name) for name in ("completeness", FRESHNESS)}
    )
    assert {one.check_name: one.passed for one in checks} == {"completeness": quiet, FRESHNESS: quiet}
    (one,) = coverage(database, [series], now(), freshness_rule(mine.settings))
    assert (one.problem() is None) is quiet


# Logged results ---------------------------------------------------------------------------------------------


def result(passed: bool, severity: AssetCheckSeverity = AssetCheckSeverity.WARN) -> AssetCheckResult:
    return AssetCheckResult(asset_key=KEY, check_name=FRESHNESS, passed=passed, severity=severity)


KEY = AssetKey(["ohlcv", "BTC_USDT", "15m"])
GOOD, LATE, STALE = result(True), result(False), result(False, AssetCheckSeverity.ERROR)


@pytest.mark.parametrize(
    ("last", "next_", "minutes", "logged"),
    [
        (GOOD, GOOD, 15, False),
        (GOOD, GOOD, 30, False),
        (GOOD, GOOD, 45, True),  # it would be older than an hour at the next tick
        (GOOD, GOOD, 600, True),
        (GOOD, LATE, 1, True),
        (LATE, GOOD, 1, True),
        (LATE, LATE, 15, False),
        (LATE, STALE, 15, True),
        (STALE, LATE, 15, True),
        (STALE, STALE, 15, False),
        (GOOD, GOOD, -60, True),  # the clock was set back
    ],
)
def test_changed_results_are_logged_and_each_result_once_an_hour(
    last: AssetCheckResult, next_: AssetCheckResult, minutes: int, logged: bool
) -> None:
    wanted = {KEY: Series("BTC/USDT", Timeframe.M15, AssetClass.CRYPTO)}
    with DagsterInstance.ephemeral() as instance:
        (event,) = events_to_log(instance, [last], wanted, now())
        instance.report_runless_asset_event(event)
        found = events_to_log(instance, [next_], wanted, now() + minutes * MICROS_PER_MINUTE)
        assert bool(found) is logged


def test_a_timeframe_that_is_polled_hourly_is_logged_at_every_tick() -> None:
    hourly = {KEY: Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)}
    with DagsterInstance.ephemeral() as instance:
        (event,) = events_to_log(instance, [GOOD], hourly, now())
        instance.report_runless_asset_event(event)
        assert events_to_log(instance, [GOOD], hourly, now() + MICROS_PER_HOUR - MICROS_PER_MINUTE)


def test_a_planned_check_without_a_result_does_not_count(kept: Project, database: Database) -> None:
    """A killed run of checks leaves a planned check without a result."""
    series = {kept.key("BTC/USDT", "15m"): kept.series("BTC/USDT", "15m")}
    key = AssetCheckKey(next(iter(series)), FRESHNESS)
    passed = AssetCheckResult(asset_key=key.asset_key, check_name=FRESHNESS, passed=True)
    assert events_to_log(kept.instance, [passed], series, now()) == []
    job = kept.definitions.resolve_job_def("ohlcv_checks").get_subset(asset_check_selection=frozenset([key]))
    kept.instance.create_run_for_job(job)
    assert events_to_log(kept.instance, [passed], series, now()) != []
