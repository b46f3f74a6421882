"""The definitions: keys, groups, partitions, checks, resources; and their load time."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
from dagster import (
    AssetCheckKey,
    AssetKey,
    ConfigurableResource,
    DagsterInvalidConfigError,
    EnvVar,
    InitResourceContext,
    JobDefinition,
    TimeWindowPartitionsDefinition,
    build_resources,
)
from pydantic import PrivateAttr

from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.assets import PARTITIONS_PER_RUN
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.resources import DATABASE, PROVIDERS
from fks_backfill_dagster.settings.model import CHECKOUT, Settings
from fks_backfill_dagster.settings.sections import SymbolSettings
from fks_backfill_dagster_tests.orchestration.conftest import settings_of

MIXED = Settings(
    symbols=(
        SymbolSettings(
            asset_class=AssetClass.CRYPTO, symbol="BTC/USDT", timeframes=(Timeframe.M1, Timeframe.D1)
        ),
        SymbolSettings(asset_class=AssetClass.CRYPTO, symbol="ETH/USDT", timeframes=(Timeframe.M1,)),
        SymbolSettings(asset_class=AssetClass.STOCKS, symbol="BRK.B", timeframes=(Timeframe.D1,)),
    )
)


def test_every_series_is_an_asset_in_the_group_of_its_class() -> None:
    specs = {spec.key: spec.group_name for spec in build_defs(settings=MIXED).resolve_all_asset_specs()}
    assert specs == {
        AssetKey(["ohlcv", "BTC_USDT", "1m"]): "crypto",
        AssetKey(["ohlcv", "BTC_USDT", "1d"]): "crypto",
        AssetKey(["ohlcv", "ETH_USDT", "1m"]): "crypto",
        AssetKey(["ohlcv", "BRK_B", "1d"]): "stocks",
    }


def test_series_of_one_class_and_timeframe_share_an_op() -> None:
    graph = build_defs(settings=MIXED).resolve_asset_graph()
    ops = {tuple(node.key.path[1:]): node.assets_def.op.name for node in graph.asset_nodes}
    assert ops == {
        ("BTC_USDT", "1m"): "ohlcv_crypto_1m",
        ("ETH_USDT", "1m"): "ohlcv_crypto_1m",
        ("BTC_USDT", "1d"): "ohlcv_crypto_1d",
        ("BRK_B", "1d"): "ohlcv_stocks_1d",
    }


def test_a_backfill_run_holds_one_asset_class_and_loading_does_not_warn() -> None:
    """Dagster puts assets with the same partitions and policy into one run, whatever launched the backfill."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        definitions = build_defs(settings=MIXED)
        graph = definitions.resolve_asset_graph()
        definitions.get_repository_def().get_all_jobs()
    policies: dict[str, set[int]] = {}
    for node in graph.asset_nodes:
        assert node.backfill_policy is not None
        policies.setdefault(node.group_name or "", set()).add(
            node.backfill_policy.max_partitions_per_run or 0
        )
    assert all(len(sizes) == 1 for sizes in policies.values())
    assert len(set.union(*policies.values())) == len(policies)
    assert len(set(PARTITIONS_PER_RUN.values())) == len(AssetClass)


def test_partitions_follow_the_timeframe() -> None:
    definitions = build_defs(settings=settings_of("BTC/USDT", start="2024-05-20"))
    graph = definitions.resolve_asset_graph()
    first = {}
    for node in graph.asset_nodes:
        assert isinstance(node.partitions_def, TimeWindowPartitionsDefinition)
        first[node.key.path[-1]] = node.partitions_def.get_first_partition_key()
    assert first == {"15m": "2024-05-01", "1h": "2024-01-01"}


def test_every_series_has_all_checks_and_none_blocks() -> None:
    graph = build_defs(settings=MIXED).resolve_asset_graph()
    keys = {AssetKey(["ohlcv", *rest]) for rest in (("BTC_USDT", "1m"), ("BRK_B", "1d"))}
    for key in keys:
        names = graph.get_check_keys_for_assets({key})
        assert names == {
            AssetCheckKey(key, name) for name in ("ohlc_sanity", "completeness", "data_freshness")
        }
        assert not any(graph.get_check_spec(name).blocking for name in names)


def test_there_is_a_resource_for_the_database_and_for_every_provider() -> None:
    resources = build_defs(settings=MIXED).resources or {}
    assert set(resources) == {DATABASE, *PROVIDERS, "io_manager"}


