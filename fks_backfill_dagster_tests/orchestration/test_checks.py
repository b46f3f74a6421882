"""The checks: of whole series, in bulk, run alone, and without fetching."""

from __future__ import annotations

from typing import Any

import pytest
from dagster import (
    AssetCheckEvaluation,
    AssetCheckKey,
    AssetCheckSeverity,
    AssetSelection,
    ExecuteInProcessResult,
)

from fks_backfill_dagster.app import now
from fks_backfill_dagster.domain.freshness import recent_start
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, to_datetime
from fks_backfill_dagster.orchestration.checks import COMPLETENESS, MOST_GAPS, evaluate
from fks_backfill_dagster.orchestration.groups import asset_key, groups_of
from fks_backfill_dagster.pipeline.calendars import keep_calendar
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import SymbolSettings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import ledger_gaps
from fks_backfill_dagster.store.reaches import recent_missing
from fks_backfill_dagster_tests.calendars import Update, update
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project
from fks_backfill_dagster_tests.orchestration.test_assets import plant_failure
from fks_backfill_dagster_tests.store.builders import Shelf, execute

__all__ = ["update"]


def run_checks(project: Project, *checks: AssetCheckKey) -> ExecuteInProcessResult:
    """Runs only the checks, as the button of the UI does."""
    from dagster import define_asset_job

    job = define_asset_job("alone", AssetSelection.checks(*checks))
    repository = type(project.definitions).merge(project.definitions, _with_job(job)).get_repository_def()
    return repository.get_job("alone").execute_in_process(instance=project.instance)


def _with_job(job: Any) -> Any:
    from dagster import Definitions

    return Definitions(jobs=[job])


def outcomes(done: ExecuteInProcessResult) -> dict[tuple[str, str], bool]:
    return {(e.asset_key.path[1], e.check_name): e.passed for e in done.get_asset_check_evaluations()}


def metadata(done: ExecuteInProcessResult, symbol: str, name: str) -> dict[str, Any]:
    (found,) = [
        e for e in done.get_asset_check_evaluations() if (e.asset_key.path[1], e.check_name) == (symbol, name)
    ]
    return {key: value.value for key, value in found.metadata.items()}


@pytest.fixture
def stored(project: MakeProject) -> Project:
    """Two series with two months of 15m candles each."""
    mine = project("BTC/USDT", "ETH/USDT")
    assert mine.materialize("15m", "2024-01-01", "2024-02-01").success
    return mine


def every(project: Project) -> list[AssetCheckKey]:
    return [
        AssetCheckKey(project.key(symbol, "15m"), name)
        for symbol in ("BTC/USDT", "ETH/USDT")
        for name in ("ohlc_sanity", "completeness", "data_freshness")
    ]


def test_whole_series_pass_and_nothing_is_fetched(stored: Project, market: LocalMarket) -> None:
    market.reset_requests()
    done = run_checks(stored, *every(stored))
    assert outcomes(done) == {
        ("BTC_USDT", "ohlc_sanity"): True,
        ("BTC_USDT", "completeness"): True,
        ("BTC_USDT", "data_freshness"): False,  # nothing since February 2024
        ("ETH_USDT", "ohlc_sanity"): True,
        ("ETH_USDT", "completeness"): True,
        ("ETH_USDT", "data_freshness"): False,
    }
    assert market.requests() == 0
    assert metadata(done, "BTC_USDT", "completeness") == {
        "expected": 5760,
        "stored": 5760,
        "missing": 0,
        "explained": 0,
        "no_trade": 0,
        "recent_missing": 0,
        "open_gaps": 0,
        "coverage": 1.0,
        "failed_partitions": [],
    }


def test_a_single_check_can_be_run(stored: Project) -> None:
    done = run_checks(stored, AssetCheckKey(stored.key("ETH/USDT", "15m"), "ohlc_sanity"))
    assert outcomes(done) == {("ETH_USDT", "ohlc_sanity"): True}


def test_an_invalid_candle_is_found_for_each_rule(stored: Project, database: Database) -> None:
    table, where = 'fks."candles_15m"', "series_id = (SELECT id FROM fks.series WHERE symbol = 'ETH/USDT')"
    execute(
        database,
        f"UPDATE {table} SET high = low - 1 WHERE {where} AND ts = '2024-01-03T00:00Z'",
        f"UPDATE {table} SET volume = -1 WHERE {where} AND ts = '2024-01-04T00:00Z'",
        f"UPDATE {table} SET open = 'NaN' WHERE {where} AND ts = '2024-01-05T00:00Z'",
        f"UPDATE {table} SET low = 0 WHERE {where} AND ts = '2024-01-06T00:00Z'",
    )
    done = run_checks(stored, *every(stored))
    assert outcomes(done)["ETH_USDT", "ohlc_sanity"] is False
    assert outcomes(done)["BTC_USDT", "ohlc_sanity"] is True
    found = metadata(done, "ETH_USDT", "ohlc_sanity")
    assert found["candles"] == 5760
    assert found["bad_volume"] == found["not_finite"] == found["not_positive"] == 1
    assert found["high_low"] == 2  # a NaN open is above its high
    assert found["first"] == "2024-01-03T00:00:00+00:00"
    assert found["failed_partitions"] == {"2024-01-01": 4}


