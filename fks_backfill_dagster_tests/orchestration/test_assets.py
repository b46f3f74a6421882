"""Runs: the stored candles, and what Dagster shows per partition."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from dagster import AssetKey, DagsterEventType, DagsterInstance
from dagster._core.storage.partition_status_cache import (
    AssetPartitionStatus,
    get_and_update_asset_status_cache_value,
)
from pydantic import SecretStr

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.orchestration.resources import TimescaleDB
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import batches, ledger_gaps, read_candles
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project

QUARTER = TimeRange(instant("2024-01-01"), instant("2024-04-01"))


def metadata_of(instance: DagsterInstance, key: AssetKey) -> dict[str, dict[str, Any]]:
    """The metadata of the newest materialization of every partition."""
    records = instance.fetch_materializations(key, limit=1000, ascending=True).records
    return {
        str(record.partition_key): {
            name: value.value for name, value in record.asset_materialization.metadata.items()
        }
        for record in records
        if record.asset_materialization is not None
    }


def statuses(project: Project, key: AssetKey, *partitions: str) -> dict[str, str | None]:
    """The status of partitions in the UI: MATERIALIZED, FAILED or None."""
    node = project.definitions.resolve_asset_graph().get(key)
    found = project.instance.get_status_by_partition(key, partitions, node.partitions_def)  # type: ignore[arg-type]
    assert found is not None
    return {k: v.value if isinstance(v, AssetPartitionStatus) else None for k, v in found.items()}


def plant_failure(market: LocalMarket, symbol: str, start: str, end: str) -> None:
    """Binance's archives and REST return 503 for candles of that range."""
    for provider in ("binance", "archive"):
        market.plant_fault(
            provider, "status", count=None, status=503, symbol=symbol, start=start, end=end, seconds=0
        )


def test_a_range_of_partitions_is_stored_as_the_market_has_it(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    done = mine.materialize("15m", "2024-01-01", "2024-03-01")
    assert done.success
    for symbol in ("BTC/USDT", "ETH/USDT"):
        stored = read_candles(database, mine.series(symbol, "15m"), QUARTER)
        truth = market.truth("binance", symbol, Timeframe.M15, QUARTER)
        for ours, theirs in zip(stored.columns(), truth.columns(), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_each_partition_has_its_own_counts(project: MakeProject, market: LocalMarket) -> None:
    mine = project("BTC/USDT")
    market.plant_outage(
        "binance", TimeRange(instant("2024-02-10T03:00"), instant("2024-02-10T05:00")), "BTC/USDT"
    )
    assert mine.materialize("15m", "2024-01-01", "2024-03-01").success
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "15m"))
    numbers = {k: (v["expected"], v["stored"], v["missing"]) for k, v in found.items()}
    assert numbers == {
        "2024-01-01": (2976, 2976, 0),
        "2024-02-01": (2784, 2776, 8),
        "2024-03-01": (2976, 2976, 0),
    }
    february = found["2024-02-01"]
    assert february["coverage"] == 0.997126
    assert february["providers"] == {"binance": 2776}
    assert february["from_fallback"] == 0
    excluded = {"requests", "candles_per_second", "dagster/partition_row_count"}
    assert not excluded & set(february), "per run, or redundant"


def test_each_partition_describes_its_candles(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT")
    assert mine.materialize("15m", "2024-01-01", "2024-03-01").success
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "15m"))
    month = TimeRange(instant("2024-02-01"), instant("2024-03-01"))
    truth = market.truth("binance", "BTCUSDT", Timeframe.M15, month)
    february = found["2024-02-01"]
    assert (february["first"], february["last"]) == (iso(int(truth.ts[0])), iso(int(truth.ts[-1])))
    assert february["close_last"] == truth.close[-1]
    assert february["volume_sum"] == pytest.approx(truth.volume.sum(), rel=1e-9)