def test_a_resource_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(ConfigurableResource):  # type: ignore[type-arg]
        where: str
        answer: int = 42
        _log: list[str] = PrivateAttr(default_factory=list)

        def setup_for_execution(self, context: InitResourceContext) -> None:
            self._log.append("opened")

        def teardown_after_execution(self, context: InitResourceContext) -> None:
            ended.extend([*self._log, "closed"])

    ended: list[str] = []
    mine = Mine(where=EnvVar("MY_PLACE"))
    resources = build_defs(settings=MIXED, resource_overrides={"polygon": mine}).resources or {}
    monkeypatch.setenv("MY_PLACE", "here")  # resolved when a run opens it
    with build_resources({"polygon": resources["polygon"]}) as opened:
        assert (opened.polygon.where, opened.polygon.answer) == ("here", 42)
    assert ended == ["opened", "closed"]
    assert set(resources) == {DATABASE, *PROVIDERS, "io_manager"}


def test_no_secret_is_shown_by_the_ui() -> None:
    settings = Settings(
        keys={"polygon": "very-secret"},  # type: ignore[dict-item]
        database_url="postgresql://me:also-secret@localhost/candles",  # type: ignore[arg-type]
    )
    resources = build_defs(settings=settings).resources or {}
    shown = [(one.description, str(one.config_schema.as_field())) for one in resources.values()]
    assert "api.massive.com" in str(shown)
    assert "secret" not in str(shown)


def _jobs() -> list[JobDefinition]:
    return list(build_defs(settings=MIXED).get_repository_def().get_all_jobs())


@pytest.mark.parametrize("job", _jobs(), ids=lambda job: job.name)
def test_no_value_of_a_run_is_taken_from_the_environment(job: JobDefinition) -> None:
    """A run with {"env": "POLYGON_API_KEY"} as a value could show the key, for example in an error or a path."""
    schema = job.run_config_schema.run_config_schema_type
    kinds = {type(kind).__name__ for kind in schema.type_iterator()}
    assert "Shape" in kinds
    assert not {kind for kind in kinds if "Source" in kind}


@pytest.mark.parametrize("name", [DATABASE, *PROVIDERS])
@pytest.mark.parametrize(
    "config",
    [
        {"base_url": "http://127.0.0.1:1"},
        {"base_url": {"env": "POLYGON_API_KEY"}},
        {"requests_per_minute": {"env": "POLYGON_API_KEY"}},
        {"url": "postgresql://127.0.0.1:1/other"},
    ],
)
def test_a_run_cannot_replace_a_resource(
    name: str, config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "very-secret")
    job = build_defs(settings=MIXED).resolve_job_def("ohlcv_months")
    with pytest.raises(DagsterInvalidConfigError) as rejected:
        job.execute_in_process(run_config={"resources": {name: {"config": config}}})
    (field,) = config
    assert f'unexpected config entry "{field}" at path root:resources:{name}' in str(rejected.value)
    assert "very-secret" not in str(rejected.value)


_MEASURE = """
import json, sys, time
import dagster
began = time.process_time()
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import SymbolSettings
frames = (Timeframe.M1, Timeframe.M15, Timeframe.H1, Timeframe.D1)
symbols = tuple(
    SymbolSettings(asset_class=AssetClass.CRYPTO, symbol=f"C{n}/USDT", timeframes=frames) for n in range(500)
)
repository = build_defs(settings=Settings(symbols=symbols)).get_repository_def()
repository.load_all_definitions()
heavy = [name for name in ("pandas", "ccxt", "exchange_calendars") if name in sys.modules]
assets = len(repository.asset_graph.get_all_asset_keys())
checks = len(repository.asset_graph.asset_check_keys)
print(json.dumps([time.process_time() - began, heavy, assets, checks]))
"""


@pytest.fixture(scope="module")
def measured() -> tuple[float, list[str], int, int]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    seconds, heavy, assets, checks = json.loads(done.stdout)
    return seconds, heavy, assets, checks


@pytest.mark.server
def test_two_thousand_series_load_quickly(measured: tuple[float, list[str], int, int]) -> None:
    seconds, _, assets, checks = measured
    assert (assets, checks) == (2000, 6000)
    assert seconds < 6  # CPU time: 1.7 s on an idle machine; the limit allows for other load


@pytest.mark.server
def test_definitions_import_no_heavy_modules(measured: tuple[float, list[str], int, int]) -> None:
    assert measured[1] == []
