"""Stock splits: prices as traded, and prices adjusted for later splits."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np

from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.simulator.bars import Bars, Scale, Units
from fks_backfill_dagster.simulator.sessions import NEW_YORK, utc

_ADJUSTED_DIGITS = 9  # enough to recover the traded price, few enough to stay below 2**53


@dataclass(frozen=True, slots=True)
class Split:
    """From `day` on, `new` shares replace `old` ones: `Split("AAPL", date(2014, 6, 9), 7)`."""

    symbol: str
    day: date
    new: int
    old: int = 1

    def __post_init__(self) -> None:
        if self.new < 1 or self.old < 1 or self.new == self.old:
            raise ValueError(
                f"a split of {self.new}:{self.old} for {self.symbol} is invalid: two different positive numbers"
            )

    @property
    def begins(self) -> int:
        """00:00 New York of `day`: before its first trade, and after the last trade of the day before."""
        midnight = np.datetime64(self.day, "us").astype(np.int64)
        return int(utc(np.array([midnight], dtype=np.int64), NEW_YORK)[0])


def read_splits(path: Path) -> tuple[Split, ...]:
    """Reads a file of lines `symbol,date,new,old`. Raises ValueError for another format."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return tuple(
            Split(row["symbol"], date.fromisoformat(row["date"]), int(row["new"]), int(row["old"]))
            for row in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} needs the columns symbol,date,new,old ({error})") from None


def of_symbol(splits: Iterable[Split], symbol: str) -> tuple[Split, ...]:
    return tuple(split for split in splits if split.symbol == symbol)


def as_traded(bars: Bars, splits: Iterable[Split]) -> Bars:
    """Converts synthetic bars in today's shares to bars as traded before the splits.

    Prices keep their digits; the volume of a bar is at least one share.
    """
    new, old = _factors(bars.ts, splits)
    volume = None if bars.volume is None else np.maximum(bars.volume * old // new, 1)
    opened, high, low, close = (
        column * new // old for column in (bars.open, bars.high, bars.low, bars.close)
    )
    return replace(bars, open=opened, high=high, low=low, close=close, volume=volume)


def adjusted(bars: Bars, splits: Iterable[Split]) -> Bars:
    """Converts traded bars to today's shares; if there are splits, prices have nine digits."""
    splits = tuple(splits)
    if not splits or bars.scale.price >= _ADJUSTED_DIGITS:
        return bars
    new, old = _factors(bars.ts, splits)
    raised = 10 ** (_ADJUSTED_DIGITS - bars.scale.price)

    def move(column: Units) -> Units:
        moved: Units = (column * raised * old + new // 2) // new
        return moved

    return Bars(
        bars.ts,
        move(bars.open),
        move(bars.high),
        move(bars.low),
        move(bars.close),
        None if bars.volume is None else bars.volume * new // old,
        Scale(_ADJUSTED_DIGITS, bars.scale.volume),
    )


def _factors(ts: Instants, splits: Iterable[Split]) -> tuple[Units, Units]:
    """For each instant the ratio of today's shares (first) to shares of that time (second)."""
    new, old = np.ones(len(ts), dtype=np.int64), np.ones(len(ts), dtype=np.int64)
    for split in splits:
        before = ts < split.begins
        new[before] *= split.new
        old[before] *= split.old
    return new, old
