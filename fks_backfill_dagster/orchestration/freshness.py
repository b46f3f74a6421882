"""The check `data_freshness`: its results, and which of them are logged.

Belongs here: the check result of an assessment, when it is logged. Does not belong here: when a series is stale
(`pipeline.freshness`), where the check is evaluated (`checks`, `assets`, `outage_sensor`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dagster import (
    AssetCheckEvaluation,
    AssetCheckKey,
    AssetCheckResult,
    AssetCheckSeverity,
    AssetKey,
    DagsterInstance,
    MetadataValue,
)

from fks_backfill_dagster.domain.freshness import Verdict, polling_interval
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, MICROS_PER_MINUTE, iso
from fks_backfill_dagster.pipeline.freshness import Assessment, Rule, freshness
from fks_backfill_dagster.store.database import Database

FRESHNESS = "data_freshness"

# An unchanged result is logged again if the logged one would be older than this at the next evaluation: an hour,
# less the delay with which a refresh may start.
_RELOG_AFTER = MICROS_PER_HOUR - 5 * MICROS_PER_MINUTE


def freshness_results(
    database: Database, wanted: Mapping[AssetKey, Series], rule: Rule, now: int
) -> list[AssetCheckResult]:
    """One result per series, from one query for all of them (and four more if candles are overdue)."""
    found = freshness(database, list(dict.fromkeys(wanted.values())), now, rule)
    return [_result(key, found[one]) for key, one in wanted.items()]


def _result(key: AssetKey, found: Assessment) -> AssetCheckResult:
    state, text = found.freshness, str(found)
    outage = {} if found.outage is None else {"outage": str(found.outage)}
    return AssetCheckResult(
        asset_key=key,
        check_name=FRESHNESS,
        passed=state.fresh,
        severity=AssetCheckSeverity.ERROR if state.verdict is Verdict.STALE else AssetCheckSeverity.WARN,
        description=f"{text[0].upper()}{text[1:]}.",
        metadata={
            "newest": MetadataValue.null() if state.newest is None else iso(state.newest),
            "lag": MetadataValue.null() if state.lag is None else state.lag,
            "allowed": state.allowed,
            **outage,
        },
    )


def events_to_log(
    instance: DagsterInstance,
    results: Sequence[AssetCheckResult],
    wanted: Mapping[AssetKey, Series],
    now: int,
) -> list[AssetCheckEvaluation]:
    """Results that differ from the last ones in Dagster's event log, and those that would be an hour old there.

    Logging every evaluation of thousands of series, four times an hour, would flood the event log; the page of a
    series shows the last one and its age. One query.
    """
    keys = [AssetCheckKey(key, FRESHNESS) for key in wanted]
    known = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
    fresh = []
    for result in results:
        event = as_event(result)
        record = known.get(AssetCheckKey(event.asset_key, FRESHNESS))
        last = None if record is None else record.evaluation
        if isinstance(last, AssetCheckEvaluation) and record is not None and record.event is not None:
            age = now - int(record.event.timestamp * 1_000_000)
            due = age + polling_interval(wanted[event.asset_key].timeframe) > _RELOG_AFTER
            if _outcome(last) == _outcome(event) and age >= 0 and not due:
                continue
        fresh.append(event)
    return fresh


def as_event(result: AssetCheckResult) -> AssetCheckEvaluation:
    """The event that the op of the check would log for this result."""
    assert result.asset_key is not None
    assert result.check_name is not None
    return AssetCheckEvaluation(
        asset_key=result.asset_key,
        check_name=result.check_name,
        passed=bool(result.passed),
        severity=result.severity,
        description=result.description,
        metadata=result.metadata,
    )


def _outcome(evaluation: AssetCheckEvaluation) -> tuple[bool, AssetCheckSeverity | None]:
    return evaluation.passed, None if evaluation.passed else evaluation.severity
