"""Partitions before a series' own start: reported once, without a run, without an effect on freshness."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from dagster import AssetKey, SensorDefinition, build_sensor_context
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration import before_start
from fks_backfill_dagster.orchestration.before_start import SENSOR, keys_before_start
from fks_backfill_dagster.settings.sections import SymbolSettings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project
from fks_backfill_dagster_tests.orchestration.test_assets import metadata_of, statuses

FRAMES = (Timeframe.M15, Timeframe.H1)


def entry(symbol: str, start: str | None, asset_class: AssetClass = AssetClass.CRYPTO) -> SymbolSettings:
    return SymbolSettings(
        asset_class=asset_class,
        symbol=symbol,
        timeframes=FRAMES,
        start=start,  # type: ignore[arg-type]
    )


def sensor_of(project: Project) -> SensorDefinition:
    return project.definitions.resolve_sensor_def(SENSOR)


def tick(project: Project, cursor: str | None = None) -> tuple[str | None, str]:
    """The cursor after a tick, and its skip message."""
    with build_sensor_context(instance=project.instance, cursor=cursor) as context:
        done = sensor_of(project).evaluate_tick(context)
    assert not done.run_requests
    return done.cursor, str(done.skip_message)


def reports(project: Project, key: AssetKey) -> list[tuple[str, str]]:
    """Partition and description of each materialization without a run, oldest first."""
    found = project.instance.fetch_materializations(key, limit=1000, ascending=True).records
    return [
        (str(one.partition_key), str(one.asset_materialization.description))
        for one in found
        if one.asset_materialization is not None and not one.run_id
    ]


@pytest.fixture
def mine(project: MakeProject, resources: dict[str, Any]) -> Project:
    """BTC since October 2023 (before history_start), ETH since 20 February 2024, SOL since history_start."""
    base = project("BTC/USDT", start="2024-01-01")
    entries = (entry("BTC/USDT", "2023-10-05"), entry("ETH/USDT", "2024-02-20"), entry("SOL/USDT", None))
    return base.with_symbols(entries, resources)


def test_each_early_partition_is_reported_once(mine: Project, market: LocalMarket) -> None:
    market.reset_requests()
    cursor, message = tick(mine)
    assert "9 partitions reported" in message, "ETH: 4 months and a year; SOL: 3 months and a year"
    expected = {
        ("BTC/USDT", "15m"): [],
        ("ETH/USDT", "15m"): ["2023-10-01", "2023-11-01", "2023-12-01", "2024-01-01"],
        ("SOL/USDT", "15m"): ["2023-10-01", "2023-11-01", "2023-12-01"],
        ("ETH/USDT", "1h"): ["2023-01-01"],
        ("SOL/USDT", "1h"): ["2023-01-01"],
    }
    for (symbol, frame), keys in expected.items():
        found = reports(mine, mine.key(symbol, frame))
        assert [key for key, _ in found] == keys
        assert all("nothing expected" in text for _, text in found)
    key = mine.key("ETH/USDT", "15m")
    numbers = metadata_of(mine.instance, key)
    assert {one["expected"] for one in numbers.values()} == {0}
    assert statuses(mine, key, "2024-01-01", "2024-02-01") == {
        "2024-01-01": "MATERIALIZED",
        "2024-02-01": None,
    }
    for again in (cursor, None):  # the cursor is only an optimization
        _, message = tick(mine, again)
        assert " 9 partitions" not in message
    assert len(reports(mine, key)) == 4
    assert market.requests() == 0
    assert mine.instance.get_runs() == []


def test_partitions_of_a_new_symbol_are_reported_and_no_others_again(
    mine: Project, resources: dict[str, Any]
) -> None:
    cursor, _ = tick(mine)
    more = mine.with_symbols([*mine.settings.symbols, entry("ADA/USDT", "2023-12-31")], resources)
    cursor, message = tick(more, cursor)
    assert message.startswith("2 partitions reported"), (
        "October and November; December and the year contain its start"
    )
    assert [key for key, _ in reports(more, more.key("ADA/USDT", "15m"))] == ["2023-10-01", "2023-11-01"]
    assert len(reports(more, more.key("SOL/USDT", "15m"))) == 3
    # An earlier start adds earlier partitions: only these are reported.
    earlier = more.with_symbols([entry("BTC/USDT", "2023-08-01"), *more.settings.symbols[1:]], resources)
    _, message = tick(earlier, cursor)
    assert [key for key, _ in reports(earlier, earlier.key("SOL/USDT", "15m"))][3:] == [
        "2023-08-01",
        "2023-09-01",
    ]


def test_partitions_materialized_by_a_run_are_not_reported(mine: Project) -> None:
    assert mine.materialize("15m", "2023-11-01", "2023-11-01", "SOL/USDT").success
    tick(mine)
    assert [key for key, _ in reports(mine, mine.key("SOL/USDT", "15m"))] == ["2023-10-01", "2023-12-01"]


def test_a_report_does_not_make_a_series_fresh(mine: Project) -> None:
    """The freshness policy uses the time of the asset's newest materialization."""
    key = mine.key("ETH/USDT", "15m")
    tick(mine)
    never = mine.instance.get_latest_materialization_event(key)
    assert never is not None
    assert datetime.fromtimestamp(never.timestamp, UTC) < datetime.now(UTC) - timedelta(days=365)
    assert mine.materialize("1h", "2024-01-01", "2024-01-01", "SOL/USDT").success
    key = mine.key("SOL/USDT", "1h")
    real = mine.instance.get_latest_materialization_event(key)
    assert real is not None
    before_start.report(
        mine.instance, [before_start.Early(mine.series("SOL/USDT", "1h"), 0, ("2022-01-01",))], 0
    )
    after = mine.instance.get_latest_materialization_event(key)
    assert after is not None
    assert after.run_id == ""
    assert after.timestamp == real.timestamp


def test_many_are_reported_over_several_ticks(mine: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(before_start, "MOST_REPORTS", 2)
    cursor, seen = None, []
    while "every partition" not in (message := tick(mine, cursor)[1]):
        cursor, _ = tick(mine, cursor)
        seen.append(message)
        assert len(seen) < 20
    assert (
        sum(len(reports(mine, mine.key(s, f))) for s in ("ETH/USDT", "SOL/USDT") for f in ("15m", "1h")) == 9
    )


def test_without_a_later_start_there_is_no_sensor(project: MakeProject) -> None:
    assert SENSOR not in {one.name for one in project("BTC/USDT").definitions.sensors or ()}


moments = st.integers(631_152_000, 1_893_456_000).map(lambda seconds: seconds * 10**6)


@given(frame=st.sampled_from(list(Timeframe)), begin=moments, start=moments)
def test_keys_before_a_start_are_those_of_whole_partitions_before_it(
    frame: Timeframe, begin: int, start: int
) -> None:
    grain = Grain.of(frame)
    keys = keys_before_start(grain, begin, start)
    windows = [grain.window(key) for key in keys]
    assert all(window.end <= start for window in windows)
    assert all(one.end == other.start for one, other in pairwise(windows))
    if keys:
        assert keys[0] == grain.key(begin)
        assert grain.key(windows[-1].end) == grain.key(start)
    elif start > begin:
        assert grain.key(begin) == grain.key(start)
