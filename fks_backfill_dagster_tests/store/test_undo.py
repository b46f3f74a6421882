"""Undoing batches; `test_history` does it in any order."""

from __future__ import annotations

import numpy as np
import pytest

from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.writer.records import Committed
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, brought, candles_at
from fks_backfill_dagster_tests.store.conftest import fresh


def test_inserted_candles_are_missing_again(hours: Shelf) -> None:
    hours.put(0, 10)
    hours.put(10, 20)
    assert hours.undo(hours.batches()[1]) == Committed(0, 10, 10)
    assert hours.read().equals(candles_at(hours.opens(0, 10)))
    assert np.isin(hours.opens(10, 20), hours.missing()).all()
    assert not np.isin(hours.opens(0, 10), hours.missing()).any()
    status = hours.status()
    assert (status.total_candles, status.open_gaps) == (10, 1)
    assert hours.put(10, 20) == Committed(10, 0, 0)
    assert hours.gaps() == ()


def test_the_gap_merges_with_its_neighbour(hours: Shelf) -> None:
    hours.commit(hours.span(0, 5))
    hours.put(5, 8)
    hours.undo(hours.batches()[0])
    (gap,) = hours.gaps()
    assert (gap.start, gap.missing) == (hours.opens(0, 1)[0], 8)


def test_changed_candles_get_their_former_values(hours: Shelf) -> None:
    hours.put(0, 10)
    hours.put(5, 15, version=2, provider="polygon")
    assert hours.undo(hours.batches()[1]) == Committed(0, 10, 5)
    assert hours.read().equals(candles_at(hours.opens(0, 10)))
    (origin,) = queries.origins(hours.database, hours.series, hours.span(0, 20))
    assert (origin.provider, origin.candles) == ("binance", 10)


def test_candles_changed_by_a_later_batch_stay(hours: Shelf) -> None:
    hours.put(0, 10)
    hours.put(4, 6, version=2)
    assert hours.undo(hours.batches()[0]) == Committed(0, 8, 8)
    assert hours.read().equals(candles_at(hours.opens(4, 6), 2))


@pytest.mark.parametrize("reach", [10, 6])
def test_a_second_undo_does_not_restore_a_wrong_import(hours: Shelf, reach: int) -> None:
    """Batch 1 was wrong and is undone while batch 2 covers it (fully or partly); then 2 is undone."""
    hours.put(0, 10)
    hours.put(0, reach, version=2)
    one, two = hours.batches()
    assert hours.undo(one) == Committed(0, 10 - reach, 10 - reach)
    assert hours.undo(two) == Committed(0, reach, reach)
    assert len(hours.read()) == 0
    with pytest.raises(StoreError, match="undone before"):
        hours.undo(one)


def test_three_deep(hours: Shelf) -> None:
    for version in (0, 2, 1, 3):
        hours.put(0, 5, version)
    first, second, third, fourth = hours.batches()
    hours.undo(third)
    hours.undo(second)
    assert hours.undo(fourth) == Committed(0, 5, 0)
    assert hours.read().equals(candles_at(hours.opens(0, 5), 0))
    (origin,) = {b.id for b in queries.batches(hours.database, hours.series)} & {first}
    assert hours.rows(f"SELECT DISTINCT batch_id FROM {hours.table} WHERE series_id = :id") == [(origin,)]


def test_a_batch_can_be_undone_once(hours: Shelf) -> None:
    hours.put(0, 10)
    (batch,) = hours.batches()
    hours.undo(batch)
    hours.put(0, 10)
    with pytest.raises(StoreError, match=f"Batch {batch} was undone before"):
        hours.undo(batch)
    assert len(hours.read()) == 10


