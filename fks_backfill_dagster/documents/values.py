"""Documents of values: findings, corrections, quarantined rows, actions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC
from typing import TYPE_CHECKING

from fks_backfill_dagster.documents.common import Document, moment, names
from fks_backfill_dagster.domain.candles import FIELDS
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.actions import StoredAction
    from fks_backfill_dagster.domain.candles import Candles
    from fks_backfill_dagster.domain.corrections import CorrectionError
    from fks_backfill_dagster.pipeline.actions import RefreshedActions
    from fks_backfill_dagster.pipeline.evaluate import Evaluated
    from fks_backfill_dagster.pipeline.quarantine import Released
    from fks_backfill_dagster.store.corrections import CorrectionInfo
    from fks_backfill_dagster.store.findings import StoredFinding
    from fks_backfill_dagster.store.quarantine import Neighbour, QuarantinedRow
    from fks_backfill_dagster.store.writer.correction import Corrected


def finding(found: StoredFinding) -> Document:
    one = found.finding
    return {
        "id": one.number,
        **names(found.series),
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


def evaluated(found: Evaluated, still_open: int) -> Document:
    """The result of a check. `start` and `end` are null if no candle is stored there; `open` counts those of the
    whole series."""
    is_empty = not found.window
    return names(found.series) | {
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


def corrected(series: Series, done: Corrected) -> Document:
    """A correction that was applied, or would be: `batch` is null where nothing was written."""
    changes = done.changes
    return names(series) | {
        "inserted": changes.inserted,
        "updated": changes.updated,
        "unchanged": changes.unchanged,
        "rejected": 0,
        "batch": done.batch,
        "problems": [],
    }


def refused_correction(series: Series, error: CorrectionError) -> Document:
    """A correction with invalid rows, of which nothing was written. `problems`: the first of them."""
    return names(series) | {
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
        | names(found.series)
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
    rows = [names(one.series) | {"ids": list(one.ids), "batch": one.done.batch} for one in found]
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
