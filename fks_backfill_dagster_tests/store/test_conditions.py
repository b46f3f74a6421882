"""`fks.conditions`: per series and day what is expected and stored, against counts made from the grid."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, to_datetime
from fks_backfill_dagster.ledger.reconcile import Kind
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.records import Withdrawal
from fks_backfill_dagster_tests.domain.builders import at, window
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.store.builders import Shelf, brought, candles_at, execute, origin_of
from fks_backfill_dagster_tests.store.conftest import fresh
from fks_backfill_dagster_tests.store.test_findings import COUNT, STRAY, accept, evaluate, planted, stored

Row = tuple[str, int | None, int]


def conditions(shelf: Shelf) -> dict[str, Row]:
    """By day: condition, expected, stored; without the pending days after the coverage."""
    rows: list[Any] = shelf.rows(
        "SELECT day, condition, expected, stored FROM fks.conditions WHERE symbol = :symbol"
        " AND timeframe = :timeframe AND NOT (condition = 'pending' AND expected IS NULL) ORDER BY day"
    )
    return {day.isoformat(): tuple(rest) for day, *rest in rows}


def other(asset_class: str, timeframe: str) -> Series:
    name = uuid.uuid4().hex[:12].upper()
    symbol = name if asset_class == "stocks" else f"{name}/USD"
    return Series(symbol, Timeframe(timeframe), AssetClass(asset_class))


def test_complete_degraded_and_missing_days(hours: Shelf) -> None:
    """Three days, of which the second lacks two hours and the third everything."""
    kept = np.concatenate([hours.opens(0, 30), hours.opens(32, 48)])
    hours.commit(hours.span(0, 72), brought(candles_at(kept)))
    assert conditions(hours) == {
        "2024-01-01": ("available", 24, 24),
        "2024-01-02": ("degraded", 24, 22),
        "2024-01-03": ("missing", 24, 0),
    }


@pytest.mark.parametrize("status", ["open", "unavailable", "tolerated", "no_trade"])
def test_a_gap_over_several_days(hours: Shelf, status: str) -> None:
    """From Monday 20:00 to Thursday 04:00. A no-trade interval is expected, and is not missing."""
    kept = np.concatenate([hours.opens(0, 20), hours.opens(76, 96)])
    hours.commit(hours.span(0, 96), brought(candles_at(kept)))
    execute(hours.database, f"UPDATE fks.gap SET status = '{status}' WHERE series_id = {hours.identity}")
    some, none = ("available", "available") if status == "no_trade" else ("degraded", "missing")
    assert conditions(hours) == {
        "2024-01-01": (some, 24, 20),
        "2024-01-02": (none, 24, 0),
        "2024-01-03": (none, 24, 0),
        "2024-01-04": (some, 24, 20),
    }


def test_what_is_not_synced_is_pending(hours: Shelf) -> None:
    """A hole in the coverage, a day that is synced to noon, and the days since then."""
    hours.put(0, 24)
    hours.put(72, 84)
    rows: list[Any] = hours.rows(
        "SELECT day, condition, expected, stored FROM fks.conditions WHERE symbol = :symbol ORDER BY day LIMIT 6"
    )
    assert [(day.day, *rest) for day, *rest in rows] == [
        (1, "available", 24, 24),
        (2, "pending", None, 0),
        (3, "pending", None, 0),
        (4, "pending", 12, 12),
        (5, "pending", None, 0),
        (6, "pending", None, 0),
    ]
    ((last,),) = hours.rows("SELECT max(day) FROM fks.conditions WHERE symbol = :symbol")
    assert last == datetime.now(UTC).date()


def test_an_open_finding_degrades_its_day(hours: Shelf) -> None:
    planted(hours, STRAY)
    evaluate(hours)
    day = to_datetime(hours.span(STRAY, STRAY).start).date().isoformat()
    degraded = [when for when, row in conditions(hours).items() if row[0] == "degraded"]
    assert degraded == [day]
    accept(hours, *stored(hours))
    assert {row[0] for row in conditions(hours).values()} <= {"available", "pending"}
    assert sum(row[2] for row in conditions(hours).values()) == COUNT


def test_days_without_an_expected_candle_have_no_row(shared: Database) -> None:
    """A weekend and a holiday of an exchange; a half-day has fewer candles."""
    shelf = Shelf.of(shared, other("stocks", "1h"))
    span = window("2024-07-01T00:00Z", "2024-07-09T00:00Z")
    opens = grid_of(shelf.series).opens(span)
    shelf.commit(span, brought(candles_at(opens[:-1])))
    assert conditions(shelf) == {
        "2024-07-01": ("available", 7, 7),
        "2024-07-02": ("available", 7, 7),
        "2024-07-03": ("available", 4, 4),
        "2024-07-05": ("available", 7, 7),
        "2024-07-08": ("degraded", 7, 6),
    }


def test_a_week_is_pending_on_its_first_day_only(shared: Database) -> None:
    for asset_class, weekday in (("crypto", 1), ("stocks", 1), ("forex", 7)):
        shelf = Shelf.of(shared, other(asset_class, "1w"))
        span = window("2024-01-01T00:00Z", "2024-02-01T12:00Z")
        shelf.commit(span, brought(candles_at(grid_of(shelf.series).opens(span))))
        found = shelf.rows(
            "SELECT DISTINCT extract(isodow FROM day) FROM fks.conditions WHERE symbol = :symbol"
        )
        assert found == [(weekday,)]


def test_a_gap_over_a_weekend_and_a_change_of_the_clock(shared: Database) -> None:
    """Forex from Thursday 2024-03-07 to Tuesday 2024-03-12: New York changes its clock on Sunday."""
    shelf = Shelf.of(shared, other("forex", "1h"))
    span = window("2024-03-07T00:00Z", "2024-03-13T00:00Z")
    opens = grid_of(shelf.series).opens(span)
    kept = opens[(opens < at("2024-03-08T10:00Z")) | (opens >= at("2024-03-12T03:00Z"))]
    shelf.commit(span, brought(candles_at(kept)))
    assert conditions(shelf) == {
        "2024-03-07": ("available", 24, 24),
        "2024-03-08": ("degraded", 22, 10),
        "2024-03-10": ("missing", 3, 0),
        "2024-03-11": ("missing", 24, 0),
        "2024-03-12": ("degraded", 24, 21),
    }


def test_the_time_of_the_last_change(hours: Shelf) -> None:
    hours.put(0, 48)
    first, second = modified(hours)
    assert first == second is not None
    hours.put(30, 31, version=2)  # corrected
    assert modified(hours)[0] == first
    assert (corrected := modified(hours)[1]) > second
    place = hours.span(3, 4)
    hours.commit(place, withdrawn=(Withdrawal(origin_of(), hours.opens(3, 4)),))
    assert modified(hours)[0] > corrected
    hours.undo(hours.batches()[-1])
    assert modified(hours)[0] > corrected


def modified(shelf: Shelf) -> list[Any]:
    rows = shelf.rows(
        "SELECT last_modified FROM fks.conditions WHERE symbol = :symbol AND stored > 0 ORDER BY day"
    )
    return [moment for (moment,) in rows]


def test_a_day_is_read_alone(minutes: Shelf) -> None:
    """With a condition on the day the candles of other days are not read."""
    minutes.put(0, 4 * 1440)
    plan = "\n".join(
        str(line)
        for (line,) in minutes.rows(
            "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) SELECT * FROM fks.conditions"
            " WHERE symbol = :symbol AND timeframe = :timeframe AND day = '2024-01-02'"
        )
    )
    assert "loops=1" in plan
    read = [line for line in plan.splitlines() if "Scan" in line and "candles_1m" in line]
    assert read
    assert all("loops=1" in line for line in read)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_against_counts_made_from_the_grid(shared: Database, data: st.DataObject) -> None:
    """Any series, any commits of any parts, undone or not: each day has what the grid and the table have."""
    asset_class = data.draw(st.sampled_from(["crypto", "stocks", "forex"]))
    timeframe = data.draw(st.sampled_from(["30m", "4h", "1d", "1w"]))
    shelf = Shelf.of(shared, other(asset_class, timeframe))
    began, days = at("2024-03-06T00:00Z"), 12
    for _ in range(data.draw(st.integers(1, 4))):
        edges = sorted(data.draw(st.lists(st.integers(0, days * 4), min_size=2, max_size=2, unique=True)))
        first, past = (began + edge * 6 * MICROS_PER_HOUR for edge in edges)
        opens = shelf.grid.opens(window_of(first, past))
        lacking = data.draw(st.sets(st.integers(0, max(len(opens) - 1, 0)), max_size=len(opens)))
        kept = opens[[n not in lacking for n in range(len(opens))]] if len(opens) else opens
        evidence = (Evidence("binance", began, Outcome.ABSENT),)
        shelf.commit(window_of(first, past), brought(candles_at(kept)), evidence=evidence)
    is_undone = data.draw(st.booleans())
    if shelf.batches() and is_undone:
        shelf.undo(shelf.batches()[0])
    assert shelf.audit().differences == ()
    found = conditions(shelf)
    for day in range(days + 1):
        low = began + day * MICROS_PER_DAY
        expected, kept_here = counted(shelf, low)
        row = found.get(to_datetime(low).date().isoformat())
        assert (row is None and expected == 0) or row is not None
        if row is not None and row[1] is not None:
            assert row[1:] == (expected, kept_here)
            assert (row[0] in ("missing", "degraded")) == (kept_here < expected)


def window_of(first: int, past: int) -> Any:
    return window(to_datetime(first).isoformat(), to_datetime(past).isoformat())


def counted(shelf: Shelf, low: int) -> tuple[int, int]:
    """The expected candles of a day inside the coverage, and the stored ones, without the ledger."""
    from fks_backfill_dagster.store.ledger import known

    day = window_of(low, low + MICROS_PER_DAY)
    with shelf.database.begin() as connection:
        synced = known(connection, shelf.identity, day).synced
    expected = sum(shelf.grid.count(part) for part in synced)
    return expected, len(shelf.read().within(day))


def test_the_audit_repairs_counts_by_day(hours: Shelf) -> None:
    kept = np.concatenate([hours.opens(0, 20), hours.opens(76, 96)])
    hours.commit(hours.span(0, 96), brought(candles_at(kept)))
    right = conditions(hours)
    for wrong in ("'{5,24,24,3}'", "'{4,24,24}'", "NULL"):
        execute(hours.database, f"UPDATE fks.gap SET by_day = {wrong} WHERE series_id = {hours.identity}")
        assert [one.kind for one in hours.audit().differences] == [Kind.GAP_DAYS]
        if wrong == "NULL":
            assert conditions(hours)["2024-01-02"] == ("degraded", None, 0)
        assert [one.repaired for one in hours.repair().differences] == [True]
        assert hours.audit().differences == ()
        assert conditions(hours) == right


def test_an_upgrade_completes_gaps_of_an_older_version(database: Database) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    kept = np.concatenate([shelf.opens(0, 20), shelf.opens(76, 96)])
    shelf.commit(shelf.span(0, 96), brought(candles_at(kept)))
    right = conditions(shelf)
    execute(
        database,
        "UPDATE fks.gap SET by_day = NULL",
        "INSERT INTO fks.series (symbol, timeframe, asset_class, calendar) VALUES ('X', '1d', 'stocks', 'XXXX')",
        "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts, evidence)"
        " SELECT id, '2024-01-02', '2024-01-05', 3, 'open', 0, '[]' FROM fks.series WHERE symbol = 'X'",
        "INSERT INTO fks.sync_state (series_id, synced) SELECT id, '{[2024-01-01,2024-01-08)}' FROM fks.series"
        " WHERE symbol = 'X'",
    )
    database.upgrade()
    assert conditions(shelf) == right
    # Without a calendar the days of a gap are unknown: degraded, never available.
    unknown = shelf.rows(
        "SELECT day, condition, expected FROM fks.conditions WHERE symbol = 'X' AND condition <> 'pending' ORDER BY day"
    )
    assert unknown == [(date(2024, 1, day), "degraded", None) for day in (2, 3, 4)]
