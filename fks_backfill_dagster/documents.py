"""The JSON documents of results, the same on the command line and over HTTP.

Belongs here: keys and formats, one function per document. Dictionaries with public keys are built only here.
Does not belong here: computing the values.

Times are ISO 8601 with an explicit zone, UTC, as `2024-01-01T00:00:00+00:00`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from fks_backfill_dagster.domain.corrections import FIELDS
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, iso, to_datetime

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.corrections import CorrectionError
    from fks_backfill_dagster.domain.patterns import Classification
    from fks_backfill_dagster.domain.candles import Candles
    from fks_backfill_dagster.domain.actions import StoredAction
    from fks_backfill_dagster.ledger.reconcile import Difference, SeriesAudit
    from fks_backfill_dagster.pipeline.actions import RefreshedActions
    from fks_backfill_dagster.pipeline.audit import AuditReport
    from fks_backfill_dagster.pipeline.coverage import Coverage
    from fks_backfill_dagster.pipeline.fill import FilledGap
    from fks_backfill_dagster.pipeline.gaps import FoundGap
    from fks_backfill_dagster.pipeline.quarantine import Released
    from fks_backfill_dagster.store.corrections import CorrectionInfo
    from fks_backfill_dagster.store.quarantine import Neighbour, QuarantinedRow
    from fks_backfill_dagster.pipeline.validate import Validation
    from fks_backfill_dagster.pipeline.validation_report import (
        SourceTally,
        ValidationEstimate,
        ValidationReport,
    )
    from fks_backfill_dagster.pipeline.judge import Judged
    from fks_backfill_dagster.pipeline.report import DryRun, SyncReport
    from fks_backfill_dagster.store.findings import StoredFinding
    from fks_backfill_dagster.store.queries import BatchInfo, SyncStatus
    from fks_backfill_dagster.store.writer.correction import Corrected

Document = dict[str, object]

NOT_ASKED = "after the end of the synced range, not requested yet"


def sync_report(report: SyncReport) -> Document:
    return _names(report.series) | {
        "total_batches": report.total_batches,
        "successful_batches": report.successful_batches,
        "failed_batches": report.failed_batches,
        "total_candles": report.total_candles,
        "errors": list(report.errors),
        "expected": report.expected,
        "missing": report.missing,
        "providers": {
            name: {
                "asked": tally.asked,
                "delivered": tally.delivered,
                "rejected": tally.rejected,
                "failed": tally.failed,
            }
            for name, tally in report.providers.items()
        },
        "seconds": round(report.seconds, 3),
        "no_trade": report.no_trade,
        "outdated": report.outdated,
        "withdrawn": report.withdrawn,
        "listing": report.listing,
        "warnings": list(report.warnings),
        "pinned": report.pinned,
    }


def broken_sync(
    series: Series,
    error: str,
    *,
    total_batches: int,
    successful_batches: int,
    failed_batches: int,
    candles: int,
) -> Document:
    """The report of an aborted sync: `expected` and `missing` are unknown, hence null."""
    return _names(series) | {
        "total_batches": total_batches,
        "successful_batches": successful_batches,
        "failed_batches": failed_batches,
        "total_candles": candles,
        "errors": [error],
        "expected": None,
        "missing": None,
        "providers": {},
        "seconds": None,
        "no_trade": None,
        "outdated": None,
        "withdrawn": None,
        "listing": None,
        "warnings": [],
        "pinned": None,
    }


def dry_run(found: DryRun) -> Document:
    candles = sum(batch.candles for batch in found.plan.batches)
    return _names(found.plan.series) | {
        "start": iso(found.plan.window.start),
        "end": iso(found.plan.window.end),
        "expected": found.plan.expected,
        "missing": found.plan.missing,
        "total_batches": len(found.plan.batches),
        "providers": {
            name: {
                "requests": estimate.requests,
                "candles": candles,
                "seconds": round(estimate.seconds, 3),
            }
            for name, estimate in found.estimates
        },
        "warnings": list(found.warnings),
    }


def gap(found: FoundGap) -> Document:
    row = found.row
    evidence = [item.to_json() for item in row.evidence]
    return {
        "start": iso(row.start),
        "end": iso(row.end),
        "duration_minutes": (row.end - row.start) // MICROS_PER_MINUTE,
        "missing_candles": row.missing,
        "status": row.status.value,
        "evidence": evidence if found.asked else [{"outcome": "not_asked", "detail": NOT_ASKED}],
    }


def gap_of(series: Series, found: FoundGap) -> Document:
    """Like `gap`, for a list of several series."""
    return _names(series) | gap(found)


def finding(found: StoredFinding) -> Document:
    one = found.finding
    return {
        "id": one.number,
        **_names(found.series),
        "start": iso(one.start),
        "end": iso(one.end),
        "candles": one.candles,
        "rule": one.rule.value,
        "severity": one.severity.value,
        "status": one.status.value,
        "first_seen_at": moment(to_datetime(one.first_seen_at)),
        "last_seen_at": moment(to_datetime(one.last_seen_at)),
        "evidence": dict(one.evidence),
        "verdict": None
        if one.verdict is None
        else {
            "by": one.verdict.by,
            "at": moment(to_datetime(one.verdict.at)),
            "reason": one.verdict.reason,
        },
    }


def judged(found: Judged, still_open: int) -> Document:
    """The result of a check. `start` and `end` are null if no candle is stored there; `open` counts those of the
    whole series."""
    is_empty = not found.window
    return _names(found.series) | {
        "start": None if is_empty else iso(found.window.start),
        "end": None if is_empty else iso(found.window.end),
        "candles": found.candles,
        "evaluated": found.evaluated,
        "new": found.new,
        "reopened": found.reopened,
        "corrected": found.corrected,
        "resolved": found.resolved,
        "open": still_open,
    }


def candles(found: Candles) -> list[Document]:
    """One document per candle, for a few candles; a missing volume is null."""
    return [
        {
            "ts": iso(ts),
            "open": opened,
            "high": high,
            "low": low,
            "close": close,
            "volume": None if math.isnan(volume) else volume,
        }
        for ts, opened, high, low, close, volume in zip(
            *(column.tolist() for column in found.columns()), strict=True
        )
    ]


def filled_gap(series: Series, found: FilledGap) -> Document:
    """The outcome of a requested gap. `coverage` is the share of its candles that were filled."""
    return _names(series) | {
        "start": iso(found.gap.start),
        "end": iso(found.gap.end),
        "success": found.success,
        "provider": ", ".join(found.providers) or None,
        "candles_filled": found.filled,
        "expected_candles": found.gap.missing,
        "coverage": round(found.coverage, 6),
        "error": found.error,
    }


def audit_report(report: AuditReport) -> Document:
    return {
        "series": [_series_audit(one) for one in report.series],
        "candles": report.candles,
        "differences": report.differences,
        "repaired": report.repaired,
        "seconds": round(report.seconds, 3),
    }


def _series_audit(found: SeriesAudit) -> Document:
    return _names(found.series) | {
        "candles": found.candles,
        "expected": found.expected,
        "missing": found.missing,
        "explained": found.explained,
        "differences": [difference(one) for one in found.differences],
    }


def validation(report: ValidationReport) -> Document:
    """`difference_pct` is a fraction of the other price, as `validation.tolerance_pct` is; `compared` counts candles
    at the timeframe `compared_at`."""
    patterns = report.classified()
    return {
        "valid": report.valid,
        "reason": report.reason,
        "compared": report.compared,
        "total_records": report.stored,
        "discrepancy_count": report.discrepancies,
        "discrepancies": [
            {
                "timestamp": iso(one.ts),
                "field": one.field,
                "stored": one.stored,
                "validation": one.other,
                "difference_pct": one.difference,
                "provider": name,
            }
            for name, one in report.worst
        ],
        "compared_at": report.compared_series.timeframe.value,
        "providers": list(report.providers),
        **_names(report.series),
        "start": iso(report.window.start),
        "end": iso(report.window.end),
        "tolerance": report.tolerance,
        "classification": {name: _classification(one) for name, one in patterns.items()},
        "odd_one_out": report.odd_one_out,
        "sample": {
            "complete": report.complete,
            "ranges": report.ranges,
            "candles": report.sampled,
            "unverified": report.unverified,
            "incomplete": report.incomplete,
        },
        "sources": {name: _validation_source(one) for name, one in report.sources.items()},
        "errors": list(report.errors),
        "warnings": list(report.warnings),
    }


def _classification(found: Classification) -> Document:
    return {
        "pattern": found.pattern.value,
        "factor": found.factor,
        "bars": found.bars,
        "hours": found.hours,
        "text": str(found),
    }


def _validation_source(found: SourceTally) -> Document:
    from fks_backfill_dagster.domain.comparison import FIELDS  # imports numpy

    return {
        "compared": found.compared,
        "differing": found.differing,
        "discrepancies": found.discrepancies,
        "not_comparable": {why.value: count for why, count in found.not_comparable.items()},
        "requests": found.requests,
        "fields": {
            name: {"max": found.spread.largest_of(name), "p99": found.spread.quantile(name, 0.99)}
            for name in FIELDS
        },
        "errors": list(found.errors),
    }


def validation_plan(found: Validation, estimates: Mapping[str, ValidationEstimate]) -> Document:
    """The plan of a validation that is not carried out. `reason`: why nothing can be compared."""
    return _names(found.series) | {
        "start": iso(found.window.start),
        "end": iso(found.window.end),
        "total_records": found.stored,
        "compared_at": found.validators.series.timeframe.value,
        "sample": {"complete": found.complete, "ranges": len(found.sample)},
        "providers": {
            name: {"requests": one.requests, "candles": one.candles, "seconds": round(one.seconds, 3)}
            for name, one in estimates.items()
        },
        "reason": found.obstacle,
        "warnings": list(found.warnings),
    }


def difference(found: Difference) -> Document:
    """`recorded` and `actual` are numbers; times for the kinds `oldest` and `newest`."""

    def shown(value: int | None) -> int | str | None:
        return iso(value) if found.kind.tells_time and value is not None else value

    return {
        "kind": found.kind.value,
        "start": None if found.start is None else iso(found.start),
        "end": None if found.end is None else iso(found.end),
        "recorded": shown(found.recorded),
        "actual": shown(found.actual),
        "message": found.message,
        "repaired": found.repaired,
    }


def status(found: Coverage) -> Document:
    """The seven keys of the HTTP route come first. `lag` is in closed candles; a `next_attempt` in the past is
    due."""
    state = found.status
    if state is None:
        return not_started(found.series)
    return {
        "symbol": state.symbol,
        "timeframe": state.timeframe,
        "status": state.status,
        "oldest_data": moment(state.oldest_data_time),
        "newest_data": moment(state.newest_data_time),
        "total_candles": state.total_candles,
        "last_sync": moment(state.last_sync_time),
        "expected": found.counts.expected,
        "stored": found.counts.stored,
        "coverage": found.counts.rounded_coverage if found.counts.expected else None,
        "open_gaps": state.open_gaps,
        "lag": found.assessment.freshness.lag,
        "next_attempt": None if found.next_attempt is None else moment(to_datetime(found.next_attempt)),
        "error": state.error_message,
        "open_findings": found.open_findings,
    }


def not_started(series: Series) -> Document:
    """The status of an unknown series."""
    return _names(series) | {"status": "not_started"}


def series(found: Series, state: SyncStatus | None, configured: bool, priority: Sequence[str]) -> Document:
    return _names(found) | {
        "asset_class": found.asset_class.value,
        "configured": configured,
        "total_candles": state.total_candles if state else 0,
        "oldest_data": moment(state.oldest_data_time) if state else None,
        "newest_data": moment(state.newest_data_time) if state else None,
        "provider_priority": list(priority),
    }


def batch(found: BatchInfo) -> Document:
    return {
        "id": found.id,
        "symbol": found.symbol,
        "timeframe": found.timeframe,
        "provider": found.provider,
        "transport": found.transport,
        "source": found.source,
        "sha256": found.sha256,
        "range_start": moment(found.range_start),
        "range_end": moment(found.range_end),
        "run_id": found.run_id,
        "fetched_at": moment(found.fetched_at),
        # Not truncated to seconds: `--as-of` compares with it.
        "committed_at": found.committed_at.astimezone(UTC).isoformat(),
        "inserted": found.inserted,
        "updated": found.updated,
        "undoes": found.undoes,
        "host": found.host or None,
        "instrument": found.instrument,
        "published_at": moment(found.published_at),
        "kind": found.kind,
        "undone_by": found.undone_by,
        "author": found.author,
        "reason": found.reason,
    }


def corrected(series: Series, done: Corrected) -> Document:
    """A correction that was applied, or would be: `batch` is null where nothing was written."""
    changes = done.changes
    return _names(series) | {
        "inserted": changes.inserted,
        "updated": changes.updated,
        "unchanged": changes.unchanged,
        "rejected": 0,
        "batch": done.batch,
        "problems": [],
    }


def refused_correction(series: Series, error: CorrectionError) -> Document:
    """A correction with invalid rows, of which nothing was written. `problems`: the first of them."""
    return _names(series) | {
        "inserted": 0,
        "updated": 0,
        "unchanged": 0,
        "rejected": error.total,
        "batch": None,
        "problems": [{"line": one.line, "reason": one.reason} for one in error.first],
    }


def correction(found: CorrectionInfo) -> Document:
    def values(when: str) -> dict[str, float | None]:
        return {name: getattr(found, f"{name}_{when}") for name in FIELDS}

    return {
        "symbol": found.symbol,
        "timeframe": found.timeframe,
        "ts": moment(found.ts),
        "corrected_at": found.corrected_at.astimezone(UTC).isoformat(),
        "before": values("before"),
        "after": values("after"),
        "source": found.source,
        "reason": found.reason,
        "batch": found.batch,
        "author": found.author,
        "origin": found.origin,
        "pinned": found.pinned,
    }


def quarantined(found: QuarantinedRow) -> Document:
    return (
        {"id": found.id}
        | _names(found.series)
        | {
            "ts": found.ts.astimezone(UTC).isoformat(),
            **{name: getattr(found, name) for name in FIELDS},
            "provider": found.provider,
            "source": found.source,
            "rule": found.reason,
            "first_seen": moment(found.first_seen_at),
            "last_seen": moment(found.last_seen_at),
            "seen": found.seen,
            "decision": found.decision,
            "decided_at": moment(found.decided_at),
            "decided_by": found.decided_by,
            "reason": found.decision_reason,
            "batch": found.batch,
        }
    )


def released(found: Sequence[Released]) -> Document:
    """Released rows, by series. `batch` is null where the same values were stored already."""
    rows = [_names(one.series) | {"ids": list(one.ids), "batch": one.done.batch} for one in found]
    return {"released": rows, "rejected": 0, "problems": []}


def refused_release(error: CorrectionError) -> Document:
    """A release with rows that break a rule of candles, of which nothing was written."""
    problems = [{"id": one.line, "reason": one.reason} for one in error.first]
    return {"released": [], "rejected": error.total, "problems": problems}


def neighbours(found: Sequence[Neighbour]) -> list[Document]:
    """Stored candles around a quarantined row."""
    return [
        {"ts": moment(one.ts), **{name: getattr(one, name) for name in FIELDS}, "provider": one.provider}
        for one in found
    ]
def action(found: StoredAction) -> Document:
    """The columns of the view fks.actions."""
    one = found.action
    return {
        "symbol": one.symbol,
        "kind": one.kind.value,
        "ex_date": one.ex_date.isoformat(),
        "ratio": one.ratio,
        "amount": one.amount,
        "currency": one.currency,
        "provider": found.provider,
        "fetched_at": moment(found.fetched_at),
        "begins_at": moment(found.begins_at),
        "used": found.used,
    }


def refreshed_actions(found: RefreshedActions) -> Document:
    """The response of one provider about one stock; numbers are null without one."""
    failed = found.error is not None
    return {
        "symbol": found.instrument.symbol,
        "provider": found.provider,
        "listed": None if failed else found.listed,
        "inserted": None if failed else found.written.inserted,
        "updated": None if failed else found.written.updated,
        "refused": list(found.refused),
        "gone": list(found.gone),
        "error": found.error,
    }


def moment(when: datetime | None) -> str | None:
    """To the second: candles have no finer times, and a sync time needs none."""
    return None if when is None else when.astimezone(UTC).isoformat(timespec="seconds")


def _names(series: Series) -> Document:
    return {"symbol": series.symbol, "timeframe": series.timeframe.value}
