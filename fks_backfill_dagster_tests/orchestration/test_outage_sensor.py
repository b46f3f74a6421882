"""An outage of a venue is reported once, in a tick of the sensor, with one observation per affected series."""

from __future__ import annotations

import json
from typing import Any

import pytest
from dagster import AssetCheckEvaluation, AssetObservation, build_sensor_context
from dagster._core.definitions.sensor_definition import SensorExecutionData

from fks_backfill_dagster.app import now
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, to_datetime
from fks_backfill_dagster.orchestration import outage_sensor as sensor_module
from fks_backfill_dagster.orchestration.outage_sensor import MOST_LINES, Reported, new_outages, observations
from fks_backfill_dagster.pipeline.outages import Outage
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
LINE = "crypto: 2024-01-10 05:00 .. 09:00: 3 of 3 symbols miss 4 h; requested: binance"


def evaluate_tick_of(project: Project, resources: dict[str, Any], cursor: str | None) -> SensorExecutionData:
    """The result of a tick of the sensor."""
    sensor = project.definitions.resolve_sensor_def("venue_outages")
    with build_sensor_context(
        instance=project.instance,
        resources={"timescaledb": resources["timescaledb"]},
        definitions=project.definitions,
        cursor=cursor,
    ) as context:
        done = sensor.evaluate_tick(context)
    assert not done.run_requests
    return done


def tick(project: Project, resources: dict[str, Any], cursor: str | None) -> tuple[str | None, str | None]:
    """The message of a tick and its new cursor."""
    done = evaluate_tick_of(project, resources, cursor)
    return done.skip_message, done.cursor


