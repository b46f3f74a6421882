"""The numbers of partitions and checks."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, to_datetime, to_micros
from fks_backfill_dagster.store.coverage import (
    Completeness,
    PartState,
    _lineage,
    completeness,
    missing_gaps,
    next_attempts,
    part_states,
)
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.queries import batches, read_candles
from fks_backfill_dagster.store.reaches import MOST_TAIL_GAPS, Reach, Tail, reaches, recent_missing, tails
from fks_backfill_dagster.store.sanity import sanity
from fks_backfill_dagster.store.writer.records import Withdrawal
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, execute, origin_of
from fks_backfill_dagster_tests.store.conftest import fresh


def counted(shelf: Shelf, windows: dict[str, TimeRange]) -> dict[str, PartState]:
    """The states without the fields from candles, lineage and back-off."""
    found = part_states(shelf.database, shelf.series, windows)
    none = {"first": None, "last": None, "close_last": None, "volume_sum": None, "next_attempt": None}
    return {key: replace(state, **none) for key, state in found.items()}  # type: ignore[arg-type]


def test_stored_candles_of_a_window_by_provider(hours: Shelf) -> None:
    hours.put(0, 24)
    hours.commit(hours.span(24, 48), brought(candles_at(hours.opens(24, 40)), "polygon"))
    found = counted(
        hours,
        {"first": hours.span(0, 24), "both": hours.span(12, 48), "never": hours.span(48, 60)},
    )
    assert found == {
        "first": PartState(expected=24, providers={"binance": 24}),
        "both": PartState(expected=36, missing=8, unexplained=8, providers={"polygon": 16, "binance": 12}),
        "never": PartState(expected=12, missing=12, unexplained=12),
    }
    assert list(found["both"].providers) == ["polygon", "binance"]
    assert (found["both"].stored, found["both"].coverage) == (28, 28 / 36)


def test_ends_last_close_and_volume_of_a_window(hours: Shelf) -> None:
    """Against the candles themselves, summed by numpy; also without candles or volume."""
    hours.commit(hours.span(0, 24), brought(candles_at(hours.opens(2, 20))))
    hours.commit(hours.span(24, 48), brought(candles_at(hours.opens(24, 48), 4), "polygon"))
    without_volume = candles_at(hours.opens(48, 60))
    without_volume = Candles(*without_volume.columns()[:5], np.full(len(without_volume), np.nan))
    hours.commit(hours.span(48, 72), brought(without_volume, "oanda"))
    windows = {
        "both": hours.span(0, 48),
        "late": hours.span(30, 40),
        "mute": hours.span(48, 60),
        "mixed": hours.span(40, 60),
        "none": hours.span(60, 72),
    }
    found = part_states(hours.database, hours.series, windows)
    for key, window in windows.items():
        stored = read_candles(hours.database, hours.series, window)
        state = found[key]
        if not len(stored):
            assert (state.first, state.last, state.close_last, state.volume_sum) == (None, None, None, None)
            continue
        assert (state.first, state.last) == (stored.ts[0], stored.ts[-1])
        assert state.close_last == stored.close[-1]
        volumes = stored.volume[~np.isnan(stored.volume)]
        assert state.volume_sum == pytest.approx(volumes.sum() if len(volumes) else None)
    assert found["mute"].volume_sum is None
    assert (found["both"].from_fallback("binance"), found["both"].from_fallback("polygon")) == (24, 18)
    assert (found["late"].from_fallback("binance"), found["none"].from_fallback("binance")) == (10, 0)


@pytest.mark.parametrize("seed", range(6))
def test_the_volume_of_a_window_is_that_of_its_candles(hours: Shelf, seed: int) -> None:
    """From the lineage or from the candles: adjacent and overlapping batches, corrections, withdrawals, undone batches,
    windows that cut batches."""
    chance = np.random.default_rng(seed)
    windows = {f"{low}..{past}": hours.span(low, past) for low in range(0, 72, 12) for past in (low + 12, 72)}
    from_lineage = 0
    for _ in range(12):
        first = int(chance.integers(0, 6)) * 12 if chance.random() < 0.7 else int(chance.integers(0, 60))
        past = first + (12 if chance.random() < 0.7 else int(chance.integers(1, 30)))
        match chance.integers(0, 8):
            case 0 if made := [b for b in batches(hours.database, hours.series) if b.undoes is None]:
                with suppress(StoreError):
                    hours.undo(made[int(chance.integers(0, len(made)))].id)
            case 1:
                gone = Withdrawal(origin_of(), hours.opens(first, first + 2))
                hours.commit(hours.span(first, past), withdrawn=(gone,))
            case _:
                hours.put(first, past, version=int(chance.integers(0, 2) * chance.integers(0, 5)))
        found = part_states(hours.database, hours.series, windows)
        for key, window in windows.items():
            stored = read_candles(hours.database, hours.series, window)
            volumes = stored.volume[~np.isnan(stored.volume)]
            assert found[key].volume_sum == (pytest.approx(volumes.sum()) if len(volumes) else None)
            assert found[key].first == (int(stored.ts[0]) if len(stored) else None)
            assert found[key].last == (int(stored.ts[-1]) if len(stored) else None)
        with hours.database.begin() as connection:
            from_lineage += sum(
                one.volume is not None for one in _lineage(connection, hours.identity, windows).values()
            )
    assert from_lineage  # otherwise only sums of candles were tested


def test_whole_batches_are_not_read_for_their_volume(hours: Shelf) -> None:
    """A month of minutes is 43,200 candles, and a run reads sixty months."""
    hours.put(0, 12)
    hours.put(12, 24)
    execute(hours.database, f"UPDATE {hours.table} SET volume = 1e9 WHERE series_id = {hours.identity}")
    found = part_states(hours.database, hours.series, {"whole": hours.span(0, 24), "cut": hours.span(6, 24)})
    assert found["whole"].volume_sum == pytest.approx(np.nansum(candles_at(hours.opens(0, 24)).volume))
    assert found["cut"].volume_sum == pytest.approx(18e9)


def test_the_next_attempt_of_a_window(hours: Shelf) -> None:
    hours.commit(hours.span(0, 24), brought(candles_at(hours.opens(0, 20))))
    hours.commit(hours.span(24, 48), brought(candles_at(hours.opens(28, 48))))
    execute(
        hours.database,
        f"UPDATE fks.gap SET next_attempt_at = '2030-01-01Z' WHERE series_id = {hours.identity}",
    )
    found = part_states(hours.database, hours.series, {"gap": hours.span(0, 24), "none": hours.span(30, 40)})
    assert found["gap"].next_attempt == to_micros(datetime(2030, 1, 1, tzinfo=UTC))
    assert found["none"].next_attempt is None


def test_an_explained_gap_is_missing_but_not_unexplained(hours: Shelf) -> None:
    hours.commit(hours.span(0, 24), brought(candles_at(hours.opens(0, 20))))
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' WHERE series_id = {hours.identity}")
    state = part_states(hours.database, hours.series, {"": hours.span(0, 24)})[""]
    assert (state.expected, state.missing, state.unexplained) == (24, 4, 0)
    assert completeness(hours.database, [hours.series])[hours.series] == Completeness(expected=24, missing=4)


def test_no_trade_candles_are_neither_stored_nor_missing(hours: Shelf) -> None:
    """One gap of each kind, and hours that were never synced: expected = stored + missing + no_trade."""
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
    state = counted(hours, {"": hours.span(0, 30)})[""]
    assert state == PartState(
        expected=30, missing=2 + 3 + 4 + 6, unexplained=4 + 6, no_trade=1, providers={"binance": 14}
    )
    assert (state.stored, state.coverage) == (14, 15 / 30)
    whole = completeness(hours.database, [hours.series])[hours.series]
    assert whole == Completeness(expected=24, missing=2 + 3 + 4, open_gaps=1, open_missing=4, no_trade=1)
    assert (whole.stored, whole.coverage) == (14, 15 / 24)


def test_an_empty_window_is_covered(hours: Shelf) -> None:
    state = part_states(hours.database, hours.series, {"": hours.span(5, 5)})[""]
    assert state == PartState()
    assert state.coverage == 1.0


def test_completeness_counts_within_the_coverage(hours: Shelf) -> None:
    hours.put(0, 24)
    hours.commit(hours.span(100, 124), brought(candles_at(hours.opens(100, 122))))
    assert completeness(hours.database, [hours.series])[hours.series] == Completeness(
        expected=48, missing=2, open_gaps=1, open_missing=2
    )


def test_sanity_of_many_series(hours: Shelf, minutes: Shelf, shared: Database) -> None:
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


def test_the_reach_and_the_unfillable_end_of_a_series(hours: Shelf) -> None:
    end, last = hours.span(0, 24).end, int(hours.opens(20, 21)[0])
    own = f"WHERE series_id = {hours.identity}"

    def reach() -> Reach | None:
        return reaches(hours.database, [hours.series]).get(hours.series)

    assert reach() is None, "it was never synced"
    hours.commit(hours.span(0, 24), brought(candles_at([*hours.opens(0, 5), *hours.opens(7, 20)])))
    assert reach() == Reach(end, last), "a provider may still have its end"
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' {own}")
    assert reach() == Reach(end, last, last), "not the gap before"
    execute(hours.database, f"UPDATE fks.gap SET status = 'tolerated' {own} AND missing_candles = 4")
    assert reach() == Reach(end, last, last)
    execute(hours.database, f"UPDATE fks.gap SET status = 'no_trade' {own} AND missing_candles = 4")
    assert reach() == Reach(end)


def test_a_series_without_any_candle_is_absent_from_its_beginning(hours: Shelf) -> None:
    hours.commit(hours.span(0, 24))
    execute(hours.database, f"UPDATE fks.gap SET status = 'unavailable' WHERE series_id = {hours.identity}")
    span = hours.span(0, 24)
    assert reaches(hours.database, [hours.series]) == {hours.series: Reach(span.end, span.start, span.start)}


def test_an_open_gap_breaks_off_the_unfillable_end(hours: Shelf) -> None:
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


# Tails and recent gaps ----------------------------------------------------------------------------------


def set_gap(shelf: Shelf, first: int, **values: str) -> None:
    """Changes columns of the gap that begins at the first-th hour."""
    low = to_datetime(shelf.span(first, first).start)
    columns = ", ".join(f"{name} = '{value}'" for name, value in values.items())
    execute(
        shelf.database,
        f"UPDATE fks.gap SET {columns} WHERE series_id = {shelf.identity} AND gap_start = '{low}'",
    )


def split_gap(shelf: Shelf, first: int, at: int) -> None:
    """Makes two rows of the gap that begins at the first-th candle: up to the `at`-th, and from there on."""
    low, cut = (to_datetime(shelf.span(n, n).start) for n in (first, at))
    execute(
        shelf.database,
        "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
        f" SELECT series_id, '{cut}', gap_end, missing_candles - {at - first}, status, attempts, evidence FROM fks.gap"
        f" WHERE series_id = {shelf.identity} AND gap_start = '{low}'",
    )
    set_gap(shelf, first, missing_candles=str(at - first), gap_end=str(cut))


def test_the_tail_around_the_newest_candle(hours: Shelf, minutes: Shelf) -> None:
    unknown = fresh("1h")
    before = {hours.series: 7 * MICROS_PER_HOUR, minutes.series: 0, unknown: 0}
    assert tails(hours.database, before) == dict.fromkeys(before, Tail())
    # Absent: 0, 3 .. 5, 7, and after the newest candle (9) the hours 10 .. 15; of those 7 and 10 .. 13 are no-trade.
    hours.commit(
        hours.span(0, 16), brought(candles_at([*hours.opens(1, 3), *hours.opens(6, 7), *hours.opens(8, 10)]))
    )
    set_gap(hours, 7, status="no_trade")
    split_gap(hours, 10, 14)
    set_gap(hours, 10, status="no_trade")
    minutes.commit(minutes.span(5, 10))
    found = tails(hours.database, before)
    newest = int(hours.opens(9, 10)[0])
    quiet = RangeSet([hours.span(7, 8), hours.span(10, 14)])
    # A gap that extends into the tail (from 2 on) belongs to it completely, and so does the one before it.
    absent = RangeSet([hours.span(0, 1), hours.span(3, 6), hours.span(7, 8), hours.span(10, 16)])
    assert found[hours.series] == Tail(
        newest, hours.span(0, 16), RangeSet([hours.span(2, 16)]), absent, quiet
    )
    assert found[minutes.series] == Tail(
        None,
        minutes.span(5, 10),
        RangeSet([minutes.span(5, 10)]),
        RangeSet([minutes.span(5, 10)]),
        RangeSet(),
    )
    assert found[unknown] == Tail()
    near = tails(hours.database, {hours.series: MICROS_PER_HOUR})[hours.series]
    assert near.absent == RangeSet([hours.span(7, 8), hours.span(10, 16)])


def test_a_tail_is_limited_to_the_newest_gaps(minutes: Shelf) -> None:
    stored = minutes.opens(0, 2 * MOST_TAIL_GAPS + 41)[::2]
    minutes.commit(minutes.span(0, 2 * MOST_TAIL_GAPS + 41), brought(candles_at(stored)))
    (found,) = tails(minutes.database, {minutes.series: 10 * MICROS_PER_DAY}).values()
    assert len(found.absent) == MOST_TAIL_GAPS
    assert found.absent.hull == minutes.span(41, 2 * MOST_TAIL_GAPS + 40)


def test_the_tails_of_many_series_are_one_query(shared: Database, hours: Shelf, minutes: Shelf) -> None:
    import sqlalchemy as sa

    seen: list[str] = []

    def note(connection: object, cursor: object, statement: str, *others: object) -> None:
        seen.append(statement)

    sa.event.listen(shared._engine, "before_cursor_execute", note)
    try:
        tails(
            shared, dict.fromkeys([hours.series, minutes.series, fresh("1d"), fresh("1m")], MICROS_PER_HOUR)
        )
    finally:
        sa.event.remove(shared._engine, "before_cursor_execute", note)
    assert len(seen) == 1


def test_recent_missing_candles_are_counted_within_a_window(hours: Shelf, minutes: Shelf) -> None:
    hours.commit(hours.span(0, 24), brought(candles_at([*hours.opens(0, 4), *hours.opens(10, 20)])))
    set_gap(hours, 4, status="unavailable")
    set_gap(hours, 20, status="tolerated")
    minutes.put(0, 10)

    def within(first: int, past: int = 30) -> int:
        windows = {hours.series: hours.span(first, past), minutes.series: minutes.span(0, 100)}
        found = recent_missing(hours.database, windows)
        assert found[minutes.series] == 0
        return found[hours.series]

    assert [within(hour) for hour in (0, 4, 7, 10, 20, 22, 24)] == [10, 10, 7, 4, 4, 2, 0]
    assert [within(0, hour) for hour in (4, 6, 10, 20, 21)] == [0, 2, 6, 6, 7]
    set_gap(hours, 20, status="no_trade")
    assert [within(hour) for hour in (0, 7, 22)] == [6, 3, 0]
    assert recent_missing(hours.database, {fresh("1h"): TimeRange(0, 1)}).popitem()[1] == 0


def test_the_next_attempt_is_that_of_the_first_gap_that_is_due(hours: Shelf) -> None:
    def due() -> int | None:
        return next_attempts(hours.database, [hours.series]).get(hours.series)

    assert due() is None
    hours.commit(hours.span(0, 24), brought(candles_at([*hours.opens(0, 4), *hours.opens(6, 10)])))
    set_gap(hours, 4, status="tolerated")
    found_at = due()
    assert found_at is not None, "an open gap without a date is due since it was found"
    set_gap(hours, 10, next_attempt_at="2024-01-03T00:00Z")
    assert due() == hours.span(48, 48).start
    set_gap(hours, 4, status="unavailable", next_attempt_at="2024-01-02T00:00Z")
    assert due() == hours.span(24, 24).start
    set_gap(hours, 4, status="no_trade")
    assert due() == hours.span(48, 48).start


def test_missing_gaps_are_ordered_and_limited(hours: Shelf, minutes: Shelf) -> None:
    hours.commit(hours.span(0, 24), brought(candles_at(hours.opens(0, 24)[::2])))
    for first in range(3, 24, 2):
        set_gap(hours, first, status="unavailable")
    set_gap(hours, 5, status="no_trade")
    minutes.put(0, 10)
    found = missing_gaps(hours.database, [hours.series, minutes.series], 4)
    assert found[minutes.series] == ()
    assert [(gap.start, gap.status) for gap in found[hours.series]] == [
        (int(hours.opens(at, at + 1)[0]), "open" if at == 1 else "unavailable") for at in (1, 23, 21, 19)
    ]
