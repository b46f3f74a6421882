"""Due gaps and their order: the query against the slow obvious definition."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Evidence, LedgerGap, Outcome
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.due_gaps import Place, Wanted, due_places
from fks_backfill_dagster.store.ledger import hold_lease
from fks_backfill_dagster_tests.domain.builders import at
from fks_backfill_dagster_tests.examples import examples
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf
from fks_backfill_dagster_tests.store.conftest import fresh

NOW = at("2024-06-15T12:00Z")
BOTH = frozenset({"binance", "polygon"})
MONTHS = Wanted(at("2023-01-01T00:00Z"), Grain.MONTH, BOTH)


def absent(*providers: str) -> tuple[Evidence, ...]:
    return tuple(Evidence(name, NOW - MICROS_PER_DAY, Outcome.ABSENT) for name in providers)


def write(shelf: Shelf, *gaps: LedgerGap) -> None:
    """Inserts rows of the ledger."""
    rows = [
        {
            "id": shelf.identity,
            "start": to_datetime(gap.start),
            "end": to_datetime(gap.end),
            "missing": gap.missing,
            "status": gap.status.value,
            "attempts": gap.attempts,
            "next": None if gap.next_attempt_at is None else to_datetime(gap.next_attempt_at),
            "evidence": json.dumps([item.to_json() for item in gap.evidence]),
            "found": to_datetime(NOW if gap.found_at is None else gap.found_at),
        }
        for gap in gaps
    ]
    with shelf.database.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO fks.gap (series_id, gap_start, gap_end, missing_candles, status, attempts,"
                " next_attempt_at, evidence, found_at)"
                " VALUES (:id, :start, :end, :missing, :status, :attempts, :next, CAST(:evidence AS jsonb), :found)"
            ),
            rows,
        )


def gap(
    shelf: Shelf, first: int, past: int, status: GapStatus = GapStatus.OPEN, **fields: object
) -> LedgerGap:
    span = shelf.span(first, past)
    return replace(LedgerGap(span.start, span.end, past - first, status), **fields)  # type: ignore[arg-type]


def due(shelf: Shelf, wanted: Wanted = MONTHS, most: int = 100) -> list[Place]:
    return due_places(shelf.database, {shelf.series: wanted}, NOW, most)


# One gap ----------------------------------------------------------------------------------------------


def test_an_open_gap_is_due_at_its_next_attempt(hours: Shelf) -> None:
    responses = (*absent("binance"), Evidence("polygon", NOW, Outcome.ERROR, "polygon: HTTP 503"))
    write(hours, gap(hours, 0, 3, next_attempt_at=NOW + 1, evidence=responses))
    assert due(hours) == []
    write(hours, gap(hours, 5, 9, next_attempt_at=NOW, evidence=responses))
    (place,) = due(hours)
    assert (place.series, place.key, place.window) == (hours.series, "2024-01-01", hours.span(5, 9))
    assert place.missing == 4
    write(hours, gap(hours, 20, 21))  # never requested
    assert [place.window for place in due(hours)] == [hours.span(5, 21)]


def test_an_open_gap_is_due_for_a_provider_without_a_response(hours: Shelf) -> None:
    write(hours, gap(hours, 0, 3, next_attempt_at=NOW + MICROS_PER_DAY, evidence=absent("binance")))
    assert len(due(hours)) == 1
    assert due(hours, Wanted(MONTHS.since, Grain.MONTH, frozenset({"binance"}))) == []


def test_an_unavailable_gap_is_due_for_a_provider_without_a_response(hours: Shelf) -> None:
    later = {"next_attempt_at": NOW + MICROS_PER_DAY}
    write(hours, gap(hours, 0, 3, GapStatus.UNAVAILABLE, evidence=absent("binance", "polygon"), **later))
    assert due(hours) == []
    (place,) = due(hours, Wanted(MONTHS.since, Grain.MONTH, BOTH | {"coingecko"}))
    assert place.window == hours.span(0, 3)
    assert due(hours, Wanted(MONTHS.since, Grain.MONTH, frozenset({"polygon"}))) == []


def test_an_error_is_not_a_final_response(hours: Shelf) -> None:
    responses = (*absent("binance"), Evidence("polygon", NOW, Outcome.ERROR, "polygon: HTTP 503"))
    write(hours, gap(hours, 0, 3, GapStatus.UNAVAILABLE, evidence=responses, next_attempt_at=NOW + 9))
    assert len(due(hours)) == 1


def test_gaps_of_other_states_are_never_due(hours: Shelf) -> None:
    for first, status in enumerate((GapStatus.TOLERATED, GapStatus.NO_TRADE, GapStatus.FILLED)):
        write(hours, gap(hours, 3 * first, 3 * first + 1, status, next_attempt_at=NOW - 9))
    assert due(hours) == []


def test_without_an_eligible_provider_nothing_is_due(hours: Shelf) -> None:
    write(hours, gap(hours, 0, 3))
    assert due(hours, Wanted(MONTHS.since, Grain.MONTH, frozenset())) == []


def test_a_series_that_is_being_synced_has_no_due_gaps(hours: Shelf) -> None:
    write(hours, gap(hours, 0, 3))
    with hours.database.begin() as connection:
        hold_lease(connection, hours.identity, "owner", 60)
    assert due(hours) == []
    with hours.database.begin() as connection:
        hold_lease(connection, hours.identity, "owner", -1)
    assert len(due(hours)) == 1


# Parts ------------------------------------------------------------------------------------------------


def test_a_gap_across_an_edge_is_due_on_both_sides(hours: Shelf) -> None:
    edge = TimeRange(at("2024-01-31T20:00Z"), at("2024-02-01T04:00Z"))
    write(hours, LedgerGap(edge.start, edge.end, 8, GapStatus.OPEN))
    assert [(place.key, place.window.start, place.window.end) for place in due(hours)] == [
        ("2024-01-01", edge.start, at("2024-02-01T00:00Z")),
        ("2024-02-01", at("2024-02-01T00:00Z"), edge.end),
    ]
    assert [place.key for place in due(hours, Wanted(MONTHS.since, Grain.YEAR, BOTH))] == ["2024-01-01"]
    (later,) = due(hours, Wanted(at("2024-02-01T02:00Z"), Grain.MONTH, BOTH))
    assert (later.key, later.window.start) == ("2024-02-01", at("2024-02-01T02:00Z"))


def test_nothing_is_due_after_the_end_of_a_symbol(hours: Shelf) -> None:
    write(hours, LedgerGap(at("2024-01-31T20:00Z"), at("2024-03-01T04:00Z"), 700, GapStatus.OPEN))
    until = replace(MONTHS, until=at("2024-02-01T02:00Z"))
    places = [(place.key, place.window.end) for place in due(hours, until)]
    assert places == [
        ("2024-01-01", at("2024-02-01T00:00Z")),
        ("2024-02-01", at("2024-02-01T02:00Z")),
    ]
    assert due(hours, replace(MONTHS, until=at("2024-01-31T20:00Z"))) == []


def test_a_candle_that_closes_in_the_next_part_is_due_only_in_its_own(shared: Database) -> None:
    """A day in New York opens at 22:00 UTC; the last of a year closes in the next one."""
    shelf = Shelf.of(shared, replace(fresh("1d"), asset_class=AssetClass.FOREX))
    opens = shelf.grid.opens(TimeRange(at("2024-12-30T00:00Z"), at("2025-01-01T00:00Z")))
    close = int(shelf.grid.closes(opens[-1:])[0])
    assert close > at("2025-01-01T00:00Z")
    write(shelf, LedgerGap(int(opens[-1]), close, 1, GapStatus.OPEN))
    assert [place.key for place in due(shelf, Wanted(MONTHS.since, Grain.YEAR, BOTH))] == ["2024-01-01"]


def test_the_time_zone_of_the_server_does_not_matter(hours: Shelf) -> None:
    write(hours, LedgerGap(at("2024-01-31T22:00Z"), at("2024-01-31T23:00Z"), 1, GapStatus.OPEN))
    with hours.database.begin() as connection:
        name = connection.scalar(sa.text("SELECT current_database()"))
        connection.execute(sa.text(f"ALTER DATABASE \"{name}\" SET timezone TO 'Asia/Tokyo'"))
    other = Database(hours.database.url.render_as_string(hide_password=False))
    try:
        assert [place.key for place in due(hours.on(other))] == ["2024-01-01"]
    finally:
        other.dispose()
        with hours.database.begin() as connection:
            connection.execute(sa.text(f'ALTER DATABASE "{name}" RESET timezone'))


# Order ------------------------------------------------------------------------------------------------


def test_every_symbol_has_its_first_place_before_any_has_a_second(shared: Database) -> None:
    greedy, modest = Shelf.of(shared, fresh("1h")), Shelf.of(shared, fresh("1h"))
    days = MICROS_PER_DAY // MICROS_PER_HOUR
    for month in range(4):
        write(greedy, gap(greedy, 31 * month * days, 31 * month * days + 9, found_at=NOW - 9 + month))
    write(modest, gap(modest, 0, 1, found_at=NOW - 1))
    wanted = {shelf.series: MONTHS for shelf in (greedy, modest)}
    order = [place.series for place in due_places(shared, wanted, NOW, 100)]
    assert order[:3] == [greedy.series, modest.series, greedy.series]
    assert len(due_places(shared, wanted, NOW, 2)) == 2


def test_the_oldest_goes_first_then_the_largest(hours: Shelf) -> None:
    months = [(0, 2, 5), (744, 746, 1), (1440, 1450, 5), (2184, 2185, 9)]
    for first, past, age in months:
        write(hours, gap(hours, first, past, found_at=NOW - age))
    assert [(place.found_at, place.missing) for place in due(hours)] == [
        (NOW - 9, 1),
        (NOW - 5, 10),
        (NOW - 5, 2),
        (NOW - 1, 2),
    ]


# Any ledger -------------------------------------------------------------------------------------------

ROW = st.tuples(
    st.integers(0, 2200),
    st.integers(1, 900),
    st.sampled_from(list(GapStatus)),
    st.sampled_from([None, NOW - 5, NOW, NOW + 5]),
    st.lists(
        st.tuples(
            st.sampled_from(["binance", "polygon", "oanda"]),
            st.sampled_from(["absent", "refused", "rejected", "error"]),
        ),
        max_size=3,
        unique_by=lambda response: response[0],
    ),
)


def months_of(start: int, end: int) -> list[str]:
    """The months of every hour, without arithmetic."""
    hours = range(start, end, MICROS_PER_HOUR)
    return sorted({f"{datetime.fromtimestamp(h / 1e6, UTC):%Y-%m-01}" for h in hours})


@given(
    st.lists(ROW, max_size=6),
    st.integers(0, 1500),
    st.sampled_from([BOTH, frozenset({"oanda"}), frozenset({"binance"})]),
)
@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_ledger(
    shared: Database,
    rows: Sequence[tuple[int, int, GapStatus, int | None, object]],
    since: int,
    eligible: frozenset[str],
) -> None:
    shelf = Shelf.of(shared, fresh("1h"))
    gaps: list[LedgerGap] = []
    for first, length, status, next_attempt, responses in rows:
        evidence = tuple(Evidence(name, NOW, Outcome(outcome)) for name, outcome in responses)  # type: ignore[attr-defined]
        span = shelf.span(first, first + length)
        if any(g.start < span.end and g.end > span.start for g in gaps):
            continue
        gaps.append(
            gap(shelf, first, first + length, status, next_attempt_at=next_attempt, evidence=evidence)
        )
    if gaps:
        write(shelf, *gaps)
    begin = MIDNIGHT + since * MICROS_PER_HOUR
    expected: dict[str, int] = {}
    for one in gaps:
        if one.status is not GapStatus.TOLERATED and one.is_due(eligible, NOW) and one.end > begin:
            for key in months_of(max(one.start, begin), one.end):
                expected[key] = expected.get(key, 0) + one.missing
    found = due(shelf, Wanted(begin, Grain.MONTH, eligible))
    assert {place.key: place.missing for place in found} == expected
    for place in found:
        inside = np.array([to_micros(datetime.fromisoformat(place.key).replace(tzinfo=UTC))])
        assert inside[0] <= place.window.start < place.window.end
        assert place.window.start >= begin
