"""Builders of values for the tests of this layer."""

from __future__ import annotations

import gzip
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import FIELDS, Candles
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_HOUR, Timeframe, to_micros


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


def random_walk(
    seed: int, count: int, *, step: int = MICROS_PER_HOUR, volatility: float = 0.02, start: int = 0
) -> Candles:
    """Valid candles of a random walk around 1000; some without a volume. `volatility`: of a return, in logarithms."""
    draw = np.random.default_rng(seed)
    close = 1000 * np.exp(np.cumsum(draw.normal(0, volatility, count)))
    opened = np.concatenate([[1000.0], close[:-1]])
    high = np.maximum(opened, close) * np.exp(np.abs(draw.normal(0, volatility / 3, count)))
    low = np.minimum(opened, close) * np.exp(-np.abs(draw.normal(0, volatility / 3, count)))
    volume = np.where(draw.random(count) < 0.1, np.nan, draw.random(count))
    return Candles(start + step * np.arange(count, dtype=np.int64), opened, high, low, close, volume)


def changed(candles: Candles, **columns: NDArray[np.float64]) -> Candles:
    """The candles with other values of some columns."""
    values = {name: columns.get(name, getattr(candles, name)) for name in FIELDS}
    return Candles(candles.ts, **values)
