"""The checks: one subsettable multi-asset check per (asset class, timeframe), evaluated in bulk.

A check speaks of its series as a whole, not of the partitions of a run: it fails as long as anything
stored of the series is wrong, in whichever partition; its metadata names those partitions. It can be
run alone, without fetching. It blocks nothing: what a failed check says is true of candles that are
stored already.
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

from collections.abc import Iterator, Mapping, Sequence, Set

from dagster import (
    AssetCheckEvaluation,
    AssetCheckExecutionContext,
    AssetCheckKey,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    AssetKey,
    MetadataValue,
    multi_asset_check,
)

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.names import is_monthly
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.store.checking import (
    Completeness,
    Sanity,
    bad_parts,
    completeness,
    open_parts,
    sanity,
)
from fks_backfill_dagster.store.database import Database

SANITY = "ohlc_sanity"
COMPLETENESS = "completeness"

_DESCRIPTIONS = {
    SANITY: "Prices are finite and above zero, high is the highest and low the lowest, volume is not negative.",
    COMPLETENESS: "No gap is open in what was synced: every expected candle is stored or its absence explained.",
}


CHECK_NAMES = tuple(_DESCRIPTIONS)


def op_name(group: Group) -> str:
    return f"checks_{group.name}"


def build_checks(group: Group) -> AssetChecksDefinition:
    """Both checks of every series of one group."""

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
        yield from _evaluate(context, group)

    return checks


def _evaluate(context: AssetCheckExecutionContext, group: Group) -> Iterator[AssetCheckResult]:
    database = getattr(context.resources, DATABASE).database
    results = evaluate(database, group, context.selected_asset_check_keys)
    failed = sum(not result.passed for result in results)
    context.log.info(f"{group.asset_class} {group.timeframe}: {len(results)} checks, {failed} failed")
    yield from results


def evaluate(database: Database, group: Group, wanted: Set[AssetCheckKey]) -> list[AssetCheckResult]:
    """The checks of a group with one query per kind, however many series they are about."""
    part = "month" if is_monthly(group.timeframe) else "year"
    return [
        *_sanity(database, _wanted(group, wanted, SANITY), part),
        *_completeness(database, _wanted(group, wanted, COMPLETENESS), part),
    ]


def evaluate_after_failure(
    context: AssetExecutionContext, database: Database, group: Group, keys: Set[AssetKey]
) -> None:
    """The run's checks of these series, in the op that is about to fail.

    Dagster skips the op of the checks after a failure, and shows them as failed for every series of the
    run. They speak of what is stored, which a failure does not change.
    """
    if not context.job_def.has_node_named(op_name(group)):
        return
    wanted = {AssetCheckKey(key, name) for key in keys for name in CHECK_NAMES}
    planned = context.run.asset_check_selection
    for result in evaluate(database, group, wanted if planned is None else wanted & planned):
        assert result.asset_key is not None
        assert result.check_name is not None
        context.log_event(
            AssetCheckEvaluation(
                asset_key=result.asset_key,
                check_name=result.check_name,
                passed=bool(result.passed),
                severity=result.severity,
                description=result.description,
                metadata=result.metadata,
            )
        )


def _wanted(group: Group, wanted: Set[AssetCheckKey], name: str) -> dict[AssetKey, Series]:
    return {key: one for key, one in group.series.items() if AssetCheckKey(key, name) in wanted}


def _sanity(database: Database, wanted: Mapping[AssetKey, Series], part: str) -> list[AssetCheckResult]:
    found = sanity(database, list(wanted.values()))
    broken = bad_parts(database, [one for one in wanted.values() if found[one].bad], part)
    return [_sanity_result(key, found[one], broken.get(one, {})) for key, one in wanted.items()]


def _sanity_result(key: AssetKey, found: Sanity, broken: Mapping[str, int]) -> AssetCheckResult:
    first = {} if found.first is None else {"first": iso(found.first)}
    return AssetCheckResult(
        asset_key=key,
        check_name=SANITY,
        passed=found.bad == 0,
        severity=AssetCheckSeverity.ERROR,
        description=f"{found.bad:,} of {found.candles:,} candles break a rule" if found.bad else None,
        metadata={
            "candles": found.candles,
            **found.violations,
            **first,
            "failed_partitions": MetadataValue.json(dict(broken)),
        },
    )


def _completeness(database: Database, wanted: Mapping[AssetKey, Series], part: str) -> list[AssetCheckResult]:
    found = completeness(database, list(wanted.values()))
    lacking = open_parts(database, [one for one in wanted.values() if found[one].open_gaps], part)
    return [_completeness_result(key, found[one], lacking.get(one, [])) for key, one in wanted.items()]


def _completeness_result(key: AssetKey, found: Completeness, lacking: Sequence[str]) -> AssetCheckResult:
    text = None
    if not found.expected:
        text = "nothing is synced yet"
    elif found.open_gaps:
        text = f"{found.open_gaps:,} open gaps, {found.open_missing:,} candles"
    return AssetCheckResult(
        asset_key=key,
        check_name=COMPLETENESS,
        passed=found.open_gaps == 0,
        severity=AssetCheckSeverity.WARN,
        description=text,
        metadata={
            "expected": found.expected,
            "stored": found.stored,
            "missing": found.missing,
            "explained": found.missing - found.open_missing,
            "quiet": found.quiet,
            "open_gaps": found.open_gaps,
            "coverage": MetadataValue.float(found.coverage),
            "failed_partitions": MetadataValue.json(list(lacking)),
        },
    )
