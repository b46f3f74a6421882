"""The ledger of findings as pure functions: any suspicious candles, evaluated in any parts and any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.evaluation import Block, Evaluation
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.ledger.detections import changed, detections, digest
from fks_backfill_dagster.ledger.findings import (
    Detection,
    EvaluatedWindow,
    Finding,
    FindingError,
    FindingStatus,
    Rule,
    Severity,
    Verdict,
    accepted,
    reconcile,
    reopened,
    widened,
)
from fks_backfill_dagster_tests.domain.builders import at
from fks_backfill_dagster_tests.examples import examples

HOURS = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
GRID, STEP = grid_of(HOURS), Timeframe.H1.micros
MIDNIGHT = at("2024-01-01T00:00Z")
CANDLES = 24
NOW = at("2024-06-01T00:00Z")
RULES = (Rule.SPIKE, Rule.STUCK)
VERDICT = Verdict("ana", NOW - 1, "an announcement")


def span(first: int, past: int) -> TimeRange:
    return TimeRange(MIDNIGHT + first * STEP, MIDNIGHT + past * STEP)


def block(version: int = 0) -> Block:
    values = np.arange(CANDLES, dtype=np.float64) + 100 + version
    ts = GRID.opens(span(0, CANDLES))
    return Block(Candles(ts, values, values + 1, values - 1, values, values), GRID, HOURS.timeframe)


def evaluation(flagged: frozenset[int], blind: frozenset[int] = frozenset()) -> Evaluation:
    """Flags candles by their number; `blind` ones cannot be evaluated."""
    mask, evaluated = np.zeros(CANDLES, dtype=bool), np.ones(CANDLES, dtype=bool)
    mask[sorted(flagged - blind)] = True
    evaluated[sorted(blind)] = False
    return Evaluation(evaluated, mask, mask * (1.0 + np.arange(CANDLES)), lambda row: {"worst": row})


class Ledger:
    """The stored findings, and evaluates the candles as the pipeline makes them."""

    def __init__(self, findings: Sequence[Finding] = ()) -> None:
        self._numbers = count(100)
        self.rows = {finding.number: finding for finding in findings}

    @property
    def active(self) -> list[Finding]:
        return sorted((f for f in self.rows.values() if f.is_active), key=lambda f: (f.rule, f.start))

    def evaluate(
        self,
        window: TimeRange,
        flagged: dict[Rule, frozenset[int]],
        now: int = NOW,
        candles: Block | None = None,
        blind: frozenset[int] = frozenset(),
    ) -> None:
        candles = candles or block()
        window = widened(window, self.active)
        inside = [f for f in self.active if f.start < window.end and f.end > window.start]
        seen = [
            detection
            for rule, rows in flagged.items()
            for detection in detections(
                rule, Severity.WARNING, candles, evaluation(rows, blind), window, inside
            )
        ]
        changes = reconcile(
            inside, seen, EvaluatedWindow(window, frozenset(flagged), now, changed(candles, inside))
        )
        for finding in changes.changed:
            assert self.rows[finding.number] != finding
            self.rows[finding.number] = finding
        for finding in changes.added:
            number = next(self._numbers)
            self.rows[number] = replace(finding, number=number)

    def ranges(self, rule: Rule) -> list[tuple[int, int]]:
        """The active findings of a rule, as numbers of candles."""
        return [
            ((f.start - MIDNIGHT) // STEP, (f.end - MIDNIGHT) // STEP) for f in self.active if f.rule is rule
        ]


def finding(first: int, past: int, *, number: int = 1, version: int = 0, **other: object) -> Finding:
    """One that was recorded with the candles of a version."""
    values: dict[str, object] = {
        "rule": Rule.SPIKE,
        "severity": Severity.WARNING,
        "start": span(first, past).start,
        "end": span(first, past).end,
        "candles": past - first,
        "digest": digest(block(version).candles.take(slice(first, past))),
        "first_seen_at": NOW - 1000,
        "last_seen_at": NOW - 500,
        "number": number,
    }
    return Finding(**(values | other))  # type: ignore[arg-type]


# Any history --------------------------------------------------------------------------------------------

numbers = st.integers(0, CANDLES - 1)
flags = st.fixed_dictionaries({rule: st.frozensets(numbers, max_size=12) for rule in RULES})


@st.composite
def ledgers(draw: st.DrawFn) -> list[Finding]:
    """Active findings of both rules that neither overlap nor touch; some were recorded with other values."""
    found, number = [], 1
    for rule in RULES:
        edges = sorted(draw(st.sets(numbers, max_size=8)))
        for first, past in list(pairwise(edges))[::2]:
            status = draw(
                st.sampled_from([FindingStatus.OPEN, FindingStatus.CONFIRMED, FindingStatus.ACCEPTED])
            )
            found.append(
                finding(
                    first,
                    past,
                    rule=rule,
                    number=number,
                    status=status,
                    version=draw(st.sampled_from([0, 0, 1])),
                    verdict=VERDICT if status is FindingStatus.ACCEPTED else None,
                    first_seen_at=NOW - 1000 - draw(st.integers(0, 5)),
                )
            )
            number += 1
    return found


def runs(rows: frozenset[int]) -> list[tuple[int, int]]:
    """The reference: neighbouring numbers as ranges."""
    ordered = sorted(rows)
    starts = [n for n in ordered if n - 1 not in rows]
    ends = [n + 1 for n in ordered if n + 1 not in rows]
    return list(zip(starts, ends, strict=True))


def what_is_known(ledger: Ledger) -> Iterator[tuple[object, ...]]:
    """Everything of the rows but their numbers, where these depend on the order of new ones."""
    for row in ledger.rows.values():
        number = row.number if row.number is not None and row.number < 100 else None
        yield (row.rule, row.start, row.end, row.status, row.first_seen_at, row.digest, row.verdict, number)


@settings(max_examples=examples(300))
@given(before=ledgers(), flagged=flags)
def test_the_active_findings_are_the_runs_of_suspicious_candles(
    before: list[Finding], flagged: dict[Rule, frozenset[int]]
) -> None:
    ledger = Ledger(before)
    ledger.evaluate(span(0, CANDLES), flagged)
    for rule in RULES:
        assert ledger.ranges(rule) == runs(flagged[rule])
    # Nothing is lost: each former finding is a row still, and one that ended has its range.
    for old in before:
        new = ledger.rows[old.number]
        assert new.first_seen_at == old.first_seen_at
        assert new.is_active or (new.start, new.end, new.verdict) == (old.start, old.end, old.verdict)


@settings(max_examples=examples(300))
@given(before=ledgers(), flagged=flags)
def test_the_same_look_again_changes_nothing(
    before: list[Finding], flagged: dict[Rule, frozenset[int]]
) -> None:
    ledger = Ledger(before)
    ledger.evaluate(span(0, CANDLES), flagged)
    rows = dict(ledger.rows)
    ledger.evaluate(span(0, CANDLES), flagged)
    assert ledger.rows == rows


@settings(max_examples=examples(400))
@given(before=ledgers(), flagged=flags, cuts=st.sets(st.integers(1, CANDLES - 1), max_size=5), data=st.data())
def test_the_result_does_not_depend_on_the_cut_of_the_range(
    before: list[Finding], flagged: dict[Rule, frozenset[int]], cuts: set[int], data: st.DataObject
) -> None:
    whole, parts = Ledger(before), Ledger(before)
    whole.evaluate(span(0, CANDLES), flagged)
    edges = [0, *sorted(cuts), CANDLES]
    for first, past in data.draw(st.permutations(list(pairwise(edges)))):
        parts.evaluate(span(first, past), flagged)
    assert {rule: parts.ranges(rule) for rule in RULES} == {rule: whole.ranges(rule) for rule in RULES}
    active = [{one for one in what_is_known(each) if one[3] in _ACTIVE} for each in (whole, parts)]
    assert _states(active[0]) == _states(active[1])


_ACTIVE = {FindingStatus.OPEN, FindingStatus.CONFIRMED, FindingStatus.ACCEPTED}


def _states(rows: set[tuple[object, ...]]) -> set[tuple[object, ...]]:
    """Rule, range, state, digest and verdict. Where one finding falls into two and one of these becomes one with
    another, the cut may decide whose number continues."""
    return {(*row[:4], *row[5:7]) for row in rows}


@settings(max_examples=examples(300))
@given(before=ledgers(), flagged=flags, first=numbers, length=st.integers(1, 6))
def test_outside_of_the_look_nothing_changes_and_no_two_overlap(
    before: list[Finding], flagged: dict[Rule, frozenset[int]], first: int, length: int
) -> None:
    ledger = Ledger(before)
    window = widened(span(first, min(first + length, CANDLES)), ledger.active)
    ledger.evaluate(window, flagged)
    for old in before:
        if old.end < window.start or old.start > window.end:
            assert ledger.rows[old.number] == old
    for rule in RULES:
        ranges = ledger.ranges(rule)
        assert all(one[1] <= other[0] for one, other in pairwise(ranges))


# Cases --------------------------------------------------------------------------------------------------


def evaluate(
    ledger: Ledger, *flagged: int, window: TimeRange | None = None, **other: object
) -> list[Finding]:
    ledger.evaluate(window or span(0, CANDLES), {Rule.SPIKE: frozenset(flagged)}, **other)  # type: ignore[arg-type]
    return list(ledger.rows.values())


def test_seen_again_is_the_same_finding() -> None:
    (row,) = evaluate(Ledger([finding(3, 4)]), 3)
    assert (row.number, row.status, row.first_seen_at, row.last_seen_at) == (
        1,
        FindingStatus.OPEN,
        NOW - 1000,
        NOW,
    )


@pytest.mark.parametrize("flagged", [(2, 3), (3, 4, 5), (2, 3, 4)])
def test_its_range_grows_to_what_is_seen(flagged: tuple[int, ...]) -> None:
    (row,) = evaluate(Ledger([finding(3, 4)]), *flagged)
    grown = span(flagged[0], flagged[-1] + 1)
    assert (row.number, row.start, row.end) == (1, grown.start, grown.end)
    assert row.candles == len(flagged)


def test_it_shrinks_to_what_is_seen() -> None:
    (row,) = evaluate(Ledger([finding(3, 8)]), 5)
    assert (row.number, row.start, row.end, row.candles) == (1, span(5, 6).start, span(5, 6).end, 1)


def test_a_finding_that_falls_into_two_keeps_its_first_part() -> None:
    one, other = evaluate(Ledger([finding(3, 8)]), 3, 7)
    assert (one.number, one.end) == (1, span(3, 4).end)
    assert (other.start, other.first_seen_at, other.last_seen_at) == (span(7, 8).start, NOW - 1000, NOW)


def test_two_findings_that_become_one() -> None:
    one, other = evaluate(Ledger([finding(3, 4), finding(5, 6, number=2)]), 3, 4, 5)
    assert (one.status, one.end) == (FindingStatus.OPEN, span(5, 6).end)
    assert (other.number, other.status) == (2, FindingStatus.RESOLVED)


@pytest.mark.parametrize(("version", "status"), [(0, FindingStatus.RESOLVED), (1, FindingStatus.CORRECTED)])
def test_no_longer_seen(version: int, status: FindingStatus) -> None:
    """Corrected if its candles have other values than those that it was recorded with."""
    (row,) = evaluate(Ledger([finding(3, 4, version=version)]))
    assert (row.status, row.last_seen_at) == (status, NOW - 500)


def test_an_acceptance_holds_for_the_values_that_were_accepted() -> None:
    kept = finding(3, 4, status=FindingStatus.ACCEPTED, verdict=VERDICT)
    (row,) = evaluate(Ledger([kept]), 3)
    assert (row.status, row.verdict) == (FindingStatus.ACCEPTED, VERDICT)
    (row,) = evaluate(Ledger([replace(kept, digest="0" * 32)]), 3)
    assert (row.status, row.verdict) == (FindingStatus.OPEN, None)
    former = row.evidence["former_verdict"]
    assert former == {"by": "ana", "at": "2024-05-31T23:59:59.999999+00:00", "reason": "an announcement"}
    # It stays in the evidence.
    (row,) = evaluate(Ledger([row]), 3, now=NOW + 5)
    assert (row.evidence["former_verdict"], row.last_seen_at) == (former, NOW + 5)


def test_a_confirmed_finding_stays_while_its_values_do() -> None:
    kept = finding(3, 4, status=FindingStatus.CONFIRMED)
    assert evaluate(Ledger([kept]), 3)[0].status is FindingStatus.CONFIRMED
    assert evaluate(Ledger([replace(kept, digest="0" * 32)]), 3)[0].status is FindingStatus.OPEN


def test_what_could_not_be_evaluated_does_not_resolve() -> None:
    (row,) = evaluate(Ledger([finding(3, 5)]), blind=frozenset([3, 4]))
    assert row == finding(3, 5)
    (row,) = evaluate(Ledger([finding(3, 5)]), blind=frozenset([4]))
    assert (row.status, row.start, row.last_seen_at) == (FindingStatus.OPEN, span(4, 5).start, NOW - 500)


def test_rules_that_did_not_look_change_nothing() -> None:
    stuck = finding(3, 5, rule=Rule.STUCK)
    assert evaluate(Ledger([stuck])) == [stuck]


def test_the_evidence_is_that_of_the_worst_candle() -> None:
    (row,) = evaluate(Ledger(), 3, 4, 5)
    assert row.evidence == {"worst": 5}


def test_candles_on_either_side_of_closed_hours_are_two_sightings() -> None:
    stocks = Series("AAPL", Timeframe.H1, AssetClass.STOCKS)
    opens = grid_of(stocks).opens(TimeRange(at("2024-03-07T00:00Z"), at("2024-03-09T00:00Z")))
    ones = np.ones(len(opens))
    candles = Block(Candles(opens, ones, ones, ones, ones, ones), grid_of(stocks), Timeframe.H1)
    every = np.ones(len(opens), dtype=bool)
    found = detections(
        Rule.STUCK,
        Severity.WARNING,
        candles,
        Evaluation(every, every, ones, lambda _: {}),
        TimeRange(0, at("2025-01-01T00:00Z")),
    )
    assert [(one.start, one.end, one.candles) for one in found] == [
        (at("2024-03-07T14:00Z"), at("2024-03-07T21:00Z"), 7),
        (at("2024-03-08T14:00Z"), at("2024-03-08T21:00Z"), 7),
    ]


def test_a_digest_identifies_values_and_times() -> None:
    candles = block().candles.take(slice(3, 5))
    none = replace(candles, volume=np.full(2, np.nan))
    same = replace(none, volume=-none.volume)  # NaN with another sign bit
    assert digest(none) == digest(same)
    others = [
        candles,
        none,
        block(1).candles.take(slice(3, 5)),
        replace(candles, ts=candles.ts + STEP),
        candles.take(slice(0, 1)),
    ]
    assert len({digest(one) for one in others}) == len(others)


def test_a_look_that_cuts_a_finding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cuts spike \[2024-01-01T03:00.*: widen it"):
        reconcile([finding(3, 8)], [], EvaluatedWindow(span(0, 5), frozenset(RULES), NOW))
    assert widened(span(0, 5), [finding(3, 8), finding(8, 9, number=2)]) == span(0, 9)
    assert widened(span(0, 3), [finding(4, 8)]) == span(0, 3)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(3, 5), (5, 6)], "are one detection"),
        ([(3, 5), (4, 6)], "are one detection"),
        ([(20, 21)], "is not part"),
    ],
)
def test_sightings_of_another_form_are_refused(ranges: list[tuple[int, int]], message: str) -> None:
    seen = [
        Detection(Rule.SPIKE, Severity.WARNING, span(*one).start, span(*one).end, 1, "") for one in ranges
    ]
    with pytest.raises(ValueError, match=message):
        reconcile([], seen, EvaluatedWindow(span(0, 12), frozenset(RULES), NOW))


@pytest.mark.parametrize("status", [FindingStatus.CORRECTED, FindingStatus.RESOLVED])
def test_history_is_not_decided(status: FindingStatus) -> None:
    row = finding(3, 4, status=status)
    with pytest.raises(FindingError, match=f"finding 1 is {status}: only an open, confirmed or accepted one"):
        accepted(row, VERDICT)
    with pytest.raises(
        FindingError, match=f"finding 1 is {status} and stays so: `fks-backfill findings check`"
    ):
        reopened(row)


def test_an_acceptance_and_its_withdrawal() -> None:
    row = accepted(finding(3, 4), VERDICT)
    assert (row.status, row.verdict) == (FindingStatus.ACCEPTED, VERDICT)
    row = reopened(row)
    assert (row.status, row.verdict) == (FindingStatus.OPEN, None)
    assert row.evidence["former_verdict"]["reason"] == "an announcement"  # type: ignore[index]
