"""`launch` with a real webserver and daemon while settings change and a provider fails.

Black-box tests: the command's exit code and documents, and Dagster over GraphQL. All of them are slow; `make test` has
one launch with a failed month in test_scenario.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fks_backfill_dagster.host.coordinator import BACKFILL
from fks_backfill_dagster.host.graphql import REPOSITORY
from fks_backfill_dagster.orchestration.before_start import SENSOR
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster_tests.host.site import Site, site

AUTOMATION = {"refresh": [], "fill_gaps": False, "checks": False, "audit": False, "housekeeping": False}
CRYPTO = {"asset_class": "crypto", "timeframes": ["15m"]}
NAMES = {"crypto": "binance", "stocks": "yfinance", "forex": "oanda"}


@dataclass(frozen=True)
class EditableSite:
    """A site whose settings change during a test."""

    made: Site

    def write(self, symbols: Sequence[Mapping[str, Any]], **keys: Any) -> None:
        document = {
            "provider_priority": {asset_class: [name] for asset_class, name in NAMES.items()},
            "automation": AUTOMATION,
            "symbols": list(symbols),
            **keys,
        }
        Path(self.made.environment["FKS_CONFIG"]).write_text(json.dumps(document))

    def launch(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "fks_backfill_dagster", "launch", *arguments],
            env=dict(self.made.environment),
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def runs_of(self, status: str) -> list[frozenset[str]]:
        """The symbols of each run with that status."""
        found = self.made.web.query(
            "{ runsOrError { ... on Runs { results { status assetSelection { path } } } } }"
        )["runsOrError"]["results"]
        return [
            frozenset(key["path"][1] for key in run["assetSelection"])
            for run in found
            if run["status"] == status
        ]

    def partitions(self, symbol: str, timeframe: str, status: str) -> int:
        """The number of partitions with that status on the asset's page."""
        shown = self.made.asset(
            ("ohlcv", symbol, timeframe),
            "partitionStats { numMaterialized numFailed numPartitions }",
        )["partitionStats"]
        return int(shown[status])


@pytest.fixture(scope="module")
def editable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditableSite]:
    home = tmp_path_factory.mktemp("launching") / "home"
    with (
        LocalMarket(MarketConfig(limits=False)) as market,
        site(home, market, ("BTC/USDT",), "15m", "2023-01-01") as plain,
    ):
        environment = {
            **plain.environment,
            "FKS_PROVIDERS__YFINANCE__BASE_URL": market.yahoo_url,
            "FKS_PROVIDERS__OANDA__BASE_URL": market.oanda_url,
            "OANDA_API_TOKEN": "any",
        }
        made = EditableSite(
            replace(plain, environment=environment, settings=load_settings(environment, CHECKOUT))
        )
        yield made


def plant_hang(market: LocalMarket, symbol: str, start: str, end: str) -> None:
    for transport in ("binance", "archive"):
        market.plant_fault(transport, "hang", count=None, seconds=600, symbol=symbol, start=start, end=end)


@pytest.mark.slow
def test_stocks_and_forex_do_not_wait_for_crypto(editable: EditableSite) -> None:
    """One month of one crypto symbol hangs; runs of the other classes complete meanwhile."""
    made = editable.made
    both = {"timeframes": ["15m", "1h"], "asset_class": "crypto"}
    editable.write(
        [
            {"symbol": "BTC/USDT", **both},
            {"symbol": "ETH/USDT", **both},
            {"symbol": "SPY", "asset_class": "stocks", "timeframes": ["1h", "1d"]},
            {"symbol": "EUR/USD", "asset_class": "forex", "timeframes": ["15m", "1h"]},
        ],
        history_start="2025-01-01",
    )
    made.up()
    plant_hang(made.market, "ETHUSDT", "2025-02-01", "2025-03-01")
    with editable.launch("--all", "--json") as launch:
        made.until(
            lambda: (
                editable.partitions("SPY", "1d", "numMaterialized") > 0
                and editable.partitions("EUR_USD", "15m", "numMaterialized") > 0
            ),
            150,
        )
        crypto = [names for names in editable.runs_of("STARTED") if "ETH_USDT" in names]
        assert crypto, "the run of the hanging month continues"
        assert launch.poll() is None
        made.market.clear_faults()
        out, messages = launch.communicate(timeout=240)
    document = json.loads(out)
    tags = {run["tags"].get(BACKFILL) for run in made.runs()}
    assert tags == {"crypto", "stocks", "forex"}
    for names in editable.runs_of("SUCCESS") + editable.runs_of("FAILURE"):
        assert len(names & {"SPY"}) + len(names & {"EUR_USD"}) + bool(names & {"BTC_USDT", "ETH_USDT"}) == 1
    # Its final counts equal Dagster's.
    failed = sum(len(one["failed"]) for one in document["series"])
    total = sum(len(one["partitions"]) for one in document["series"])
    assert [
        line
        for line in messages.splitlines()
        if f"{total - failed} of {total} partitions materialized" in line
    ]
    made.until(lambda: made.web.backfill_state(document["backfill"]).status.startswith("COMPLETED"))
    counts = made.web.query(
        "query($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill {"
        " assetBackfillData { assetBackfillStatuses { ... on AssetPartitionsStatusCounts {"
        " numPartitionsTargeted numPartitionsMaterialized numPartitionsFailed } } } } } }",
        id=document["backfill"],
    )["partitionBackfillOrError"]["assetBackfillData"]["assetBackfillStatuses"]
    assert sum(one["numPartitionsTargeted"] for one in counts) == total
    assert sum(one["numPartitionsFailed"] for one in counts) == failed
    assert sum(one["numPartitionsMaterialized"] for one in counts) == total - failed


