"""The market fails for one month of one symbol: exactly that partition fails, and only it is fetched again.

With a real webserver, daemon and GraphQL, from a database without a schema to `launch`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from fks_backfill_dagster.demo.scenario import FAILED_SYMBOL, MONTHS, SYMBOLS, Scene, failed_month
from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import Webserver
from fks_backfill_dagster.host.processes import Background
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster_tests.host.site import compute_log
from fks_backfill_dagster_tests.host.test_servers import until


@pytest.fixture
def scene(empty_database_url: str, tmp_path: Path) -> Iterator[Scene]:
    environ = {**os.environ, "FKS_DATABASE_URL": empty_database_url}
    with failed_month(tmp_path / "home", environ=environ) as made:
        yield made


def partitions(web: Webserver, asset: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The metadata of the newest materialization of each partition."""
    found = web.query(
        "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {"
        " assetMaterializations(limit: 200) { partition metadataEntries { label"
        " ... on IntMetadataEntry { intValue } ... on FloatMetadataEntry { floatValue } } } } } }",
        key={"path": list(asset)},
    )["assetNodeOrError"]["assetMaterializations"]
    return {
        one["partition"]: {
            entry["label"]: entry.get("intValue", entry.get("floatValue")) for entry in one["metadataEntries"]
        }
        for one in reversed(found)
    }


def test_a_failed_month(scene: Scene) -> None:
    # Exactly one of 72 partitions is failed, with its reason.
    failed = {one.series.symbol: list(keys) for one, keys in scene.first.failed.items()}
    assert failed == {symbol: [scene.failed] if symbol == FAILED_SYMBOL else [] for symbol in SYMBOLS}
    (reason,) = scene.first.reasons
    assert f"ETH/USDT 15m: 1 of {MONTHS} partitions ({scene.failed})" in reason
    assert "400" in reason

    # The others are materialized, each with its own counts.
    (eth,) = [one for one in scene.orders if one.series.symbol == FAILED_SYMBOL]
    shown = partitions(scene.web, eth.asset)
    assert set(shown) == set(eth.keys) - {scene.failed}
    assert len(eth.keys) == MONTHS
    for key, numbers in shown.items():
        first = datetime.fromisoformat(key).replace(tzinfo=UTC)
        days = ((first.replace(day=28) - first).days + 1, 31)
        assert numbers["expected"] in range(days[0] * 96, days[1] * 96 + 1)
        assert numbers["stored"] == numbers["expected"]
        assert (numbers["missing"], numbers["explained"], numbers["coverage"]) == (0, 0, 1.0)
        assert numbers["volume_sum"] > 0

    # The checks have results although the run failed, and its compute log is short.
    passed = {one.series.symbol: scene.web.check_outcomes(one.asset) for one in scene.orders}
    for symbol in SYMBOLS:
        outcomes = {outcome.name: outcome.passed for outcome in passed[symbol]}
        assert None not in outcomes.values()
        # The history ends long before now, so no series is fresh.
        assert outcomes["data_freshness"] is False
        assert symbol == FAILED_SYMBOL or (outcomes["completeness"] and outcomes["ohlc_sanity"])
    (run,) = scene.first.runs
    lines = compute_log(scene.web, run.id)
    lines = lines[: next(n for n, line in enumerate(lines) if "STEP_FAILURE" in line) + 1]
    assert 4 <= len(lines) <= 40  # twenty where a batch takes no time, a line for every two seconds elsewhere

    # A second backfill of all partitions after the recovery fetches only this one.
    done, fetched = scene.ask_again()
    assert done.succeeded
    assert not any(done.failed.values())
    (batch,) = fetched
    assert (batch.symbol, f"{batch.range_start:%Y-%m-%d}") == (FAILED_SYMBOL, scene.failed)
    requested = [line["target"] for line in scene.market.journal()["last"]]
    assert requested
    # In addition one stored candle on either side, to verify that the market is the same.
    month, beside = ([t for t in requested if ("-15m-" in t) == is_archive] for is_archive in (True, False))
    assert month
    assert all("ETHUSDT-15m-" + scene.failed[:7] in target for target in month)
    assert [parse_qs(urlsplit(target).query)["symbol"] for target in beside] == [["ETHUSDT"]] * 2

    # By the command line: nothing is fetched, exit code 0.
    code, document = launched(scene, "BTC/USDT", "eth_usdt", "--start", scene.failed, "--end", eth.keys[-1])
    assert code == 0
    assert document["succeeded"] is True
    assert [(one["symbol"], one["failed"]) for one in document["series"]] == [
        ("BTC/USDT", []),
        ("ETH/USDT", []),
    ]
    assert document["series"][0]["partitions"] == list(eth.keys[eth.keys.index(scene.failed) : -1])
    assert {run["status"] for run in document["runs"]} == {"SUCCESS"}
    assert scene.market.requests() == len(requested)


def launched(scene: Scene, *arguments: str) -> tuple[int, Any]:
    """`fks-backfill launch --json` while the daemon starts: it polls at its start, then only every 30 s."""
    servers.stop_part(scene.settings, servers.DAEMON)
    starting = threading.Thread(
        target=servers.up,
        args=(scene.settings,),
        kwargs={"environment": scene.environment, "keep_database": False, "say": lambda text: None},
    )
    starting.start()
    until(lambda: Background(scene.settings.home, servers.DAEMON).is_running())
    done = subprocess.run(
        [sys.executable, "-m", "fks_backfill_dagster", "launch", *arguments, "--json"],
        env=dict(scene.environment),
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
    )
    starting.join()
    return done.returncode, json.loads(done.stdout)
