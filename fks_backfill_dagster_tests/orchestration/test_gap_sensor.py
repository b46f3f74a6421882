"""The gap sensor: requested and skipped gaps, and its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from dagster import (
    DagsterRunStatus,
    DefaultSensorStatus,
    RunRequest,
    build_sensor_context,
)
from pydantic import SecretStr

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.orchestration.gap_sensor import bundled
from fks_backfill_dagster.orchestration.resources import ProviderResource
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import Automation, ProviderPriority
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.due_gaps import Place
from fks_backfill_dagster.store.queries import ledger_gaps, read_candles
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project, settings_of
from fks_backfill_dagster_tests.orchestration.test_assets import metadata_of
from fks_backfill_dagster_tests.store.builders import execute

OUTAGE = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
ALL_TIME = TimeRange(instant("2023-01-01"), instant("2026-01-01"))


@contextmanager
def tick(project: Project, resources: dict[str, Any]) -> Iterator[tuple[list[RunRequest], str | None]]:
    """A tick of the sensor: the requested runs, or the reason of the skip."""
    sensor = project.definitions.resolve_sensor_def("fill_gaps")
    given = {name: project.definitions.resources[name] for name in sensor.required_resource_keys}  # type: ignore[index]
    with build_sensor_context(
        instance=project.instance, resources={**given, **resources}, definitions=project.definitions
    ) as context:
        done = sensor.evaluate_tick(context)
        yield list(done.run_requests or []), done.skip_message


def requested_runs(project: Project, resources: dict[str, Any]) -> list[RunRequest]:
    with tick(project, resources) as (requests, _):
        return requests


def skip_reason(project: Project, resources: dict[str, Any]) -> str | None:
    with tick(project, resources) as (requests, reason):
        assert not requests
        return reason


def make_due(database: Database) -> None:
    execute(database, "UPDATE fks.gap SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")


def run(project: Project, request: RunRequest) -> bool:
    """Executes a request in this process, as the daemon would launch it."""
    job = project.definitions.resolve_job_def(str(request.job_name))
    return job.execute_in_process(
        instance=project.instance,
        asset_selection=list(request.asset_selection or ()),
        partition_key=request.partition_key,
        run_config=request.run_config,
        tags={**request.tags, "dagster/sensor_name": "fill_gaps"},
        raise_on_error=False,
    ).success


@pytest.fixture
def with_gap(project: MakeProject, market: LocalMarket) -> Project:
    """15m candles of January 2024 without four hours, which are missing at Binance, the only provider."""
    market.plant_outage("binance", OUTAGE)
    mine = project("BTC/USDT", "ETH/USDT")
    assert mine.materialize("15m", "2024-01-01").success
    market.reset_requests()
    return mine


def test_a_due_gap_is_requested(
    with_gap: Project, resources: dict[str, Any], database: Database, market: LocalMarket
) -> None:
    assert skip_reason(with_gap, resources) == "no gap is due"
    make_due(database)
    (request,) = requested_runs(with_gap, resources)
    assert (request.job_name, request.partition_key) == ("ohlcv_months", "2024-01-01")
    both = {with_gap.key(symbol, "15m") for symbol in ("BTC/USDT", "ETH/USDT")}
    assert set(request.asset_selection or ()) == both, "both due, in any order"
    assert [str(key.name) for key in request.asset_check_keys or ()] == ["completeness"] * 2
    assert request.tags[cadence.PRIORITY] == cadence.LAST
    assert request.run_key is None, "with a key a second attempt would be skipped"

    market.clear_outages()
    assert run(with_gap, request)
    for symbol in ("BTC/USDT", "ETH/USDT"):
        assert ledger_gaps(database, with_gap.series(symbol, "15m"), ALL_TIME) == ()
        newest = metadata_of(with_gap.instance, with_gap.key(symbol, "15m"))["2024-01-01"]
        assert (newest["missing"], newest["coverage"]) == (0, 1.0)
    assert skip_reason(with_gap, resources) == "no gap is due"


@pytest.mark.parametrize("queued_by", ["this version", "an earlier version"])
def test_a_run_requests_only_the_gaps(
    project: MakeProject,
    resources: dict[str, Any],
    database: Database,
    market: LocalMarket,
    queued_by: str,
) -> None:
    """History that was never synced stays pending, even in the same partition. Earlier versions set tags only."""
    market.plant_outage("binance", OUTAGE)
    mine = project("BTC/USDT")
    series = mine.series("BTC/USDT", "15m")
    mine.materialize("15m", "2024-01-01")
    half = "2024-01-16"
    execute(
        database,
        f"DELETE FROM fks.candles_15m WHERE ts >= '{half}Z'",
        f"UPDATE fks.sync_state SET synced = synced * '{{[2024-01-01Z, {half}Z)}}'",
    )
    market.clear_outages()
    make_due(database)
    (request,) = requested_runs(mine, resources)
    assert request.run_config == {"ops": {"ohlcv_crypto_15m": {"config": {"mode": "fill_gaps"}}}}
    if queued_by == "an earlier version":
        request = request._replace(run_config={})
    assert run(mine, request)
    assert len(read_candles(database, series, ALL_TIME)) == 15 * 96
    assert ledger_gaps(database, series, ALL_TIME) == ()


def test_a_gap_that_no_provider_can_fill_backs_off(
    with_gap: Project, resources: dict[str, Any], database: Database, market: LocalMarket
) -> None:
    make_due(database)
    for request in requested_runs(with_gap, resources):
        assert run(with_gap, request)
    requests = market.requests()
    (gap,) = ledger_gaps(database, with_gap.series("BTC/USDT", "15m"), ALL_TIME)
    assert (gap.status, gap.attempts) == (GapStatus.UNAVAILABLE, 2)
    assert skip_reason(with_gap, resources) == "no gap is due"
    assert market.requests() == requests


def test_a_gap_is_not_requested_twice_at_a_time(
    with_gap: Project, resources: dict[str, Any], database: Database
) -> None:
    make_due(database)
    (request,) = requested_runs(with_gap, resources)
    key = with_gap.key("BTC/USDT", "15m")
    with_gap.instance.create_run_for_job(
        with_gap.definitions.resolve_job_def("ohlcv_months"),
        asset_selection=frozenset([key]),
        tags={**request.tags, "dagster/sensor_name": "fill_gaps", "dagster/partition": "2024-01-01"},
        status=DagsterRunStatus.STARTED,
    )
    (request,) = requested_runs(with_gap, resources)
    assert request.asset_selection == [with_gap.key("ETH/USDT", "15m")]


def test_a_failed_run_is_not_requested_again_immediately(
    with_gap: Project, resources: dict[str, Any], database: Database
) -> None:
    """It ended before its first request, so the gap is still due."""
    make_due(database)
    (request,) = requested_runs(with_gap, resources)
    with_gap.instance.create_run_for_job(
        with_gap.definitions.resolve_job_def("ohlcv_months"),
        asset_selection=frozenset(request.asset_selection or ()),
        tags={**request.tags, "dagster/sensor_name": "fill_gaps", "dagster/partition": "2024-01-01"},
        status=DagsterRunStatus.FAILURE,
    )
    assert skip_reason(with_gap, resources) == "no gap is due"


def test_unfinished_runs_are_limited(
    with_gap: Project, resources: dict[str, Any], database: Database
) -> None:
    make_due(database)
    for _ in range(cadence.FILL_RUNS):
        with_gap.instance.create_run_for_job(
            with_gap.definitions.resolve_job_def("ohlcv_years"),
            asset_selection=frozenset([with_gap.key("BTC/USDT", "1h")]),
            tags={"dagster/sensor_name": "fill_gaps", "dagster/partition": "2024-01-01"},
            status=DagsterRunStatus.STARTED,
        )
    assert skip_reason(with_gap, resources) == "10 gap-filling runs are queued or running already"


def test_a_series_outside_the_settings_is_skipped(
    with_gap: Project, resources: dict[str, Any], database: Database
) -> None:
    make_due(database)
    fewer = with_gap.with_symbols(with_gap.settings.symbols[:1], resources)
    (request,) = requested_runs(fewer, resources)
    assert request.asset_selection == [with_gap.key("BTC/USDT", "15m")]


def test_a_gap_before_the_first_partition_is_skipped(
    with_gap: Project, resources: dict[str, Any], database: Database
) -> None:
    """It was synced by the command line; Dagster has no partition for it."""
    make_due(database)
    settings = with_gap.settings.model_copy(update={"history_start": instant("2024-02-01")})
    later = Project(settings, build_defs(settings=settings, resource_overrides=resources), with_gap.instance)
    assert skip_reason(later, resources) == "no gap is due"


# Bundles ----------------------------------------------------------------------------------------------


def test_a_new_provider_reopens_gaps_that_rely_on_one_response(
    project: MakeProject,
    resources: dict[str, Any],
    database: Database,
    market: LocalMarket,
) -> None:
    """Single missing quarters of Polygon, the only provider, are no-trade until Binance is eligible too."""
    polygon = ProviderResource(provider="polygon", base_url=market.polygon_url)
    given = resources | {"polygon": polygon}
    alone = settings_of("BTC/USDT").model_copy(
        update={
            "provider_priority": ProviderPriority(crypto=("polygon",)),
            "keys": {"polygon": SecretStr("any")},
        }
    )
    first = project("BTC/USDT")
    mine = replace(first, settings=alone, definitions=build_defs(settings=alone, resource_overrides=given))
    quiet = [instant("2024-01-02") + n * 900_000_000 for n in range(50, 2800, 140)]
    for start in quiet:
        market.plant_outage("polygon", TimeRange(start, start + 900_000_000))
    assert mine.materialize("15m", "2024-01-01").success
    series = mine.series("BTC/USDT", "15m")
    assert [(gap.start, gap.status) for gap in ledger_gaps(database, series, ALL_TIME)] == [
        (start, GapStatus.NO_TRADE) for start in quiet
    ]
    assert skip_reason(mine, given) == "no gap is due"
    both = alone.model_copy(update={"provider_priority": ProviderPriority(crypto=("polygon", "binance"))})
    mine = replace(mine, settings=both, definitions=build_defs(settings=both, resource_overrides=given))
    (request,) = requested_runs(mine, given)
    assert run(mine, request)
    assert ledger_gaps(database, series, ALL_TIME) == ()


def place(number: int, key: str, timeframe: Timeframe = Timeframe.M1) -> Place:
    series = Series(f"C{number}/USDT", timeframe, AssetClass.CRYPTO)
    return Place(series, key, OUTAGE, OUTAGE.start, 1)


def symbols(found: Sequence[Series]) -> list[str]:
    return [one.symbol for one in found]


def test_an_outage_of_many_is_a_run_of_fifty() -> None:
    found = bundled([place(n, "2024-01-01") for n in range(120)], 10)
    assert {key: len(series) for key, series in found.items()} == {
        ("ohlcv_months", "2024-01-01", AssetClass.CRYPTO): 50
    }


def test_runs_are_few_and_in_the_order_of_their_first_place() -> None:
    places = [place(0, "2024-03-01"), place(1, "2024-01-01"), place(2, "2024-02-01"), place(3, "2024-03-01")]
    found = bundled(places, 2)
    assert {key: symbols(series) for (_, key, _), series in found.items()} == {
        "2024-03-01": ["C0/USDT", "C3/USDT"],
        "2024-01-01": ["C1/USDT"],
    }


def test_months_and_years_are_different_runs() -> None:
    found = bundled([place(0, "2024-01-01"), place(0, "2024-01-01", Timeframe.D1)], 10)
    assert [(job, key) for job, key, _ in found] == [
        ("ohlcv_months", "2024-01-01"),
        ("ohlcv_years", "2024-01-01"),
    ]


def test_asset_classes_are_different_runs() -> None:
    """A class whose providers fail must not delay another one."""
    series = (
        Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO),
        Series("AAPL", Timeframe.H1, AssetClass.STOCKS),
        Series("MSFT", Timeframe.H1, AssetClass.STOCKS),
        Series("EUR/USD", Timeframe.H1, AssetClass.FOREX),
    )
    found = bundled([replace(place(0, "2024-01-01", Timeframe.H1), series=one) for one in series], 10)
    assert [symbols(some) for some in found.values()] == [["BTC/USDT"], ["AAPL", "MSFT"], ["EUR/USD"]]


# Settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "status"), [(True, DefaultSensorStatus.RUNNING), (False, DefaultSensorStatus.STOPPED)]
)
def test_the_sensor_can_be_switched_off(on: bool, status: DefaultSensorStatus) -> None:
    settings = settings_of("BTC/USDT").model_copy(update={"automation": Automation(fill_gaps=on)})
    sensor = build_defs(settings=settings).resolve_sensor_def("fill_gaps")
    assert sensor.default_status is status


def test_without_a_series_there_is_no_sensor() -> None:
    assert not build_defs(settings=Settings(symbols=())).sensors
