"""Stored candles that their provider no longer returns; `test_history` combines them with all other changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.writer.candles import WITHDRAWN
from fks_backfill_dagster.store.writer.records import Committed, Withdrawal
from fks_backfill_dagster_tests.store.builders import (
    EVER,
    MIDNIGHT,
    Shelf,
    brought,
    candles_at,
    execute,
    origin_of,
)
from fks_backfill_dagster_tests.store.conftest import fresh


def withdraw(shelf: Shelf, first: int, past: int, provider: str = "binance", **other: Any) -> Committed:
    """A refetch of candles 0 to 20 without some of them."""
    absent = Evidence(provider, MIDNIGHT, Outcome.ABSENT)
    withdrawal = Withdrawal(origin_of(provider, **other), shelf.opens(first, past))
    return shelf.commit(shelf.span(0, 20), evidence=(absent,), withdrawn=(withdrawal,))


def test_withdrawn_candles_become_a_gap(hours: Shelf) -> None:
    hours.put(0, 20)
    assert withdraw(hours, 5, 8) == Committed(0, 0, 3, withdrawn=3)
    expected = np.concatenate([hours.opens(0, 5), hours.opens(8, 20)])
    assert hours.read().equals(candles_at(expected))
    (gap,) = hours.gaps()
    assert (gap.start, gap.missing, gap.status) == (hours.opens(5, 6)[0], 3, "open")
    assert [item.outcome for item in gap.evidence] == ["absent"]
    status = hours.status()
    assert (status.total_candles, status.open_gaps) == (17, 1)
    assert np.isin(hours.opens(5, 8), hours.missing()).all()
    assert hours.audit().differences == ()


def test_the_ends_of_the_series_follow(hours: Shelf) -> None:
    hours.put(0, 20)
    withdraw(hours, 0, 4)
    withdraw(hours, 17, 20)
    status, stored = hours.status(), hours.read()
    assert status.oldest_data_time is not None
    assert status.newest_data_time is not None
    assert status.oldest_data_time.timestamp() * 1e6 == stored.ts[0] == hours.opens(4, 5)[0]
    assert status.newest_data_time.timestamp() * 1e6 == stored.ts[-1] == hours.opens(16, 17)[0]
    withdraw(hours, 4, 17)
    status = hours.status()
    assert (status.total_candles, status.oldest_data_time, status.newest_data_time) == (0, None, None)
    assert hours.audit().differences == ()


def test_withdrawn_values_are_kept(hours: Shelf) -> None:
    """In a revision without values after; the lineage names the response that no longer contained them."""
    hours.put(0, 20)
    start = hours.now()
    withdraw(hours, 5, 6)
    former = candles_at(hours.opens(5, 6))
    assert hours.rows(
        "SELECT close_before, close_after, volume_after, source, reason FROM fks.corrections WHERE symbol = :symbol"
    ) == [(former.close[0], None, None, "binance", WITHDRAWN)]
    lineage = queries.batches(hours.database, hours.series)[0]
    assert (lineage.transport, lineage.inserted, lineage.updated) == ("withdrawal", 0, 1)
    assert (lineage.provider, lineage.host, lineage.instrument) == (
        "binance",
        "https://market.example",
        "BTCUSDT",
    )
    assert len(hours.read(start)) == 20
    assert len(hours.read(hours.now())) == 19
    assert len(hours.read(lineage.committed_at)) == 19


@pytest.mark.parametrize(
    ("provider", "instrument"), [("polygon", "BTCUSDT"), ("binance", "ETHUSDT"), ("polygon", "X:BTCUSD")]
)
def test_only_the_same_provider_and_instrument_count(hours: Shelf, provider: str, instrument: str) -> None:
    hours.put(0, 20)
    before = (hours.batches(), hours.read(), hours.status(), hours.gaps())
    assert withdraw(hours, 5, 8, provider, instrument=instrument) == Committed(0, 0, 0)
    after = (hours.batches(), hours.read(), hours.status(), hours.gaps())
    assert after[0] == before[0]
    assert after[1].equals(before[1])
    assert after[2:] == before[2:]


def test_candles_of_other_providers_stay(hours: Shelf) -> None:
    hours.put(0, 6)
    hours.put(6, 20, provider="polygon")
    assert withdraw(hours, 4, 9) == Committed(0, 0, 2, withdrawn=2)
    assert hours.read().ts.tolist() == [*hours.opens(0, 4), *hours.opens(6, 20)]


def test_a_candle_that_another_provider_corrected_stays(hours: Shelf) -> None:
    hours.put(0, 20)
    hours.put(5, 7, version=2, provider="polygon")
    assert withdraw(hours, 4, 8) == Committed(0, 0, 2, withdrawn=2)
    assert hours.read().within(hours.span(4, 8)).equals(candles_at(hours.opens(5, 7), 2))


def test_lineage_without_an_instrument_does_not_match(database: Database) -> None:
    """For batches from before instruments were recorded the instrument of the candles is unknown."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 20)
    execute(database, "UPDATE fks.batch SET instrument = NULL")
    assert withdraw(shelf, 5, 8) == Committed(0, 0, 0)
    assert len(shelf.read()) == 20


def test_missing_candles_are_not_withdrawn(hours: Shelf) -> None:
    hours.commit(hours.span(0, 20), brought(candles_at(hours.opens(0, 6))))
    assert withdraw(hours, 4, 9) == Committed(0, 0, 16, withdrawn=2)
    assert withdraw(hours, 4, 9) == Committed(0, 0, 16)
    (gap,) = hours.gaps()
    assert gap.missing == 16


