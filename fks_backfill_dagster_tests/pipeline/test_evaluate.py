"""Evaluation of stored candles: in parts, beside commits, with further rules."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.evaluation import Block, Evaluation
from fks_backfill_dagster.domain.spikes import CONTEXT
from fks_backfill_dagster.ledger.findings import Finding, FindingStatus, Rule, Severity
from fks_backfill_dagster.pipeline.evaluate import CHECKS, Check, Evaluated, evaluate_series
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.findings import findings
from fks_backfill_dagster_tests.postgres import database, database_url, server_url, template
from fks_backfill_dagster_tests.store.builders import Shelf, candles_at, execute
from fks_backfill_dagster_tests.store.conftest import fresh
from fks_backfill_dagster_tests.store.test_findings import NOW, STRAY, calm, planted, put, stray

__all__ = ["database", "database_url", "server_url", "template"]

LONG = 1_500


@pytest.fixture
def shelf(database: Database) -> Shelf:
    return Shelf.of(database, fresh("1m"))


def active(shelf: Shelf) -> list[Finding]:
    states = [FindingStatus.OPEN, FindingStatus.CONFIRMED, FindingStatus.ACCEPTED]
    return [one.finding for one in findings(shelf.database, [shelf.series], states)]


def test_a_range_of_several_parts(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts are of a day at least; a spike at the border of two, and one in each."""
    strays = (700, 1_439, 1_445, 4_000)
    candles = calm(shelf, 0, 5_000)
    for number in strays:
        one = stray(shelf, number)
        candles.close[number], candles.high[number] = one.close[0], one.high[0]
    put(shelf, candles, 0, 5_000)
    whole = evaluate_series(shelf.database, shelf.series, shelf.span(0, 5_000), NOW)
    expected = [replace(one, number=None) for one in active(shelf)]
    assert [one.start for one in expected] == [shelf.span(n, n + 1).start for n in strays]
    execute(shelf.database, "DELETE FROM fks.finding")
    monkeypatch.setattr(queries, "_ROWS_AT_ONCE", 1)
    parts: list[Evaluated] = []
    found = evaluate_series(shelf.database, shelf.series, shelf.span(0, 5_000), NOW, done=parts.append)
    assert found == whole
    assert [one.candles for one in parts] == [1_440, 2_880, 4_320, 5_000]
    assert [replace(one, number=None) for one in active(shelf)] == expected


def test_a_look_reads_no_more_than_its_part_and_context(shelf: Shelf) -> None:
    put(shelf, calm(shelf, 0, LONG), 0, LONG)
    sizes = []

    def evaluate(block: Block) -> Evaluation:
        sizes.append(len(block.candles))
        return CHECKS[0].evaluate(block)

    evaluate_series(shelf.database, shelf.series, shelf.span(500, 600), NOW, checks=[counting(evaluate)])
    assert sizes == [100 + 2 * CONTEXT]


def counting(evaluate: object, rule: Rule = Rule.SPIKE) -> Check:
    return Check(rule, Severity.WARNING, CONTEXT, evaluate)  # type: ignore[arg-type]


def test_a_further_rule(shelf: Shelf) -> None:
    """Its findings are its own; a call without it leaves them as they are."""

    def identical(block: Block) -> Evaluation:
        same = np.concatenate([[False], np.diff(block.candles.close) == 0])
        every = np.ones(len(same), dtype=bool)
        return Evaluation(every, same, same.astype(float), lambda _: {"identical": True})

    stuck = Check(Rule.STUCK, Severity.ERROR, 1, identical)
    planted(shelf, STRAY)
    stays = calm(shelf, 50, 54)
    put(shelf, replace(stays, **dict.fromkeys(("open", "high", "low", "close"), np.full(4, 100.0))), 50, 54)
    evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW, checks=(*CHECKS, stuck))
    found = [(one.rule, one.candles, one.severity, dict(one.evidence)) for one in active(shelf)]
    # The close after them is the same as well.
    assert (Rule.STUCK, 4, Severity.ERROR, {"identical": True}) in found
    assert Rule.SPIKE in {rule for rule, *_ in found}
    evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW + 1)
    assert Rule.STUCK in {one.rule for one in active(shelf)}


def test_candles_off_the_grid_are_not_evaluated(shelf: Shelf) -> None:
    """They are no neighbours of others: the audit reports them."""
    planted(shelf, STRAY)
    execute(
        shelf.database,
        f"INSERT INTO {shelf.table} SELECT series_id, ts + interval '30 s', batch_id, open, high, low, close, volume"
        f" FROM {shelf.table} WHERE ts = '2024-01-01T00:10Z'",
    )
    found = evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW)
    assert (found.candles, found.evaluated, found.new) == (301, 298, 1)


@pytest.mark.parametrize("close", ["0", "'NaN'", "'Infinity'"])
def test_candles_that_break_a_rule_are_not_evaluated(shelf: Shelf, close: str) -> None:
    """Nor are their neighbours; the spike is found still."""
    planted(shelf, STRAY)
    execute(shelf.database, f"UPDATE {shelf.table} SET close = {close} WHERE ts = '2024-01-01T00:10Z'")
    found = evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW)
    assert (found.candles, found.evaluated, found.new) == (300, 295, 1)


def test_a_commit_waits_for_a_look(shelf: Shelf) -> None:
    """So no candle changes between its evaluation and the record: the commit then corrects the finding."""
    planted(shelf, STRAY)
    began, finished = threading.Event(), threading.Event()

    def commit() -> None:
        began.wait()
        put(shelf, calm(shelf, STRAY, STRAY + 1), STRAY, STRAY + 1)
        finished.set()

    committing = threading.Thread(target=commit)
    committing.start()

    def evaluate(block: Block) -> Evaluation:
        began.set()
        while not waiting(shelf.database):
            assert not finished.is_set()
        return CHECKS[0].evaluate(block)

    evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW, checks=[counting(evaluate)])
    committing.join()
    (one,) = findings(shelf.database, [shelf.series])
    assert one.finding.status is FindingStatus.CORRECTED


def waiting(database: Database) -> bool:
    """Whether a session of this database waits for a lock."""
    with database.begin() as connection:
        query = (
            "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        return bool(connection.exec_driver_sql(query).scalar())


def test_a_series_that_is_not_stored(database: Database) -> None:
    series = fresh("1h")
    span = Shelf(database, series, 0).span(0, 10)
    assert evaluate_series(database, series, span, NOW) == Evaluated(series, span)


def test_a_second_run_changes_nothing_but_the_time(shelf: Shelf) -> None:
    planted(shelf, STRAY)
    evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW)
    before = active(shelf)
    evaluate_series(shelf.database, shelf.series, shelf.span(0, 300), NOW + 5)
    assert active(shelf) == [replace(one, last_seen_at=NOW + 5) for one in before]
    shelf.commit(shelf.span(300, 310), *[])
    put(shelf, candles_at(shelf.opens(300, 310)), 300, 310)
    assert evaluate_series(shelf.database, shelf.series, shelf.span(0, 290), NOW + 6).new == 0