def test_it_is_reported_once(project: MakeProject, resources: dict[str, Any], market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00")))
    mine = project(*SYMBOLS)
    assert mine.materialize("15m", "2024-01-01").success
    message, cursor = tick(mine, resources, None)
    assert message == LINE
    message, cursor = tick(mine, resources, cursor)
    assert message == "no new outage of a venue"


def test_one_symbol_is_not_an_outage_of_its_venue(
    project: MakeProject, resources: dict[str, Any], market: LocalMarket
) -> None:
    window = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
    market.plant_outage("binance", window, "BTCUSDT")
    mine = project(*SYMBOLS)
    assert mine.materialize("15m", "2024-01-01").success
    message, _ = tick(mine, resources, None)
    assert message == "no new outage of a venue"


def outage(hour: int, hours: int = 1) -> Outage:
    start = instant("2024-01-01") + hour * 3_600_000_000
    return Outage("crypto", TimeRange(start, start + hours * 3_600_000_000), SYMBOLS, 3, 9, (), ("binance",))


def test_a_continuing_outage_is_reported_once_and_a_filled_one_leaves_the_cursor() -> None:
    cursor, lines = new_outages([outage(0), outage(9)], None)
    assert len(lines) == 2
    cursor, lines = new_outages([outage(0, hours=5)], cursor)
    assert lines == []
    _, lines = new_outages([outage(0), outage(9)], cursor)
    assert lines == [str(outage(9))]


def test_many_outages_are_reported_over_several_ticks() -> None:
    many = [outage(2 * n) for n in range(MOST_LINES + 5)]
    cursor, lines = new_outages(many, None)
    assert len(lines) == MOST_LINES
    cursor, lines = new_outages(many, cursor)
    assert len(lines) == 5
    assert new_outages(many, cursor)[1] == []


# Observations and freshness ---------------------------------------------------------------------------------


def observed(done: SensorExecutionData) -> list[str]:
    return [
        "/".join(event.asset_key.path[1:])
        for event in done.asset_events
        if isinstance(event, AssetObservation)
    ]


def evaluated(done: SensorExecutionData) -> dict[str, AssetCheckEvaluation]:
    events = [event for event in done.asset_events if isinstance(event, AssetCheckEvaluation)]
    return {"/".join(event.asset_key.path[1:]): event for event in events}


def store(project: Project, present: int) -> None:
    """Materializes the current partitions of all series, without checks."""
    for job_name, frame, form in (("ohlcv_months", "15m", "%Y-%m-01"), ("ohlcv_years", "1h", "%Y-01-01")):
        job = project.definitions.resolve_job_def(job_name).get_subset(
            asset_selection=frozenset(project.key(symbol, frame) for symbol in SYMBOLS),
            asset_check_selection=frozenset(),
        )
        partition = f"{to_datetime(present):{form}}"
        assert job.execute_in_process(instance=project.instance, partition_key=partition).success


@pytest.mark.parametrize("over", [False, True])
def test_each_series_of_an_outage_gets_one_observation_and_fails_during_it(
    project: MakeProject, resources: dict[str, Any], market: LocalMarket, over: bool
) -> None:
    present = now()
    end = present - 2 * MICROS_PER_HOUR if over else present + MICROS_PER_DAY
    market.plant_outage("binance", TimeRange(present - 6 * MICROS_PER_HOUR, end))
    mine = project(*SYMBOLS, start=f"{to_datetime(present - 3 * MICROS_PER_DAY):%Y-01-01}")
    store(mine, present)
    done = evaluate_tick_of(mine, resources, None)
    every = sorted(f"{symbol.replace('/', '_')}/{frame}" for symbol in SYMBOLS for frame in ("15m", "1h"))
    assert sorted(observed(done)) == every
    (first, *_) = [event for event in done.asset_events if isinstance(event, AssetObservation)]
    assert (first.description or "").startswith("Outage of its venue: crypto: ")
    assert first.metadata["symbols"].value == "3 of 3"
    found = evaluated(done)
    assert sorted(found) == every
    assert {one.passed for one in found.values()} == {over}
    if not over:
        assert "outage of crypto: 3 of 3 symbols miss candles" in (found["BTC_USDT/1h"].description or "")
        assert "outage" in found["BTC_USDT/1h"].metadata
    for event in done.asset_events:  # as the daemon does it
        mine.instance.report_runless_asset_event(event)
    again = evaluate_tick_of(mine, resources, done.cursor)
    assert (observed(again), evaluated(again)) == ([], {}), "each series once"


def hours_of(symbols: int) -> tuple[Series, ...]:
    return tuple(Series(f"C{n}/USDT", Timeframe.H1, AssetClass.CRYPTO) for n in range(symbols))


def outage_of(start: str, series: tuple[Series, ...]) -> Outage:
    window = TimeRange(instant(start), instant(start) + MICROS_PER_HOUR)
    return Outage("crypto", window, SYMBOLS, 3, 9, (), ("binance",), series)


def test_observations_per_tick_are_bounded_and_continue_in_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sensor_module, "MOST_OBSERVATIONS", 4)
    found, at = (
        [outage_of("2024-01-01", hours_of(3)), outage_of("2024-01-02", hours_of(6))],
        instant("2024-02-01"),
    )
    reported, _ = new_outages(found, None)
    state = Reported(reported)
    counts = []
    for _ in range(4):
        new, affected = observations(found, state.outages or "[]", state.observed, at)
        counts.append(len(new.events))
        assert len(affected) <= len(new.events)
        state = Reported.parse(Reported(reported, new.seen).dump())
    assert counts == [4, 4, 1, 0]
    assert set(state.observed.values()) == {None}, "the outages are over, so the cursor drops their series"


def test_a_series_that_joins_an_outage_later_is_observed_too() -> None:
    at = instant("2024-01-01T00:30")
    one = outage_of("2024-01-01", hours_of(3))
    reported, _ = new_outages([one], None)
    first, _ = observations([one], reported, {}, at)
    assert len(first.events) == 3
    second, _ = observations([outage_of("2024-01-01", hours_of(5))], reported, first.seen, at)
    assert [event.asset_key.path[1] for event in second.events] == ["C3_USDT", "C4_USDT"]
    gone, _ = observations([], reported, second.seen, at)
    assert (list(gone.events), dict(gone.seen)) == ([], {}), "filled outages leave the cursor"


def test_an_unreported_outage_is_not_observed() -> None:
    found = [outage_of("2024-01-01", hours_of(3))]
    new, affected = observations(found, "[]", {}, instant("2024-02-01"))
    assert (list(new.events), affected) == ([], {})


def test_a_cursor_of_an_older_version_is_parsed() -> None:
    old = json.dumps(["crypto 2024-01-01T00:00:00+00:00"])
    state = Reported.parse(old)
    found = [outage_of("2024-01-01", hours_of(3))]
    reported, lines = new_outages(found, state.outages)
    assert lines == [], "it was reported before"
    new, _ = observations(found, reported, state.observed, instant("2024-02-01"))
    assert list(new.events) == []
    assert Reported.parse(None) == Reported(None)