@pytest.mark.slow
def test_a_new_symbol_is_launched_and_its_early_partitions_are_reported(editable: EditableSite) -> None:
    """Includes a start before history_start, for which the running definitions have no partition."""
    made = editable.made
    made.up()
    editable.write(
        [
            {"symbol": "BTC/USDT", **CRYPTO, "start": "2024-11-10"},
            {"symbol": "SOL/USDT", **CRYPTO, "start": "2025-03-05"},
        ],
        history_start="2025-01-01",
    )
    with editable.launch("--all", "--end", "2025-05-01", "--no-wait", "--json") as launch:
        out, messages = launch.communicate(timeout=120)
    assert launch.returncode == 0, messages
    document = json.loads(out)
    assert "reloading" in messages
    assert [(one["symbol"], one["partitions"][0]) for one in document["series"]] == [
        ("BTC/USDT", "2024-11-01"),
        ("SOL/USDT", "2025-03-01"),
    ]
    assert document["url"].endswith(document["backfill"])
    made.until(lambda: made.web.backfill_state(document["backfill"]).status == "COMPLETED_SUCCESS", 150)
    sol = ("ohlcv", "SOL_USDT", "15m")

    def early() -> list[dict[str, Any]]:
        found = made.asset(sol, "assetMaterializations(limit: 100) { partition runId description }")
        return [one for one in found["assetMaterializations"] if one["partition"] < "2025-03-01"]

    keys = ["2024-11-01", "2024-12-01", "2025-01-01", "2025-02-01"]
    made.until(lambda: sorted(one["partition"] for one in early()) == keys, 150)
    assert {one["runId"] for one in early()} == {""}
    assert all("nothing expected" in one["description"] for one in early())
    ticks = made.web.query(
        "query($s: SensorSelector!) { sensorOrError(sensorSelector: $s) { ... on Sensor { sensorState {"
        " ticks { status runIds } } } } }",
        s={**REPOSITORY, "sensorName": SENSOR},
    )["sensorOrError"]["sensorState"]["ticks"]
    assert not any(tick["runIds"] for tick in ticks)


@pytest.mark.slow
def test_a_removed_symbol_does_not_affect_the_others(editable: EditableSite) -> None:
    """While some of its runs plant_hang, and a queued one could not be loaded without it."""
    made = editable.made
    btc, eth = {"symbol": "BTC/USDT", **CRYPTO}, {"symbol": "ETH/USDT", **CRYPTO}
    editable.write([btc, eth], history_start="2013-01-01")
    made.up()
    for transport in ("binance", "archive"):
        made.market.plant_fault(transport, "status", count=None, status=503, symbol="ETHUSDT", seconds=0)
    with editable.launch("--all", "--json") as launch:
        both = frozenset({"BTC_USDT", "ETH_USDT"})
        made.until(lambda: both in editable.runs_of("STARTED") and both in editable.runs_of("QUEUED"), 150)
        editable.write([btc], history_start="2013-01-01")
        assert made.web.reloaded() == []
        out, messages = launch.communicate(timeout=300)
    document = json.loads(out)
    assert launch.returncode == 0, messages
    assert document["succeeded"] is True
    kept, gone = document["series"]
    assert (kept["symbol"], kept["failed"], kept["removed"]) == ("BTC/USDT", [], False)
    assert (gone["symbol"], gone["removed"]) == ("ETH/USDT", True)
    assert "fks-backfill launch ETH/USDT" in messages.splitlines()[-1]
    assert editable.runs_of("CANCELED") == []
    assert editable.partitions("BTC_USDT", "15m", "numMaterialized") == len(kept["partitions"])
    for identity in (document["backfill"], *document["followed_by"]):
        made.until(lambda one=identity: made.web.backfill_state(one).status.startswith("COMPLETED"))  # type: ignore[misc]
    # The queued run was requested again without it.
    assert frozenset({"BTC_USDT"}) in editable.runs_of("SUCCESS")


@pytest.mark.slow
def test_a_later_start_and_a_removed_timeframe_do_not_affect_the_rest(editable: EditableSite) -> None:
    """Undefined partitions and assets are removed from the backfill, all others complete."""
    made = editable.made
    btc = {"symbol": "BTC/USDT", "asset_class": "crypto", "timeframes": ["15m", "5m"]}
    editable.write([btc], history_start="2020-01-01")
    made.up()
    made.market.clear_faults()
    for transport in ("binance", "archive"):  # its run continues until the settings have changed
        made.market.plant_fault(transport, "drip", count=None, seconds=2, symbol="BTCUSDT")
    with editable.launch("--all", "--end", "2024-03-01", "--json") as launch:
        made.until(lambda: bool(editable.runs_of("STARTED")), 150)
        editable.write([{**btc, "timeframes": ["15m"]}], history_start="2022-06-01")
        assert made.web.reloaded() == []
        made.market.clear_faults()
        out, messages = launch.communicate(timeout=300)
    document = json.loads(out)
    assert launch.returncode == 0, messages
    kept, gone = document["series"]
    assert (kept["timeframe"], kept["failed"], kept["removed"]) == ("15m", [], False)
    assert (gone["timeframe"], gone["removed"]) == ("5m", True)
    assert "BTC/USDT 5m" in messages.splitlines()[-1]
    made.until(lambda: made.web.backfill_state(document["backfill"]).status == "COMPLETED_SUCCESS")
    assert editable.runs_of("CANCELED") == []
