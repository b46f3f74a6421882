"""Documents of syncs, the series and their lineage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC
from typing import TYPE_CHECKING

from fks_backfill_dagster.documents.common import Document, moment, names
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime

if TYPE_CHECKING:
    from fks_backfill_dagster.pipeline.coverage import Coverage
    from fks_backfill_dagster.pipeline.report import DryRun, SyncReport
    from fks_backfill_dagster.store.queries import BatchInfo, SyncStatus


def sync_report(report: SyncReport) -> Document:
    return names(report.series) | {
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
    return names(series) | {
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
    return names(found.plan.series) | {
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
    return names(series) | {"status": "not_started"}


def series(found: Series, state: SyncStatus | None, configured: bool, priority: Sequence[str]) -> Document:
    return names(found) | {
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