def test_an_undo_can_be_undone(hours: Shelf) -> None:
    """The batch is in effect again, and can be undone again; so can the undo of the undo."""
    hours.put(0, 10)
    (batch,) = hours.batches()
    hours.undo(batch)
    undo = hours.batches()[-1]
    assert hours.undo(undo) == Committed(0, 10, 0)
    again = hours.batches()[-1]
    assert hours.read().equals(candles_at(hours.opens(0, 10)))
    assert hours.gaps() == ()
    with pytest.raises(
        StoreError, match=f"was undone before, by batch {again}: .* batches undo {again}` rest"
    ):
        hours.undo(undo)
    assert hours.undo(again) == Committed(0, 10, 10)
    with pytest.raises(StoreError, match=f"by batch {undo}"):
        hours.undo(batch)
    hours.undo(undo)
    assert hours.undo(batch) == Committed(0, 10, 10)
    assert hours.audit().differences == ()


def test_an_undone_undo_leaves_what_came_since(hours: Shelf) -> None:
    hours.put(0, 10)
    hours.undo(hours.batches()[0])
    undo = hours.batches()[-1]
    hours.put(2, 5, version=2)
    assert hours.undo(undo) == Committed(0, 7, 0)
    stored = hours.read()
    assert stored.take(slice(2, 5)).equals(candles_at(hours.opens(2, 5), 2))
    hours.undo(hours.batches()[-2])  # what came since
    assert hours.read().equals(candles_at(hours.opens(0, 10)))


def test_a_reopened_gap_names_the_undo(hours: Shelf) -> None:
    """It is due at once, keeps that evidence beside later responses, and loses it with the gap."""
    hours.put(0, 10)
    hours.undo(hours.batches()[0])
    undo = hours.batches()[-1]
    (gap,) = hours.gaps()
    assert [(e.provider, e.outcome, e.text) for e in gap.evidence] == [
        ("undo", Outcome.UNDONE, f"taken back by batch {undo}")
    ]
    assert (gap.status, gap.next_attempt_at) == ("open", None)
    assert not gap.declined()
    hours.commit(hours.span(0, 10), evidence=(Evidence("binance", MIDNIGHT, Outcome.ABSENT),))
    (gap,) = hours.gaps()
    assert [e.provider for e in gap.evidence] == ["undo", "binance"]
    hours.put(0, 10)
    assert hours.gaps() == ()


def test_a_batch_of_another_series(shared: Database, hours: Shelf) -> None:
    neighbour = Shelf.of(shared, fresh("1h"))
    neighbour.put(0, 10)
    for batch in (neighbour.batches()[0], 2_000_000_000):
        with pytest.raises(
            StoreError, match=f"no batch {batch} of {hours.series}: see `fks-backfill batches"
        ):
            hours.undo(batch)
    assert len(neighbour.read()) == 10


def test_corrections_show_the_undo(hours: Shelf) -> None:
    hours.put(0, 2)
    hours.put(1, 2, version=2)
    later = hours.batches()[1]
    hours.undo(later)
    hours.undo(hours.batches()[0])
    found = hours.rows("SELECT reason, close_before, close_after FROM fks.corrections WHERE symbol = :symbol")
    old, new = candles_at(hours.opens(0, 2)).close.tolist(), candles_at(hours.opens(0, 2), 2).close.tolist()
    assert sorted(found, key=str) == sorted(
        [
            ("refetched: the source gives other values", old[1], new[1]),
            (f"batch {later} undone", new[1], old[1]),
            (f"batch {hours.batches()[0]} undone", old[0], None),
            (f"batch {hours.batches()[0]} undone", old[1], None),
        ],
        key=str,
    )


def test_an_explained_gap_within_it_stays(hours: Shelf) -> None:
    opens = hours.opens(0, 10)
    hours.commit(hours.span(0, 10), brought(candles_at(opens[[0, 1, 5, 9]])))
    with hours.database.begin() as connection:
        connection.exec_driver_sql(
            f"UPDATE fks.gap SET status = 'no_trade' WHERE series_id = {hours.identity} AND missing_candles = 3"
            " AND gap_start < '2024-01-01T04:00Z'"
        )
    hours.undo(hours.batches()[0])
    assert [(g.missing, g.status) for g in hours.gaps()] == [(2, "open"), (3, "no_trade"), (5, "open")]
