"""A partition backfill of 2020 and 2021 from a file of real Binance candles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from dagster import DagsterInstance
from pyarrow import csv

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.resources import ProviderResource, TimescaleDB
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import ledger_gaps, read_candles
from fks_backfill_dagster_tests.orchestration.conftest import Project, settings_of

WINDOW = TimeRange(instant("2020-11-17"), instant("2021-05-16"))


def test_two_years_contain_the_candles_and_outages_of_the_file(
    database: Database, database_url: str, shared_data: Callable[[str], Path]
) -> None:
    file = shared_data("binance/BTCUSDT-1h.csv.gz")
    settings = settings_of("BTC/USDT", start="2020-01-01", frames=(Timeframe.H1,))
    with (
        LocalMarket(MarketConfig(limits=False, replay=file.parents[1])) as market,
        DagsterInstance.ephemeral() as instance,
    ):
        binance = ProviderResource(
            provider="binance", base_url=market.binance_url, archive_url=market.archive_url
        )
        resources = {"timescaledb": TimescaleDB(url=database_url), "binance": binance}
        project = Project(settings, build_defs(settings=settings, resource_overrides=resources), instance)
        assert project.materialize("1h", "2020-01-01", "2021-01-01").success
        series = project.series("BTC/USDT", "1h")
    stored = read_candles(database, series, WINDOW)
    rows = csv.read_csv(file)
    opens = rows["ts"].cast(pa.timestamp("us", "UTC")).cast("int64").to_numpy()
    inside = opens < WINDOW.end
    assert len(stored) == 4308
    assert np.array_equal(stored.ts, opens[inside])
    for name in ("open", "high", "low", "close", "volume"):
        assert np.array_equal(getattr(stored, name), rows[name].to_numpy().astype(float)[inside])
    gaps = ledger_gaps(database, series, WINDOW)
    assert [gap.missing for gap in gaps] == [1, 3, 1, 1, 1, 2, 3]
