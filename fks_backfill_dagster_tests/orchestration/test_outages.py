"""An outage of a venue is told once, in a tick of the sensor."""

from __future__ import annotations

from typing import Any

from dagster import build_sensor_context

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.orchestration.outages import MOST_LINES, news
from fks_backfill_dagster.pipeline.outages import Outage
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project

SYMBOLS = ("BTC/USDT", "ETH/USDT", "SOL/USDT")
LINE = "crypto: 2024-01-10 05:00 .. 09:00: 3 of 3 symbols lack 4 h; asked: binance"


def tick(project: Project, resources: dict[str, Any], cursor: str | None) -> tuple[str | None, str | None]:
    """What a look of the sensor says, and its new cursor."""
    sensor = project.definitions.resolve_sensor_def("venue_outages")
    with build_sensor_context(
        instance=project.instance,
        resources={"timescaledb": resources["timescaledb"]},
        definitions=project.definitions,
        cursor=cursor,
    ) as context:
        done = sensor.evaluate_tick(context)
    assert not done.run_requests
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
