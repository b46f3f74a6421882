"""Round trips of candles through a real COPY."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.store import copy_format
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster_tests.domain.builders import at
from fks_backfill_dagster_tests.examples import examples

PRICE = st.floats(allow_nan=False)
VOLUME = st.floats(allow_infinity=False)
# From 1900 to 2200: before and after the epochs of both Unix and PostgreSQL.
INSTANT = st.integers(at("1900-01-01T00:00Z"), at("2200-01-01T00:00Z"))
ROWS = st.lists(
    st.tuples(INSTANT, PRICE, PRICE, PRICE, PRICE, VOLUME), max_size=30, unique_by=lambda row: row[0]
)


def round_trip(database: Database, candles: Candles, series_id: int = 7) -> tuple[Candles, list[int]]:
    """Written by `encode`, read by `decode`; also the batch ids, both in the order of `ts`."""
    batches = np.arange(len(candles), dtype=np.int32) % 1000 + 1
    columns = ", ".join(copy_format.CANDLE_COLUMNS)
    with database.begin() as connection, cursor_of(connection) as cursor:
        cursor.execute('CREATE TEMPORARY TABLE there (LIKE fks."candles_1m") ON COMMIT DROP')
        with cursor.copy(f"COPY there ({columns}) FROM STDIN (FORMAT BINARY)") as copy:
            for block in copy_format.encode(series_id, candles, batches):
                copy.write(block)
        read = "SELECT ts, open, high, low, close, coalesce(volume, 'NaN') FROM there ORDER BY ts"
        with cursor.copy(f"COPY ({read}) TO STDOUT (FORMAT BINARY)") as copy:
            back = copy_format.decode(copy)
        sent = cursor.execute(
            "SELECT array_send(array_agg(ts ORDER BY ts)) FROM there", binary=True
        ).fetchone()
        assert sent is not None
        assert np.array_equal(copy_format.decode_array(sent[0]), back.ts)
        cursor.execute(
            "SELECT coalesce(bool_and(series_id = %s), true), count(*) FILTER (WHERE volume = 'NaN'),"
            " count(*) FILTER (WHERE volume IS NULL) FROM there",
            [series_id],
        )
        assert cursor.fetchone() == (True, 0, int(np.isnan(candles.volume).sum()))
        cursor.execute("SELECT batch_id FROM there ORDER BY ts")
        return back, [row[0] for row in cursor.fetchall()]


@given(ROWS)
@example([])
@settings(max_examples=examples(60))
def test_round_trip(shared: Database, rows: list[tuple[float, ...]]) -> None:
    ts = np.array([row[0] for row in rows], dtype=np.int64)
    there = Candles(ts, *(np.array([row[n] for row in rows], dtype=np.float64) for n in range(1, 6)))
    back, batches = round_trip(shared, there)
    assert back.equals(there.sorted())
    assert batches == (np.argsort(there.ts, kind="stable") % 1000 + 1).tolist()


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("unknown", ["none", "all", "some", "second block"])
def test_blocks(shared: Database, monkeypatch: pytest.MonkeyPatch, extra: int, unknown: str) -> None:
    monkeypatch.setattr(copy_format, "BLOCK_ROWS", 1000)
    count = 2 * 1000 + extra
    values = np.random.default_rng(count).normal(size=(5, count))
    absent = {
        "none": slice(0, 0),
        "all": slice(None),
        "some": slice(0, None, 3),
        "second block": slice(1000, None),
    }
    values[4, absent[unknown]] = np.nan
    there = Candles(MICROS_PER_DAY * np.arange(count, dtype=np.int64), *values)
    back, batches = round_trip(shared, there)
    assert back.equals(there)
    assert batches == (np.arange(count) % 1000 + 1).tolist()


def test_numbers_at_the_edge_of_float(shared: Database) -> None:
    """Preserved bit for bit: signed zero, the smallest, the largest."""
    edge = np.array([-0.0, 5e-324, 1.7976931348623157e308, -1.7976931348623157e308, 0.1])
    back, _ = round_trip(shared, Candles(np.arange(5), edge, edge, edge, edge, edge))
    assert [column.tobytes() for column in back.columns()[1:]] == [edge.tobytes()] * 5
