"""The configuration of runs: modes and providers, as entered in the launchpad."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from dagster import DagsterEventType, DagsterInvalidConfigError, DagsterRun, ExecuteInProcessResult
from pydantic import SecretStr

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime
from fks_backfill_dagster.orchestration.resources import PROVIDERS, ProviderResource
from fks_backfill_dagster.orchestration.run_config import (
    SyncConfig,
    SyncMode,
    SyncOptions,
    options_of,
    run_config,
)
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import batches, read_candles
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project
from fks_backfill_dagster_tests.orchestration.test_assets import plant_failure, statuses
from fks_backfill_dagster_tests.store.builders import execute

JANUARY = TimeRange(instant("2024-01-01"), instant("2024-02-01"))
OP = "ohlcv_crypto_15m"


def changed_candle(database: Database) -> int:
    """Gives the stored candles another close at one open, as if their provider had corrected it since."""
    execute(database, "UPDATE fks.candles_15m SET close = (high + low) / 2 WHERE ts = '2024-01-10 05:00+00'")
    return instant("2024-01-10T05:00")


def failure_of(done: ExecuteInProcessResult) -> str:
    (failed,) = [e for e in done.all_events if e.event_type is DagsterEventType.STEP_FAILURE]
    return failed.step_failure_data.error_display_string


def with_polygon(project: Project, resources: dict[str, Any]) -> Project:
    """Polygon has a key, and is not in the priority of the settings."""
    settings = project.settings.model_copy(update={"keys": {"polygon": SecretStr("any")}})
    return replace(project, settings=settings).with_symbols(settings.symbols, resources)


# Refetch -----------------------------------------------------------------------------------------------


def test_a_refetch_corrects_a_changed_candle_and_keeps_its_former_values(
    project: MakeProject, market: LocalMarket, database: Database
) -> None:
    mine = project("BTC/USDT")
    series = mine.series("BTC/USDT", "15m")
    assert mine.materialize("15m", "2024-01-01").success
    truth = market.truth("binance", "BTC/USDT", Timeframe.M15, JANUARY)
    at = changed_candle(database)
    wrong, held_then = read_candles(database, series, JANUARY), datetime.now(UTC)
    assert np.flatnonzero(wrong.close != truth.close).tolist() == [int(np.searchsorted(wrong.ts, at))]

    market.reset_requests()
    assert mine.materialize("15m", "2024-01-01").success
    assert market.requests() == 0, "a run without configuration requests missing candles only"
    assert read_candles(database, series, JANUARY).equals(wrong)

    assert mine.materialize("15m", "2024-01-01", mode="refetch").success
    assert market.requests() > 0
    np.testing.assert_array_equal(read_candles(database, series, JANUARY).close, truth.close)
    assert read_candles(database, series, JANUARY, held_then).equals(wrong)
    with database.begin() as connection:
        (revision,) = connection.execute(
            sa.text("SELECT ts, close_before, close_after, source FROM fks.corrections")
        )
    position = int(np.searchsorted(truth.ts, at))
    assert revision == (to_datetime(at), wrong.close[position], truth.close[position], "binance")


def test_a_refetch_of_another_symbols_candles_is_refused_and_fails_its_partition(
    project: MakeProject, resources: dict[str, Any], database: Database
) -> None:
    """No option of a run forces them."""
    with LocalMarket(MarketConfig(limits=False, seed=2)) as elsewhere:
        other = ProviderResource(
            provider="binance", base_url=elsewhere.binance_url, archive_url=elsewhere.archive_url
        )
        mine = project("BTC/USDT")
        strange = mine.with_symbols(mine.settings.symbols, resources | {"binance": other})
        assert strange.materialize("15m", "2024-01-01").success
    stored = read_candles(database, mine.series("BTC/USDT", "15m"), JANUARY)
    done = mine.materialize("15m", "2024-01-01", mode="refetch")
    assert not done.success
    assert "Launch the failed partitions again with `mode: refetch`." in failure_of(done)
    assert read_candles(database, mine.series("BTC/USDT", "15m"), JANUARY).equals(stored)


def test_a_refetch_without_a_response_fails_its_partition(project: MakeProject, market: LocalMarket) -> None:
    """All candles are stored already, but none was compared."""
    mine = project("BTC/USDT")
    months = ("2024-01-01", "2024-02-01")
    assert mine.materialize("15m", *months).success
    plant_failure(market, "BTCUSDT", "2024-02-01", "2024-03-01")
    assert not mine.materialize("15m", *months, mode="refetch").success
    assert statuses(mine, mine.key("BTC/USDT", "15m"), *months) == {
        "2024-01-01": "MATERIALIZED",
        "2024-02-01": "FAILED",
    }


# Providers ---------------------------------------------------------------------------------------------


def test_only_the_given_providers_are_requested(
    project: MakeProject, market: LocalMarket, resources: dict[str, Any], database: Database
) -> None:
    mine = with_polygon(project("BTC/USDT"), resources)
    assert mine.materialize("15m", "2024-01-01", providers=["polygon"]).success
    assert market.requests("polygon") == market.requests() > 0
    assert {batch.provider for batch in batches(database)} == {"polygon"}


def test_a_disabled_provider_is_refused_before_any_request(
    project: MakeProject, market: LocalMarket, resources: dict[str, Any]
) -> None:
    mine = project("BTC/USDT")
    disabled = mine.settings.providers.polygon.model_copy(update={"enabled": False})
    providers = mine.settings.providers.model_copy(update={"polygon": disabled})
    mine = replace(mine, settings=mine.settings.model_copy(update={"providers": providers}))
    mine = mine.with_symbols(mine.settings.symbols, resources)
    done = mine.materialize("15m", "2024-01-01", providers=["binance", "polygon"])
    assert not done.success
    assert "op ohlcv_crypto_15m, providers: polygon is disabled: set providers.polygon.enabled" in failure_of(
        done
    )
    assert market.requests() == 0


# Wrong values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "place", "allowed"),
    [
        ({"mode": "refetc"}, "mode", "'backfill', 'refresh', 'fill_gaps', 'refetch'"),
        ({"mode": ""}, "mode", "'backfill', 'refresh', 'fill_gaps', 'refetch'"),
        ({"mode": {"env": "POLYGON_API_KEY"}}, "mode", "must be a string"),
        ({"providers": ["binance", "polygn"]}, "providers[1]", ", ".join(PROVIDERS)),
        ({"providers": [{"env": "POLYGON_API_KEY"}]}, "providers[0]", "must be a string"),
        ({"providers": "polygon"}, "providers", "must be list"),
        ({"base_url": "http://127.0.0.1:1"}, "config", 'unexpected config entry "base_url"'),
        ({"mode": "refetch", "force": True}, "config", 'unexpected config entry "force"'),
    ],
)
def test_a_wrong_value_is_refused_with_its_place_and_the_allowed_values(
    project: MakeProject,
    market: LocalMarket,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, object],
    place: str,
    allowed: str,
) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "very-secret")
    mine = project("BTC/USDT")
    with pytest.raises(DagsterInvalidConfigError) as refused:
        mine.materialize("15m", "2024-01-01", **config)  # type: ignore[arg-type]
    assert f"root:ops:{OP}:config" + (f":{place}" if place != "config" else "") in str(refused.value)
    assert allowed in str(refused.value)
    assert "very-secret" not in str(refused.value)
    assert market.requests() == 0


# Modes and tags ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tags", "expected"),
    [
        (None, {}, SyncMode.BACKFILL),
        (None, {"fks/refresh": "15m"}, SyncMode.REFRESH),
        (None, {"fks/fill": "2024-01-01"}, SyncMode.FILL_GAPS),
        ({"mode": "refetch"}, {"fks/refresh": "15m"}, SyncMode.REFETCH),
        ({"mode": "backfill"}, {"fks/fill": "2024-01-01"}, SyncMode.BACKFILL),
        ({"providers": ["polygon"]}, {"fks/refresh": "15m"}, SyncMode.REFRESH),
        ({"providers": ["polygon"]}, {}, SyncMode.BACKFILL),
    ],
)
def test_the_configuration_decides_and_the_tags_of_earlier_versions_otherwise(
    config: dict[str, Any] | None, tags: dict[str, str], expected: SyncMode
) -> None:
    given = {} if config is None else {"ops": {OP: {"config": config}}}
    run = DagsterRun(job_name="ohlcv_months", run_config=given, tags=tags)
    found = options_of(run, OP, SyncConfig(**(config or {})), Settings())
    assert found == SyncOptions(expected, tuple((config or {}).get("providers", ())))


def test_a_request_configures_the_op_of_each_timeframe() -> None:
    def crypto(symbol: str, timeframe: Timeframe) -> Series:
        return Series(symbol, timeframe, AssetClass.CRYPTO)

    some = [crypto("A/USDT", Timeframe.M1), crypto("B/USDT", Timeframe.M1), crypto("A/USDT", Timeframe.M5)]
    assert run_config(SyncMode.FILL_GAPS, some) == {
        "ops": {
            "ohlcv_crypto_1m": {"config": {"mode": "fill_gaps"}},
            "ohlcv_crypto_5m": {"config": {"mode": "fill_gaps"}},
        }
    }
