"""An audit of real tables: each kind of damage is found, reported precisely, and repaired if possible."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, Timeframe, to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.reconcile import Kind, SeriesAudit
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.audit_reader import examine
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.repair import repair_series
from fks_backfill_dagster_tests.store.builders import EVER, MIDNIGHT, Shelf, brought, candles_at, execute
from fks_backfill_dagster_tests.store.conftest import fresh

ABSENT = Evidence("binance", MIDNIGHT, Outcome.ABSENT)

Found = tuple[Kind, int | None, int | None, int | None, int | None]


@dataclass(frozen=True)
class Stand:
    """A series that was synced from MIDNIGHT on, with a gap of four candles, and some time since.

    `opens` are all of its candles, including those of the gap; `later` those that have closed since.
    """

    shelf: Shelf
    opens: Instants
    later: Instants
    now: int

    @classmethod
    def of(cls, database: Database, asset_class: str, timeframe: str) -> Stand:
        name = uuid.uuid4().hex[:12].upper()
        series = Series(name, Timeframe(timeframe), AssetClass(asset_class))
        shelf, grid, step = Shelf.of(database, series), grid_of(series), series.timeframe.micros
        length, rest = (40, 20) if series.timeframe is Timeframe.D1 else (16 * 24, 48)
        end = grid.closed_end(MIDNIGHT + length * step)
        now = MIDNIGHT + (length + rest) * step
        opens, later = (
            grid.opens(TimeRange(a, b)) for a, b in ((MIDNIGHT, end), (end, grid.closed_end(now)))
        )
        present = np.concatenate([opens[:10], opens[14:]])
        middle = int(opens[20])
        shelf.commit(
            TimeRange(MIDNIGHT, middle), brought(candles_at(present[present < middle])), evidence=(ABSENT,)
        )
        shelf.commit(TimeRange(middle, end), brought(candles_at(present[present >= middle]), "polygon"))
        return cls(shelf, opens, later, now)

    @property
    def stored(self) -> int:
        return len(self.opens) - 4

    def close(self, opened: Instants | int) -> int:
        return int(self.shelf.grid.closes(np.array([opened], dtype=np.int64))[0])

    def span(self, first: int, past: int) -> tuple[int, int]:
        return int(self.opens[first]), self.close(self.opens[past - 1])

    @property
    def gap(self) -> tuple[int, int]:
        return self.span(10, 14)

    def execute(self, statement: str) -> None:
        """`{table}`, `{id}` and `{gap}` (the condition that finds the gap's row) are filled in."""
        one = self.shelf.identity
        condition = f"series_id = {one} AND status <> 'filled'"
        execute(self.shelf.database, statement.format(table=self.shelf.table, id=one, gap=condition))

    def insert(self, *opens: int) -> None:
        """Inserts candles directly, with the lineage of the first batch."""
        batch = self.shelf.batches()[0]
        for ts in opens:
            row = f"{self.shelf.identity}, '{moment(ts)}', {batch}, 2, 3, 1, 2, 1"
            self.execute(f"INSERT INTO {{table}} VALUES ({row})")

    def delete(self, *opens: int) -> None:
        times = ", ".join(f"'{moment(ts)}'" for ts in opens)
        self.execute(f"DELETE FROM {{table}} WHERE series_id = {{id}} AND ts IN ({times})")

    def row(self, start: int, end: int, missing: int, status: str = "open") -> None:
        """Inserts a row of the ledger directly."""
        self.execute(
            "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
            f" VALUES ({{id}}, '{moment(start)}', '{moment(end)}', {missing}, '{status}', 7, '[]')"
        )


def moment(ts: int) -> str:
    return to_datetime(int(ts)).isoformat()


Damage = Callable[[Stand], list[Found]]
DAMAGES: list[Damage] = []


def damage(function: Damage) -> Damage:
    DAMAGES.append(function)
    return function


@damage
def nothing(it: Stand) -> list[Found]:
    return []


@damage
def a_candle_deleted(it: Stand) -> list[Found]:
    it.delete(it.opens[17])
    return [
        (Kind.UNRECORDED_GAP, *it.span(17, 18), 0, 1),
        (Kind.TOTAL, None, None, it.stored, it.stored - 1),
    ]


@damage
def the_ends_deleted(it: Stand) -> list[Found]:
    it.delete(it.opens[0], it.opens[-2], it.opens[-1])
    last = len(it.opens)
    return [
        (Kind.UNRECORDED_GAP, *it.span(0, 1), 0, 1),
        (Kind.UNRECORDED_GAP, *it.span(last - 2, last), 0, 2),
        (Kind.TOTAL, None, None, it.stored, it.stored - 3),
        (Kind.OLDEST, None, None, int(it.opens[0]), int(it.opens[1])),
        (Kind.NEWEST, None, None, int(it.opens[-1]), int(it.opens[-3])),
    ]


@damage
def everything_deleted(it: Stand) -> list[Found]:
    it.delete(*it.opens)
    return [
        (Kind.UNRECORDED_GAP, *it.span(0, 10), 0, 10),
        (Kind.UNRECORDED_GAP, *it.span(14, len(it.opens)), 0, len(it.opens) - 14),
        (Kind.TOTAL, None, None, it.stored, 0),
        (Kind.OLDEST, None, None, int(it.opens[0]), None),
        (Kind.NEWEST, None, None, int(it.opens[-1]), None),
    ]


@damage
def a_candle_inserted_into_the_gap(it: Stand) -> list[Found]:
    it.insert(it.opens[11])
    return [
        (Kind.STORED_IN_GAP, *it.gap, 4, 3),
        (Kind.TOTAL, None, None, it.stored, it.stored + 1),
    ]


@damage
def candles_before_the_coverage(it: Stand) -> list[Found]:
    before = it.shelf.grid.opens(TimeRange(MIDNIGHT - 40 * 86_400_000_000, MIDNIGHT))
    it.insert(before[-9], before[-5], before[-4])
    return [
        (Kind.CANDLES_OUTSIDE, int(before[-9]), it.close(before[-9]), 0, 1),
        (Kind.CANDLES_OUTSIDE, int(before[-5]), it.close(before[-4]), 0, 2),
        (Kind.TOTAL, None, None, it.stored, it.stored + 3),
        (Kind.OLDEST, None, None, int(it.opens[0]), int(before[-9])),
    ]


@damage
def a_candle_after_the_coverage(it: Stand) -> list[Found]:
    it.insert(it.later[3])
    return [
        (Kind.UNRECORDED_GAP, int(it.later[0]), it.close(it.later[2]), 0, 3),
        (Kind.CANDLES_OUTSIDE, int(it.later[3]), it.close(it.later[3]), 0, 1),
        (Kind.TOTAL, None, None, it.stored, it.stored + 1),
        (Kind.NEWEST, None, None, int(it.opens[-1]), int(it.later[3])),
    ]


@damage
def the_coverage_reaches_ahead(it: Stand) -> list[Found]:
    end = it.now + 100 * it.shelf.series.timeframe.micros
    it.execute(
        "UPDATE fks.sync_state SET synced = synced + tstzmultirange(tstzrange("
        f"upper(synced), '{moment(end)}')) WHERE series_id = {{id}}"
    )
    closed = it.shelf.grid.closed_end(it.now)
    ahead = it.shelf.grid.count(TimeRange(closed, end))
    return [
        (Kind.UNRECORDED_GAP, int(it.later[0]), it.close(it.later[-1]), 0, len(it.later)),
        (Kind.COVERAGE_AHEAD, closed, end, ahead, 0),
    ]


@damage
def the_gap_deleted(it: Stand) -> list[Found]:
    it.execute("DELETE FROM fks.gap WHERE {gap}")
    return [(Kind.UNRECORDED_GAP, *it.gap, 0, 4)]


@damage
def the_gap_widened(it: Stand) -> list[Found]:
    start, end = it.span(9, 17)
    it.execute(f"UPDATE fks.gap SET gap_start = '{moment(start)}', gap_end = '{moment(end)}' WHERE {{gap}}")
    return [(Kind.STORED_IN_GAP, start, end, 4, 4)]


@damage
def the_gap_miscounted(it: Stand) -> list[Found]:
    it.execute("UPDATE fks.gap SET missing_candles = 9 WHERE {gap}")
    return [(Kind.GAP_COUNT, *it.gap, 9, 4)]


@damage
def ragged_edges(it: Stand) -> list[Found]:
    start, end = it.gap
    it.execute(f"UPDATE fks.gap SET gap_end = '{moment(end - 1)}' WHERE {{gap}}")
    return [(Kind.GAP_EDGES, start, end - 1, 4, 4)]


@damage
def an_overlap(it: Stand) -> list[Found]:
    it.row(*it.span(12, 14), 2, "unavailable")
    return [(Kind.GAP_OVERLAP, *it.span(12, 14), 2, 2)]


@damage
def an_overlap_with_candles(it: Stand) -> list[Found]:
    it.row(*it.span(12, 16), 4, "unavailable")
    return [
        (Kind.STORED_IN_GAP, *it.span(12, 16), 4, 2),
        (Kind.GAP_OVERLAP, *it.span(12, 16), 4, 2),
    ]


@damage
def a_gap_where_nothing_was_synced(it: Stand) -> list[Found]:
    start, end = int(it.later[2]), it.close(it.later[4])
    it.row(start, end, 3)
    return [(Kind.GAP_OUTSIDE, start, end, 3, 0)]


@damage
def a_gap_without_candles(it: Stand) -> list[Found]:
    start = int(it.opens[16]) + 1
    it.row(start, start + 1, 1)
    return [(Kind.GAP_COUNT, start, start + 1, 1, 0)]


@damage
def totals_changed(it: Stand) -> list[Found]:
    it.execute(
        "UPDATE fks.sync_state SET total_candles = 7, oldest = NULL, newest = newest - interval '1 second'"
        " WHERE series_id = {id}"
    )
    newest = int(it.opens[-1])
    return [
        (Kind.TOTAL, None, None, 7, it.stored),
        (Kind.OLDEST, None, None, None, int(it.opens[0])),
        (Kind.NEWEST, None, None, newest - MICROS_PER_SECOND, newest),
    ]


@damage
def the_status_deleted(it: Stand) -> list[Found]:
    """Deletes the coverage, too: only the candles show what was synced, and nothing else becomes a gap."""
    it.execute("DELETE FROM fks.sync_state WHERE series_id = {id}")
    return [
        (Kind.NO_STATUS, None, None, None, it.stored),
        (Kind.CANDLES_OUTSIDE, *it.span(0, 10), 0, 10),
        (Kind.GAP_OUTSIDE, *it.gap, 4, 0),
        (Kind.CANDLES_OUTSIDE, *it.span(14, len(it.opens)), 0, len(it.opens) - 14),
    ]


@damage
def an_expired_lease(it: Stand) -> list[Found]:
    it.execute("INSERT INTO fks.lease VALUES ({id}, 'dead', now() - interval '1 minute')")
    it.execute("INSERT INTO fks.lease VALUES ({id}, 'alive', now() + interval '1 hour')")
    return [(Kind.EXPIRED_LEASE, None, None, 1, 0)]


# Not repairable from the candles


@damage
def a_candle_off_the_grid(it: Stand) -> list[Found]:
    off_grid = int(it.opens[16]) + 7 * MICROS_PER_SECOND
    it.insert(off_grid)
    return [
        (Kind.OFF_GRID, off_grid, off_grid + it.shelf.series.timeframe.micros, None, 1),
        (Kind.TOTAL, None, None, it.stored, it.stored + 1),
    ]


@damage
def a_candle_that_is_not_closed(it: Stand) -> list[Found]:
    future = it.shelf.grid.closed_end(it.now)
    it.insert(future)
    return [
        (Kind.UNCLOSED, future, future + it.shelf.series.timeframe.micros, None, 1),
        (Kind.TOTAL, None, None, it.stored, it.stored + 1),
        (Kind.NEWEST, None, None, int(it.opens[-1]), future),
    ]


@damage
def candles_that_break_a_rule(it: Stand) -> list[Found]:
    first, last = int(it.opens[2]), int(it.opens[5])
    it.execute(
        f"UPDATE {{table}} SET low = 'NaN' WHERE series_id = {{id}} AND ts IN ('{moment(first)}', '{moment(last)}')"
    )
    return [(Kind.BROKEN_RULE, first, last + it.shelf.series.timeframe.micros, None, 2)]


@damage
def lineage_deleted(it: Stand) -> list[Found]:
    it.execute(f"DELETE FROM fks.batch WHERE id = {it.shelf.batches()[0]}")
    past = int(it.opens[19]) + it.shelf.series.timeframe.micros
    return [(Kind.NO_LINEAGE, int(it.opens[0]), past, None, 16)]


@damage
def lineage_never_stamped(it: Stand) -> list[Found]:
    it.execute(f"UPDATE fks.batch SET committed_at = 'infinity' WHERE id = {it.shelf.batches()[1]}")
    first, past = int(it.opens[20]), int(it.opens[-1]) + it.shelf.series.timeframe.micros
    return [(Kind.NO_LINEAGE, first, past, None, len(it.opens) - 20)]


GRIDS = [("crypto", "1h"), ("stocks", "1h"), ("stocks", "1d"), ("forex", "1h"), ("forex", "1d")]


@pytest.mark.parametrize(("asset_class", "timeframe"), GRIDS)
@pytest.mark.parametrize("harm", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_reported_and_repaired(
    shared: Database, harm: Damage, asset_class: str, timeframe: str
) -> None:
    stand = Stand.of(shared, asset_class, timeframe)
    shelf = stand.shelf
    expected = sorted(harm(stand), key=repr)
    rows = shelf.rows(f"SELECT c::text FROM {shelf.table} c WHERE series_id = :id ORDER BY ts")
    assert differences_of(shelf.audit(stand.now)) == expected
    repaired = shelf.repair(stand.now)
    assert differences_of(repaired) == expected
    unrepairable = [d for d in expected if not d[0].repairable]
    assert sorted(((d.kind, d.start, d.end, d.recorded, d.actual) for d in repaired.left), key=repr) == (
        unrepairable
    )
    again = shelf.audit(stand.now)
    assert differences_of(again) == unrepairable
    assert_invariants(stand, again)
    assert shelf.rows(f"SELECT c::text FROM {shelf.table} c WHERE series_id = :id ORDER BY ts") == rows


def differences_of(found: SeriesAudit) -> list[Found]:
    assert all(d.message and not d.message.endswith(".") for d in found.differences)
    return sorted(((d.kind, d.start, d.end, d.recorded, d.actual) for d in found.differences), key=repr)


def assert_invariants(it: Stand, found: SeriesAudit) -> None:
    """By their plain definition, from the tables."""
    shelf, grid = it.shelf, it.shelf.grid
    known = queries.what_is_known(shelf.database, shelf.series, EVER)
    stored = shelf.read().ts
    expected = np.concatenate([np.empty(0, np.int64), *(grid.opens(part) for part in known.synced)])
    absent = np.setdiff1d(expected, stored)
    held = [grid.opens(TimeRange(g.start, g.end)) for g in known.gaps]
    assert np.concatenate([np.empty(0, np.int64), *held]).tolist() == absent.tolist()
    assert [g.missing for g in known.gaps] == [len(part) for part in held]
    closed = stored[grid.contains(stored) & (stored < grid.closed_end(it.now))]
    assert known.synced.contains(closed).all()
    status = shelf.status()
    assert status.total_candles == len(stored) == found.candles
    assert (found.expected, found.missing) == (len(expected), len(absent))


# History of the ledger -----------------------------------------------------------------------------------


def test_a_gap_that_is_still_missing_keeps_its_history(shared: Database) -> None:
    stand = Stand.of(shared, "crypto", "1h")
    (before,) = stand.shelf.gaps()
    stand.insert(stand.opens[11])
    stand.delete(stand.opens[30])
    stand.shelf.repair(stand.now)
    first, second, new = stand.shelf.gaps()
    assert [(g.missing, g.attempts, g.evidence, g.found_at) for g in (first, second)] == [
        (1, 1, (ABSENT,), before.found_at),
        (2, 1, (ABSENT,), before.found_at),
    ]
    assert (new.start, new.status, new.attempts, new.evidence) == (stand.opens[30], GapStatus.OPEN, 0, ())


def test_an_explained_gap_stays_explained_and_an_open_neighbour_stays_open(shared: Database) -> None:
    stand = Stand.of(shared, "stocks", "1h")
    stand.execute("UPDATE fks.gap SET status = 'unavailable' WHERE {gap}")
    stand.delete(stand.opens[14])
    found = stand.shelf.repair(stand.now)
    assert (found.missing, found.explained) == (5, 4)
    assert [(g.status.value, g.missing) for g in stand.shelf.gaps()] == [("unavailable", 4), ("open", 1)]


def test_a_deleted_neighbour_is_a_separate_gap(shared: Database) -> None:
    """It was never requested; the next sync merges the two."""
    stand = Stand.of(shared, "forex", "1h")
    stand.delete(stand.opens[14])
    stand.shelf.repair(stand.now)
    known, new = stand.shelf.gaps()
    assert ((known.start, known.end), known.missing, known.evidence) == (stand.span(10, 14), 4, (ABSENT,))
    assert ((new.start, new.end), new.missing, new.evidence) == (stand.span(14, 15), 1, ())


def test_a_sync_after_the_repair_fetches_what_was_deleted(shared: Database) -> None:
    stand = Stand.of(shared, "crypto", "1h")
    stand.delete(stand.opens[0], stand.opens[33])
    stand.shelf.repair(stand.now)
    assert {int(stand.opens[0]), int(stand.opens[33])} <= set(stand.shelf.missing().tolist())


def test_a_batch_with_candles_off_the_grid_can_be_undone(shared: Database) -> None:
    stand = Stand.of(shared, "crypto", "1h")
    stand.insert(stand.opens[3] + 7 * MICROS_PER_SECOND)
    stand.shelf.repair(stand.now)
    (left,) = stand.shelf.audit(stand.now).differences
    first = stand.shelf.batches()[0]
    assert f"`fks-backfill batches undo {first}`" in left.message
    stand.shelf.undo(first)
    assert stand.shelf.audit(stand.now).differences == ()


# Snapshots ----------------------------------------------------------------------------------------------


def test_a_series_that_is_not_stored_is_not_audited(shared: Database) -> None:
    series = fresh("1h")
    assert examine(shared, series, grid_of(series), lambda: EVER.end) is None
    assert repair_series(shared, series, grid_of(series), lambda: EVER.end) is None


def test_a_series_without_candles_has_no_differences(hours: Shelf) -> None:
    assert hours.audit().differences == ()
    hours.commit(hours.span(0, 24))
    found = hours.audit()
    assert (found.differences, found.expected, found.missing) == ((), 24, 24)


def test_many_blocks_are_one_series(minutes: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap across two blocks is one gap, and a batch in both of them is reported once."""
    monkeypatch.setattr("fks_backfill_dagster.store.audit_reader._BLOCK", 50)
    minutes.put(0, 1000)
    opens = minutes.opens(0, 1000)
    for first, last in ((90, 110), (140, 460)):
        between = f"BETWEEN '{moment(opens[first])}' AND '{moment(opens[last])}'"
        execute(
            minutes.database,
            f"DELETE FROM {minutes.table} WHERE series_id = {minutes.identity} AND ts {between}",
        )
    execute(minutes.database, f"UPDATE {minutes.table} SET close = 0 WHERE series_id = {minutes.identity}")
    found = [(d.kind, d.start, d.actual) for d in minutes.audit().differences]
    assert found == [
        (Kind.TOTAL, None, 658),
        (Kind.BROKEN_RULE, opens[0], 658),
        (Kind.UNRECORDED_GAP, opens[90], 21),
        (Kind.UNRECORDED_GAP, opens[140], 321),
    ]


def test_a_batch_may_be_far_from_its_candles(minutes: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a manual change causes this. The lineage is wrong, but it exists."""
    monkeypatch.setattr("fks_backfill_dagster.store.audit_reader._BLOCK", 50)
    minutes.put(0, 500)
    minutes.put(500, 1000)
    first, second = minutes.batches()
    execute(minutes.database, f"UPDATE {minutes.table} SET batch_id = {first} WHERE batch_id = {second}")
    assert minutes.audit().differences == ()
    execute(minutes.database, f"DELETE FROM fks.batch WHERE id = {first}")
    (found,) = minutes.audit().differences
    assert (found.kind, found.actual) == (Kind.NO_LINEAGE, 1000)


def test_a_concurrent_sync_causes_no_differences(hours: Shelf, shared: Database) -> None:
    """Commits, undos and corrections on another connection, one after the other, during audits."""
    done = threading.Event()
    failures: list[BaseException] = []

    def write() -> None:
        try:
            number = 0
            while not done.is_set():
                first = 12 * (number % 20)
                hours.put(first, first + 11, version=number % 4)
                if number % 3 == 0:
                    hours.undo(hours.batches()[-1])
                number += 1
        except BaseException as error:
            failures.append(error)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        reports = [hours.audit() for _ in range(40)]
        reports += [hours.repair() for _ in range(10)]
    finally:
        done.set()
        writer.join()
    assert failures == []
    assert [d for report in reports for d in report.differences] == []
    assert len({report.candles for report in reports}) > 1, "nothing was written during the audits"


def test_a_repair_examines_again_under_the_lock(shared: Database) -> None:
    """A difference that another writer removed while the repair waited is not repaired again."""
    stand = Stand.of(shared, "crypto", "1h")
    stand.delete(stand.opens[30])
    found: list[SeriesAudit] = []
    with shared.begin() as connection:
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(46137, :id)"), {"id": stand.shelf.identity})
        repairing = threading.Thread(target=lambda: found.append(stand.shelf.repair(stand.now)))
        repairing.start()
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted AND objid = :id"
        with shared.autocommit() as other:
            while not other.scalar(sa.text(waiting), {"id": stand.shelf.identity}):
                pass
        stand.insert(stand.opens[30])
    repairing.join()
    assert found[0].differences == ()


def test_the_server_may_return_the_candles_in_any_order(database: Database) -> None:
    """When it scans the table instead of the index, it returns them in the order in which they were written."""
    shelf = Shelf.of(database, fresh("1h"))
    for first in (48, 24, 0):
        shelf.put(first, first + 24)
    for plan in ("indexscan", "indexonlyscan", "bitmapscan"):
        execute(database, f'ALTER DATABASE "{database.url.database}" SET enable_{plan} = off')
    database.dispose()  # the settings are those of new connections
    plain = shelf.rows(f"SELECT ts FROM {shelf.table} WHERE series_id = :id")
    assert plain != sorted(plain, key=str), "they were returned in order: this tests nothing"
    assert shelf.audit().differences == ()
