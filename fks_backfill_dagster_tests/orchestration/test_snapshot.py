"""The definitions, compared with a snapshot of everything that users see.

After an intended change: `FKS_TEST_WRITE=1 pytest fks_backfill_dagster_tests/orchestration/test_snapshot.py`,
and review the difference.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dagster import Definitions, TimeWindowPartitionsDefinition

from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.settings.model import CHECKOUT, Settings
from fks_backfill_dagster.settings.sections import SymbolSettings

pytestmark = pytest.mark.server

SNAPSHOT = Path(__file__).with_name("definitions.txt")

SETTINGS = Settings(
    symbols=(
        SymbolSettings(
            asset_class=AssetClass.CRYPTO, symbol="BTC/USDT", timeframes=(Timeframe.M1, Timeframe.D1)
        ),
        SymbolSettings(asset_class=AssetClass.STOCKS, symbol="BRK.B", timeframes=(Timeframe.H1,)),
        SymbolSettings(asset_class=AssetClass.FOREX, symbol="EUR/USD", timeframes=(Timeframe.H1,)),
    )
)


def lines(definitions: Definitions) -> Iterator[str]:
    graph = definitions.resolve_asset_graph()
    for node in sorted(graph.asset_nodes, key=lambda node: tuple(node.key.path)):
        spec, op = (
            graph.assets_def_for_key(node.key).get_asset_spec(node.key),
            graph.assets_def_for_key(node.key).op,
        )
        assert isinstance(node.partitions_def, TimeWindowPartitionsDefinition)
        yield f"asset {'/'.join(node.key.path)}: {spec.description}"
        yield f"  group {spec.group_name}, owners {list(spec.owners)}, op {op.name}, pool {op.pool}"
        fields = op.config_schema.config_type.fields  # type: ignore[union-attr]
        for name, field in fields.items():
            yield f"  config {name} = {field.default_value!r}: {field.description}"
        yield f"  partitions {node.partitions_def.cron_schedule} from {node.partitions_def.get_first_partition_key()}"
        yield f"  backfill {node.backfill_policy}"
        yield f"  freshness {spec.freshness_policy}"
        yield f"  tags {dict(sorted(spec.tags.items()))}"
        yield f"  metadata {', '.join(sorted(spec.metadata))}"
        for key in sorted(graph.get_check_keys_for_assets({node.key}), key=lambda key: key.name):
            check = graph.get_check_spec(key)
            yield f"  check {key.name}: {check.description} blocking {check.blocking}"
    repository = definitions.get_repository_def()
    for job in sorted(repository.get_all_jobs(), key=lambda job: job.name):
        if not job.name.startswith("__"):
            yield f"job {job.name}: {(job.description or '').splitlines()[0]} executor {job.executor_def.name}"
    for schedule in sorted(repository.schedule_defs, key=lambda schedule: schedule.name):
        yield f"schedule {schedule.name}: {schedule.description}"
        yield f"  at {schedule.cron_schedule} {schedule.execution_timezone}, job {schedule.job_name},"
        yield f"  {schedule.default_status.value}"
    for sensor in sorted(repository.sensor_defs, key=lambda sensor: sensor.name):
        yield f"sensor {sensor.name}: {sensor.description}"
        yield f"  every {sensor.minimum_interval_seconds} s, {sensor.default_status.value}"


def test_the_definitions_match_the_snapshot() -> None:
    found = "\n".join(lines(build_defs(settings=SETTINGS))) + "\n"
    if os.environ.get("FKS_TEST_WRITE"):
        SNAPSHOT.write_text(found, encoding="utf-8")
    assert found == SNAPSHOT.read_text(encoding="utf-8")


def test_loading_causes_no_warnings() -> None:
    code = (
        "from fks_backfill_dagster.orchestration.definitions import defs\n"
        "defs.get_repository_def().load_all_definitions()"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith("FKS_")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=CHECKOUT, env=kept, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
