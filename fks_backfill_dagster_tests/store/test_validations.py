"""Records of validations, their view, and the lineage that a validation needs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.timeframe import Timeframe, to_datetime
from fks_backfill_dagster.store import validations
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.validations import Delivered, ValidationRecord
from fks_backfill_dagster.store.writer.remove import remove_series
from fks_backfill_dagster_tests.store.builders import MIDNIGHT, Shelf, brought, candles_at, fetch
from fks_backfill_dagster_tests.store.conftest import fresh

VIEW = "SELECT * FROM fks.validations WHERE symbol = :symbol ORDER BY validated_at"


def verdict(hours: Shelf, **other: Any) -> ValidationRecord:
    made = ValidationRecord(
        window=hours.span(0, 100),
        stored=100,
        compared=24,
        compared_at=Timeframe.H4,
        discrepancies=3,
        providers=("coingecko", "polygon"),
        tolerance=0.01,
        validated_at=MIDNIGHT,
    )
    return replace(made, **other)


def test_a_record_is_in_the_view(hours: Shelf) -> None:
    made = verdict(hours)
    validations.record(hours.database, hours.series, made)
    validations.record(
        hours.database, hours.series, replace(made, validated_at=MIDNIGHT + 1, discrepancies=0)
    )
    rows = hours.rows(VIEW)
    start, end = (to_datetime(edge) for edge in (made.window.start, made.window.end))
    assert rows[0] == (
        hours.series.symbol,
        "1h",
        start,
        end,
        24,
        3,
        ["coingecko", "polygon"],
        to_datetime(MIDNIGHT),
        100,
        "4h",
        0.01,
    )
    assert [row[5] for row in rows] == [3, 0]


def test_a_repeated_record_is_one_row(hours: Shelf) -> None:
    for _ in range(2):
        validations.record(hours.database, hours.series, verdict(hours))
    assert len(hours.rows(VIEW)) == 1


def test_nothing_compared_is_no_record(hours: Shelf) -> None:
    nothings: list[dict[str, Any]] = [{"compared": 0}, {"providers": ()}]
    for nothing in nothings:
        with pytest.raises(ValueError, match="compared nothing has no verdict"):
            verdict(hours, **nothing)
    insert = sa.text(
        "INSERT INTO fks.validation (series_id, start_ts, end_ts, stored, compared, compared_at, discrepancies,"
        " providers, tolerance, validated_at) VALUES (:id, now(), now(), 10, 0, '1h', 0, '{polygon}', 0.01, now())"
    )
    with (
        pytest.raises(StoreError, match="validation_compared"),
        hours.database.begin() as connection,
    ):
        connection.execute(insert, {"id": hours.identity})
    assert hours.rows(VIEW) == []


def test_a_removed_series_takes_its_records_along(database: Database) -> None:
    kept, removed = (Shelf.of(database, fresh("1h")) for _ in range(2))
    for shelf in (kept, removed):
        shelf.put(0, 10)
        validations.record(database, shelf.series, verdict(shelf))
    remove_series(database, removed.series)
    assert fetch(database, "SELECT symbol FROM fks.validations") == [(kept.series.symbol,)]
    assert fetch(database, "SELECT count(*) FROM fks.validation") == [(1,)]
    validations.record(database, removed.series, verdict(removed))  # removed while it was validated
    assert fetch(database, "SELECT count(*) FROM fks.validation") == [(1,)]


def test_who_delivered_the_candles_of_a_window(hours: Shelf) -> None:
    hours.put(0, 10)
    hours.put(10, 14, provider="polygon")
    hours.commit(
        hours.span(14, 20), brought(candles_at(hours.opens(14, 20)), "polygon", instrument="X:BTCUSDT")
    )
    hours.put(20, 30)
    first = [int(ts) for ts in hours.opens(0, 30)]
    assert validations.delivered(hours.database, hours.series, hours.span(5, 25)) == (
        Delivered("binance", "BTCUSDT", 10, first[5], first[24]),
        Delivered("polygon", "X:BTCUSDT", 6, first[14], first[19]),
        Delivered("polygon", "BTCUSDT", 4, first[10], first[13]),
    )
    assert validations.delivered(hours.database, hours.series, hours.span(40, 50)) == ()
    assert validations.delivered(hours.database, fresh("1h"), hours.span(0, 50)) == ()
