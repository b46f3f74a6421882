"""An outage from its detection to its end in a running Dagster, filled by the gap sensor only.

Real webserver, daemon, code server and run workers, queried over GraphQL; a local market with two providers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.partitions import asset_path
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import REPOSITORY, Webserver
from fks_backfill_dagster.host.processes import Background, Guard
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT, KEY_VARIABLES, Settings
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.queries import ledger_gaps, origins

MONTH = TimeRange(instant("2024-01-01"), instant("2024-02-01"))
OUTAGE = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
JANUARY = ("--start", "2024-01-01", "--end", "2024-02-01", "--provider", "binance")
CONFIG = """
history_start: 2024-01-01
provider_priority: {crypto: [binance, polygon]}
automation: {refresh: [], fill_gaps: false, checks: false, audit: false, housekeeping: false}
symbols:
  - {symbol: BTC/USDT, asset_class: crypto, timeframes: [15m]}
  - {symbol: ETH/USDT, asset_class: crypto, timeframes: [15m]}
"""


@dataclass(frozen=True)
class World:
    """A running Dagster over a market; January of two symbols was fetched from Binance only."""

    settings: Settings
    market: LocalMarket
    web: Webserver

    def gaps(self, symbol: str) -> tuple[LedgerGap, ...]:
        with app.open_database(self.settings) as database:
            return ledger_gaps(database, Catalog(self.settings).find_series(symbol, "15m"), MONTH)

    def sources(self, symbol: str) -> dict[str, int]:
        """The candles of the outage by provider."""
        with app.open_database(self.settings) as database:
            found = origins(database, Catalog(self.settings).find_series(symbol, "15m"), OUTAGE)
        return {origin.provider: origin.candles for origin in found}

    def check(self, symbol: str) -> tuple[bool, dict[str, Any]] | None:
        """The last outcome of the completeness check and its numbers; None before the first evaluation."""
        asset = {"path": list(asset_path(Catalog(self.settings).find_series(symbol, "15m")))}
        found = self.web.query(
            "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {"
            ' assetCheckOrError(checkName: "completeness") { ... on AssetCheck {'
            " executionForLatestMaterialization { evaluation { success metadataEntries { label"
            " ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue } } } } } } } } }",
            key=asset,
        )["assetNodeOrError"]["assetCheckOrError"]
        execution = (found or {}).get("executionForLatestMaterialization")
        if not execution or not execution["evaluation"]:
            return None
        evaluation = execution["evaluation"]
        numbers = {
            entry["label"]: entry.get("intValue", entry.get("floatValue"))
            for entry in evaluation["metadataEntries"]
        }
        return evaluation["success"], numbers

    def coverage(self, symbol: str) -> float | None:
        """The coverage of January in its newest materialization."""
        asset = {"path": list(asset_path(Catalog(self.settings).find_series(symbol, "15m")))}
        found = self.web.query(
            "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {"
            " assetMaterializations(limit: 1) { metadataEntries { label ... on FloatMetadataEntry { floatValue }"
            " } } } } }",
            key=asset,
        )["assetNodeOrError"]["assetMaterializations"]
        values = [
            e["floatValue"] for one in found for e in one["metadataEntries"] if e["label"] == "coverage"
        ]
        return values[0] if values else None

    def ticks(self) -> list[dict[str, Any]]:
        """The ticks of the sensor, newest first."""
        selector = {**REPOSITORY, "sensorName": "fill_gaps"}
        found = self.web.query(
            "query($selector: SensorSelector!) { sensorOrError(sensorSelector: $selector) { ... on Sensor {"
            " sensorState { ticks { status skipReason runIds error { message } } } } } }",
            selector=selector,
        )
        ticks: list[dict[str, Any]] = found["sensorOrError"]["sensorState"]["ticks"]
        return ticks

    def switch_on(self) -> None:
        selector = {**REPOSITORY, "sensorName": "fill_gaps"}
        found = self.web.query(
            "mutation($selector: SensorSelector!) { startSensor(sensorSelector: $selector) { __typename } }",
            selector=selector,
        )
        assert found["startSensor"]["__typename"] == "Sensor"


@pytest.fixture
def world(empty_database_url: str, tmp_path: Path) -> Iterator[World]:
    home = tmp_path / "home"
    home.mkdir()
    config = home / "backfill.yaml"
    config.write_text(CONFIG)
    with LocalMarket(MarketConfig(limits=False, polygon_offset_ppm=100)) as market:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not (name.startswith(("FKS_", "DAGSTER_")) or name in KEY_VARIABLES.values())
        }
        environment = kept | {
            "FKS_HOME": str(home),
            "FKS_CONFIG": str(config),
            "FKS_DATABASE_URL": empty_database_url,
            "FKS_PROVIDERS__BINANCE__BASE_URL": market.binance_url,
            "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": market.archive_url,
            "FKS_PROVIDERS__POLYGON__BASE_URL": market.polygon_url,
            "FKS_PROVIDERS__POLYGON__REQUESTS_PER_MINUTE": "100000",
            "POLYGON_API_KEY": "any",
        }
        settings = load_settings(environment, CHECKOUT)
        market.plant_outage("binance", OUTAGE)
        market.plant_outage("polygon", OUTAGE, "ETH/USDT")
        backfill(environment)
        with Guard(home, settings.root):
            try:
                up = servers.up(
                    settings, port=servers.free_port(), environment=environment, say=lambda text: None
                )
                yield World(settings, market, up.web)
            finally:
                servers.down(settings, say=lambda text: None)


def backfill(environment: dict[str, str]) -> None:
    """By the command line, from Binance only."""
    for symbol in ("BTC/USDT", "ETH/USDT"):
        done = subprocess.run(
            [sys.executable, "-m", "fks_backfill_dagster", "backfill", symbol, "15m", *JANUARY],
            env=environment,
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 1, done.stderr
        assert "16 candles still missing" in done.stderr


def wait_for(world: World, what: str, true: Callable[[], object], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            log = Background(world.settings.home, servers.DAEMON).log.read_text()[-4000:]
            pytest.fail(f"{what}: not within {seconds} s; ticks {world.ticks()[:3]}; the daemon:\n{log}")
        time.sleep(1)


@pytest.mark.slow
def test_an_outage_is_found_filled_or_explained(world: World) -> None:
    # The UI shows it: the check of the series fails, with the number of missing candles.
    checks = [
        (asset_path(Catalog(world.settings).find_series(s, "15m")), "completeness")
        for s in ("BTC/USDT", "ETH/USDT")
    ]
    world.web.launch_checks(checks)
    wait_for(world, "the checks", lambda: world.check("BTC/USDT") and world.check("ETH/USDT"))
    for symbol in ("BTC/USDT", "ETH/USDT"):
        passed, numbers = world.check(symbol) or (True, {})
        assert not passed
        assert (numbers["open_gaps"], numbers["missing"]) == (1, 16)

    # The sensor requests it, and a run fills it from the second provider.
    before = world.market.requests()
    world.switch_on()
    wait_for(world, "the gap of BTC/USDT", lambda: not world.gaps("BTC/USDT"))
    assert world.sources("BTC/USDT") == {"polygon": 16}
    wait_for(world, "its check", lambda: (world.check("BTC/USDT") or (False,))[0])
    assert world.coverage("BTC/USDT") == 1.0

    # A gap that no provider can fill is explained, and not requested again.
    wait_for(world, "the gap of ETH/USDT", lambda: world.gaps("ETH/USDT")[0].status is GapStatus.UNAVAILABLE)
    (gap,) = world.gaps("ETH/USDT")
    assert {(one.provider, one.outcome) for one in gap.evidence} == {
        ("binance", "absent"),
        ("polygon", "absent"),
    }
    wait_for(world, "the check of ETH/USDT", lambda: (world.check("ETH/USDT") or (False,))[0])
    after = world.market.requests()
    assert before < after <= before + 12
    wait_for(world, "a tick after it", lambda: world.ticks()[0]["skipReason"] == "no gap is due")
    assert world.market.requests() == after

    # One run for both series.
    runs = [run for tick in world.ticks() for run in tick["runIds"]]
    assert len(runs) == 1
    assert not [tick["error"] for tick in world.ticks() if tick["error"]]
