"""Coverage of series: expected, stored and missing candles, lag, and the next attempt for a gap.

Read-only: six queries for any number of series, and four more if candles are overdue.
Does not belong here: presentation (`documents`, `tables`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.pipeline.freshness import Assessment, Rule, freshness
from fks_backfill_dagster.store.coverage import Completeness, completeness, next_attempts
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.findings import open_findings
from fks_backfill_dagster.store.queries import SyncStatus, sync_status


@dataclass(frozen=True, slots=True)
class Coverage:
    """The coverage of one series: `status` is None if none is recorded, `next_attempt` in microseconds."""

    series: Series
    status: SyncStatus | None
    counts: Completeness
    assessment: Assessment
    next_attempt: int | None
    open_findings: int = 0

    def problem(self, *, kept_fresh: bool = True) -> str | None:
        """Why the series needs attention: a failed sync, open gaps, or a lag (never synced included) if it is to be
        `kept_fresh`. None: it needs none."""
        reasons = []
        if self.status is not None and self.status.status == "error":
            reasons.append(f"error: {self.status.error_message or 'the last sync failed'}")
        if self.counts.open_gaps:
            gaps = "open gap" if self.counts.open_gaps == 1 else "open gaps"
            reasons.append(f"{self.counts.open_gaps:,} {gaps} ({self.counts.open_missing:,} candles missing)")
        if kept_fresh and not self.assessment.freshness.fresh:
            reasons.append(f"{self.assessment.freshness.verdict}: {self.assessment}")
        return "; ".join(reasons) or None


def coverage(database: Database, series: Sequence[Series], now: int, rule: Rule) -> list[Coverage]:
    """The coverage of every series, in the given order."""
    states = {(one.symbol, one.timeframe): one for one in sync_status(database)}
    counts = completeness(database, series)
    lags = freshness(database, series, now, rule)
    due = next_attempts(database, series)
    suspicious = open_findings(database)
    return [
        Coverage(one, states.get(one.key), counts[one], lags[one], due.get(one), suspicious.get(one.key, 0))
        for one in series
    ]
