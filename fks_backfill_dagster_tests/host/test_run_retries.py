"""A run that failed is retried although its failure is seen before its status."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from dagster import DagsterEvent, DagsterEventType, DagsterInstance, DagsterRunStatus, EventLogEntry
from dagster._core.storage.dagster_run import RunsFilter
from dagster._core.storage.tags import WILL_RETRY_TAG
from dagster._core.test_utils import create_run_for_test, instance_for_test
from dagster._daemon.auto_run_reexecution import auto_run_reexecution
from dagster._daemon.auto_run_reexecution.event_log_consumer import EventLogConsumerDaemon
from dagster._daemon.daemon import IntervalDaemon

from fks_backfill_dagster.host import daemon
from fks_backfill_dagster.host.daemon import EndedRunsDaemon, LastingBackfillDaemon, daemons, ended


@pytest.fixture
def instance() -> Iterator[DagsterInstance]:
    with instance_for_test(overrides={"run_retries": {"enabled": True, "max_retries": 3}}) as made:
        yield made


def half_failed(instance: DagsterInstance) -> str:
    """A run whose failure is stored as an event, and not as its status yet: as between the two statements."""
    run = create_run_for_test(instance, status=DagsterRunStatus.STARTED, tags={WILL_RETRY_TAG: "true"})
    failure = DagsterEvent(DagsterEventType.RUN_FAILURE.value, run.job_name, message="its worker is gone")
    instance.event_log_storage.store_event(
        EventLogEntry(  # type: ignore[no-untyped-call]  # Dagster's constructor has no annotations
            error_info=None,
            level=40,
            user_message="",
            run_id=run.run_id,
            timestamp=time.time(),
            dagster_event=failure,
        )
    )
    return str(run.run_id)


def fail_while_waiting(instance: DagsterInstance, run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores the status during the second pause of the daemon."""
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            run = instance.get_run_by_id(run_id)
            assert run is not None
            instance.report_run_failed(run)

    monkeypatch.setattr(time, "sleep", sleep)


@pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning")  # Dagster's
@pytest.mark.parametrize(
    ("made", "status"),
    [
        (EndedRunsDaemon, DagsterRunStatus.FAILURE),
        # Dagster's own: when this fails, Dagster waits itself, and EndedRunsDaemon can go.
        (EventLogConsumerDaemon, DagsterRunStatus.STARTED),
    ],
)
def test_the_retry_begins_with_the_status(
    instance: DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
    made: type[EventLogConsumerDaemon],
    status: DagsterRunStatus,
) -> None:
    consumer = made()
    context = SimpleNamespace(instance=instance)
    iterate(consumer, context)  # the first iteration begins at the end of the log
    run_id = half_failed(instance)
    retried = []
    monkeypatch.setattr(
        auto_run_reexecution, "retry_run", lambda run, _: retried.append((run.run_id, run.status))
    )
    fail_while_waiting(instance, run_id, monkeypatch)
    iterate(consumer, context)
    assert retried == [(run_id, status)]


def iterate(consumer: IntervalDaemon[Any], context: Any) -> None:
    for _ in consumer.run_iteration(context):
        pass


def test_a_status_that_never_comes_is_not_waited_for_endlessly(
    instance: DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "STATUS_SECONDS", -1.0)
    records = instance.get_run_records(RunsFilter(run_ids=[half_failed(instance)]))
    assert [one.dagster_run.status for one in ended(instance, records)] == [DagsterRunStatus.STARTED]


def test_the_daemons_are_ours(instance: DagsterInstance) -> None:
    kinds = {type(one) for one in daemons(instance)}
    assert {EndedRunsDaemon, LastingBackfillDaemon} <= kinds
    assert EventLogConsumerDaemon not in kinds
