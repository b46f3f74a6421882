"""An outage of a venue is told once, in a tick of the sensor, and observed once by each of its series."""

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
from fks_backfill_dagster.orchestration.outage_sensor import MOST_LINES, Reported, news, observations
from fks_backfill_dagster.pipeline.outages import Outage
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
LINE = "crypto: 2024-01-10 05:00 .. 09:00: 3 of 3 symbols lack 4 h; asked: binance"


def looked(project: Project, resources: dict[str, Any], cursor: str | None) -> SensorExecutionData:
    """What a tick of the sensor does."""
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
    """What a look of the sensor says, and its new cursor."""
    done = looked(project, resources, cursor)
    return done.skip_message, done.cursor


def test_it_is_told_once(project: MakeProject, resources: dict[str, Any], market: LocalMarket) -> None:
    market.plant_outage("binance", TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00")))
    mine = project(*SYMBOLS)
    assert mine.materialize("15m", "2024-01-01").success
    said, cursor = tick(mine, resources, None)
    assert said == LINE
    said, cursor = tick(mine, resources, cursor)
    assert said == "no venue has an outage that was not told"


def test_one_symbol_is_no_venue(project: MakeProject, resources: dict[str, Any], market: LocalMarket) -> None:
    window = TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00"))
    market.plant_outage("binance", window, "BTCUSDT")
    mine = project(*SYMBOLS)
    assert mine.materialize("15m", "2024-01-01").success
    said, _ = tick(mine, resources, None)
    assert said == "no venue has an outage that was not told"


def outage(hour: int, hours: int = 1) -> Outage:
    start = instant("2024-01-01") + hour * 3_600_000_000
    return Outage("crypto", TimeRange(start, start + hours * 3_600_000_000), SYMBOLS, 3, 9, (), ("binance",))


def test_what_goes_on_is_told_once_and_what_is_over_is_forgotten() -> None:
    cursor, lines = news([outage(0), outage(9)], None)
    assert len(lines) == 2
    cursor, lines = news([outage(0, hours=5)], cursor)
    assert lines == []
    _, lines = news([outage(0), outage(9)], cursor)
    assert lines == [str(outage(9))]


def test_many_are_told_in_several_ticks() -> None:
    many = [outage(2 * n) for n in range(MOST_LINES + 5)]
    cursor, lines = news(many, None)
    assert len(lines) == MOST_LINES
    cursor, lines = news(many, cursor)
    assert len(lines) == 5
    assert news(many, cursor)[1] == []


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
    """The running partitions of all series, without any check."""
    for job_name, frame, form in (("ohlcv_months", "15m", "%Y-%m-01"), ("ohlcv_years", "1h", "%Y-01-01")):
        job = project.definitions.resolve_job_def(job_name).get_subset(
            asset_selection=frozenset(project.key(symbol, frame) for symbol in SYMBOLS),
            asset_check_selection=frozenset(),
        )
        partition = f"{to_datetime(present):{form}}"
        assert job.execute_in_process(instance=project.instance, partition_key=partition).success


@pytest.mark.parametrize("over", [False, True])
def test_each_series_of_an_outage_gets_one_observation_and_fails_while_it_goes_on(
    project: MakeProject, resources: dict[str, Any], market: LocalMarket, over: bool
) -> None:
    present = now()
    end = present - 2 * MICROS_PER_HOUR if over else present + MICROS_PER_DAY
    market.plant_outage("binance", TimeRange(present - 6 * MICROS_PER_HOUR, end))
    mine = project(*SYMBOLS, start=f"{to_datetime(present - 3 * MICROS_PER_DAY):%Y-01-01}")
    store(mine, present)
    done = looked(mine, resources, None)
    every = sorted(f"{symbol.replace('/', '_')}/{frame}" for symbol in SYMBOLS for frame in ("15m", "1h"))
    assert sorted(observed(done)) == every
    (first, *_) = [event for event in done.asset_events if isinstance(event, AssetObservation)]
    assert (first.description or "").startswith("Outage of its venue: crypto: ")
    assert first.metadata["symbols"].value == "3 of 3"
    found = evaluated(done)
    assert sorted(found) == every
    assert {one.passed for one in found.values()} == {over}
    if not over:
        assert "outage of crypto: 3 of 3 symbols lack candles" in (found["BTC_USDT/1h"].description or "")
        assert "outage" in found["BTC_USDT/1h"].metadata
    for event in done.asset_events:  # as the daemon does
        mine.instance.report_runless_asset_event(event)
    again = looked(mine, resources, done.cursor)
    assert (observed(again), evaluated(again)) == ([], {}), "each series once"


def hours_of(symbols: int) -> tuple[Series, ...]:
    return tuple(Series(f"C{n}/USDT", Timeframe.H1, AssetClass.CRYPTO) for n in range(symbols))


def lacking(start: str, series: tuple[Series, ...]) -> Outage:
    window = TimeRange(instant(start), instant(start) + MICROS_PER_HOUR)
    return Outage("crypto", window, SYMBOLS, 3, 9, (), ("binance",), series)


def test_observations_are_bounded_and_go_on_in_the_next_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensor_module, "MOST_OBSERVATIONS", 4)
    found, at = (
        [lacking("2024-01-01", hours_of(3)), lacking("2024-01-02", hours_of(6))],
        instant("2024-02-01"),
    )
    told, _ = news(found, None)
    state = Reported(told)
    counts = []
    for _ in range(4):
        new, affected = observations(found, state.told or "[]", state.observed, at)
        counts.append(len(new.events))
        assert len(affected) <= len(new.events)
        state = Reported.parse(Reported(told, new.seen).dump())
    assert counts == [4, 4, 1, 0]
    assert set(state.observed.values()) == {None}, "they are over: no more is remembered than that"


def test_a_series_that_joins_an_outage_later_is_observed_too() -> None:
    at = instant("2024-01-01T00:30")
    one = lacking("2024-01-01", hours_of(3))
    told, _ = news([one], None)
    first, _ = observations([one], told, {}, at)
    assert len(first.events) == 3
    second, _ = observations([lacking("2024-01-01", hours_of(5))], told, first.seen, at)
    assert [event.asset_key.path[1] for event in second.events] == ["C3_USDT", "C4_USDT"]
    gone, _ = observations([], told, second.seen, at)
    assert (list(gone.events), dict(gone.seen)) == ([], {}), "what is filled is forgotten"


def test_an_untold_outage_is_not_observed() -> None:
    found = [lacking("2024-01-01", hours_of(3))]
    new, affected = observations(found, "[]", {}, instant("2024-02-01"))
    assert (list(new.events), affected) == ([], {})


def test_a_cursor_of_an_older_version_is_understood() -> None:
    old = json.dumps(["crypto 2024-01-01T00:00:00+00:00"])
    state = Reported.parse(old)
    found = [lacking("2024-01-01", hours_of(3))]
    told, lines = news(found, state.told)
    assert lines == [], "it was told"
    new, _ = observations(found, told, state.observed, instant("2024-02-01"))
    assert list(new.events) == []
    assert Reported.parse(None) == Reported(None)
