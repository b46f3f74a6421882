"""Stored candles compared with those of other providers: differences, discrepancies, the odd one out.

Belongs here: the comparison of common candles, by arrays, and its totals. Does not belong here: what kind of error the
differences show (`patterns`), which candles are compared (`sampling`), requests (`pipeline.validate`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import FIELDS, PRICES, Candles, Floats
from fks_backfill_dagster.domain.continuity import difference
from fks_backfill_dagster.domain.ranges import common

STORED = "stored"
"""The name of the stored candles among the sources."""

EXTREMES = 2.0
"""The tolerance of high and low is this multiple of that of open and close. They are single trades: between Coinbase
and Bitstamp (1,318 days of BTC/USD) the low differs by more than 1 % on 243 days, the close on 164."""

_FACTORS = np.array([1.0, EXTREMES, EXTREMES, 1.0])
"""In the order of PRICES."""

_BIN = 0.02
_EDGES = np.exp(np.arange(np.log(1e-7), np.log(1e4), _BIN))
"""Bins of the histogram of differences, each 2 % wider than the one before; the first one begins at 0."""


@dataclass(frozen=True, slots=True)
class Discrepancy:
    """A price that differs by more than its tolerance; `difference` is relative to the other provider's price."""

    ts: int
    field: str
    stored: float
    other: float
    difference: float

    @property
    def excess(self) -> float:
        """The difference as a multiple of that of a close: the order of discrepancies."""
        return self.difference / (EXTREMES if self.field in ("high", "low") else 1.0)


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """The common candles of two sources, of equal length and ascending.

    differences: relative differences, one row per price in the order of PRICES. exceeded: those above the tolerance.
    """

    stored: Candles
    other: Candles
    differences: Floats
    exceeded: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.stored)

    def worst(self, most: int) -> list[Discrepancy]:
        """The largest discrepancies, at most `most`, the largest first."""
        rows, columns = np.nonzero(self.exceeded)
        excess = self.differences[rows, columns] / _FACTORS[rows]
        found = []
        for at in np.argsort(-excess, kind="stable")[:most].tolist():
            name, column = PRICES[int(rows[at])], int(columns[at])
            found.append(
                Discrepancy(
                    int(self.stored.ts[column]),
                    name,
                    float(getattr(self.stored, name)[column]),
                    float(getattr(self.other, name)[column]),
                    float(self.differences[rows[at], column]),
                )
            )
        return found


def compare(stored: Candles, other: Candles, tolerance: float) -> Compared:
    """The common candles of two sources, each ascending and valid.

    A price exceeds if its relative difference is above `tolerance`, for high and low EXTREMES times that. Volume is
    not compared: venues have different volumes.
    """
    opens = common(stored.ts, other.ts)
    mine, its = stored.take(np.isin(stored.ts, opens)), other.take(np.isin(other.ts, opens))
    differences = difference(mine, its)
    return Compared(mine, its, differences, differences > tolerance * _FACTORS[:, None])


# Totals -----------------------------------------------------------------------------------------------


def _no_counts() -> NDArray[np.int64]:
    return np.zeros((len(FIELDS), len(_EDGES) + 1), dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Spread:
    """The distribution of the differences of each field, volume included, in bounded memory.

    counts: a histogram per field, in the order of FIELDS. largest: the largest difference of each; NaN without one.
    """

    counts: NDArray[np.int64] = field(default_factory=_no_counts)
    largest: Floats = field(default_factory=lambda: np.full(len(FIELDS), np.nan))

    def __add__(self, compared: Compared) -> Spread:
        counts, largest = self.counts.copy(), self.largest.copy()
        for row, values in enumerate((*compared.differences, _volumes(compared))):
            if len(values):
                counts[row] += np.bincount(np.searchsorted(_EDGES, values), minlength=len(_EDGES) + 1)
                largest[row] = np.fmax(largest[row], values.max())
        return Spread(counts, largest)

    def largest_of(self, name: str) -> float | None:
        """The largest difference of a field; None if no candle has one (a source without volume)."""
        value = float(self.largest[FIELDS.index(name)])
        return None if np.isnan(value) else value

    def quantile(self, name: str, share: float) -> float | None:
        """The difference that `share` of the candles do not exceed, at most 2 % too large; None as `largest_of`."""
        largest, counts = self.largest_of(name), self.counts[FIELDS.index(name)]
        if largest is None:
            return None
        at = int(np.searchsorted(np.cumsum(counts), share * counts.sum()))
        return largest if at >= len(_EDGES) else min(largest, float(_EDGES[at]) if at else 0.0)


def _volumes(compared: Compared) -> Floats:
    """The relative differences of the volumes that both sources have."""
    mine, its = compared.stored.volume, compared.other.volume
    known = np.isfinite(mine) & np.isfinite(its) & (its > 0)
    differences: Floats = np.abs(mine[known] - its[known]) / its[known]
    return differences


# Three sources or more ------------------------------------------------------------------------------


def odd_ones(sources: Mapping[str, Candles], tolerance: float) -> dict[str, int]:
    """For each source the number of common candles in which it alone contradicts all others, which agree.

    `sources`: candles by name, each ascending. Fewer than three have no odd one. A candle about which the others
    disagree counts for none.
    """
    found = dict.fromkeys(sources, 0)
    if len(sources) < 3:
        return found
    names = list(sources)
    opens = sources[names[0]].ts
    for name in names[1:]:
        opens = common(opens, sources[name].ts)
    aligned = {name: one.take(np.isin(one.ts, opens)) for name, one in sources.items()}
    agree = {
        (one, other): _agree(aligned[one], aligned[other], tolerance)
        for at, one in enumerate(names)
        for other in names[at + 1 :]
    }
    for name in names:
        alone = np.ones(len(opens), dtype=bool)
        for pair, both in agree.items():
            alone &= ~both if name in pair else both
        found[name] = int(alone.sum())
    return found


def odd_one_out(counts: Mapping[str, int]) -> str | None:
    """The source that is the odd one in most candles; None if there is none, or two share the place."""
    ordered = sorted(counts, key=lambda name: counts[name], reverse=True)
    if not ordered or not counts[ordered[0]]:
        return None
    if len(ordered) > 1 and counts[ordered[0]] == counts[ordered[1]]:
        return None
    return ordered[0]


def _agree(one: Candles, other: Candles, tolerance: float) -> NDArray[np.bool_]:
    """Which candles of the same opens agree; in either direction, as neither is the reference."""
    larger = np.maximum(difference(one, other), difference(other, one))
    agreed: NDArray[np.bool_] = np.all(larger <= tolerance * _FACTORS[:, None], axis=0)
    return agreed
