"""Verification of the rows of a response: the rules that need only the rows and the grid.

Belongs here: shape, range, grid, OHLC sanity, duplicates.
Does not belong here: rules that need stored data (splices, validation). Rows are never repaired: a row is
accepted unchanged, or rejected.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.ranges import TimeRange

Mask = NDArray[np.bool_]


class Reason(StrEnum):
    """Why a row is quarantined, in the order of the checks: the first that fails is the reason."""

    OFF_GRID = "off_grid"  # no candle of this timeframe opens there, inside or outside a session
    NOT_FINITE = "not_finite"  # a price is NaN or infinite
    NOT_POSITIVE = "not_positive"  # a price is zero or less
    HIGH_LOW = "high_low"  # high is not the highest, or low not the lowest
    BAD_VOLUME = "bad_volume"  # negative or infinite; NaN means no volume and is valid
    CONFLICT = "conflict"  # several sane rows of one open that differ: which one is correct is unknown
    # Checked elsewhere, since they need other candles than the row's own:
    SPLICE = "splice"  # a fallback that disagrees beside the gap: it quotes another market
    WRONG_SYMBOL = "wrong_symbol"  # a response that begins with a jump and ends with the same jump back
    IMPLAUSIBLE = "implausible"  # a factor of 50 from the candles around it, and no second provider agrees


@dataclass(frozen=True, slots=True, eq=False)
class Rejected:
    """Rows to quarantine, in the order of the response; never empty."""

    reason: Reason
    candles: Candles


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """The result for every row: `len(good)` + all rejected + `dropped` is the number of rows.

    `good` is ascending and unique by `ts`, and may share memory with the input. `dropped` counts rows
    that are no data errors: out of range, not closed yet, outside the session, or an exact repetition.
    """

    good: Candles
    rejected: tuple[Rejected, ...]
    dropped: int


def verify(candles: Candles, window: TimeRange, grid: Grid, closed_end: int) -> Verdict:
    """Verifies the rows of a response for `[window.start, min(window.end, closed_end))`.

    Raises ValueError if the columns differ in length.
    """
    _check_shape(candles)
    end = min(window.end, closed_end)
    rows = _where(candles, (candles.ts >= window.start) & (candles.ts < end))
    rejected: list[Rejected] = []

    expected = grid.contains(rows.ts)
    if not expected.all():
        strays = rows.take(~expected)
        _reject(rejected, Reason.OFF_GRID, strays, ~grid.on_clock(strays.ts))
        rows = rows.take(expected)

    good = sane(rows)
    if not good.all():
        _reject_insane(rejected, rows.take(~good))
        rows = rows.take(good)

    rows = rows.sorted()
    if (rows.ts[1:] == rows.ts[:-1]).any():
        first, conflict = _repeated(rows)
        _reject(rejected, Reason.CONFLICT, rows, conflict)
        rows = rows.take(first & ~conflict)

    kept = len(rows) + sum(len(part.candles) for part in rejected)
    return Verdict(rows, tuple(rejected), len(candles) - kept)


def _check_shape(candles: Candles) -> None:
    shapes = [column.shape for column in candles.columns()]
    if any(shape != (len(candles.ts),) for shape in shapes):
        raise ValueError(f"the columns of a candle block must be of one length, not {shapes}")


def _where(candles: Candles, mask: Mask) -> Candles:
    return candles if mask.all() else candles.take(mask)


def _reject(rejected: list[Rejected], reason: Reason, candles: Candles, mask: Mask) -> None:
    if mask.any():
        rejected.append(Rejected(reason, candles.take(mask)))


def sane(c: Candles) -> Mask:
    """For each row whether it follows every OHLC rule: NaN fails each comparison, and low and high bound each price."""
    prices = (c.low > 0) & (c.high < np.inf)
    for price in (c.open, c.close):
        prices &= (c.low <= price) & (price <= c.high)
    verdict: Mask = prices & ~((c.volume < 0) | (c.volume == np.inf))
    return verdict


def _reject_insane(rejected: list[Rejected], bad: Candles) -> None:
    """Rejects the rows that are not sane, each with its reason."""
    prices = np.stack([bad.open, bad.high, bad.low, bad.close])
    tests = (
        (Reason.NOT_FINITE, ~np.isfinite(prices).all(axis=0)),
        (Reason.NOT_POSITIVE, (prices <= 0).any(axis=0)),
        (Reason.HIGH_LOW, (prices.max(axis=0) > bad.high) | (prices.min(axis=0) < bad.low)),
        (Reason.BAD_VOLUME, np.ones(len(bad), dtype=bool)),
    )
    undecided = np.ones(len(bad), dtype=bool)
    for reason, fails in tests:
        _reject(rejected, reason, bad, undecided & fails)
        undecided &= ~fails


def _repeated(rows: Candles) -> tuple[Mask, Mask]:
    """For rows ascending by `ts`: the first row of each open, and the rows of a conflict."""
    first = np.concatenate([[True], rows.ts[1:] != rows.ts[:-1]])
    group = np.cumsum(first) - 1
    leader = np.flatnonzero(first)[group]
    differs = np.zeros(len(rows), dtype=bool)
    for column in rows.columns():
        theirs = column[leader]
        differs |= (column != theirs) & ~((column != column) & (theirs != theirs))  # NaN equals NaN
    return first, np.bincount(group, weights=differs)[group] > 0
