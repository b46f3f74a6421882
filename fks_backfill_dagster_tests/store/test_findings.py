"""Findings in the database: evaluations, corrections by commits, decisions, the view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import FIELDS, Candles
from fks_backfill_dagster.domain.corrections import CorrectionRows
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.findings import FindingStatus, Rule, Verdict, accepted, reopened
from fks_backfill_dagster.pipeline.corrections import Statement, correct
from fks_backfill_dagster.pipeline.evaluate import Evaluated, evaluate_series
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.findings import (
    StoredFinding,
    candles_around,
    findings,
    findings_by_number,
    open_findings,
)
from fks_backfill_dagster.store.writer.findings import decide
from fks_backfill_dagster.store.writer.records import Withdrawal
from fks_backfill_dagster.store.writer.remove import remove_series
from fks_backfill_dagster_tests.domain.builders import at
from fks_backfill_dagster_tests.store.builders import EVER, Shelf, brought, fetch, origin_of
from fks_backfill_dagster_tests.store.conftest import fresh

NOW = at("2024-03-01T00:00Z")
COUNT = 300
STRAY = 150
"""The number of the planted candle."""


def calm(shelf: Shelf, first: int = 0, past: int = COUNT) -> Candles:
    """Closes that move by 0.1 % back and forth, with narrow ranges."""
    opens = shelf.opens(first, past)
    number = np.arange(first, past, dtype=np.float64)
    close = 100 * (1 + 0.001 * (number % 3))
    opened = 100 * (1 + 0.001 * ((number - 1) % 3))
    high, low = np.maximum(opened, close), np.minimum(opened, close)
    return Candles(opens, opened, high * 1.0005, low * 0.9995, close, np.ones(len(opens)))


def stray(shelf: Shelf, number: int = STRAY, factor: float = 1.3) -> Candles:
    """One candle that closes far out."""
    one = calm(shelf, number, number + 1)
    return replace(one, close=one.close * factor, high=np.maximum(one.high, one.close * factor))


def put(shelf: Shelf, candles: Candles, first: int, past: int) -> None:
    shelf.commit(shelf.span(first, past), brought(candles))


def planted(shelf: Shelf, *numbers: int) -> None:
    """Calm candles, with strays at these numbers."""
    rows = calm(shelf)
    strays = {number: stray(shelf, number) for number in numbers}
    for number, one in strays.items():
        rows.close[number], rows.high[number] = one.close[0], one.high[0]
    put(shelf, rows, 0, COUNT)


def evaluate(shelf: Shelf, now: int = NOW, first: int = 0, past: int = COUNT) -> Evaluated:
    return evaluate_series(shelf.database, shelf.series, shelf.span(first, past), now)


def stored(shelf: Shelf) -> list[StoredFinding]:
    return findings(shelf.database, [shelf.series])


def statuses(shelf: Shelf) -> list[FindingStatus]:
    return [one.finding.status for one in stored(shelf)]


def test_a_spike_is_recorded_once(hours: Shelf) -> None:
    planted(hours, STRAY)
    assert evaluate(hours) == Evaluated(
        hours.series, hours.span(0, COUNT), candles=COUNT, evaluated=COUNT - 2, new=1
    )
    (one,) = stored(hours)
    assert one.series == hours.series
    found = one.finding
    place = hours.span(STRAY, STRAY + 1)
    assert (found.rule, found.start, found.end, found.candles) == (Rule.SPIKE, place.start, place.end, 1)
    assert (found.status, found.first_seen_at, found.last_seen_at) == (FindingStatus.OPEN, NOW, NOW)
    assert found.evidence["price"] == "close"
    again = evaluate(hours, NOW + 7)
    assert (again.new, again.resolved, again.corrected) == (0, 0, 0)
    (one,) = stored(hours)
    assert one.finding == replace(found, last_seen_at=NOW + 7)


def test_parts_of_a_range_find_the_same(hours: Shelf) -> None:
    """Cut within a candle, beside the spike, and on it."""
    planted(hours, STRAY, STRAY + 60)
    for first, past in ((0, 80), (80, STRAY), (STRAY, STRAY + 1), (STRAY + 1, COUNT)):
        evaluate(hours, first=first, past=past)
    half = hours.series.timeframe.micros // 2
    window = hours.span(STRAY + 10, STRAY + 60)
    evaluate_series(
        hours.database, hours.series, replace(window, start=window.start - half, end=window.end + half), NOW
    )
    ranges = [(one.finding.start, one.finding.candles) for one in stored(hours)]
    assert ranges == [(hours.span(n, n + 1).start, 1) for n in (STRAY, STRAY + 60)]


def test_a_commit_that_changes_the_candle_corrects_the_finding(hours: Shelf) -> None:
    planted(hours, STRAY, STRAY + 60)
    evaluate(hours)
    put(hours, calm(hours, 100, 200), 100, 200)
    assert statuses(hours) == [FindingStatus.CORRECTED, FindingStatus.OPEN]
    assert evaluate(hours, NOW + 1).new == 0
    assert statuses(hours) == [FindingStatus.CORRECTED, FindingStatus.OPEN]


def test_a_correction_by_a_person_ends_the_finding_and_its_undo_brings_it_back(hours: Shelf) -> None:
    """The undo restores the suspicious values: a new finding, because ended ones are history."""
    planted(hours, STRAY, STRAY + 60)
    evaluate(hours)
    right = calm(hours, STRAY, STRAY + 1)
    rows = CorrectionRows.of(right, frozenset(FIELDS), np.array([2], dtype=np.int64))
    done = correct(hours.database, hours.series, rows, Statement("alice", "a bad print", "fix.csv"), EVER.end)
    assert statuses(hours) == [FindingStatus.CORRECTED, FindingStatus.OPEN]
    assert evaluate(hours, NOW + 1).new == 0
    assert done.batch is not None
    hours.undo(done.batch)
    assert evaluate(hours, NOW + 2).new == 1
    assert statuses(hours).count(FindingStatus.OPEN) == 2


def test_a_correction_that_is_suspicious_too_is_a_new_finding(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    put(hours, stray(hours, factor=1.4), STRAY, STRAY + 1)
    assert evaluate(hours, NOW + 1).new == 1
    assert statuses(hours) == [FindingStatus.CORRECTED, FindingStatus.OPEN]


def test_a_commit_that_changes_nothing_corrects_nothing(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    put(hours, stray(hours), STRAY, STRAY + 1)
    put(hours, calm(hours, STRAY + 1, COUNT), STRAY + 1, COUNT)
    assert statuses(hours) == [FindingStatus.OPEN]


def test_an_accepted_finding_of_a_changed_candle_is_corrected(hours: Shelf) -> None:
    """Only the volume changes: the acceptance was of other values."""
    planted(hours, STRAY)
    evaluate(hours)
    (one,) = stored(hours)
    accept(hours, one)
    put(hours, replace(stray(hours), volume=np.array([7.0])), STRAY, STRAY + 1)
    assert statuses(hours) == [FindingStatus.CORRECTED]
    assert evaluate(hours).new == 1


def test_a_withdrawn_candle_corrects_its_finding(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    place = hours.span(STRAY, STRAY + 1)
    hours.commit(place, withdrawn=(Withdrawal(origin_of(), hours.opens(STRAY, STRAY + 1)),))
    assert statuses(hours) == [FindingStatus.CORRECTED]


def test_an_undo_corrects_and_brings_back_what_was_suspicious(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    put(hours, calm(hours, STRAY, STRAY + 1), STRAY, STRAY + 1)
    assert evaluate(hours, NOW + 1).new == 0
    hours.undo(hours.batches()[-1])
    assert evaluate(hours, NOW + 2).new == 1
    hours.undo(hours.batches()[0])
    assert statuses(hours) == [FindingStatus.CORRECTED] * 2


def test_neighbours_that_arrive_later_resolve_it(hours: Shelf) -> None:
    """The last candle of a level that stays is no spike; before the next candle is stored nothing is known."""
    rows = calm(hours)
    risen = replace(
        rows,
        **{
            name: np.where(np.arange(COUNT) >= STRAY, 1.3, 1.0) * getattr(rows, name)
            for name in ("open", "high", "low", "close")
        },
    )
    put(hours, risen.take(slice(0, STRAY + 1)), 0, STRAY + 1)
    assert (evaluate(hours).new, evaluate(hours).evaluated) == (0, STRAY - 1)
    put(hours, risen.take(slice(STRAY + 1, COUNT)), STRAY + 1, COUNT)
    assert (evaluate(hours).new, evaluate(hours).evaluated) == (0, COUNT - 2)


def test_a_finding_that_is_no_longer_seen_resolves(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    done = evaluate_series(hours.database, hours.series, hours.span(0, COUNT), NOW + 1, checks=())
    assert (done.resolved, statuses(hours)) == (0, [FindingStatus.OPEN])  # no rule evaluated
    # The close after it follows: a level, not a spike. Its own values are the same.
    step = stray(hours, STRAY + 1)
    put(hours, step, STRAY + 1, STRAY + 2)
    assert evaluate(hours, NOW + 2).resolved == 1
    assert statuses(hours)[0] is FindingStatus.RESOLVED


def accept(shelf: Shelf, *found: StoredFinding, reason: str = "an announcement") -> list[StoredFinding]:
    verdict = Verdict("ana", NOW, reason)
    numbers = [one.finding.number for one in found]
    return decide(shelf.database, numbers, lambda one: accepted(one, verdict))  # type: ignore[arg-type]


def test_decisions(hours: Shelf) -> None:
    planted(hours, STRAY, STRAY + 60)
    evaluate(hours)
    one, other = stored(hours)
    (done,) = accept(hours, one)
    assert done.finding.verdict == Verdict("ana", NOW, "an announcement")
    assert statuses(hours) == [FindingStatus.ACCEPTED, FindingStatus.OPEN]
    assert open_findings(hours.database)[hours.series.key] == 1
    evaluate(hours, NOW + 9)
    assert statuses(hours) == [FindingStatus.ACCEPTED, FindingStatus.OPEN]
    decide(hours.database, [done.finding.number or 0], reopened)
    assert statuses(hours) == [FindingStatus.OPEN, FindingStatus.OPEN]
    assert stored(hours)[0].finding.evidence["former_verdict"]["reason"] == "an announcement"  # type: ignore[index]
    with pytest.raises(KeyError, match=r"^999999$"):
        decide(hours.database, [other.finding.number or 0, 999_999], reopened)
    assert findings_by_number_of(hours, other) == stored(hours)[1]


def findings_by_number_of(shelf: Shelf, one: StoredFinding) -> StoredFinding:
    number = one.finding.number or 0
    with shelf.database.begin() as connection:
        return findings_by_number(connection, [number])[number]


def test_a_removed_series_removes_its_findings(database: Database) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    planted(shelf, STRAY)
    evaluate(shelf)
    assert remove_series(database, shelf.series) == COUNT
    assert fetch(database, "SELECT count(*) FROM fks.finding") == [(0,)]
    assert evaluate(shelf) == Evaluated(shelf.series, shelf.span(0, COUNT))


def test_the_view(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    (one,) = stored(hours)
    accept(hours, one)
    found: list[Any] = hours.rows(
        "SELECT id, symbol, timeframe, start_ts, end_ts, candles, rule, severity, status, first_seen_at, last_seen_at,"
        " evidence, verdict FROM fks.findings WHERE symbol = :symbol"
    )
    place = hours.span(STRAY, STRAY + 1)
    assert found == [
        (
            one.finding.number,
            hours.series.symbol,
            "1h",
            to_datetime(place.start),
            to_datetime(place.end),
            1,
            "spike",
            "warning",
            "accepted",
            to_datetime(NOW),
            to_datetime(NOW),
            one.finding.evidence,
            {"by": "ana", "at": "2024-03-01T00:00:00+00:00", "reason": "an announcement"},
        )
    ]


def test_filters(hours: Shelf, minutes: Shelf) -> None:
    planted(hours, STRAY)
    planted(minutes, STRAY, STRAY + 60)
    evaluate(hours)
    evaluate(minutes)
    accept(minutes, stored(minutes)[0])
    both = [hours.series, minutes.series]

    def number(**chosen: Any) -> int:
        return len(findings(hours.database, both, **chosen))

    assert number() == 3
    assert number(statuses=[FindingStatus.OPEN]) == 2
    assert number(statuses=[FindingStatus.ACCEPTED, FindingStatus.RESOLVED]) == 1
    assert number(rules=[Rule.SPIKE]) == 3
    assert number(rules=[Rule.STUCK]) == 0
    assert findings(hours.database, []) == []
    assert len(findings(hours.database)) >= 3


def test_candles_around_a_finding(hours: Shelf) -> None:
    planted(hours, STRAY)
    place = hours.span(STRAY, STRAY + 1)
    found = candles_around(hours.database, hours.series, place, 3)
    assert found.ts.tolist() == hours.opens(STRAY - 3, STRAY + 4).tolist()
    assert len(candles_around(hours.database, hours.series, hours.span(0, 1), 3)) == 4
    assert len(candles_around(hours.database, fresh("1h"), EVER, 3)) == 0
