"""Detections: the candles that a rule flagged, grouped into runs.

Belongs here: the grouping, the digest of candles. Does not belong here: the rules (`domain`), what a detection means
for the ledger (`findings`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.evaluation import Block, Evaluation
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.ledger.findings import Detection, Finding, Rule, Severity


def detections(
    rule: Rule,
    severity: Severity,
    block: Block,
    evaluation: Evaluation,
    window: TimeRange,
    active: Sequence[Finding] = (),
) -> list[Detection]:
    """The runs of flagged candles that open in `window`; of candles that touch in time, one run.

    A candle of an `active` finding that cannot be evaluated now (a neighbour was withdrawn) counts as suspicious
    still: what was not evaluated does not resolve. Evidence is that of the worst candle of a run.
    """
    candles = block.candles
    known = RangeSet([TimeRange(f.start, f.end) for f in active if f.rule is rule])
    suspicious = evaluation.flagged | (known.contains(candles.ts) & ~evaluation.evaluated)
    rows = np.flatnonzero(suspicious & (candles.ts >= window.start) & (candles.ts < window.end))
    if not len(rows):
        return []
    closes = block.grid.closes(candles.ts[rows])
    jumps = np.flatnonzero(closes[:-1] < candles.ts[rows[1:]])
    firsts, lasts = np.concatenate([[0], jumps + 1]), np.concatenate([jumps, [len(rows) - 1]])
    found = []
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        run = rows[first : last + 1]
        worst = int(run[evaluation.strength[run].argmax()])
        seen = bool(evaluation.flagged[worst])
        found.append(
            Detection(
                rule=rule,
                severity=severity,
                start=int(candles.ts[run[0]]),
                end=int(closes[last]),
                candles=len(run),
                digest=digest(candles.take(run)),
                evidence=evaluation.detail(worst) if seen else {},
                seen=seen,
            )
        )
    return found


def digest(candles: Candles) -> str:
    """32 hexadecimal digits that identify opens and values, bit for bit; a missing volume is one value."""
    volume = np.where(np.isnan(candles.volume), np.nan, candles.volume)
    columns = np.stack([candles.open, candles.high, candles.low, candles.close, volume]).astype("<f8")
    content = candles.ts.astype("<i8").tobytes() + columns.tobytes()
    return hashlib.sha256(content).hexdigest()[:32]


def changed(block: Block, active: Sequence[Finding]) -> frozenset[int]:
    """The numbers of the findings whose candles, all of which lie in the block, are not those recorded."""
    return frozenset(
        finding.number
        for finding in active
        if finding.number is not None
        and digest(block.candles.within(TimeRange(finding.start, finding.end))) != finding.digest
    )
