"""The checks: one subsettable multi-asset check per (asset class, timeframe), evaluated in bulk.

A check covers its whole series, not the partitions of a run: it fails as long as any stored partition has a
problem, and its metadata names those partitions. It can be run alone, without fetching. It is not blocking: it
evaluates candles that are stored already.
"""

# No `from __future__ import annotations` here: Dagster inspects the annotation of `context` at runtime.

from collections.abc import Iterator, Mapping, Sequence, Set

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckKey,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    AssetKey,
    MetadataValue,
    TableColumn,
    TableMetadataValue,
    TableRecord,
    TableSchema,
    multi_asset_check,
)

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.orchestration.freshness import (
    FRESHNESS,
    as_event,
    events_to_log,
    freshness_results,
)
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.orchestration.retrying import retried
from fks_backfill_dagster.pipeline.calendars import CalendarChange, calendar_changes
from fks_backfill_dagster.pipeline.freshness import recent_windows
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.store.coverage import Completeness, completeness, missing_gaps, open_partitions
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.reaches import recent_missing
from fks_backfill_dagster.store.sanity import Sanity, bad_partitions, sanity

SANITY = "ohlc_sanity"
COMPLETENESS = "completeness"

_DESCRIPTIONS = {
    SANITY: "Prices are finite and above zero, high is the highest and low the lowest, volume is not negative.",
    COMPLETENESS: "No gap is open in what was synced, and no recent candle (a day or three candles) is missing,"
    " explained or not.",
    FRESHNESS: "The newest candle is no older than polling interval, publication delay and margin allow.",
}


CHECK_NAMES = tuple(_DESCRIPTIONS)

MOST_GAPS = 20
"""Gaps in the metadata of a check; `fks-backfill gaps` lists all."""

_MOST_EVIDENCE = 300  # characters

_GAP_COLUMNS = TableSchema(
    [
        TableColumn("start", "text", "The open of the first missing candle, UTC."),
        TableColumn("end", "text", "The close of the last one."),
        TableColumn("missing", "int", "Candles."),
        TableColumn("status", "text"),
        TableColumn("evidence", "text", "The last response of each provider."),
    ]
)


def op_name(group: Group) -> str:
    return f"checks_{group.name}"


def build_checks(group: Group, settings: Settings) -> AssetChecksDefinition:
    """The checks of every series of one group."""

    @multi_asset_check(
        name=op_name(group),
        specs=[
            AssetCheckSpec(name, asset=key, description=text)
            for key in group.series
            for name, text in _DESCRIPTIONS.items()
        ],
        required_resource_keys={DATABASE},
        can_subset=True,
    )
    def checks(context: AssetCheckExecutionContext) -> Iterator[AssetCheckResult]:
        with retried(context):
            yield from _evaluate(context, group, settings)

    return checks


def _evaluate(
    context: AssetCheckExecutionContext, group: Group, settings: Settings
) -> Iterator[AssetCheckResult]:
    database = getattr(context.resources, DATABASE).database
    results = evaluate(database, group, settings, context.selected_asset_check_keys)
    failed = sum(not result.passed for result in results)
    context.log.info(f"{group.asset_class} {group.timeframe}: {len(results)} checks, {failed} failed")
    yield from results


def evaluate(
    database: Database, group: Group, settings: Settings, wanted: Set[AssetCheckKey]
) -> list[AssetCheckResult]:
    """Evaluates checks of a group, with a few queries per kind of check for any number of series."""
    grain, now = Grain.of(group.timeframe), app.now()
    return [
        *_sanity(database, _wanted(group, wanted, SANITY), grain),
        *_completeness(database, _wanted(group, wanted, COMPLETENESS), grain, settings, now),
        *_freshness(database, _wanted(group, wanted, FRESHNESS), settings, now),
    ]


def evaluate_after_failure(
    context: AssetExecutionContext,
    database: Database,
    group: Group,
    settings: Settings,
    keys: Set[AssetKey],
) -> None:
    """Evaluates the run's checks of these series in the op that is about to fail.

    After a failure Dagster skips the op of the checks and shows them as failed for every series of the run,
    although they evaluate stored candles, which the failure does not change.
    """
    if not context.job_def.has_node_named(op_name(group)):
        return
    wanted = {AssetCheckKey(key, name) for key in keys for name in CHECK_NAMES}
    planned = context.run.asset_check_selection
    for result in evaluate(database, group, settings, wanted if planned is None else wanted & planned):
        context.log_event(as_event(result))


def evaluate_after_refresh(
    context: AssetExecutionContext,
    database: Database,
    group: Group,
    settings: Settings,
    keys: Set[AssetKey],
) -> None:
    """Evaluates `data_freshness` of the series of a refresh, whatever its outcome; its run has no op of the checks.

    Changed results are logged, and every result at least once an hour.
    """
    if context.job_def.has_node_named(op_name(group)):
        return  # that op evaluates all checks, or `evaluate_after_failure` does
    wanted = {key: group.series[key] for key in group.series if key in keys}
    now = app.now()
    results = _freshness(database, wanted, settings, now)
    for event in events_to_log(context.instance, results, wanted, now):
        context.log_event(event)


