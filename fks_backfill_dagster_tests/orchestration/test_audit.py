"""The audit in Dagster: log and failures of a run, and the ticks of its schedule."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from dagster import DagsterEventType, DagsterInstance, DagsterRunStatus, Definitions, build_schedule_context
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.orchestration import cadence
from fks_backfill_dagster.orchestration.audit import audit_cron, audit_requests, is_audit_hour
from fks_backfill_dagster.orchestration.build import build_defs
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.sections import GapDetection
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.orchestration.conftest import MakeProject, Project, settings_of
from fks_backfill_dagster_tests.orchestration.test_schedules import pretend_synced
from fks_backfill_dagster_tests.store.builders import execute

DELETE = (
    "DELETE FROM fks.\"candles_15m\" WHERE ts = '2024-01-20T12:00Z' AND series_id ="
    " (SELECT id FROM fks.series WHERE symbol = 'BTC/USDT' AND timeframe = '15m')"
)
BREAK = "UPDATE fks.\"candles_15m\" SET high = low - 1 WHERE ts = '2024-01-21T12:00Z'"


@pytest.fixture
def stored(project: MakeProject) -> Project:
    mine = project("BTC/USDT", "ETH/USDT")
    assert mine.materialize("15m", "2024-01-01").success
    return mine


def audited(mine: Project, series: list[str] | None = None) -> Any:
    config = {"ops": {"audit_series": {"config": {"series": series}}}} if series else {}
    return mine.definitions.resolve_job_def("audit").execute_in_process(
        instance=mine.instance, run_config=config, raise_on_error=False
    )


def lines(mine: Project, done: Any, level: str) -> list[str]:
    names = {"warning": 30, "error": 40}
    logs = mine.instance.all_logs(done.run_id)
    return [
        entry.user_message for entry in logs if entry.level == names[level] and not entry.is_dagster_event
    ]


def sums(done: Any) -> dict[str, Any]:
    (output,) = [e for e in done.all_events if e.event_type is DagsterEventType.STEP_OUTPUT]
    return {name: value.value for name, value in output.step_output_data.metadata.items()}


def observed(mine: Project, done: Any) -> dict[str, Any]:
    """The metadata of the observations of a run, by asset; those of a failed run are in the instance only."""
    records = mine.instance.all_logs(done.run_id, of_type=DagsterEventType.ASSET_OBSERVATION)
    found = [r.get_dagster_event().asset_observation_data.asset_observation for r in records]
    return {"/".join(one.asset_key.path): {k: v.value for k, v in one.metadata.items()} for one in found}


def test_an_audit_without_differences(stored: Project) -> None:
    done = audited(stored)
    assert done.success
    found = sums(done)
    assert found.pop("seconds") >= 0
    assert found == {"series": 2, "candles": 2 * 2976, "differences": 0, "repaired": 0, "left": 0}
    assert (lines(stored, done, "warning"), observed(stored, done)) == ([], {})


def test_a_repaired_difference_is_a_warning_and_an_observation(stored: Project, database: Database) -> None:
    execute(database, DELETE)
    done = audited(stored)
    assert done.success
    assert (sums(done)["differences"], sums(done)["repaired"]) == (2, 2)
    assert sorted(lines(stored, done, "warning")) == [
        "BTC/USDT 15m: total_candles: the status records 2,976 candles instead of 2,975 (repaired)",
        "BTC/USDT 15m: unrecorded_gap: 1 candle absent without a gap in the ledger (repaired)",
    ]
    (key,) = observed(stored, done)
    assert key == "ohlcv/BTC_USDT/15m"
    found = observed(stored, done)[key]
    assert (found["missing"], found["left"]) == (1, 0)
    assert [one["kind"] for one in found["differences"]] == ["total_candles", "unrecorded_gap"]
    again = audited(stored)
    assert (sums(again)["differences"], observed(stored, again)) == (0, {})


def test_an_unrepaired_difference_fails_the_run(stored: Project, database: Database) -> None:
    execute(database, DELETE, BREAK)
    done = audited(stored)
    assert not done.success
    errors = [line for line in lines(stored, done, "error") if "broken_rule" in line]
    assert len(errors) == 2
    assert all("--refetch" in line for line in errors)
    assert len(lines(stored, done, "warning")) == 2
    (failure,) = [e for e in done.all_events if e.event_type is DagsterEventType.STEP_FAILURE]
    assert "2 differences cannot be repaired" in str(failure.step_failure_data.error)
    assert "BTC/USDT 15m, ETH/USDT 15m" in str(failure.step_failure_data.error)
    assert set(observed(stored, done)) == {"ohlcv/BTC_USDT/15m", "ohlcv/ETH_USDT/15m"}


def test_series_can_be_named(stored: Project) -> None:
    assert sums(audited(stored, ["ETH/USDT 15m"]))["series"] == 1
    wrong = audited(stored, ["ETH/USDT 15m", "DOGE/USDT 1h"])
    assert not wrong.success
    (failure,) = [e for e in wrong.all_events if e.event_type is DagsterEventType.STEP_FAILURE]
    assert "not stored: DOGE/USDT 1h" in str(failure.step_failure_data.error)


def test_a_series_that_was_removed_from_the_settings_is_audited(
    stored: Project, database: Database, resources: dict[str, object]
) -> None:
    execute(database, DELETE)
    rest = stored.with_symbols(stored.settings.symbols[1:], resources)
    done = audited(rest)
    assert (sums(done)["series"], sums(done)["repaired"]) == (2, 2)
    assert observed(stored, done) == {}, "it is no longer an asset"


def test_the_log_of_a_run_is_short(stored: Project, database: Database) -> None:
    execute(
        database,
        'DELETE FROM fks."candles_15m" WHERE extract(hour FROM ts) = 5 AND extract(minute FROM ts) = 0',
    )
    done = audited(stored)
    logged = lines(stored, done, "warning")
    assert len(logged) == 21
    assert logged[-1] == f"and {2 * 31 + 2 - 20} more"


# Schedule -----------------------------------------------------------------------------------------------


def test_a_run_takes_fifty_series_at_most(database: Database) -> None:
    for number in range(51):
        pretend_synced(database, f"C{number}/USDT", "1h", "2024-01-01", "2024-01-02")
    found = list(audit_requests(database, Catalog(settings_of("C1/USDT"))))
    names = [request.run_config["ops"]["audit_series"]["config"]["series"] for request in found]
    assert [len(some) for some in names] == [50, 1]
    assert len({name for some in names for name in some}) == 51
    assert len({request.run_key for request in found}) == 2
    assert {request.tags[cadence.PRIORITY] for request in found} == {"-10"}


@pytest.mark.parametrize(
    ("hours", "cron"),
    [
        (1, "50 */1 * * *"),
        (6, "50 */6 * * *"),
        (7, "50 * * * *"),
        (24, "50 0 * * *"),
        (36, "50 * * * *"),
        (8760, "50 0 * * *"),
    ],
)
def test_the_cron_schedule(hours: int, cron: str) -> None:
    assert audit_cron(hours) == cron


@given(st.integers(1, 8760), st.integers(0, 500_000))
def test_one_tick_per_interval_is_due(hours: int, first: int) -> None:
    epoch = datetime(1970, 1, 1, 0, 50, tzinfo=UTC)
    due = [n for n in range(first, first + hours) if is_audit_hour(epoch + timedelta(hours=n), hours)]
    assert len(due) == 1
    hour = (epoch + timedelta(hours=due[0])).hour
    hours_field = audit_cron(hours).split()[1]
    assert hours_field == "*" or (
        hour == 0 if hours_field == "0" else hour % int(hours_field.removeprefix("*/")) == 0
    )


def test_the_schedule_requests_one_audit_per_interval(
    resources: dict[str, Any], database: Database, tmp_path: Path
) -> None:
    pretend_synced(database, "BTC/USDT", "1h", "2024-01-01", "2024-01-02")
    settings = settings_of("BTC/USDT").model_copy(
        update={"gap_detection": GapDetection(check_interval_hours=48)}
    )
    definitions = build_defs(settings=settings, resource_overrides=resources)
    midnight = datetime(2024, 3, 10, 0, 50, tzinfo=UTC)
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        ticks = [tick(definitions, resources, instance, midnight + timedelta(days=n)) for n in range(4)]
        assert ticks[:2] == ticks[2:]
        assert sorted(ticks[:2]) == [(0, "an audit is due every 48 hours"), (1, "")]
        due = midnight + timedelta(days=ticks.index((1, "")))
        instance.create_run_for_job(definitions.resolve_job_def("audit"), status=DagsterRunStatus.STARTED)
        waits = (0, "the previous audit is still queued or running")
        assert tick(definitions, resources, instance, due) == waits


def test_without_series_no_run_is_requested(resources: dict[str, Any], tmp_path: Path) -> None:
    definitions = build_defs(settings=settings_of("BTC/USDT"), resource_overrides=resources)
    with DagsterInstance.local_temp(str(tmp_path)) as instance:
        moment = datetime(2024, 3, 10, 0, 50, tzinfo=UTC)
        assert tick(definitions, resources, instance, moment) == (0, "no series is stored")


def tick(
    definitions: Definitions, resources: dict[str, Any], instance: DagsterInstance, moment: datetime
) -> tuple[int, str]:
    """The number of requested runs of a tick, and the reason of a skip."""
    with build_schedule_context(
        instance=instance, scheduled_execution_time=moment, resources=resources
    ) as context:
        found = definitions.resolve_schedule_def("audit").evaluate_tick(context)
    return len(found.run_requests or []), found.skip_message or ""