def test_candles_of_a_fallback_are_counted(
    project: MakeProject, market: LocalMarket, resources: dict[str, Any]
) -> None:
    """Candles of the first provider's outage come from the second one; other months have none from it."""
    mine = project("BTC/USDT")
    entry = mine.settings.symbols[0].model_copy(update={"provider_priority": ("binance", "polygon")})
    mine = mine.with_symbols([entry], resources)
    mine = replace(mine, settings=mine.settings.model_copy(update={"keys": {"polygon": SecretStr("any")}}))
    mine = mine.with_symbols(mine.settings.symbols, resources)
    market.plant_outage(
        "binance", TimeRange(instant("2024-02-10T03:00"), instant("2024-02-10T05:00")), "BTC/USDT"
    )
    assert mine.materialize("15m", "2024-01-01", "2024-02-01").success
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "15m"))
    assert {k: (v["from_fallback"], v["missing"]) for k, v in found.items()} == {
        "2024-01-01": (0, 0),
        "2024-02-01": (8, 0),
    }
    assert found["2024-02-01"]["providers"] == {"binance": 2776, "polygon": 8}


def observations(project: Project, key: AssetKey) -> dict[str, dict[str, Any]]:
    """The metadata of each partition's observation, and its description as `text`; one per partition."""
    found = [
        record.event_log_entry.asset_observation
        for record in project.instance.fetch_observations(key, limit=1000).records
    ]
    seen = {
        str(one.partition): {"text": one.description, **{k: v.value for k, v in one.metadata.items()}}
        for one in found
        if one is not None
    }
    assert len(seen) == len(found), "one per partition"
    return seen


