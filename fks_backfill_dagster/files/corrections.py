"""Correction files: CSV or Parquet with the column `ts` and any of open, high, low, close, volume.

A cell that cannot be read makes its row invalid, and the other rows are read on, so that one pass finds every problem.
FileError is about the file as a whole: its encoding, its columns, its size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv
from pyarrow import parquet as pq

from fks_backfill_dagster.domain.candles import FIELDS, Candles
from fks_backfill_dagster.domain.corrections import CorrectionRows
from fks_backfill_dagster.domain.quality import Mask
from fks_backfill_dagster.domain.ranges import Instants

LARGEST_BYTES = 128 * 2**20
"""About two million rows of CSV: all of a correction is one transaction, and in memory."""

_COLUMNS = ("ts", *FIELDS)
_NUMBER = r"^\s*[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*$"
_NO_TIME = "its ts is not a time such as 2024-01-31T12:00:00Z"


class FileError(ValueError):
    """A file that is no correction file: one sentence with the remedy."""


def read_csv(data: bytes, name: str) -> CorrectionRows:
    """The rows of a CSV file in UTF-8 with a header; lines count from 1, the header included."""
    _check_size(data, name)
    text = _checked_text(data, name)
    header = _header(text, name)
    bad: list[Any] = []

    def remember(row: Any) -> str:
        bad.append(row)
        return "skip"

    try:
        table = csv.read_csv(
            io.BytesIO(data),
            read_options=csv.ReadOptions(use_threads=False, column_names=header, skip_rows=1),
            parse_options=csv.ParseOptions(ignore_empty_lines=False, invalid_row_handler=remember),
            convert_options=csv.ConvertOptions(
                column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False
            ),
        )
    except pa.ArrowInvalid as error:
        raise FileError(f"{name} cannot be read as CSV: {error}.") from None
    skipped = np.array([row.number for row in bad], dtype=np.int64)
    table, lines = _without_empty(table, _numbered(table.num_rows, skipped))
    return _of_table(table, lines, [row for row in bad if row.text.strip()], name)


def read_parquet(data: bytes, name: str) -> CorrectionRows:
    """The rows of a Parquet file, whose numbers count from 1."""
    _check_size(data, name)
    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise FileError(f"{name} cannot be read as Parquet: {error}.") from None
    _check_columns(table.column_names, name)
    return _of_table(table, np.arange(1, table.num_rows + 1, dtype=np.int64), [], name)


# The file as a whole -----------------------------------------------------------------------------------


def _check_size(data: bytes, name: str) -> None:
    if len(data) > LARGEST_BYTES:
        raise FileError(
            f"{name} has more than {LARGEST_BYTES:,} bytes: a correction is one transaction; split the file."
        )


def _checked_text(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FileError(f"{name} is not UTF-8 (line {line}): save it in that encoding.") from None


def _header(text: str, name: str) -> list[str]:
    line = text.partition("\n")[0].strip()
    if not line:
        raise FileError(f"{name} is empty: the first line names the columns, {', '.join(_COLUMNS)}.")
    if "," not in line and any(mark in line for mark in ";\t|"):
        raise FileError(f"{name} does not separate its columns by commas: save it as CSV with commas.")
    header = [one.strip().strip('"') for one in line.split(",")]
    _check_columns(header, name)
    return header


def _check_columns(found: Sequence[str], name: str) -> None:
    unknown = [one for one in found if one not in _COLUMNS]
    if unknown:
        close = get_close_matches(unknown[0].lower(), _COLUMNS, n=1, cutoff=0.5)
        meant = f"did you mean {close[0]}?" if close else f"the columns are {', '.join(_COLUMNS)}"
        raise FileError(f"{name} has the unknown column {unknown[0]!r}; {meant}")
    if repeated := [one for one in _COLUMNS if list(found).count(one) > 1]:
        raise FileError(f"{name} has the column {repeated[0]} more than once: keep one.")
    if "ts" not in found:
        raise FileError(f"{name} has no column ts, the open time of the candle: add it.")
    if len(found) == 1:
        raise FileError(f"{name} has no column to correct: add one of {', '.join(FIELDS)}.")


# Rows ----------------------------------------------------------------------------------------------------


def _numbered(rows: int, skipped: Instants) -> Instants:
    """The line of each row: all lines after the header but the skipped ones."""
    lines = np.arange(2, rows + len(skipped) + 2, dtype=np.int64)
    return lines[~np.isin(lines, skipped)]


def _without_empty(table: pa.Table, lines: Instants) -> tuple[pa.Table, Instants]:
    """Empty lines are no rows."""
    empty = np.ones(table.num_rows, dtype=bool)
    for column in table.columns:
        empty &= pc.equal(pc.utf8_trim_whitespace(column), "").to_numpy()
    return (table.filter(pa.array(~empty)), lines[~empty]) if empty.any() else (table, lines)


def _of_table(table: pa.Table, lines: Instants, bad: Sequence[Any], name: str) -> CorrectionRows:
    if not (table.num_rows or bad):
        raise FileError(f"{name} has no rows: there is nothing to correct.")
    fields = frozenset(table.column_names) & frozenset(FIELDS)
    ts, timed = _instants(table["ts"], name)
    columns, invalid = [], {}
    for field in FIELDS:
        if field in fields:
            column, fine = _floats(table[field], field, name)
            invalid[field] = ~fine
        else:
            column = np.full(table.num_rows, np.nan)
        columns.append(column)
    rows = CorrectionRows.of(Candles(ts, *columns), fields, lines).marked(~timed, _NO_TIME)
    for field, mask in invalid.items():
        rows = rows.marked(mask, f"its {field} is not a finite number")
    return _with_lines(rows, bad, len(table.column_names))


def _with_lines(rows: CorrectionRows, bad: Sequence[Any], expected: int) -> CorrectionRows:
    """With the lines that have another number of cells than the header, as invalid rows."""
    if not bad:
        return rows
    count = len(bad)
    nothing = np.full(count, np.nan)
    lines = np.array([row.number for row in bad], dtype=np.int64)
    reasons = np.array([f"it has {row.actual_columns} cells, not {expected}" for row in bad], dtype=object)
    strays = Candles(np.zeros(count, dtype=np.int64), *[nothing] * len(FIELDS))
    return CorrectionRows(
        Candles.concat([rows.candles, strays]),
        rows.fields,
        np.concatenate([rows.lines, lines]),
        np.concatenate([rows.reasons, reasons]),
    )


def _instants(column: pa.ChunkedArray, name: str) -> tuple[Instants, Mask]:
    """Microseconds UTC, and which of them are times; a time without a zone is UTC."""
    if pa.types.is_timestamp(column.type):
        micros = column.cast(pa.timestamp("us", column.type.tz), safe=False)
        known = pc.is_valid(micros).to_numpy()
        return pc.fill_null(micros.cast(pa.int64()), 0).to_numpy(), known
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise FileError(f"{name}: its column ts is of type {column.type}, not a timestamp: convert it.")
    texts = column.to_pandas().astype("object").str.strip()
    found = pd.to_datetime(texts, format="ISO8601", utc=True, errors="coerce")
    known = found.notna().to_numpy()
    micros = found.astype("datetime64[us, UTC]").astype("int64").to_numpy()
    return np.where(known, micros, 0), known


def _floats(column: pa.ChunkedArray, field: str, name: str) -> tuple[Any, Mask]:
    """Float64, and which cells are valid: a finite number; an empty volume is valid and means none."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        texts = pc.utf8_trim_whitespace(column)
        is_number = pc.match_substring_regex(texts, _NUMBER)
        numbers = pc.if_else(is_number, texts, pa.scalar(None, texts.type)).cast(pa.float64())
        empty = pc.equal(texts, "").to_numpy()
    elif pa.types.is_floating(column.type) or pa.types.is_integer(column.type):
        numbers = column.cast(pa.float64())
        empty = np.zeros(len(column), dtype=bool)
    else:
        raise FileError(f"{name}: its column {field} is of type {column.type}, not a number: convert it.")
    if field == "volume":
        empty = empty | pc.is_null(column).to_numpy()
    values = numbers.to_numpy(zero_copy_only=False).astype(np.float64)
    return values, np.isfinite(values) | (empty & (field == "volume"))
