"""Recall of the rule `spike` for planted spikes among real candles: `python -m bench.spike_recall FOLDER`.

FOLDER holds `<source>/<name>-<timeframe>.csv.gz` files of real candles. One evaluated candle in 160 is moved, in turn
up and down (a low: down), beginning at ten places; prints a table for docs/measurements.md. Candles off the grid of
their series are left out.
"""

from __future__ import annotations

import gzip
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.evaluation import Block
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.spikes import evaluate_spikes
from fks_backfill_dagster.domain.timeframe import Timeframe

CLASSES = {"equity": AssetClass.STOCKS, "forex": AssetClass.FOREX}
SHARES = (0.02, 0.05, 0.10)
APART, PLACES = 160, 10


def read(path: Path) -> Candles:
    """A file of `ts,open,high,low,close,volume`."""
    with gzip.open(path, "rt") as lines:
        next(lines)
        rows = [line.rstrip("\n").split(",") for line in lines]
    ts = np.array([row[0].rstrip("Z") for row in rows], dtype="datetime64[us]").view(np.int64)
    return Candles(ts, *(np.array([row[n] or "nan" for row in rows], dtype=np.float64) for n in range(1, 6)))


def planted(candles: Candles, rows: Instants, price: str, share: float) -> Candles:
    """The candles, with one price of these rows moved."""
    signs = np.where(np.arange(len(rows)) % 2, 1, -1)
    if price == "low":
        low = candles.low.copy()
        low[rows] = np.minimum(candles.open, candles.close)[rows] * (1 - share)
        return replace(candles, low=low)
    close = candles.close.copy()
    close[rows] *= 1 + signs * share
    return replace(
        candles, close=close, high=np.maximum(candles.high, close), low=np.minimum(candles.low, close)
    )


def recall(block: Block, evaluated: Instants, price: str, share: float) -> float:
    found = []
    for place in range(0, APART, APART // PLACES):
        rows = evaluated[place::APART]
        moved = replace(block, candles=planted(block.candles, rows, price, share))
        found.append(evaluate_spikes(moved).flagged[rows])
    return float(np.concatenate(found).mean())


def main(folder: Path) -> None:
    print("| series | candles | evaluated | flagged | close 2 % | 5 % | 10 % | low 2 % | 5 % | 10 % |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for path in sorted(folder.glob("*/*-*.csv.gz")):
        source, name = path.parent.name, path.name.removesuffix(".csv.gz")
        timeframe = Timeframe(name.rpartition("-")[2])
        series = Series(name, timeframe, CLASSES.get(source, AssetClass.CRYPTO))
        candles = read(path)
        grid = grid_of(series)
        block = Block(candles.take(grid.contains(candles.ts)), grid, timeframe)
        result = evaluate_spikes(block)
        evaluated = np.flatnonzero(result.evaluated & ~result.flagged)
        figures = [
            f"{recall(block, evaluated, price, share):.2f}" for price in ("close", "low") for share in SHARES
        ]
        counts = (len(block.candles), int(result.evaluated.sum()), int(result.flagged.sum()))
        print(f"| {source} {name} | {' | '.join([*(f'{n:,}' for n in counts), *figures])} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