def test_a_failed_partition_has_an_observation_with_reason_and_next_attempt(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    for start, end in (("2024-02-01", "2024-03-01"), ("2024-04-01", "2024-05-01")):
        plant_failure(market, "ETHUSDT", start, end)
    assert not mine.materialize("15m", "2024-01-01", "2024-04-01").success
    assert observations(mine, mine.key("BTC/USDT", "15m")) == {}
    seen = observations(mine, mine.key("ETH/USDT", "15m"))
    assert set(seen) == {"2024-02-01", "2024-04-01"}
    gaps = ledger_gaps(database, mine.series("ETH/USDT", "15m"), TimeRange(0, instant("2025-01-01")))
    by_month = {iso(gap.start)[:10]: gap for gap in gaps}
    for month, one in seen.items():
        assert "503" in one["reason"]
        assert one["missing"] == one["expected"] == by_month[month].missing
        assert one["next_attempt"] == iso(by_month[month].next_attempt_at or 0)
        assert one["reason"] in one["text"]
        assert f"Next attempt: {one['next_attempt']}" in one["text"]


def test_a_failed_partition_without_a_gap_has_no_next_attempt(
    project: MakeProject, resources: dict[str, Any]
) -> None:
    """No provider serves the series, so it has no gap in the ledger."""
    mine = project("BTC/USDT")
    entry = mine.settings.symbols[0].model_copy(update={"provider_priority": ("yfinance",)})
    mine = mine.with_symbols([entry], resources)
    assert not mine.materialize("15m", "2024-01-01").success
    (one,) = observations(mine, mine.key("BTC/USDT", "15m")).values()
    assert one["next_attempt"] == "none scheduled"
    assert "no provider can serve BTC/USDT 15m" in one["reason"]
    assert "No attempt is scheduled" in one["text"]


def test_a_start_before_history_start_is_fetched(
    project: MakeProject, resources: dict[str, Any], database: Database, market: LocalMarket
) -> None:
    """Both grains begin at the earliest start of all symbols; nothing is expected there of the other symbols."""
    mine = project("BTC/USDT", "ETH/USDT", start="2024-01-01")
    early = mine.settings.symbols[0].model_copy(update={"start": instant("2021-11-15")})
    mine = mine.with_symbols([early, mine.settings.symbols[1]], resources)
    graph = mine.definitions.resolve_asset_graph()
    for frame, first in (("15m", "2021-11-01"), ("1h", "2021-01-01")):
        defs = {graph.get(mine.key(symbol, frame)).partitions_def for symbol in ("BTC/USDT", "ETH/USDT")}
        (one,) = defs
        assert one is not None
        assert one.get_first_partition_key() == first
    assert mine.materialize("15m", "2021-11-01", "2021-12-01", "BTC/USDT").success
    window = TimeRange(instant("2021-11-15"), instant("2022-01-01"))
    stored = read_candles(database, mine.series("BTC/USDT", "15m"), TimeRange(0, instant("2024-01-01")))
    truth = market.truth("binance", "BTCUSDT", Timeframe.M15, window)
    np.testing.assert_array_equal(stored.ts, truth.ts)


def test_the_lineage_names_the_run(project: MakeProject, database: Database) -> None:
    mine = project("BTC/USDT")
    done = mine.materialize("1h", "2024-01-01")
    assert {batch.run_id for batch in batches(database)} == {done.run_id}


def test_only_the_month_without_a_response_fails(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT", "ETH/USDT")
    plant_failure(market, "ETHUSDT", "2024-02-01", "2024-03-01")
    months = ("2024-01-01", "2024-02-01", "2024-03-01")
    done = mine.materialize("15m", months[0], months[-1])
    assert not done.success
    assert statuses(mine, mine.key("BTC/USDT", "15m"), *months) == dict.fromkeys(months, "MATERIALIZED")
    assert statuses(mine, mine.key("ETH/USDT", "15m"), *months) == {
        "2024-01-01": "MATERIALIZED",
        "2024-02-01": "FAILED",
        "2024-03-01": "MATERIALIZED",
    }
    (failure,) = [e for e in done.all_events if e.event_type is DagsterEventType.STEP_FAILURE]
    text = failure.step_failure_data.error_display_string
    assert "1 of 2 series" in text
    assert "ETH/USDT 15m: 1 of 3 partitions (2024-02-01)" in text
    assert "503" in text
    # After the recovery, a second run fetches only that month.
    market.clear_faults()
    before = batches(database)
    again = mine.materialize("15m", months[0], months[-1])
    assert again.success
    assert statuses(mine, mine.key("ETH/USDT", "15m"), *months) == dict.fromkeys(months, "MATERIALIZED")
    fetched = [batch for batch in batches(database) if batch not in before]
    first, end = datetime(2024, 2, 1, tzinfo=UTC), datetime(2024, 3, 1, tzinfo=UTC)
    assert {b.symbol for b in fetched} == {"ETH/USDT"}
    assert all(first <= b.range_start <= b.range_end <= end for b in fetched)


def test_candles_missing_from_a_response_are_a_gap_and_no_failure(
    project: MakeProject, market: LocalMarket
) -> None:
    mine = project("BTC/USDT")
    market.plant_outage("binance", TimeRange(instant("2024-02-01"), instant("2024-03-01")), "BTC/USDT")
    done = mine.materialize("15m", "2024-02-01")
    assert done.success
    numbers = metadata_of(mine.instance, mine.key("BTC/USDT", "15m"))["2024-02-01"]
    assert (numbers["missing"], numbers["explained"], numbers["coverage"]) == (2784, 2784, 0)
    # The only provider has responded, so the gap is explained.
    passed = {e.check_name: e.passed for e in done.get_asset_check_evaluations()}
    assert passed == {"ohlc_sanity": True, "completeness": True, "data_freshness": False}


def test_without_an_eligible_provider_every_partition_fails(
    project: MakeProject, resources: dict[str, Any]
) -> None:
    mine = project("BTC/USDT")
    priority = mine.settings.symbols[0].model_copy(update={"provider_priority": ("yfinance",)})
    unserved = mine.with_symbols([priority], resources)
    done = unserved.materialize("15m", "2024-01-01", "2024-02-01")
    assert not done.success
    months = ("2024-01-01", "2024-02-01")
    assert statuses(unserved, unserved.key("BTC/USDT", "15m"), *months) == dict.fromkeys(months, "FAILED")


def test_a_partition_in_which_nothing_is_expected_materializes_without_a_request(
    project: MakeProject, market: LocalMarket, resources: dict[str, Any]
) -> None:
    mine = project("BTC/USDT")
    later = mine.settings.symbols[0].model_copy(update={"start": instant("2024-03-15")})
    mine = mine.with_symbols([later], resources)
    assert mine.materialize("15m", "2024-01-01", "2024-02-01").success
    assert market.requests() == 0
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "15m"))
    assert {k: (v["expected"], v["coverage"], v["stored"]) for k, v in found.items()} == {
        "2024-01-01": (0, 1.0, 0),
        "2024-02-01": (0, 1.0, 0),
    }


