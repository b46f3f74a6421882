"""The schedules: series refreshed by a tick, and the runs of a refresh."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    DefaultScheduleStatus,
    RunRequest,
    build_schedule_context,
)

from fks_backfill_dagster.app import now
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_datetime
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.groups import groups_of
from fks_backfill_dagster.orchestration.schedules import check_requests, refresh_requests, unfinished
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import Automation, SymbolSettings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import read_candles
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project, settings_of
from fks_backfill_dagster_tests.orchestration.test_assets import metadata_of, statuses
from fks_backfill_dagster_tests.store.builders import execute


def requests_at(settings: Settings, database: Database, frame: str, at: str) -> list[RunRequest]:
    (group,) = [group for group in groups_of(Catalog(settings)) if group.timeframe.value == frame]
    moment = datetime.fromisoformat(at).replace(tzinfo=UTC)
    return list(refresh_requests(Timeframe(frame), group.series, Catalog(settings), database, moment))


def pretend_synced(database: Database, symbol: str, timeframe: str, start: str, end: str) -> None:
    execute(
        database,
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar)"
        f" VALUES ('{symbol}', '{timeframe}', 'crypto', 'XNYS')",
        f"INSERT INTO fks.sync_state (series_id, synced) SELECT id, '{{[{start}Z, {end}Z)}}'"
        f" FROM fks.series WHERE symbol = '{symbol}' AND timeframe = '{timeframe}'",
    )


def spans(requests: list[RunRequest]) -> dict[tuple[str, str], list[str]]:
    """The symbols by first and last partition."""
    return {
        (
            request.tags["dagster/asset_partition_range_start"],
            request.tags["dagster/asset_partition_range_end"],
        ): [key.path[1] for key in request.asset_selection or ()]
        for request in requests
    }


def test_a_run_takes_fifty_series_at_most(database: Database) -> None:
    settings = settings_of(*(f"C{n}/USDT" for n in range(120)))
    found = requests_at(settings, database, "1h", "2024-03-10T12:05")
    assert [len(request.asset_selection or ()) for request in found] == [50, 50, 20]
    assert len({request.run_key for request in found}) == 3
    assert {request.tags[cadence.PRIORITY] for request in found} == {"10"}
    (config,) = {str(request.run_config) for request in found}
    assert config == "{'ops': {'ohlcv_crypto_1h': {'config': {'mode': 'refresh'}}}}"


def test_asset_classes_are_refreshed_by_separate_runs(database: Database) -> None:
    """Even for one timeframe and partition, a run of one class must not wait for providers of another."""
    classes = {"BTC/USDT": AssetClass.CRYPTO, "AAPL": AssetClass.STOCKS, "EUR/USD": AssetClass.FOREX}
    classes |= {"ETH/USDT": AssetClass.CRYPTO}
    entries = [
        SymbolSettings(asset_class=one, symbol=symbol, timeframes=(Timeframe.H1,))
        for symbol, one in classes.items()
    ]
    settings = Settings(symbols=tuple(entries))
    series = {key: one for group in groups_of(Catalog(settings)) for key, one in group.series.items()}
    moment = datetime(2024, 3, 12, 0, 6, tzinfo=UTC)
    found = list(refresh_requests(Timeframe.H1, series, Catalog(settings), database, moment))
    assert sorted(sorted(key.path[1] for key in request.asset_selection or ()) for request in found) == [
        ["AAPL"],
        ["BTC_USDT", "ETH_USDT"],
        ["EUR_USD"],
    ]
    assert len({request.run_key for request in found}) == 3


def test_only_series_with_new_candles_are_refreshed(database: Database) -> None:
    settings = settings_of("BTC/USDT", "ETH/USDT")
    pretend_synced(database, "BTC/USDT", "1h", "2024-01-01", "2024-03-10T12:00")
    pretend_synced(database, "ETH/USDT", "1h", "2024-01-01", "2024-03-10T11:00")
    found = requests_at(settings, database, "1h", "2024-03-10T12:05")
    assert spans(found) == {("2024-01-01", "2024-01-01"): ["ETH_USDT"]}
    assert spans(requests_at(settings, database, "1h", "2024-03-10T13:05")) == {
        ("2024-01-01", "2024-01-01"): ["BTC_USDT", "ETH_USDT"]
    }


def test_the_previous_partition_is_included_until_it_is_settled(database: Database) -> None:
    settings = settings_of("BTC/USDT", "ETH/USDT")
    pretend_synced(database, "BTC/USDT", "15m", "2024-01-01", "2024-02-29T23:45")
    pretend_synced(database, "ETH/USDT", "15m", "2024-01-01", "2024-03-01T02:00")
    assert spans(requests_at(settings, database, "15m", "2024-03-01T02:16")) == {
        ("2024-02-01", "2024-03-01"): ["BTC_USDT"],
        ("2024-03-01", "2024-03-01"): ["ETH_USDT"],
    }


def test_a_new_series_gets_the_current_and_the_previous_partition(database: Database) -> None:
    settings = settings_of("BTC/USDT", start="2020-01-01")
    assert list(spans(requests_at(settings, database, "15m", "2024-03-10T12:01"))) == [
        ("2024-02-01", "2024-03-01")
    ]
    assert list(spans(requests_at(settings, database, "1h", "2024-03-10T12:05"))) == [
        ("2023-01-01", "2024-01-01")
    ]


def test_the_first_tick_of_a_day_refreshes_all(database: Database) -> None:
    settings = settings_of("BTC/USDT")
    pretend_synced(database, "BTC/USDT", "1h", "2024-01-01", "2024-03-10T00:00")
    assert spans(requests_at(settings, database, "1h", "2024-03-10T00:05")) == {
        ("2024-01-01", "2024-01-01"): ["BTC_USDT"]
    }


def test_a_series_with_an_unfinished_refresh_is_skipped(
    project: MakeProject, resources: dict[str, Any], tmp_path: Path
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    key = mine.key("BTC/USDT", "1h")
    schedule = mine.definitions.resolve_schedule_def("refresh_1h")
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.create_run_for_job(
            mine.definitions.resolve_job_def("ohlcv_years"),
            asset_selection=frozenset([key]),
            tags={"fks/refresh": "1h"},
            status=DagsterRunStatus.STARTED,
        )
        assert unfinished(instance, {"fks/refresh": "1h"}) == {key}
        with build_schedule_context(
            instance=instance, scheduled_execution_time=datetime.now(UTC), resources=resources
        ) as context:
            (request,) = schedule.evaluate_tick(context).run_requests or []
    assert request.asset_selection == [mine.key("ETH/USDT", "1h")]


def refresh(project: Project, database: Database, timeframe: str, at: int) -> bool:
    """Executes the runs that a tick at `at` requests, in this process. Returns whether there were any."""
    found = requests_at(project.settings, database, timeframe, to_datetime(at).isoformat()[:19])
    for request in found:
        done = project.definitions.resolve_implicit_global_asset_job_def().execute_in_process(
            instance=project.instance,
            asset_selection=list(request.asset_selection or ()),
            run_config=request.run_config,
            tags=dict(request.tags),
            raise_on_error=False,
        )
        assert done.success
    return bool(found)


def test_a_refresh_fetches_only_new_candles(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    present = now()
    start = to_datetime(present - 3 * MICROS_PER_DAY)
    mine = project("BTC/USDT", start=f"{start:%Y-%m-01}")
    assert refresh(mine, database, "15m", present)
    key, series = mine.key("BTC/USDT", "15m"), mine.series("BTC/USDT", "15m")
    running = f"{to_datetime(present):%Y-%m-01}"
    numbers = metadata_of(mine.instance, key)[running]
    assert numbers["missing"] == 0
    assert numbers["stored"] == numbers["expected"] > 0
    # The last two hours are removed from candles and coverage: only they are requested again.
    cut = (present // (900 * 10**6) - 8) * 900 * 10**6
    execute(
        database,
        f"DELETE FROM fks.\"candles_15m\" WHERE ts >= '{to_datetime(cut).isoformat()}'",
        "UPDATE fks.sync_state SET synced = synced * tstzmultirange(tstzrange(NULL, "
        f"'{to_datetime(cut).isoformat()}'))",
    )
    market.reset_requests()
    assert refresh(mine, database, "15m", present)
    assert market.requests() == 1
    window = TimeRange(cut, present)
    stored, truth = (
        read_candles(database, series, window),
        market.truth("binance", "BTCUSDT", series.timeframe, window),
    )
    assert stored.ts.tolist()[:8] == truth.ts.tolist()[:8]
    assert statuses(mine, key, running) == {running: "MATERIALIZED"}


def test_the_daily_checks_cover_synced_series(database: Database) -> None:
    settings = settings_of("BTC/USDT", "ETH/USDT")
    pretend_synced(database, "ETH/USDT", "1h", "2024-01-01", "2024-03-10T12:00")
    (request,) = check_requests(groups_of(Catalog(settings)), database)
    assert request.asset_selection == []
    assert [(key.asset_key.path[1], key.name) for key in request.asset_check_keys or ()] == [
        ("ETH_USDT", "ohlc_sanity"),
        ("ETH_USDT", "completeness"),
        ("ETH_USDT", "data_freshness"),
    ]


def running_schedules(settings: Settings) -> set[str]:
    schedules = build_defs(settings=settings).schedules or []
    return {
        schedule.name for schedule in schedules if schedule.default_status is DefaultScheduleStatus.RUNNING
    }


def test_all_schedules_run_by_default_and_each_can_be_switched_off() -> None:
    settings = settings_of("BTC/USDT")
    assert running_schedules(settings) == {
        "refresh_15m",
        "refresh_1h",
        "checks_daily",
        "housekeeping_daily",
        "audit",
    }
    off = Automation(refresh=(Timeframe.H1,), checks=False, audit=False, housekeeping=False)
    assert running_schedules(settings.model_copy(update={"automation": off})) == {"refresh_1h"}


@pytest.mark.parametrize("frame", list(Timeframe))
def test_a_refreshed_series_is_not_stale(frame: Timeframe) -> None:
    policy = cadence.freshness(settings_of("BTC/USDT").symbols[0].asset_class, frame)
    warn, fail = policy.warn_window, policy.fail_window  # type: ignore[attr-defined]
    assert cadence.interval(frame) < warn.to_timedelta() < fail.to_timedelta()
