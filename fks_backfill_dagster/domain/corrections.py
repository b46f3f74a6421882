"""Corrections by a person: rows with some of the fields of a candle, and what they change in the stored ones.

    rows of a file ─> check_rows (grid, calendar, closed, repeated) ─> resolve (with the stored candles) ─> changes

Belongs here: the checks and the merge, by arrays. Does not belong here: reading files (`files`), writing (`store`).
A correction is valid as a whole or not at all: `resolve` raises CorrectionError with every invalid row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import FIELDS, PRICES, Candles
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.quality import Mask, Reason, verify
from fks_backfill_dagster.domain.ranges import Instants, TimeRange

MOST_PROBLEMS: Final = 20
"""Invalid rows that an error names; the others are counted."""

_RULES: Final[Mapping[Reason, str]] = {
    Reason.NOT_FINITE: "a price is not a finite number",
    Reason.NOT_POSITIVE: "a price is zero or less",
    Reason.HIGH_LOW: "high is not the highest price, or low not the lowest",
    Reason.BAD_VOLUME: "the volume is negative or infinite",
}


@dataclass(frozen=True, slots=True)
class Problem:
    """An invalid row: its place in the source, and why it is invalid."""

    line: int
    reason: str


class CorrectionError(ValueError):
    """At least one row is invalid: `total` of them, of which `first` holds the first ones by line."""

    def __init__(self, total: int, first: tuple[Problem, ...]) -> None:
        super().__init__(f"{total:,} invalid rows")
        self.total, self.first = total, first


@dataclass(frozen=True, slots=True, eq=False)
class CorrectionRows:
    """Rows of a correction, in the order of their source; columns of one length.

    candles: NaN where a row does not give a field. fields: those that the rows give. lines: the place of each row in
    its source, from 1. reasons: why a row is invalid, empty for a valid one.
    """

    candles: Candles
    fields: frozenset[str]
    lines: Instants
    reasons: NDArray[np.object_]

    @classmethod
    def of(cls, candles: Candles, fields: frozenset[str], lines: Instants) -> CorrectionRows:
        return cls(candles, fields, lines, np.full(len(candles), "", dtype=object))

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def valid(self) -> Mask:
        return np.array(self.reasons == "", dtype=bool)

    @property
    def complete(self) -> bool:
        """Whether the rows give all prices, so that they need no stored candle."""
        return self.fields >= set(PRICES)

    def marked(self, invalid: Mask, reason: str) -> CorrectionRows:
        """With a reason for the rows of the mask that have none."""
        if not invalid.any():
            return self
        reasons = self.reasons.copy()
        reasons[invalid & self.valid] = reason
        return replace(self, reasons=reasons)

    def refuse_invalid(self) -> None:
        """Raises CorrectionError if a row is invalid."""
        bad = np.flatnonzero(~self.valid)
        if not len(bad):
            return
        order = bad[np.argsort(self.lines[bad], kind="stable")][:MOST_PROBLEMS]
        first = (Problem(int(self.lines[row]), str(self.reasons[row])) for row in order.tolist())
        raise CorrectionError(len(bad), tuple(first))


@dataclass(frozen=True, slots=True, eq=False)
class Changes:
    """What a correction changes.

    after: the candles that differ from the stored ones, complete, ascending. before: the stored ones, with NaN where
    there is none. is_new: which of them are not stored yet. unchanged: the number of the other rows.
    """

    before: Candles
    after: Candles
    is_new: Mask
    unchanged: int

    @property
    def inserted(self) -> int:
        return int(self.is_new.sum())

    @property
    def updated(self) -> int:
        return len(self.after) - self.inserted


def check_rows(rows: CorrectionRows, grid: Grid, closed_end: int) -> CorrectionRows:
    """Marks the rows whose candle cannot exist, or that the source contains more than once.

    `closed_end`: the open of the first candle that has not closed.
    """
    ts = rows.candles.ts
    rows = rows.marked(ts < 0, "before 1970")
    expected = grid.contains(ts)
    rows = rows.marked(~expected & ~grid.on_clock(ts), "off the grid: no candle of this timeframe opens then")
    rows = rows.marked(~expected, "outside the calendar: the market is closed then")
    rows = rows.marked(ts >= closed_end, "not closed yet")
    known = np.flatnonzero(rows.valid)
    _, group, count = np.unique(ts[known], return_inverse=True, return_counts=True)
    repeated = np.zeros(len(rows), dtype=bool)
    repeated[known] = count[group] > 1
    return rows.marked(repeated, "the same ts occurs more than once")


def resolve(rows: CorrectionRows, stored: Candles, grid: Grid, closed_end: int) -> Changes:
    """The changes that checked rows make to `stored`, ascending: at least the stored candles at their opens.

    Fields that the rows do not give keep their stored values; a new candle without a volume has none. Raises
    CorrectionError if a row is invalid, alone or together with the stored values.
    """
    valid = np.flatnonzero(rows.valid)
    order = valid[np.argsort(rows.candles.ts[valid], kind="stable")]
    given = rows.candles.take(order)
    stored = stored.take(np.isin(stored.ts, given.ts, assume_unique=True))
    is_new = ~np.isin(given.ts, stored.ts, assume_unique=True)
    before = _with_absent(stored, given.ts, ~is_new)
    merged = Candles(
        given.ts,
        *(getattr(given if name in rows.fields else before, name) for name in FIELDS),
    )
    lacking = is_new if not rows.complete else np.zeros(len(given), dtype=bool)
    absent = ", ".join(name for name in PRICES if name not in rows.fields)
    rows = _marked_at(rows, given.ts[lacking], f"not stored, so the row must give {absent}, too")
    checked = merged.take(~lacking)
    if len(checked):
        window = TimeRange(int(checked.ts[0]), int(checked.ts[-1]) + 1)
        for part in verify(checked, window, grid, closed_end).rejected:
            rows = _marked_at(rows, part.candles.ts, _RULES.get(part.reason, str(part.reason)))
    rows.refuse_invalid()
    differs = is_new | _differing(before, merged)
    return Changes(
        before.take(differs), merged.take(differs), is_new[differs], len(merged) - int(differs.sum())
    )


def _with_absent(stored: Candles, ts: Instants, is_stored: Mask) -> Candles:
    """The stored candles at `ts`, with NaN where there is none."""
    columns = []
    for name in FIELDS:
        column = np.full(len(ts), np.nan)
        column[is_stored] = getattr(stored, name)
        columns.append(column)
    return Candles(ts, *columns)


def _marked_at(rows: CorrectionRows, opens: Instants, reason: str) -> CorrectionRows:
    return rows.marked(np.isin(rows.candles.ts, opens), reason)


def _differing(one: Candles, other: Candles) -> Mask:
    differs = np.zeros(len(one), dtype=bool)
    for name in FIELDS:
        mine, its = getattr(one, name), getattr(other, name)
        differs |= (mine != its) & ~(np.isnan(mine) & np.isnan(its))
    return differs
