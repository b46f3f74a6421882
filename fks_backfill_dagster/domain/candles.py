"""The candle block: columns, never rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.ranges import Instants, TimeRange

Floats = NDArray[np.float64]
PRICES = ("open", "high", "low", "close")
FIELDS = (*PRICES, "volume")


@dataclass(frozen=True, slots=True, eq=False)
class Candles:
    """Candles of one series as six arrays of equal length.

    `ts` is the open in microseconds UTC (int64), the rest is float64. A volume of NaN means that
    the source has none. Neither order nor validity is guaranteed: `quality` checks both.
    """

    ts: Instants
    open: Floats
    high: Floats
    low: Floats
    close: Floats
    volume: Floats

    @classmethod
    def empty(cls) -> Candles:
        none = np.empty(0, dtype=np.float64)
        return cls(np.empty(0, dtype=np.int64), none, none, none, none, none)

    @classmethod
    def concat(cls, blocks: Sequence[Candles]) -> Candles:
        if not blocks:
            return cls.empty()
        if len(blocks) == 1:
            return blocks[0]
        return cls(*(np.concatenate(parts) for parts in zip(*(b.columns() for b in blocks), strict=True)))

    def columns(self) -> tuple[Instants, Floats, Floats, Floats, Floats, Floats]:
        return (self.ts, self.open, self.high, self.low, self.close, self.volume)

    def __len__(self) -> int:
        return len(self.ts)

    def equals(self, other: Candles) -> bool:
        """Bit for bit, with NaN equal to NaN."""
        return all(
            np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
            for mine, theirs in zip(self.columns(), other.columns(), strict=True)
        )

    def take(self, selector: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Candles:
        """The rows of a boolean mask, an index array or a slice."""
        ts, *floats = self.columns()
        return Candles(ts[selector], *(column[selector] for column in floats))

    def within(self, window: TimeRange) -> Candles:
        """The rows that open in `window`. Needs `ts` ascending; makes views, copies nothing."""
        first, last = np.searchsorted(self.ts, [window.start, window.end])
        return self.take(slice(first, last))

    def sorted(self) -> Candles:
        """Ascending by `ts`; rows of equal `ts` keep their order."""
        if len(self) < 2 or bool((self.ts[1:] > self.ts[:-1]).all()):
            return self
        return self.take(np.argsort(self.ts, kind="stable"))
