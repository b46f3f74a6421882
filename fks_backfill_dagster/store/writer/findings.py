"""Changes of the ledger of findings: after an evaluation, after a commit, by a person.

An evaluation reads candles and active findings and writes what follows from them under the lock of the series, so that
no commit comes between. A commit marks the findings whose candles it changed, in its own transaction.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.findings import Finding, FindingChanges, widened
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.findings import (
    StoredFinding,
    active_findings,
    findings_by_number,
    verdict_json,
    with_context,
)
from fks_backfill_dagster.store.ledger import series_id
from fks_backfill_dagster.store.queries import candles_within
from fks_backfill_dagster.store.writer.lineage import lock


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationInput:
    """What an evaluation reads: the candles of `window` with their context on either side, and the active findings that
    overlap it, as they are stored."""

    window: TimeRange
    candles: Candles
    active: Sequence[Finding]


def evaluate_window(
    database: Database,
    series: Series,
    window: TimeRange,
    context: int,
    evaluate: Callable[[EvaluationInput], FindingChanges],
) -> FindingChanges:
    """Reads a window, widened to whole findings, with `context` stored candles on either side, and stores what
    `evaluate` returns; empty for a series that is not stored.

    One transaction under the lock of the series: syncs of the series wait, so a window should hold no more candles than
    a batch.
    """
    with database.begin() as connection:
        identity = series_id(connection, series)
        if identity is None:
            return FindingChanges()
        lock(connection, identity)
        wider, active = _widened(connection, identity, window)
        read = with_context(connection, series, identity, wider, context)
        changes = evaluate(EvaluationInput(wider, candles_within(connection, series, identity, read), active))
        _write(connection, identity, changes)
        return changes


def _widened(connection: sa.Connection, identity: int, window: TimeRange) -> tuple[TimeRange, list[Finding]]:
    """The window that cuts and touches no active finding, and the active findings in it."""
    while True:
        active = active_findings(connection, identity, window)
        wider = widened(window, active)
        if wider == window:
            return window, active
        window = wider


_INSERT = """
INSERT INTO fks.finding (series_id, rule, severity, status, start_ts, end_ts, candles, digest, first_seen_at,
    last_seen_at, evidence, verdict)
VALUES (:id, :rule, :severity, :status, :start, :end, :candles, :digest, :first_seen_at, :last_seen_at,
    CAST(:evidence AS jsonb), CAST(:verdict AS jsonb))
"""

_UPDATE = """
UPDATE fks.finding SET severity = :severity, status = :status, start_ts = :start, end_ts = :end, candles = :candles,
    digest = :digest, last_seen_at = :last_seen_at, evidence = CAST(:evidence AS jsonb),
    verdict = CAST(:verdict AS jsonb), changed_at = CASE WHEN status <> :status THEN now() ELSE changed_at END
WHERE id = :number
"""


def _write(connection: sa.Connection, identity: int, changes: FindingChanges) -> None:
    if changes.changed:
        # The unique index is checked row by row, and a finding may begin now where one that ends now began.
        ended_first = sorted(changes.changed, key=lambda f: f.is_active)
        connection.execute(sa.text(_UPDATE), [_row(identity, one) for one in ended_first])
    if changes.added:
        connection.execute(sa.text(_INSERT), [_row(identity, one) for one in changes.added])


def _row(identity: int, finding: Finding) -> dict[str, Any]:
    verdict = verdict_json(finding.verdict)
    return {
        "id": identity,
        "number": finding.number,
        "rule": finding.rule.value,
        "severity": finding.severity.value,
        "status": finding.status.value,
        "start": to_datetime(finding.start),
        "end": to_datetime(finding.end),
        "candles": finding.candles,
        "digest": finding.digest,
        "first_seen_at": to_datetime(finding.first_seen_at),
        "last_seen_at": to_datetime(finding.last_seen_at),
        "evidence": json.dumps(finding.evidence),
        "verdict": None if verdict is None else json.dumps(verdict),
    }


# A look-up for each active finding, of which there are few; as a join it could compare each with every revision.
_CORRECTED = """
UPDATE fks.finding f SET status = 'corrected', changed_at = now()
WHERE f.series_id = :id AND f.status IN ('open', 'confirmed', 'accepted') AND (
    SELECT r.series_id FROM fks.revision r
    WHERE r.series_id = :id AND r.ts >= f.start_ts AND r.ts < f.end_ts AND r.replaced_by = ANY(:batches)
    LIMIT 1) IS NOT NULL
"""


def mark_corrected(connection: sa.Connection, identity: int, batches: Sequence[int]) -> None:
    """Ends the active findings of which these batches changed or deleted a candle; the next evaluation records what is
    suspicious about the new values."""
    if batches:
        connection.execute(sa.text(_CORRECTED), {"id": identity, "batches": list(batches)})


def decide(
    database: Database, numbers: Sequence[int], change: Callable[[Finding], Finding]
) -> list[StoredFinding]:
    """Changes findings by a person's decision, all or none; returns their new state in the order of `numbers`.

    Raises KeyError for a number that does not exist, and what `change` raises.
    """
    with database.begin() as connection:
        owners = "SELECT DISTINCT series_id FROM fks.finding WHERE id = ANY(:numbers) ORDER BY 1"
        for identity in connection.scalars(sa.text(owners), {"numbers": list(numbers)}).all():
            lock(connection, identity)
        # Read under the locks: no commit can correct one of them meanwhile.
        known = findings_by_number(connection, numbers)
        if unknown := [number for number in numbers if number not in known]:
            raise KeyError(unknown[0])
        decided = [StoredFinding(known[n].series, change(known[n].finding)) for n in dict.fromkeys(numbers)]
        rows = [_row(0, one.finding) for one in decided]
        connection.execute(sa.text(_UPDATE), rows)
        return decided
