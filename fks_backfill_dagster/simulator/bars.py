"""Candles as exact decimals: scaled integers, their grid, aggregation and text.

Shared by all markets and wire formats; independent of the source of candles and of the providers'
formats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.timeframe import FIRST_MONDAY, MICROS_PER_DAY, MICROS_PER_WEEK, Timeframe

Units = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Step:
    """A regular grid: candles of `length` microseconds, one of which opens at `origin`."""

    length: int
    origin: int = 0

    @classmethod
    def of(cls, timeframe: Timeframe) -> Step:
        """The grid of a timeframe: multiples since the epoch, weeks from Monday 00:00 UTC."""
        return cls(timeframe.micros, FIRST_MONDAY if timeframe is Timeframe.W1 else 0)

    def floor(self, instant: int) -> int:
        """The open of the candle that contains `instant`."""
        return instant - (instant - self.origin) % self.length

    def ceil(self, instant: int) -> int:
        """The first open at or after `instant`."""
        return instant + (self.origin - instant) % self.length


SUNDAY_WEEKS = Step(MICROS_PER_WEEK, FIRST_MONDAY - MICROS_PER_DAY)


@dataclass(frozen=True, slots=True)
class Scale:
    """The number of decimal digits of a block's scaled integers."""

    price: int
    volume: int


@dataclass(frozen=True, slots=True, eq=False)
class Bars:
    """Candles of one series, ascending: integers in units of 10**-digits.

    `volume` is None where the source has none. `verbatim` holds the five columns of a replayed file as
    text; such a block is served with exactly these texts.
    """

    ts: Instants
    open: Units
    high: Units
    low: Units
    close: Units
    volume: Units | None
    scale: Scale
    verbatim: tuple[NDArray[np.object_], ...] | None = None

    def __len__(self) -> int:
        return len(self.ts)

    def take(self, selector: NDArray[np.bool_] | slice) -> Bars:
        """The rows selected by a boolean mask or a slice."""
        return Bars(
            self.ts[selector],
            self.open[selector],
            self.high[selector],
            self.low[selector],
            self.close[selector],
            None if self.volume is None else self.volume[selector],
            self.scale,
            None if self.verbatim is None else tuple(column[selector] for column in self.verbatim),
        )

    def within(self, window: TimeRange) -> Bars:
        """The rows that open in `window`."""
        first, last = np.searchsorted(self.ts, [window.start, window.end])
        return self.take(slice(int(first), int(last)))

    def candles(self) -> Candles:
        """As float64. Correctly rounded, so equal to `float()` of the served text: both operands
        of the division are exact in a double, and IEEE division rounds once."""
        price, volume = 10.0**self.scale.price, 10.0**self.scale.volume
        none = np.full(len(self), np.nan)
        return Candles(
            self.ts,
            self.open / price,
            self.high / price,
            self.low / price,
            self.close / price,
            none if self.volume is None else self.volume / volume,
        )

    def texts(self) -> tuple[list[str], ...]:
        """The five value columns as decimal text; an absent volume is empty text."""
        if self.verbatim is not None:
            return tuple(column.tolist() for column in self.verbatim)
        prices = [
            decimal_texts(column, self.scale.price) for column in (self.open, self.high, self.low, self.close)
        ]
        volume = [""] * len(self) if self.volume is None else decimal_texts(self.volume, self.scale.volume)
        return (*prices, volume)

    def shifted(self, ppm: int) -> Bars:
        """Every price moved by `ppm` millionths, rounded down. Monotone, so it commutes with aggregation."""
        if ppm == 0:
            return self

        def move(column: Units) -> Units:
            return column * (1_000_000 + ppm) // 1_000_000

        return replace(
            self,
            open=move(self.open),
            high=move(self.high),
            low=move(self.low),
            close=move(self.close),
            verbatim=None,
        )


def concat(blocks: Sequence[Bars]) -> Bars:
    """Joins one or more blocks of the same symbol."""
    # An empty block of a replay can have the scale of a different file.
    blocks = [block for block in blocks if len(block)] or blocks[:1]
    if len(blocks) == 1:
        return blocks[0]
    first = blocks[0]
    volumes = [b.volume for b in blocks if b.volume is not None]
    texts = [b.verbatim for b in blocks if b.verbatim is not None]
    return Bars(
        np.concatenate([b.ts for b in blocks]),
        np.concatenate([b.open for b in blocks]),
        np.concatenate([b.high for b in blocks]),
        np.concatenate([b.low for b in blocks]),
        np.concatenate([b.close for b in blocks]),
        np.concatenate(volumes) if volumes else None,
        first.scale,
        tuple(np.concatenate(columns) for columns in zip(*texts, strict=True)) if texts else None,
    )


def aggregate(bars: Bars, step: Step) -> Bars:
    """Coarser candles: open first, high max, low min, close last, volume sum. Without parts there is no candle."""
    if len(bars) == 0:
        return replace(bars, verbatim=None)
    opens = bars.ts - (bars.ts - step.origin) % step.length
    first = np.concatenate([[0], np.flatnonzero(opens[1:] != opens[:-1]) + 1])
    last = np.concatenate([first[1:] - 1, [len(bars) - 1]])
    return Bars(
        opens[first],
        bars.open[first],
        np.maximum.reduceat(bars.high, first),
        np.minimum.reduceat(bars.low, first),
        bars.close[last],
        None if bars.volume is None else np.add.reduceat(bars.volume, first),
        bars.scale,
    )


def decimal_texts(values: Units, digits: int) -> list[str]:
    """Non-negative integers as decimals with `digits` places. One C-level format for the column."""
    if digits == 0:
        return list(map(str, values.tolist()))
    parts = np.column_stack(np.divmod(values, 10**digits)).ravel().tolist()
    return (f"%d.%0{digits}d " * len(values) % tuple(parts)).split()
