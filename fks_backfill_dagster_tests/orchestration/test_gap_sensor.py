"""The sensor that has gaps filled: what it asks for, what it leaves alone, and what its runs do."""

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
EVER = TimeRange(instant("2023-01-01"), instant("2026-01-01"))


@contextmanager
def tick(project: Project, resources: dict[str, Any]) -> Iterator[tuple[list[RunRequest], str | None]]:
    """A tick of the sensor: the runs that it asks for, or why it asks for none."""
    sensor = project.definitions.resolve_sensor_def("fill_gaps")
    given = {name: project.definitions.resources[name] for name in sensor.required_resource_keys}  # type: ignore[index]
    with build_sensor_context(
        instance=project.instance, resources={**given, **resources}, definitions=project.definitions
    ) as context:
        done = sensor.evaluate_tick(context)
        yield list(done.run_requests or []), done.skip_message


def asked(project: Project, resources: dict[str, Any]) -> list[RunRequest]:
    with tick(project, resources) as (requests, _):
        return requests


def why_not(project: Project, resources: dict[str, Any]) -> str | None:
    with tick(project, resources) as (requests, reason):
        assert not requests
        return reason


def time_has_come(database: Database) -> None:
    execute(database, "UPDATE fks.gap SET next_attempt_at = now() WHERE next_attempt_at IS NOT NULL")


def run(project: Project, request: RunRequest) -> bool:
    """The run of a request, in this process, as the daemon would launch it."""
    job = project.definitions.resolve_job_def(str(request.job_name))
    return job.execute_in_process(
        instance=project.instance,
        asset_selection=list(request.asset_selection or ()),
        partition_key=request.partition_key,
        tags={**request.tags, "dagster/sensor_name": "fill_gaps"},
        raise_on_error=False,
    ).success


@pytest.fixture
def holed(project: MakeProject, market: LocalMarket) -> Project:
    """January 2024 at 15m without four hours that Binance does not have, and nobody else is asked."""
    market.plant_outage("binance", OUTAGE)
    mine = project("BTC/USDT", "ETH/USDT")
    assert mine.materialize("15m", "2024-01-01").success
    market.reset_requests()
    return mine


def test_a_gap_is_asked_for_when_its_time_has_come(
    holed: Project, resources: dict[str, Any], database: Database, market: LocalMarket
) -> None:
    assert why_not(holed, resources) == "no gap is due"
    time_has_come(database)
    (request,) = asked(holed, resources)
    assert (request.job_name, request.partition_key) == ("ohlcv_months", "2024-01-01")
    both = {holed.key(symbol, "15m") for symbol in ("BTC/USDT", "ETH/USDT")}
    assert set(request.asset_selection or ()) == both, "found at the same time, in any order"
    assert [str(key.name) for key in request.asset_check_keys or ()] == ["completeness"] * 2
    assert request.tags[cadence.PRIORITY] == cadence.LAST
    assert request.run_key is None, "a key would make a second attempt look done"

    market.clear_outages()
    assert run(holed, request)
    for symbol in ("BTC/USDT", "ETH/USDT"):
        assert ledger_gaps(database, holed.series(symbol, "15m"), EVER) == ()
        newest = metadata_of(holed.instance, holed.key(symbol, "15m"))["2024-01-01"]
        assert (newest["missing"], newest["coverage"]) == (0, 1.0)
    assert why_not(holed, resources) == "no gap is due"


def test_a_run_asks_for_the_gaps_alone(
    project: MakeProject, resources: dict[str, Any], database: Database, market: LocalMarket
) -> None:
    """History that was never synced is pending, though it lies in the same partition."""
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
    time_has_come(database)
    (request,) = asked(mine, resources)
    assert run(mine, request)
    assert len(read_candles(database, series, EVER)) == 15 * 96
    assert ledger_gaps(database, series, EVER) == ()


def test_what_nobody_can_fill_is_left_alone_for_longer_and_longer(
    holed: Project, resources: dict[str, Any], database: Database, market: LocalMarket
) -> None:
    time_has_come(database)
    for request in asked(holed, resources):
        assert run(holed, request)
    requests = market.requests()
    (gap,) = ledger_gaps(database, holed.series("BTC/USDT", "15m"), EVER)
    assert (gap.status, gap.attempts) == (GapStatus.UNAVAILABLE, 2)
    assert why_not(holed, resources) == "no gap is due"
    assert market.requests() == requests


