"""Correction files: values bit for bit, the place of each problem, and files that are refused as a whole."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet as pq

from fks_backfill_dagster.files.corrections import FileError, read_csv, read_parquet
from fks_backfill_dagster_tests.domain.builders import at

NOON = at("2024-01-03T12:00Z")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_numbers_are_read_bit_for_bit(values: list[float]) -> None:
    text = "ts,close\n" + "".join(f"2024-01-03T12:00Z,{value!r}\n" for value in values)
    rows = read_csv(text.encode(), "fix.csv")
    assert rows.candles.close.tobytes() == np.array(values).tobytes()
    assert rows.valid.all()
    assert rows.lines.tolist() == list(range(2, len(values) + 2))
    assert rows.fields == {"close"}


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-03T12:00Z",
        "2024-01-03 12:00",
        "2024-01-03T12:00:00.000000+00:00",
        "2024-01-03T17:30+05:30",
        " 2024-01-03T12:00:00Z ",
    ],
)
def test_a_time_without_a_zone_is_utc(text: str) -> None:
    assert read_csv(f"ts,close\n{text},1\n".encode(), "fix.csv").candles.ts.tolist() == [NOON]


@pytest.mark.parametrize("text", ["", "noon", "1704283200", "2024-13-01", "03.01.2024", "nan"])
def test_what_is_no_time(text: str) -> None:
    rows = read_csv(f"ts,close\n{text},1\n2024-01-03T12:00Z,1\n".encode(), "fix.csv")
    assert rows.reasons.tolist() == ["its ts is not a time such as 2024-01-31T12:00:00Z", ""]


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-Infinity", "1e999", "1,5", "1_000", "0x10"])
def test_what_is_no_price(text: str) -> None:
    rows = read_csv(f'ts,close,volume\n2024-01-03T12:00Z,"{text}",1\n'.encode(), "fix.csv")
    assert rows.reasons.tolist() == ["its close is not a finite number"]


def test_an_empty_volume_is_none() -> None:
    rows = read_csv(b"ts,volume\n2024-01-03T12:00Z,\n2024-01-03T13:00Z,nan\n", "fix.csv")
    assert math.isnan(rows.candles.volume[0])
    assert rows.reasons.tolist() == ["", "its volume is not a finite number"]


def test_lines_are_those_of_the_file() -> None:
    """With a byte order mark, CRLF, empty lines and lines of another length."""
    text = (
        "\ufefftime,close\n".replace("time", "ts")
        + '"2024-01-03 12:00",1\r\n\r\n2024-01-03 13:00,2,3\n\nx,4\n2024-01-03 14:00\n'
    )
    rows = read_csv(text.encode(), "fix.csv")
    order = np.argsort(rows.lines)
    assert rows.lines[order].tolist() == [2, 4, 6, 7]
    assert rows.reasons[order].tolist() == [
        "",
        "it has 3 cells, not 2",
        "its ts is not a time such as 2024-01-31T12:00:00Z",
        "it has 1 cells, not 2",
    ]


def parquet(**columns: pa.Array) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


@pytest.mark.parametrize(
    "ts",
    [
        pa.array([NOON, NOON], pa.timestamp("us")),
        pa.array([NOON // 1000] * 2, pa.timestamp("ms", "UTC")),
        pa.array([NOON * 1000] * 2, pa.timestamp("ns", "Europe/Berlin")),
        pa.array(["2024-01-03 12:00"] * 2),
    ],
)
def test_parquet(ts: pa.Array) -> None:
    rows = read_parquet(
        parquet(ts=ts, close=pa.array([1, 2]), volume=pa.array([None, 0.5], pa.float32())), "fix.parquet"
    )
    assert rows.candles.ts.tolist() == [NOON, NOON]
    assert (rows.candles.close.tolist(), rows.lines.tolist()) == ([1.0, 2.0], [1, 2])
    assert math.isnan(rows.candles.volume[0])
    assert rows.valid.all()


def test_a_null_in_parquet_is_no_price_and_no_time() -> None:
    ts = pa.array([NOON, None], pa.timestamp("us"))
    rows = read_parquet(parquet(ts=ts, close=pa.array([None, 1.0])), "fix.parquet")
    assert rows.reasons.tolist() == [
        "its close is not a finite number",
        "its ts is not a time such as 2024-01-31T12:00:00Z",
    ]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"PAR1", "cannot be read as Parquet"),
        (parquet(ts=pa.array([NOON]), close=pa.array([1.0])), "column ts is of type int64"),
        (parquet(ts=pa.array(["2024"]), close=pa.array([True])), "column close is of type bool"),
        (
            parquet(ts=pa.array(["2024"]), cloze=pa.array([1.0])),
            "unknown column 'cloze'; did you mean close?",
        ),
        (parquet(ts=pa.array([], pa.string()), close=pa.array([], pa.float64())), "has no rows"),
    ],
)
def test_a_parquet_file_that_is_refused(data: bytes, sentence: str) -> None:
    with pytest.raises(FileError, match=sentence):
        read_parquet(data, "fix.parquet")


def test_a_file_of_another_encoding_names_the_line() -> None:
    with pytest.raises(FileError, match=r"fix.csv is not UTF-8 \(line 1\)"):
        read_csv("ts,close\n2024-01-01,1\n".encode("utf-16"), "fix.csv")
