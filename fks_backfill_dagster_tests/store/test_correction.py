"""Corrections by a person: merged under the lock, pinned, with their lineage; the ledger follows."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.candles import FIELDS, Candles
from fks_backfill_dagster.domain.corrections import CorrectionError, CorrectionRows
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.pipeline.corrections import Statement, correct
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.correction import Corrected, release_pins
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.store.builders import EVER, Shelf, archive, brought, candles_at
from fks_backfill_dagster_tests.store.conftest import fresh

STATEMENT = Statement("alice", "the exchange published a correction", "fix.csv")


def rows_of(ts: Instants | Sequence[int], **fields: float | Sequence[float]) -> CorrectionRows:
    """One value per field, for all rows, or one per row."""
    opens = np.asarray(ts, dtype=np.int64)
    columns = [
        np.broadcast_to(np.asarray(fields.get(name, np.nan), dtype=np.float64), opens.shape)
        for name in FIELDS
    ]
    return CorrectionRows.of(
        Candles(opens, *columns), frozenset(fields), np.arange(2, len(opens) + 2, dtype=np.int64)
    )


def whole(candles: Candles) -> CorrectionRows:
    return CorrectionRows.of(candles, frozenset(FIELDS), np.arange(2, len(candles) + 2, dtype=np.int64))


def apply(
    shelf: Shelf, rows: CorrectionRows, statement: Statement = STATEMENT, *, dry_run: bool = False
) -> Corrected:
    return correct(shelf.database, shelf.series, rows, statement, EVER.end, dry_run=dry_run)


def counts(done: Corrected) -> tuple[int, int, int]:
    return done.changes.inserted, done.changes.updated, done.changes.unchanged


def test_partial_rows_keep_the_other_fields(hours: Shelf) -> None:
    hours.put(0, 10)
    before, opens = hours.read(), hours.opens(0, 10)
    then = hours.now()
    done = apply(hours, rows_of(opens[[3, 7]], volume=5.0))
    assert counts(done) == (0, 2, 0)
    after = hours.read()
    assert after.volume[[3, 7]].tolist() == [5.0, 5.0]
    expected = before.volume.copy()
    expected[[3, 7]] = 5.0
    assert after.equals(replace(before, volume=expected))
    assert hours.read(then).equals(before)
    assert hours.audit().differences == ()
    found = hours.rows(
        "SELECT ts, volume_after, close_before = close_after, source, reason, batch, author, origin"
        " FROM fks.corrections WHERE symbol = :symbol ORDER BY ts"
    )
    assert found == [
        (to_datetime(int(ts)), 5.0, True, "manual", STATEMENT.reason, done.batch, "alice", "fix.csv")
        for ts in opens[[3, 7]]
    ]


def test_only_what_differs_is_written_and_counted(hours: Shelf) -> None:
    hours.put(0, 10)
    rows = candles_at(hours.opens(2, 8), 2)
    mixed = Candles.concat([candles_at(hours.opens(0, 2)), rows])
    done = apply(hours, whole(mixed))
    assert counts(done) == (0, 6, 2)
    (lineage,) = [one for one in queries.batches(hours.database, hours.series) if one.id == done.batch]
    assert (lineage.transport, lineage.inserted, lineage.updated) == ("correction", 0, 6)


def test_a_correction_that_changes_nothing_leaves_no_batch(hours: Shelf) -> None:
    hours.put(0, 5)
    before = hours.batches()
    done = apply(hours, whole(candles_at(hours.opens(0, 5))))
    assert (counts(done), done.batch) == ((0, 0, 5), None)
    assert hours.batches() == before
    assert hours.rows("SELECT count(*) FROM fks.pin WHERE series_id = :id") == [(0,)]


def test_a_missing_volume_can_be_given_and_taken_away(hours: Shelf) -> None:
    hours.put(0, 7)
    opens = hours.opens(0, 7)
    without = int(np.flatnonzero(np.isnan(candles_at(opens).volume))[0])
    apply(hours, rows_of(opens[[without]], volume=3.0))
    assert hours.read().volume[without] == 3.0
    apply(hours, rows_of(opens[[without]], volume=np.nan))
    assert np.isnan(hours.read().volume[without])


def test_inserted_candles_close_their_gap(hours: Shelf) -> None:
    opens = hours.opens(0, 10)
    hours.commit(hours.span(0, 10), brought(candles_at(opens[[0, 1, 2, 6, 7, 9]])))
    assert [g.missing for g in hours.gaps()] == [3, 1]
    done = apply(hours, whole(candles_at(opens[[4, 8]])))
    assert counts(done) == (2, 0, 0)
    assert [(g.start, g.missing) for g in hours.gaps()] == [(opens[3], 1), (opens[5], 1)]
    status = hours.status()
    assert (status.total_candles, status.open_gaps) == (8, 2)
    assert hours.audit().differences == ()


def test_an_explained_gap_keeps_its_state_beside_an_inserted_candle(hours: Shelf) -> None:
    opens = hours.opens(0, 6)
    hours.commit(hours.span(0, 6), brought(candles_at(opens[[0, 5]])))
    with hours.database.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE fks.gap SET status = 'unavailable' WHERE series_id = {hours.identity}"
        )
    apply(hours, whole(candles_at(opens[[2]])))
    assert [(g.missing, g.status) for g in hours.gaps()] == [(1, "unavailable"), (2, "unavailable")]
    assert hours.audit().differences == ()


def test_history_before_the_coverage_stays_pending_and_candles_after_it_extend_it(hours: Shelf) -> None:
    hours.put(20, 30)
    opens = hours.opens(0, 40)
    apply(hours, whole(candles_at(opens[[2, 3, 8]])))
    assert hours.gaps() == ()
    apply(hours, whole(candles_at(opens[[34]])))
    (gap,) = hours.gaps()
    assert (gap.start, gap.missing, gap.status) == (opens[30], 4, "open")
    status = hours.status()
    assert status.total_candles == 14
    assert (status.oldest_data_time, status.newest_data_time) == (
        to_datetime(int(opens[2])),
        to_datetime(int(opens[34])),
    )
    assert hours.audit().differences == ()


def test_a_new_series_is_registered_with_the_correction(shared: Database) -> None:
    series = fresh("1h")
    rows = whole(candles_at([1_704_067_200_000_000]))
    assert counts(correct(shared, series, rows, STATEMENT, EVER.end, dry_run=True)) == (1, 0, 0)
    assert series not in queries.stored_series(shared)
    correct(shared, series, rows, STATEMENT, EVER.end)
    (status,) = queries.sync_status(shared, series)
    assert (status.total_candles, status.open_gaps) == (1, 0)


def test_an_invalid_row_changes_nothing(shared: Database) -> None:
    series = fresh("1h")
    good = candles_at([1_704_067_200_000_000, 1_704_070_800_000_000])
    bad = replace(good, high=good.low - 1)
    with pytest.raises(CorrectionError) as error:
        correct(shared, series, whole(bad), STATEMENT, EVER.end)
    assert error.value.total == 2
    assert {one.reason for one in error.value.first} == {
        "high is not the highest price, or low not the lowest"
    }
    assert series not in queries.stored_series(shared)


def test_values_are_invalid_together_with_the_stored_ones(hours: Shelf) -> None:
    hours.put(0, 5)
    before, opens = hours.read(), hours.opens(0, 6)
    rows = rows_of(opens[[1, 2, 5]], close=[float(before.close[1]), 1e9, 1.0])
    with pytest.raises(CorrectionError) as error:
        apply(hours, rows)
    assert [(one.line, one.reason) for one in error.value.first] == [
        (3, "high is not the highest price, or low not the lowest"),
        (4, "not stored, so the row must give open, high, low, too"),
    ]
    assert hours.read().equals(before)
    assert len(hours.batches()) == 1


def test_a_dry_run_writes_nothing(hours: Shelf) -> None:
    hours.put(0, 5)
    before, opens = hours.read(), hours.opens(0, 6)
    done = apply(hours, whole(candles_at(opens, 2)), dry_run=True)
    assert (counts(done), done.batch) == ((1, 5, 0), None)
    assert done.changes.before.take(slice(0, 5)).equals(before)
    assert done.changes.after.equals(candles_at(opens, 2))
    assert hours.read().equals(before)
    assert len(hours.batches()) == 1


# Pins ---------------------------------------------------------------------------------------------------


def test_a_pinned_candle_is_not_replaced_until_it_is_released(hours: Shelf) -> None:
    hours.put(0, 10)
    opens = hours.opens(0, 10)
    apply(hours, whole(candles_at(opens[[4, 5]], 2)))
    assert hours.put(0, 10, version=6) == Committed(0, 8, 0, pinned=2)
    file = archive(candles_at(opens, 8), published_at=EVER.end)
    assert hours.commit(hours.span(0, 10), file) == Committed(0, 8, 0, pinned=2)
    assert hours.read().take(slice(4, 6)).equals(candles_at(opens[[4, 5]], 2))
    assert queries.pinned_opens(hours.database, hours.series, EVER).tolist() == opens[[4, 5]].tolist()
    assert release_pins(hours.database, hours.series, int(opens[5])) == 1
    assert queries.pinned_opens(hours.database, hours.series, EVER).tolist() == opens[[4]].tolist()
    assert hours.commit(hours.span(0, 10), file) == Committed(0, 1, 0, pinned=1)
    assert hours.read().take(slice(5, 6)).equals(candles_at(opens[[5]], 8))
    assert release_pins(hours.database, hours.series) == 1
    assert release_pins(hours.database, hours.series) == 0
    assert hours.commit(hours.span(0, 10), file) == Committed(0, 1, 0)


def test_an_equal_candle_is_no_conflict_with_a_pin(hours: Shelf) -> None:
    hours.put(0, 3)
    apply(hours, whole(candles_at(hours.opens(1, 2), 2)))
    assert hours.commit(hours.span(1, 2), brought(candles_at(hours.opens(1, 2), 2))) == Committed(0, 0, 0)


def test_a_correction_replaces_a_pinned_value_and_pins_its_own(hours: Shelf) -> None:
    hours.put(0, 3)
    opens = hours.opens(1, 2)
    apply(hours, whole(candles_at(opens, 2)))
    assert counts(apply(hours, whole(candles_at(opens, 4)))) == (0, 1, 0)
    assert queries.pinned_opens(hours.database, hours.series, EVER).tolist() == opens.tolist()
    assert release_pins(hours.database, hours.series) == 1  # candles, not corrections
    hours.undo(hours.batches()[-1])
    assert hours.read().take(slice(1, 2)).equals(candles_at(opens, 2))
    assert len(queries.pinned_opens(hours.database, hours.series, EVER)) == 0


def test_a_wrong_correction_is_undone(hours: Shelf) -> None:
    hours.put(0, 10)
    opens, before = hours.opens(0, 14), hours.read()
    done = apply(hours, whole(candles_at(opens[[2, 3, 12]], 2)))
    assert done.batch is not None
    moment = hours.now()
    assert hours.undo(done.batch).updated == 3
    assert hours.read().equals(before)
    assert len(hours.read(moment)) == 11
    assert len(queries.pinned_opens(hours.database, hours.series, EVER)) == 0
    assert hours.audit().differences == ()
    assert hours.put(0, 10, version=2) == Committed(0, 10, 0)


def test_an_undone_correction_creates_no_gap_in_pending_history(hours: Shelf) -> None:
    hours.put(20, 30)
    opens = hours.opens(0, 40)
    done = apply(hours, whole(candles_at(opens[[2, 25]], 2)))
    assert done.batch is not None
    hours.undo(done.batch)
    assert [(g.start, g.missing) for g in hours.gaps()] == [(opens[2], 1)]
    assert hours.audit().differences == ()


# Speed ---------------------------------------------------------------------------------------------------


def test_the_number_of_statements_does_not_depend_on_that_of_candles(minutes: Shelf) -> None:
    """Scattered updates and filled gaps, and their undo."""
    opens = minutes.opens(0, 6000)
    minutes.commit(minutes.span(0, 6000), brought(candles_at(np.delete(opens, np.s_[7::10]))))
    few, many = opens[[3, 17, 44]], opens[1000::3]
    used = []
    for ts, version in ((few, 2), (many, 4)):
        with statements(minutes.database) as noted:
            done = apply(minutes, whole(candles_at(ts, version)))
        assert done.batch is not None
        assert done.changes.inserted > 0
        with statements(minutes.database) as undone:
            assert minutes.undo(done.batch).updated == len(ts)
        used.append((len(noted), len(undone)))
    assert used[0] == used[1]
    assert max(used[0]) <= 30
    assert minutes.audit().differences == ()


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """The statements that SQLAlchemy sends in the block."""
    sent: list[str] = []

    def note(*arguments: Any) -> None:
        sent.append(arguments[2])

    sa.event.listen(database._engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(database._engine, "before_cursor_execute", note)


# Concurrency --------------------------------------------------------------------------------------------


def test_two_corrections_of_one_candle_are_applied_one_after_the_other(
    hours: Shelf, shared: Database
) -> None:
    """The second one waits for the lock, and is merged with what the first one has committed."""
    hours.put(0, 3)
    opens = hours.opens(1, 2)
    low = float(hours.read().low[1])
    others = [Database(shared.url.render_as_string(hide_password=False)) for _ in range(2)]
    done: list[Corrected] = []

    def run(database: Database, rows: CorrectionRows) -> None:
        done.append(apply(hours.on(database), rows))

    threads = [
        threading.Thread(target=run, args=(others[0], rows_of(opens, volume=77.0))),
        threading.Thread(target=run, args=(others[1], rows_of(opens, close=low))),
    ]
    with shared.begin() as holder:
        holder.exec_driver_sql(f"SELECT pg_advisory_xact_lock(46137, {hours.identity})")
        for thread in threads:
            thread.start()
        until_waiting(shared, 2)
    for thread in threads:
        thread.join()
    assert [counts(one) for one in done] == [(0, 1, 0), (0, 1, 0)]
    after = hours.read()
    assert (after.volume[1], after.close[1]) == (77.0, low)
    ((revisions,),) = hours.rows("SELECT count(*) FROM fks.corrections WHERE symbol = :symbol")
    assert revisions == 2
    for other in others:
        other.dispose()


def until_waiting(database: Database, sessions: int) -> None:
    """Waits until that many sessions wait for an advisory lock."""
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND classid = 46137"
    while True:
        with database.begin() as connection:
            if connection.exec_driver_sql(waiting).scalar_one() >= sessions:
                return
