"""The checks: one subsettable multi-asset check per (asset class, timeframe), evaluated in bulk.

A check speaks of its series as a whole, not of the partitions of a run: it fails as long as anything
stored of the series is wrong, and it can be run alone, without fetching. It blocks nothing: what a
failed check says is true of candles that are stored already.
"""

# No `from __future__ import annotations` here: Dagster looks at the annotation of `context` itself.

from collections.abc import Iterator

from dagster import (
    AssetCheckExecutionContext,
    AssetCheckKey,
    AssetCheckResult,
    AssetChecksDefinition,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetKey,
    MetadataValue,
    multi_asset_check,
)

from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.orchestration.groups import Group
from fks_backfill_dagster.orchestration.resources import DATABASE
from fks_backfill_dagster.store.checking import Completeness, Sanity, completeness, sanity

SANITY = "ohlc_sanity"
COMPLETENESS = "completeness"

_DESCRIPTIONS = {
    SANITY: "Prices are finite and above zero, high is the highest and low the lowest, volume is not negative.",
    COMPLETENESS: "No gap is open in what was synced: every expected candle is stored or its absence explained.",
}


def build_checks(group: Group) -> AssetChecksDefinition:
    """Both checks of every series of one group."""

    @multi_asset_check(
        name=f"checks_{group.name}",
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
    """All selected checks with one query per kind, however many series they are about."""
    database = getattr(context.resources, DATABASE).database
    wanted = context.selected_asset_check_keys
    sane = [key for key in group.series if AssetCheckKey(key, SANITY) in wanted]
    whole = [key for key in group.series if AssetCheckKey(key, COMPLETENESS) in wanted]
    found = sanity(database, [group.series[key] for key in sane])
    states = completeness(database, [group.series[key] for key in whole])
    results = [_sanity_result(key, found[group.series[key]]) for key in sane]
    results += [_completeness_result(key, states[group.series[key]]) for key in whole]
    failed = sum(not result.passed for result in results)
    context.log.info(f"{group.asset_class} {group.timeframe}: {len(results)} checks, {failed} failed")
    yield from results


def _sanity_result(key: AssetKey, found: Sanity) -> AssetCheckResult:
    first = {} if found.first is None else {"first": iso(found.first)}
    return AssetCheckResult(
        asset_key=key,
        check_name=SANITY,
        passed=found.bad == 0,
        severity=AssetCheckSeverity.ERROR,
        description=f"{found.bad:,} of {found.candles:,} candles break a rule" if found.bad else None,
        metadata={"candles": found.candles, **found.violations, **first},
    )


def _completeness_result(key: AssetKey, found: Completeness) -> AssetCheckResult:
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
            "open_gaps": found.open_gaps,
            "coverage": MetadataValue.float(found.coverage),
        },
    )