def test_an_open_gap_of_any_month_fails_the_series_until_it_is_filled(
    project: MakeProject, market: LocalMarket
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    plant_failure(market, "BTCUSDT", "2024-01-10T00:00", "2024-01-10T06:00")
    assert not mine.materialize("15m", "2024-01-01").success
    alone = run_checks(mine, AssetCheckKey(mine.key("BTC/USDT", "15m"), "completeness"))
    assert outcomes(alone) == {("BTC_USDT", "completeness"): False}
    february = mine.materialize("15m", "2024-02-01")
    assert outcomes(february)["BTC_USDT", "completeness"] is False
    found = metadata(february, "BTC_USDT", "completeness")
    assert found["expected"] == 5760
    assert found["open_gaps"] > 0
    assert found["stored"] + found["missing"] == 5760
    assert found["coverage"] == pytest.approx(found["stored"] / 5760)
    assert found["failed_partitions"] == ["2024-01-01"]
    market.clear_faults()
    filled = mine.materialize("15m", "2024-01-01")
    assert outcomes(filled)["BTC_USDT", "completeness"] is True
    assert metadata(filled, "BTC_USDT", "completeness")["failed_partitions"] == []


def shown(project: Project) -> dict[tuple[str, str], AssetCheckEvaluation]:
    """The newest evaluations, as shown on the pages of the series."""
    storage = project.instance.event_log_storage
    latest = storage.get_latest_asset_check_execution_by_key(every(project))
    found = {(key.asset_key.path[1], key.name): record.evaluation for key, record in latest.items()}
    return {key: evaluation for key, evaluation in found.items() if evaluation is not None}


def test_a_failed_run_evaluates_its_checks(project: MakeProject, market: LocalMarket) -> None:
    """Dagster skips the op of the checks after a failure and would show every series of the run as failed."""
    mine = project("BTC/USDT", "ETH/USDT")
    plant_failure(market, "ETHUSDT", "2024-02-01", "2024-03-01")
    assert not mine.materialize("15m", "2024-01-01", "2024-02-01").success
    assert {key: evaluation.passed for key, evaluation in shown(mine).items()} == {
        ("BTC_USDT", "ohlc_sanity"): True,
        ("BTC_USDT", "completeness"): True,
        ("ETH_USDT", "ohlc_sanity"): True,
        ("ETH_USDT", "completeness"): False,
        ("BTC_USDT", "data_freshness"): False,
        ("ETH_USDT", "data_freshness"): False,
    }
    evaluation = shown(mine)["ETH_USDT", "completeness"]
    assert evaluation.metadata["failed_partitions"].value == ["2024-02-01"]
    assert evaluation.severity is AssetCheckSeverity.WARN


def test_a_failed_run_without_checks_evaluates_none(project: MakeProject, market: LocalMarket) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    plant_failure(market, "BTCUSDT", "2024-01-01", "2024-02-01")
    # Like the run of a refresh: assets without checks.
    job = mine.definitions.resolve_job_def("ohlcv_months").get_subset(
        asset_selection=frozenset(mine.key(symbol, "15m") for symbol in ("BTC/USDT", "ETH/USDT")),
        asset_check_selection=frozenset(),
    )
    done = job.execute_in_process(instance=mine.instance, partition_key="2024-01-01", raise_on_error=False)
    assert not done.success
    assert shown(mine) == {}


def test_a_series_that_was_never_synced_is_pending(project: MakeProject) -> None:
    """No gap and no invalid candle; not fresh, because no candle is stored."""
    mine = project("BTC/USDT", "ETH/USDT")
    done = run_checks(mine, *every(mine))
    passed = {name: passed for (symbol, name), passed in outcomes(done).items() if symbol == "BTC_USDT"}
    assert passed == {"ohlc_sanity": True, "completeness": True, "data_freshness": False}
    assert metadata(done, "BTC_USDT", "completeness")["expected"] == 0
    assert metadata(done, "BTC_USDT", "data_freshness")["lag"] is None
    assert descriptions(done)["BTC_USDT", "data_freshness"] == (
        "Never synced: no candle is stored.",
        AssetCheckSeverity.WARN,
    )


# Descriptions and tables ---------------------------------------------------------------------------------------


def descriptions(
    done: ExecuteInProcessResult,
) -> dict[tuple[str, str], tuple[str | None, AssetCheckSeverity]]:
    return {
        (e.asset_key.path[1], e.check_name): (e.description, e.severity)
        for e in done.get_asset_check_evaluations()
    }


def test_every_result_has_a_description_of_one_sentence(stored: Project, database: Database) -> None:
    execute(
        database,
        "UPDATE fks.\"candles_15m\" SET high = low - 1 WHERE ts = '2024-01-03T00:00Z'"
        " AND series_id = (SELECT id FROM fks.series WHERE symbol = 'ETH/USDT')",
    )
    texts = {key: text for key, (text, _) in descriptions(run_checks(stored, *every(stored))).items()}
    assert texts["BTC_USDT", "ohlc_sanity"] == "All 5,760 stored candles are valid."
    assert texts["ETH_USDT", "ohlc_sanity"] == "1 of 5,760 candles are invalid."
    assert texts["BTC_USDT", "completeness"] == "All 5,760 expected candles are stored."
    newest = "allowed: the newest candle opens at 2024-02-29 23:45."
    assert (texts["BTC_USDT", "data_freshness"] or "").endswith(newest)


def test_gaps_are_a_table_open_ones_first_and_bounded(stored: Project, database: Database) -> None:
    """Open gaps first, then the newest; at most MOST_GAPS."""
    series = "(SELECT id FROM fks.series WHERE symbol = 'BTC/USDT')"
    execute(
        database,
        f'DELETE FROM fks."candles_15m" WHERE series_id = {series} AND extract(minute FROM ts) = 15'
        " AND ts < '2024-01-03T00:00Z'",
        "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
        f" SELECT {series}, t, t + interval '15 minutes', 1, CASE WHEN t < '2024-01-01T02:00Z' THEN 'open'"
        '   ELSE \'unavailable\' END, 1, CAST(\'[{"provider": "binance", "asked_at":'
        ' "2024-01-05T00:00:00+00:00", "outcome": "absent"}]\' AS jsonb)'
        " FROM generate_series(timestamptz '2024-01-01T00:15Z', '2024-01-02T23:15Z', interval '1 hour') t",
    )
    done = run_checks(stored, *every(stored))
    table = metadata(done, "BTC_USDT", "completeness")["gaps"]
    rows = [dict(record.data) for record in table.records]
    assert len(rows) == MOST_GAPS < 48
    assert rows[0] == {
        "start": "2024-01-01 01:15",
        "end": "2024-01-01 01:30",
        "missing": 1,
        "status": "open",
        "evidence": "binance: absent",
    }
    assert [row["start"][-5:] for row in rows[:4]] == ["01:15", "00:15", "23:15", "22:15"]
    text, severity = descriptions(done)["BTC_USDT", "completeness"]
    assert text == "2 open gaps with 2 candles; 5,712 of 5,760 expected candles are stored."
    assert severity is AssetCheckSeverity.WARN
    assert metadata(done, "BTC_USDT", "completeness")["coverage"] == 0.991667
    assert "gaps" not in metadata(done, "ETH_USDT", "completeness")


def test_explained_recent_candles_fail_the_check(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    """The last hours are missing from a provider's responses: the gap is explained, but the check still fails."""
    present = now()
    market.plant_outage(
        "binance", TimeRange(present - 3 * MICROS_PER_HOUR, present + MICROS_PER_HOUR), "BTCUSDT"
    )
    mine = project("BTC/USDT", "ETH/USDT", start=f"{to_datetime(present - 3 * MICROS_PER_DAY):%Y-%m-01}")
    assert mine.materialize("15m", f"{to_datetime(present):%Y-%m-01}").success
    assert {
        gap.status for gap in ledger_gaps(database, mine.series("BTC/USDT", "15m"), TimeRange(0, present))
    } == {"unavailable"}
    done = run_checks(mine, *every(mine))
    assert outcomes(done)["BTC_USDT", "completeness"] is False
    assert outcomes(done)["ETH_USDT", "completeness"] is True
    found = metadata(done, "BTC_USDT", "completeness")
    assert found["recent_missing"] == found["missing"] == found["explained"] in (11, 12, 13)
    assert "recent candles are missing (explained)" in str(descriptions(done)["BTC_USDT", "completeness"])
    # More than a day later the same gap is no longer recent.
    at = int(present + 2 * MICROS_PER_DAY)
    grid = grid_of(mine.series("BTC/USDT", "15m"))
    late = TimeRange(recent_start(grid, at), at)
    assert recent_missing(database, {mine.series("BTC/USDT", "15m"): late}) == {
        mine.series("BTC/USDT", "15m"): 0
    }


def test_completeness_fails_while_a_calendar_has_changed(database: Database, update: Update) -> None:
    apple = Series("AAPL", Timeframe.D1, AssetClass.STOCKS)
    settings = Settings(
        symbols=(SymbolSettings(asset_class=apple.asset_class, symbol="AAPL", timeframes=(apple.timeframe,)),)
    )
    (group,) = groups_of(Catalog(settings))
    shelf = Shelf.of(database, apple)
    shelf.put(0, 60)
    keep_calendar(database, "XNYS", now())
    wanted = {AssetCheckKey(asset_key(apple), COMPLETENESS)}
    (before,) = evaluate(database, group, settings, wanted)
    assert before.passed
    update("XNYS", closed=["2024-02-14"])
    (found,) = evaluate(database, group, settings, wanted)
    assert not found.passed
    assert found.description is not None
    assert "the calendar XNYS has changed" in found.description
    assert "2024-02-14 is no session any more" in found.description
