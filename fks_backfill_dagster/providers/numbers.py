"""JSON numbers to columns: times are neither truncated nor wrapped, and every integer is accepted.

JSON has integers of any size. Beyond 2^53 some are not representable as a double: these become infinite, not the
nearest double, so that `domain.quality` rejects their row with a reason.

Belongs here: the conversion. Does not belong here: the validity of rows (`domain.quality`), the shape of a response.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fks_backfill_dagster.domain.candles import Floats
from fks_backfill_dagster.domain.ranges import Instants

# Microseconds before and after 1970: every instant within has a year of four digits.
_FURTHEST = 62_000_000_000_000_000


def to_instants(values: Sequence[Any] | pa.Array, unit: int) -> Instants:
    """Whole numbers of `unit` microseconds as instants.

    Raises ValueError for a fraction or an invalid date (pa.ArrowInvalid is a ValueError), TypeError or OverflowError.
    """
    numbers = values if isinstance(values, pa.Array) else pa.array(values, pa.int64())
    found: Instants = numbers.to_numpy()
    limit = _FURTHEST // unit
    if len(found) and not -limit <= int(found.min()) <= int(found.max()) <= limit:
        raise ValueError("a time out of range")
    return found * unit


def to_instant(value: Any, unit: int) -> int:
    """A number of `unit` microseconds as an instant. Raises ValueError, TypeError or OverflowError."""
    found = int(value) * unit
    if abs(found) > _FURTHEST:
        raise ValueError("a time out of range")
    return found


def to_floats(values: Sequence[Any]) -> Floats:
    """Numbers as doubles; null is NaN. Raises pa.ArrowException or TypeError for anything else."""
    try:
        cells = pa.array(values, pa.float64())
    except pa.ArrowInvalid:  # for example an integer that no double represents
        cells = pa.array([to_double(value) for value in values], pa.float64())
    return bounded(cells)


def bounded(cells: pa.Array) -> Floats:
    """Doubles, infinite from 2^64 on: orjson rounds larger integers to doubles, so the original is unknown."""
    found: Floats = cells.to_numpy(zero_copy_only=False)
    beyond = np.abs(found) >= 2.0**64
    return np.where(beyond, np.inf, found) if beyond.any() else found


def to_double(value: Any) -> Any:
    """An integer as a double, infinite if no double represents it; anything else unchanged."""
    if type(value) is not int:
        return value
    try:
        found = float(value)
    except OverflowError:
        return math.inf
    return found if int(found) == value else math.inf
