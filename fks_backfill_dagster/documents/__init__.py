"""The JSON documents of results, the same on the command line and over HTTP.

Belongs here: keys and formats, one function per document. The acknowledgement of a command (a URL, a count) is its own.
Does not belong here: computing the values.

Times are ISO 8601 with an explicit zone, UTC, as `2024-01-01T00:00:00+00:00`.
"""

from fks_backfill_dagster.documents.absence import (
    NOT_ASKED,
    audit_report,
    difference,
    filled_gap,
    gap,
    gap_of,
)
from fks_backfill_dagster.documents.common import Document, moment
from fks_backfill_dagster.documents.syncs import (
    batch,
    broken_sync,
    dry_run,
    not_started,
    series,
    status,
    sync_report,
)
from fks_backfill_dagster.documents.validations import validation, validation_plan
from fks_backfill_dagster.documents.values import (
    action,
    candles,
    corrected,
    correction,
    evaluated,
    finding,
    neighbours,
    quarantined,
    refreshed_actions,
    refused_correction,
    refused_release,
    released,
)

__all__ = [
    "NOT_ASKED",
    "Document",
    "action",
    "audit_report",
    "batch",
    "broken_sync",
    "candles",
    "corrected",
    "correction",
    "difference",
    "dry_run",
    "evaluated",
    "filled_gap",
    "finding",
    "gap",
    "gap_of",
    "moment",
    "neighbours",
    "not_started",
    "quarantined",
    "refreshed_actions",
    "refused_correction",
    "refused_release",
    "released",
    "series",
    "status",
    "sync_report",
    "validation",
    "validation_plan",
]
