"""Documents of absent candles: gaps, and the audit of the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fks_backfill_dagster.documents.common import Document, names
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE, iso

if TYPE_CHECKING:
    from fks_backfill_dagster.ledger.reconcile import Difference, SeriesAudit
    from fks_backfill_dagster.pipeline.audit import AuditReport
    from fks_backfill_dagster.pipeline.fill import FilledGap
    from fks_backfill_dagster.pipeline.gaps import FoundGap

NOT_ASKED = "after the end of the synced range, not requested yet"


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
    return names(series) | gap(found)


def filled_gap(series: Series, found: FilledGap) -> Document:
    """The outcome of a requested gap. `coverage` is the share of its candles that were filled."""
    return names(series) | {
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
    return names(found.series) | {
        "candles": found.candles,
        "expected": found.expected,
        "missing": found.missing,
        "explained": found.explained,
        "differences": [difference(one) for one in found.differences],
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