def _wanted(group: Group, wanted: Set[AssetCheckKey], name: str) -> dict[AssetKey, Series]:
    return {key: one for key, one in group.series.items() if AssetCheckKey(key, name) in wanted}


def _sanity(database: Database, wanted: Mapping[AssetKey, Series], grain: Grain) -> list[AssetCheckResult]:
    found = sanity(database, list(wanted.values()))
    broken = bad_partitions(database, [one for one in wanted.values() if found[one].bad], grain)
    return [_sanity_result(key, found[one], broken.get(one, {})) for key, one in wanted.items()]


def _sanity_result(key: AssetKey, found: Sanity, broken: Mapping[str, int]) -> AssetCheckResult:
    first = {} if found.first is None else {"first": iso(found.first)}
    text = f"All {found.candles:,} stored candles are valid." if found.candles else "No candle is stored."
    if found.bad:
        text = f"{found.bad:,} of {found.candles:,} candles are invalid."
    return AssetCheckResult(
        asset_key=key,
        check_name=SANITY,
        passed=found.bad == 0,
        severity=AssetCheckSeverity.ERROR,
        description=text,
        metadata={
            "candles": found.candles,
            **found.violations,
            **first,
            "failed_partitions": MetadataValue.json(dict(broken)),
        },
    )


def _completeness(
    database: Database, wanted: Mapping[AssetKey, Series], grain: Grain, settings: Settings, now: int
) -> list[AssetCheckResult]:
    app.settle_closures(settings, database, wanted.values())
    changes = calendar_changes(database, wanted.values())
    found = completeness(database, list(wanted.values()))
    incomplete = [one for one in wanted.values() if found[one].missing]
    parts = open_partitions(database, [one for one in incomplete if found[one].open_gaps], grain)
    rule = app.freshness_rule(settings)
    recent = recent_missing(database, recent_windows(database, incomplete, now, rule))
    gaps = missing_gaps(database, incomplete, MOST_GAPS)
    return [
        _completeness_result(
            key, found[one], parts.get(one, []), recent.get(one, 0), gaps.get(one, ()), changes.get(one)
        )
        for key, one in wanted.items()
    ]


def _completeness_result(
    key: AssetKey,
    found: Completeness,
    failed_partitions: Sequence[str],
    recent: int,
    gaps: Sequence[LedgerGap],
    change: CalendarChange | None,
) -> AssetCheckResult:
    text = _completeness_text(found, recent)
    return AssetCheckResult(
        asset_key=key,
        check_name=COMPLETENESS,
        passed=not (found.open_gaps or recent or change),
        severity=AssetCheckSeverity.WARN,
        description=text if change is None else f"{text} Also, {change}.",
        metadata={
            "expected": found.expected,
            "stored": found.stored,
            "missing": found.missing,
            "explained": found.missing - found.open_missing,
            "no_trade": found.no_trade,
            "recent_missing": recent,
            "open_gaps": found.open_gaps,
            "coverage": MetadataValue.float(found.rounded_coverage),
            "failed_partitions": MetadataValue.json(list(failed_partitions)),
            **({"gaps": gap_table(gaps)} if gaps else {}),
        },
    )


def _completeness_text(found: Completeness, recent: int) -> str:
    """One sentence, problems first."""
    if not found.expected:
        return "Nothing is synced yet: all history is pending."
    stored = f"{found.stored:,} of {found.expected:,} expected candles are stored"
    quiet = f", nothing traded in {found.no_trade:,}" if found.no_trade else ""
    if found.open_gaps:
        gaps = "open gap" if found.open_gaps == 1 else "open gaps"
        return f"{found.open_gaps:,} {gaps} with {found.open_missing:,} candles; {stored}{quiet}."
    if recent:
        return f"{recent:,} recent candles are missing (explained); {stored}{quiet}."
    if found.missing:
        return f"{stored}{quiet}; {found.missing:,} missing candles are explained."
    return f"{stored}{quiet}." if quiet else f"All {found.expected:,} expected candles are stored."


def gap_table(gaps: Sequence[LedgerGap]) -> TableMetadataValue:
    """Gaps as a table, in the order given."""
    return MetadataValue.table(
        [
            TableRecord(
                {
                    "start": f"{to_datetime(gap.start):%Y-%m-%d %H:%M}",
                    "end": f"{to_datetime(gap.end):%Y-%m-%d %H:%M}",
                    "missing": gap.missing,
                    "status": gap.status.value,
                    "evidence": _evidence(gap),
                }
            )
            for gap in gaps
        ],
        _GAP_COLUMNS,
    )


def _evidence(gap: LedgerGap) -> str:
    text = "; ".join(f"{one.provider}: {one.text}" for one in gap.evidence)
    return text if len(text) <= _MOST_EVIDENCE else f"{text[: _MOST_EVIDENCE - 3]}..."


def _freshness(
    database: Database, wanted: Mapping[AssetKey, Series], settings: Settings, now: int
) -> list[AssetCheckResult]:
    if not wanted:
        return []
    return freshness_results(database, wanted, app.freshness_rule(settings), now)