def test_a_symbols_own_start_cuts_its_first_partition(
    project: MakeProject, resources: dict[str, Any]
) -> None:
    mine = project("BTC/USDT")
    later = mine.settings.symbols[0].model_copy(update={"start": instant("2024-03-15")})
    mine = mine.with_symbols([later], resources)
    assert mine.materialize("15m", "2024-02-01", "2024-03-01").success
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "15m"))
    assert {k: v["expected"] for k, v in found.items()} == {"2024-02-01": 0, "2024-03-01": 17 * 96}


def test_nothing_is_expected_before_the_listing(project: MakeProject, database: Database) -> None:
    mine = project("BTC/USDT", start="2017-01-01", frames=(Timeframe.D1,))
    assert mine.materialize("1d", "2017-01-01").success
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "1d"))["2017-01-01"]
    assert (
        found["expected"]
        == found["stored"]
        == len(read_candles(database, mine.series("BTC/USDT", "1d"), TimeRange(0, instant("2018-01-01"))))
    )


def test_the_current_partition_holds_closed_candles(project: MakeProject) -> None:
    mine = project("BTC/USDT")
    partitions = mine.definitions.resolve_asset_graph().get(mine.key("BTC/USDT", "1h")).partitions_def
    assert partitions is not None
    current = partitions.get_partition_keys()[-1]
    assert mine.materialize("1h", current).success
    found = metadata_of(mine.instance, mine.key("BTC/USDT", "1h"))[current]
    assert found["missing"] == 0


def test_a_second_run_requests_nothing(project: MakeProject, market: LocalMarket) -> None:
    mine = project("BTC/USDT")
    assert mine.materialize("15m", "2024-01-01", "2024-03-01").success
    market.reset_requests()
    assert mine.materialize("15m", "2024-01-01", "2024-03-01").success
    assert market.requests() == 0


def test_a_run_logs_few_lines(project: MakeProject) -> None:
    mine = project("BTC/USDT")
    done = mine.materialize("15m", "2024-01-01", "2024-06-01")
    lines = [
        entry.user_message
        for entry in mine.instance.all_logs(done.run_id)
        if entry.dagster_event is None and "BTC/USDT" in entry.user_message
    ]
    assert "17,472 of 17,472 candles are missing" in lines[0]
    assert "17,472 candles stored" in lines[-1]
    assert "0 of 17,472 expected candles are missing" in lines[-1]
    assert len(lines) <= 13


def test_the_run_log_names_custom_provider_addresses(project: MakeProject, market: LocalMarket) -> None:
    mine = project("BTC/USDT")
    done = mine.materialize("15m", "2024-01-01")
    logged = [
        entry.user_message
        for entry in mine.instance.all_logs(done.run_id)
        if "Custom provider addresses" in entry.user_message
    ]
    assert len(logged) == 1
    assert f"binance at {market.binance_url} (archives: {market.archive_url})" in logged[0]
    assert "yfinance" not in logged[0]


def test_a_missing_database_fails_the_run_with_its_message(
    project: MakeProject, resources: dict[str, Any], database_url: str
) -> None:
    gone = TimescaleDB(url=database_url.replace("/fks_test_", "/gone_"))
    mine = project("BTC/USDT").with_symbols(
        project("BTC/USDT").settings.symbols, resources | {"timescaledb": gone}
    )
    done = mine.materialize("15m", "2024-01-01")
    assert not done.success
    logged = " ".join(str(entry) for entry in mine.instance.all_logs(done.run_id))
    assert "does not exist. Create it, or correct FKS_DATABASE_URL." in logged


def test_the_status_cache_agrees(project: MakeProject, market: LocalMarket) -> None:
    """The asset page counts partitions in a separate cache."""
    mine = project("ETH/USDT")
    plant_failure(market, "ETHUSDT", "2024-02-01", "2024-03-01")
    mine.materialize("15m", "2024-01-01", "2024-03-01")
    key = mine.key("ETH/USDT", "15m")
    partitions = mine.definitions.resolve_asset_graph().get(key).partitions_def
    cached = get_and_update_asset_status_cache_value(mine.instance, key, partitions)
    assert cached is not None
    assert partitions is not None
    assert set(cached.deserialize_materialized_partition_subsets(partitions).get_partition_keys()) == {
        "2024-01-01",
        "2024-03-01",
    }
    assert list(cached.deserialize_failed_partition_subsets(partitions).get_partition_keys()) == [
        "2024-02-01"
    ]
