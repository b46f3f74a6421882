"""Builders of values for the tests of this layer."""

from __future__ import annotations

import gzip
from datetime import datetime
from pathlib import Path

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe, to_micros


def at(text: str) -> int:
    """The instant of an ISO 8601 time with a zone."""
    return to_micros(datetime.fromisoformat(text))


def window(start: str, end: str) -> TimeRange:
    return TimeRange(at(start), at(end))


def grid(asset_class: str, timeframe: str, calendar: str = "XNYS") -> Grid:
    return grid_of(Series("ANY", Timeframe(timeframe), AssetClass(asset_class), calendar))


def candles(*rows: tuple[float, ...]) -> Candles:
    """From rows of (ts, open, high, low, close, volume)."""
    ts, *floats = zip(*rows, strict=True) if rows else [()] * 6
    return Candles(np.array(ts, dtype=np.int64), *(np.array(column, dtype=np.float64) for column in floats))


def flat(ts: Instants) -> Candles:
    """Sane candles at these opens."""
    one = np.ones(len(ts))
    return Candles(ts, one, one, one, one, one)


def read_csv(path: Path) -> Candles:
    """A file of real candles in the canonical form, see the MANIFEST beside it."""
    with gzip.open(path, "rt") as lines:
        next(lines)
        rows = [line.rstrip("\n").split(",") for line in lines]
    ts = np.array([row[0].rstrip("Z") for row in rows], dtype="datetime64[us]").view(np.int64)
    return Candles(ts, *(np.array([row[n] or "nan" for row in rows], dtype=np.float64) for n in range(1, 6)))