def test_a_gap_is_never_asked_for_twice_at_a_time(
    holed: Project, resources: dict[str, Any], database: Database
) -> None:
    time_has_come(database)
    (request,) = asked(holed, resources)
    key = holed.key("BTC/USDT", "15m")
    holed.instance.create_run_for_job(
        holed.definitions.resolve_job_def("ohlcv_months"),
        asset_selection=frozenset([key]),
        tags={**request.tags, "dagster/sensor_name": "fill_gaps", "dagster/partition": "2024-01-01"},
        status=DagsterRunStatus.STARTED,
    )
    (request,) = asked(holed, resources)
    assert request.asset_selection == [holed.key("ETH/USDT", "15m")]


def test_a_run_that_broke_is_not_asked_for_again_at_once(
    holed: Project, resources: dict[str, Any], database: Database
) -> None:
    """It ended before it could ask anybody, so the gap is still due."""
    time_has_come(database)
    (request,) = asked(holed, resources)
    holed.instance.create_run_for_job(
        holed.definitions.resolve_job_def("ohlcv_months"),
        asset_selection=frozenset(request.asset_selection or ()),
        tags={**request.tags, "dagster/sensor_name": "fill_gaps", "dagster/partition": "2024-01-01"},
        status=DagsterRunStatus.FAILURE,
    )
    assert why_not(holed, resources) == "no gap is due"


def test_runs_that_wait_are_waited_for(holed: Project, resources: dict[str, Any], database: Database) -> None:
    time_has_come(database)
    for _ in range(cadence.FILL_RUNS):
        holed.instance.create_run_for_job(
            holed.definitions.resolve_job_def("ohlcv_years"),
            asset_selection=frozenset([holed.key("BTC/USDT", "1h")]),
            tags={"dagster/sensor_name": "fill_gaps", "dagster/partition": "2024-01-01"},
            status=DagsterRunStatus.STARTED,
        )
    assert why_not(holed, resources) == "10 runs that fill gaps wait or run already"


def test_a_series_that_is_in_no_settings_is_left_alone(
    holed: Project, resources: dict[str, Any], database: Database
) -> None:
    time_has_come(database)
    fewer = holed.with_symbols(holed.settings.symbols[:1], resources)
    (request,) = asked(fewer, resources)
    assert request.asset_selection == [holed.key("BTC/USDT", "15m")]


def test_a_gap_before_the_first_partition_is_left_alone(
    holed: Project, resources: dict[str, Any], database: Database
) -> None:
    """It was synced by hand; Dagster has no partition for it."""
    time_has_come(database)
    settings = holed.settings.model_copy(update={"history_start": instant("2024-02-01")})
    later = Project(settings, build_defs(settings=settings, resource_overrides=resources), holed.instance)
    assert why_not(later, resources) == "no gap is due"


# Bundles ----------------------------------------------------------------------------------------------


def test_a_new_provider_reopens_what_rests_on_one_response(
    project: MakeProject,
    resources: dict[str, Any],
    database: Database,
    market: LocalMarket,
) -> None:
    """Single quarters that Polygon alone lacks did not trade, until Binance can be requested as well."""
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
    assert [(gap.start, gap.status) for gap in ledger_gaps(database, series, EVER)] == [
        (start, GapStatus.NO_TRADE) for start in quiet
    ]
    assert why_not(mine, given) == "no gap is due"
    both = alone.model_copy(update={"provider_priority": ProviderPriority(crypto=("polygon", "binance"))})
    mine = replace(mine, settings=both, definitions=build_defs(settings=both, resource_overrides=given))
    (request,) = asked(mine, given)
    assert run(mine, request)
    assert ledger_gaps(database, series, EVER) == ()


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
    """One class whose providers fail keeps no other one waiting."""
    series = (
        Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO),
        Series("AAPL", Timeframe.H1, AssetClass.STOCKS),
        Series("MSFT", Timeframe.H1, AssetClass.STOCKS),
        Series("EUR/USD", Timeframe.H1, AssetClass.FOREX),
    )
    found = bundled([replace(place(0, "2024-01-01", Timeframe.H1), series=one) for one in series], 10)
    assert [symbols(some) for some in found.values()] == [["BTC/USDT"], ["AAPL", "MSFT"], ["EUR/USD"]]


# The switch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on", "status"), [(True, DefaultSensorStatus.RUNNING), (False, DefaultSensorStatus.STOPPED)]
)
def test_the_sensor_can_be_switched_off(on: bool, status: DefaultSensorStatus) -> None:
    settings = settings_of("BTC/USDT").model_copy(update={"automation": Automation(fill_gaps=on)})
    sensor = build_defs(settings=settings).resolve_sensor_def("fill_gaps")
    assert sensor.default_status is status


def test_without_a_series_there_is_no_sensor() -> None:
    assert not build_defs(settings=Settings(symbols=())).sensors
