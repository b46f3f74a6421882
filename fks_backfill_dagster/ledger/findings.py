"""The findings ledger: what is suspicious about stored candles, since when, and who accepted it.

A finding is a range of suspicious candles of one rule. A rule evaluates a window and reports detections; `reconcile`
compares them with the active findings, so that the same thing is recorded once and resolves without a person.

Belongs here: the records, and how they change. Does not belong here: the rules (`domain`), which candles a detection
consists of (`detections`), storage (`store.findings`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise

from fks_backfill_dagster.domain.evaluation import Evidence
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import iso


class Rule(StrEnum):
    """What is suspicious. Today `spike` is evaluated; the other names are fixed for later rules."""

    SPIKE = "spike"  # out and back within one candle
    LEVEL_SHIFT = "level_shift"
    STUCK = "stuck"  # identical candles in a row where the market is not quiet
    VOLUME_OUTLIER = "volume_outlier"
    CROSS_TIMEFRAME = "cross_timeframe"
    CROSS_SOURCE = "cross_source"
    WRONG_SYMBOL = "wrong_symbol"
    UNADJUSTED_SPLIT = "unadjusted_split"
    UNIT_CHANGE = "unit_change"  # a factor of 100 or 1000


class Severity(StrEnum):
    WARNING = "warning"  # the market may have done it
    ERROR = "error"  # no market does it


class FindingStatus(StrEnum):
    """The states of a finding. `corrected` and `resolved` findings are history and never change."""

    OPEN = "open"
    CONFIRMED = "confirmed"  # a second provider agrees
    CORRECTED = "corrected"  # its candles have other values now, or were deleted
    ACCEPTED = "accepted"  # by a person, with a reason
    RESOLVED = "resolved"  # no longer seen, although its candles are the same


ACTIVE = (FindingStatus.OPEN, FindingStatus.CONFIRMED, FindingStatus.ACCEPTED)

_FORMER = "former_verdict"
"""The key of the evidence that keeps a verdict about other values, or one that was withdrawn."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A person's decision. `at` in microseconds."""

    by: str
    at: int
    reason: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the ledger: the candles that open in `[start, end)`, `end` being the close of the last one.

    `digest` identifies the values of the candles (`detections.digest`), so that a decision holds for the values that it
    was made about. Instants in microseconds; `number` is None before it is stored.
    """

    rule: Rule
    severity: Severity
    start: int
    end: int
    candles: int
    digest: str
    first_seen_at: int
    last_seen_at: int
    status: FindingStatus = FindingStatus.OPEN
    evidence: Evidence = field(default_factory=dict)
    verdict: Verdict | None = None
    number: int | None = None

    @property
    def is_active(self) -> bool:
        return self.status in ACTIVE


@dataclass(frozen=True, slots=True)
class Detection:
    """A run of suspicious candles, as a rule found it.

    seen: False if none of its candles could be evaluated this time. They are part of an active finding, which stays.
    """

    rule: Rule
    severity: Severity
    start: int
    end: int
    candles: int
    digest: str
    evidence: Evidence = field(default_factory=dict)
    seen: bool = True


@dataclass(frozen=True, slots=True)
class EvaluatedWindow:
    """What was evaluated: the candles that open in `window`, by `rules`, at an instant.

    changed: the numbers of the active findings of the window whose candles have other values than those recorded.
    """

    window: TimeRange
    rules: frozenset[Rule]
    at: int
    changed: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class FindingChanges:
    """New findings, and the new state of stored ones that changed, each in the order of time."""

    added: tuple[Finding, ...] = ()
    changed: tuple[Finding, ...] = ()


class FindingError(ValueError):
    """A decision that a finding does not permit; the text names the remedy."""


def widened(window: TimeRange, active: Sequence[Finding]) -> TimeRange:
    """The window with every active finding that it cuts or touches, as a whole.

    So a finding is evaluated as a whole however a range is cut into windows, and pieces on either side of a cut
    become one finding.
    """
    while True:
        near = [f for f in active if f.start <= window.end and f.end >= window.start]
        edges = [window.start, window.end, *(f.start for f in near), *(f.end for f in near)]
        wider = TimeRange(min(edges), max(edges))
        if wider == window:
            return window
        window = wider


def reconcile(
    active: Sequence[Finding], detections: Sequence[Detection], evaluated: EvaluatedWindow
) -> FindingChanges:
    """How the ledger changes after an evaluation.

    `active`: active findings of the series, at least those that overlap the window, which must be `widened` by them.
    `detections`: those of the window; of one rule they neither overlap nor touch.

    A finding that overlaps a detection of its rule continues with the range and the evidence of the detection; its
    number and `first_seen_at` stay. Its state stays too if the candles have the values that it was recorded with,
    otherwise it is open again. Of several that overlap one detection the earliest continues. A finding of the window
    without a detection is corrected if its candles changed, otherwise resolved. Nothing else changes.

    Raises ValueError for a window or detections of another form.
    """
    _check(active, detections, evaluated)
    added: list[Finding] = []
    changed: list[Finding] = []
    for rule in evaluated.rules:
        inside = sorted(
            (f for f in active if f.rule is rule and _overlap(f, evaluated.window)), key=lambda f: f.start
        )
        left = dict(enumerate(inside))
        for detection in sorted((s for s in detections if s.rule is rule), key=lambda s: s.start):
            over = [place for place, finding in enumerate(inside) if _overlap(finding, detection)]
            free = next((place for place in over if place in left), None)
            if free is None:
                known = min((inside[place].first_seen_at for place in over), default=evaluated.at)
                added.append(_new(detection, known, evaluated.at))
            else:
                changed.append(_continued(left.pop(free), detection, evaluated.at))
        changed += [_ended(finding, evaluated) for finding in left.values()]
    before = {finding.number: finding for finding in active}
    return FindingChanges(
        tuple(sorted(added, key=_order)),
        tuple(sorted((f for f in changed if f != before[f.number]), key=_order)),
    )


def _check(active: Sequence[Finding], detections: Sequence[Detection], evaluated: EvaluatedWindow) -> None:
    ranges: list[Finding | Detection] = [*active, *detections]
    for one in ranges:
        is_inside = evaluated.window.start <= one.start and one.end <= evaluated.window.end
        if _overlap(one, evaluated.window) and not is_inside:
            raise ValueError(f"the evaluation of {evaluated.window} cuts {_text(one)}: widen it")
    for detection in detections:
        if not _overlap(detection, evaluated.window) or detection.rule not in evaluated.rules:
            raise ValueError(f"{_text(detection)} is not part of the evaluation of {evaluated.window}")
    ordered = sorted(detections, key=lambda s: (s.rule, s.start))
    for first, second in pairwise(ordered):
        if first.rule is second.rule and first.end >= second.start:
            raise ValueError(f"{_text(first)} and {_text(second)} are one detection")


def _text(one: Finding | Detection) -> str:
    return f"{one.rule} [{iso(one.start)}, {iso(one.end)})"


def _overlap(one: Finding | Detection, other: Finding | Detection | TimeRange) -> bool:
    return one.start < other.end and one.end > other.start


def _order(finding: Finding) -> tuple[int, str]:
    return finding.start, finding.rule


def _new(detection: Detection, since: int, now: int) -> Finding:
    return Finding(
        rule=detection.rule,
        severity=detection.severity,
        start=detection.start,
        end=detection.end,
        candles=detection.candles,
        digest=detection.digest,
        first_seen_at=since,
        last_seen_at=now,
        evidence=detection.evidence,
    )


def _continued(finding: Finding, detection: Detection, now: int) -> Finding:
    found = replace(
        finding,
        severity=detection.severity,
        start=detection.start,
        end=detection.end,
        candles=detection.candles,
        digest=detection.digest,
        last_seen_at=max(now, finding.last_seen_at) if detection.seen else finding.last_seen_at,
        evidence=_evidence(finding, detection) if detection.seen else finding.evidence,
    )
    return found if detection.digest == finding.digest else _opened(found)


def _evidence(finding: Finding, detection: Detection) -> Evidence:
    """The evidence of the detection, and the former verdict if there is one."""
    kept = {_FORMER: finding.evidence[_FORMER]} if _FORMER in finding.evidence else {}
    return {**detection.evidence, **kept}


def _opened(finding: Finding) -> Finding:
    """Open again. A former verdict becomes evidence: it was about other values, or was withdrawn."""
    evidence = dict(finding.evidence)
    if finding.verdict is not None:
        former = finding.verdict
        evidence[_FORMER] = {"by": former.by, "at": iso(former.at), "reason": former.reason}
    return replace(finding, status=FindingStatus.OPEN, verdict=None, evidence=evidence)


def _ended(finding: Finding, evaluated: EvaluatedWindow) -> Finding:
    is_corrected = finding.number in evaluated.changed
    return replace(finding, status=FindingStatus.CORRECTED if is_corrected else FindingStatus.RESOLVED)


# Decisions of a person ----------------------------------------------------------------------------------


def accepted(finding: Finding, verdict: Verdict) -> Finding:
    """The finding, accepted. Raises FindingError for one that is not active: its candles are not suspicious now."""
    if not finding.is_active:
        raise FindingError(
            f"finding {finding.number} is {finding.status}: only an open, confirmed or accepted one can be accepted"
        )
    return replace(finding, status=FindingStatus.ACCEPTED, verdict=verdict)


def reopened(finding: Finding) -> Finding:
    """The finding, open again. Raises FindingError for one that is corrected or resolved: the next check opens a new
    one if its candles are still suspicious."""
    if not finding.is_active:
        raise FindingError(
            f"finding {finding.number} is {finding.status} and stays so: `fks-backfill findings check` records a new"
            " one if its candles are suspicious again"
        )
    return _opened(finding)