def test_corrections_and_withdrawals_of_one_response(hours: Shelf) -> None:
    hours.put(0, 20)
    done = hours.commit(
        hours.span(0, 20),
        brought(candles_at(np.delete(hours.opens(0, 20), [5, 6]), 2)),
        withdrawn=(Withdrawal(origin_of(), hours.opens(5, 7)),),
    )
    assert done == Committed(0, 18, 2, withdrawn=2)
    correction, withdrawal = sorted(queries.batches(hours.database, hours.series), key=lambda b: b.id)[1:]
    assert correction.committed_at == withdrawal.committed_at
    assert hours.audit().differences == ()


def test_an_undo_restores_withdrawn_candles(hours: Shelf) -> None:
    """With their former lineage; in between nothing was stored, also for `as_of`."""
    hours.put(0, 20)
    first = hours.now()
    withdraw(hours, 5, 8)
    between = hours.now()
    origin, withdrawal = hours.batches()
    assert hours.undo(withdrawal) == Committed(0, 3, 0)
    assert hours.read().equals(candles_at(hours.opens(0, 20)))
    assert hours.rows(f"SELECT DISTINCT batch_id FROM {hours.table} WHERE series_id = :id") == [(origin,)]
    assert hours.gaps() == ()
    assert hours.status().total_candles == 20
    for moment, count in ((first, 20), (between, 17), (hours.now(), 20)):
        assert len(hours.read(moment)) == count
        assert len(hours.read(moment)) == count
    assert hours.audit().differences == ()
    found = hours.rows(
        "SELECT DISTINCT reason, open_before IS NULL, open_after IS NULL FROM fks.corrections"
        " WHERE symbol = :symbol ORDER BY reason"
    )
    assert found == [(f"batch {withdrawal} undone", True, False), (WITHDRAWN, False, True)]
    assert hours.undo(origin) == Committed(0, 20, 20)
    assert len(hours.read()) == 0
    assert len(hours.read(first)) == 20


def test_an_undo_keeps_newer_candles(hours: Shelf) -> None:
    hours.put(0, 20)
    withdraw(hours, 5, 8)
    hours.put(5, 7, version=2, provider="polygon")
    assert hours.undo(hours.batches()[1]) == Committed(0, 1, 0)
    expected = Candles.concat([candles_at(hours.opens(5, 7), 2), candles_at(hours.opens(7, 8))])
    assert hours.read().within(hours.span(5, 8)).equals(expected)


def test_after_the_undo_of_a_withdrawal_a_later_undo_restores_the_first_values(hours: Shelf) -> None:
    hours.put(0, 20)
    withdraw(hours, 5, 8)
    hours.put(5, 8, version=2, provider="polygon")
    _, withdrawal, later = hours.batches()
    assert hours.undo(withdrawal) == Committed(0, 0, 0)
    assert hours.undo(later) == Committed(0, 3, 0)
    assert hours.read().equals(candles_at(hours.opens(0, 20)))


@pytest.mark.parametrize(
    ("opens", "sentence"),
    [
        ([3, 2], "not ascending and unique"),
        ([25], "outside the batch"),
        ([2.5], "where none is expected"),
        ([12], "delivered and withdrawn at once"),
    ],
)
def test_invalid_withdrawals_are_refused(hours: Shelf, opens: list[float], sentence: str) -> None:
    hours.put(0, 20)
    step = hours.series.timeframe.micros
    withdrawal = Withdrawal(origin_of(), (MIDNIGHT + np.array(opens) * step).astype(np.int64))
    with pytest.raises(ValueError, match=sentence):
        hours.commit(hours.span(0, 20), brought(candles_at(hours.opens(10, 20), 2)), withdrawn=(withdrawal,))
    assert hours.read().equals(candles_at(hours.opens(0, 20)))


def test_many_candles_of_a_database_with_much_lineage(database: Database) -> None:
    """The number of look-ups depends on the candles, not on the lineage of all series."""
    shelf = Shelf.of(database, fresh("1m"))
    shelf.put(0, 40_000)
    opens = shelf.opens(0, 40_000)
    done = shelf.commit(shelf.span(0, 40_000), withdrawn=(Withdrawal(origin_of(), opens[1000:31_000]),))
    assert done == Committed(0, 0, 30_000, withdrawn=30_000)
    assert shelf.undo(shelf.batches()[1]) == Committed(0, 30_000, 0)
    assert queries.read_candles(database, shelf.series, EVER).equals(candles_at(opens))


def test_stored_origins(hours: Shelf) -> None:
    """One row per stored candle, from the batch that it refers to."""
    hours.commit(hours.span(0, 10), brought(candles_at(hours.opens(0, 10)), requested_at=MIDNIGHT + 7))
    hours.commit(
        hours.span(3, 12), brought(candles_at(hours.opens(3, 12)[::2], 2), "polygon", instrument="X:BTCUSD")
    )
    with hours.database.begin() as connection:
        found = queries.stored_origins(connection, hours.series, hours.span(1, 20))
        empty = queries.stored_origins(connection, hours.series, hours.span(50, 60))
        unknown = queries.stored_origins(connection, fresh("1h"), EVER)
    assert found.ts.tolist() == [*hours.opens(1, 10), *hours.opens(11, 12)]
    polygon = np.isin(found.ts, hours.opens(3, 12)[::2])
    assert found.provider.tolist() == np.where(polygon, "polygon", "binance").tolist()
    assert found.instrument.tolist() == np.where(polygon, "X:BTCUSD", "BTCUSDT").tolist()
    assert found.as_of.tolist() == np.where(polygon, MIDNIGHT, MIDNIGHT + 7).tolist()
    for nothing in (empty, unknown):
        assert len(nothing) == 0
        assert nothing.ts.dtype == nothing.as_of.dtype == np.int64
