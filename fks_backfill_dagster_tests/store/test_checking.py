"""The numbers behind partitions and checks."""

from __future__ import annotations

from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.store.checking import (
    Completeness,
    PartState,
    Reach,
    completeness,
    part_states,
    reaches,
    sanity,
)
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, execute
from fks_backfill_dagster_tests.store.conftest import fresh


def test_a_window_tells_what_is_stored_and_by_whom(hours: Shelf) -> None:
    hours.put(0, 24)
    hours.commit(hours.span(24, 48), brought(candles_at(hours.opens(24, 40)), "polygon"))
    found = part_states(
        hours.database,
        hours.series,
        {"first": hours.span(0, 24), "both": hours.span(12, 48), "never": hours.span(48, 60)},
    )
    assert found == {
        "first": PartState(expected=24, providers={"binance": 24}),
        "both": PartState(expected=36, missing=8, unexplained=8, providers={"polygon": 16, "binance": 12}),
        "never": PartState(expected=12, missing=12, unexplained=12),
    }
    assert list(found["both"].providers) == ["polygon", "binance"]
    assert (found["both"].stored, found["both"].coverage) == (28, 28 / 36)


def test_an_explained_gap_is_missing_but_not_unexplained(hours: Shelf) -> None:
    hours.commit(hours.span(0, 24), brought(candles_at(hours.opens(0, 20))))
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' WHERE series_id = {hours.identity}")
    state = part_states(hours.database, hours.series, {"": hours.span(0, 24)})[""]
    assert (state.expected, state.missing, state.unexplained) == (24, 4, 0)
    assert completeness(hours.database, [hours.series])[hours.series] == Completeness(expected=24, missing=4)


def test_what_did_not_trade_is_neither_stored_nor_missing(hours: Shelf) -> None:
    """One gap of each kind, and hours that were never synced: expected = stored + missing + quiet."""
    kinds = {4: "no_trade", 8: "unavailable", 12: "tolerated", 16: "open"}
    absent = {first + step for first in kinds for step in range(first // 4)}
    there = hours.opens(0, 24)[[hour for hour in range(24) if hour not in absent]]
    hours.commit(hours.span(0, 24), brought(candles_at(there)))
    for first, status in kinds.items():
        low = to_datetime(hours.span(first, first).start)
        execute(
            hours.database,
            f"UPDATE fks.gap SET status = '{status}' WHERE series_id = {hours.identity} AND gap_start = '{low}'",
        )
    state = part_states(hours.database, hours.series, {"": hours.span(0, 30)})[""]
    assert state == PartState(
        expected=30, missing=2 + 3 + 4 + 6, unexplained=4 + 6, quiet=1, providers={"binance": 14}
    )
    assert (state.stored, state.coverage) == (14, 15 / 30)
    whole = completeness(hours.database, [hours.series])[hours.series]
    assert whole == Completeness(expected=24, missing=2 + 3 + 4, open_gaps=1, open_missing=4, quiet=1)
    assert (whole.stored, whole.coverage) == (14, 15 / 24)


def test_an_empty_window_is_covered(hours: Shelf) -> None:
    state = part_states(hours.database, hours.series, {"": hours.span(5, 5)})[""]
    assert state == PartState()
    assert state.coverage == 1.0


def test_completeness_is_about_what_was_synced(hours: Shelf) -> None:
    hours.put(0, 24)
    hours.commit(hours.span(100, 124), brought(candles_at(hours.opens(100, 122))))
    assert completeness(hours.database, [hours.series])[hours.series] == Completeness(
        expected=48, missing=2, open_gaps=1, open_missing=2
    )


def test_many_series_are_judged_together(hours: Shelf, minutes: Shelf, shared: Database) -> None:
    hours.put(0, 24)
    minutes.put(0, 60)
    low = to_datetime(int(minutes.opens(7, 8)[0]))
    execute(
        shared,
        f"UPDATE {minutes.table} SET low = high + 1 WHERE series_id = {minutes.identity} AND ts = '{low}'",
    )
    unknown = fresh("1m")
    found = sanity(shared, [hours.series, minutes.series, unknown])
    assert (found[hours.series].candles, found[hours.series].bad) == (24, 0)
    assert (found[minutes.series].candles, found[minutes.series].bad) == (60, 1)
    assert found[minutes.series].violations["high_low"] == 1
    assert found[minutes.series].first == int(minutes.opens(7, 8)[0])
    assert (found[unknown].candles, found[unknown].first) == (0, None)
    assert completeness(shared, [unknown])[unknown] == Completeness()


def test_infinity_is_not_finite_and_no_volume_is_fine(hours: Shelf) -> None:
    hours.put(0, 24)
    execute(
        hours.database,
        f"UPDATE {hours.table} SET low = '-Infinity', high = 'Infinity', volume = NULL"
        f" WHERE series_id = {hours.identity}",
    )
    found = sanity(hours.database, [hours.series])[hours.series]
    assert found.violations == {"not_finite": 24, "not_positive": 24, "high_low": 0, "bad_volume": 0}
    assert found.bad == 24


def test_how_far_a_series_reaches_and_from_where_on_nobody_has_it(hours: Shelf) -> None:
    end, last = hours.span(0, 24).end, int(hours.opens(20, 21)[0])
    own = f"WHERE series_id = {hours.identity}"

    def reach() -> Reach | None:
        return reaches(hours.database, [hours.series]).get(hours.series)

    assert reach() is None, "it was never synced"
    hours.commit(hours.span(0, 24), brought(candles_at([*hours.opens(0, 5), *hours.opens(7, 20)])))
    assert reach() == Reach(end, last), "somebody may have its end"
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' {own}")
    assert reach() == Reach(end, last, last), "not the gap before"
    execute(hours.database, f"UPDATE fks.gap SET status = 'tolerated' {own} AND missing_candles = 4")
    assert reach() == Reach(end, last, last)
    execute(hours.database, f"UPDATE fks.gap SET status = 'no_trade' {own} AND missing_candles = 4")
    assert reach() == Reach(end)


def test_a_series_that_nobody_ever_had_is_absent_from_its_beginning(hours: Shelf) -> None:
    hours.commit(hours.span(0, 24))
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' WHERE series_id = {hours.identity}")
    span = hours.span(0, 24)
    assert reaches(hours.database, [hours.series]) == {hours.series: Reach(span.end, span.start, span.start)}


def test_a_tail_that_is_partly_open_may_yet_come(hours: Shelf) -> None:
    hours.put(0, 5)
    hours.commit(hours.span(5, 10))
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' WHERE series_id = {hours.identity}")
    hours.commit(hours.span(10, 12))
    assert [gap.status for gap in hours.gaps()] == ["unavailable", "open"]
    assert reaches(hours.database, [hours.series]) == {
        hours.series: Reach(hours.span(0, 12).end, hours.span(5, 12).start)
    }
    last = hours.span(12, 14)
    hours.commit(last)
    execute(
        hours.database,
        f"UPDATE fks.gap SET gap_end = '{to_datetime(last.start)}', missing_candles = 2"
        f" WHERE series_id = {hours.identity} AND status = 'open'",
        "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
        f" VALUES ({hours.identity}, '{to_datetime(last.start)}', '{to_datetime(last.end)}',"
        " 2, 'unavailable', 1, '[]')",
    )
    assert reaches(hours.database, [hours.series]) == {
        hours.series: Reach(last.end, hours.span(5, 12).start, last.start)
    }
