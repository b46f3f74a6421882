"""Numbers of JSON as columns: no time is cut or wraps around, and no integer is an error.

JSON has integers of any size. Beyond 2^53 not every one of them is a double: one that is none becomes infinite, not
the nearest one, so that `domain.quality` rejects its row with a reason.

Belongs here: the conversion. Does not belong here: which rows are good (`domain.quality`), the shape of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from fks_backfill_dagster.domain.candles import Floats
from fks_backfill_dagster.domain.ranges import Instants

# Of an instant in microseconds, on either side of 1970: every one within it is a date of four digits.
_FURTHEST = 62_000_000_000_000_000


def to_instants(values: Sequence[Any] | pa.Array, unit: int) -> Instants:
    """Whole numbers of `unit` microseconds as instants.

    Raises ValueError for what is no whole number or no date (pa.ArrowInvalid is one), TypeError or OverflowError.
    """
    numbers = values if isinstance(values, pa.Array) else pa.array(values, pa.int64())
    found: Instants = numbers.to_numpy()
    limit = _FURTHEST // unit
    if len(found) and not -limit <= int(found.min()) <= int(found.max()) <= limit:
        raise ValueError("a time that is no date")
    return found * unit


def to_instant(value: Any, unit: int) -> int:
    """A number of `unit` microseconds as an instant. Raises ValueError, TypeError or OverflowError."""
    found = int(value) * unit
    if abs(found) > _FURTHEST:
        raise ValueError("a time that is no date")
    return found


def to_floats(values: Sequence[Any]) -> Floats:
    """Numbers as doubles; null is NaN. Raises pa.ArrowException or TypeError for what is no number."""
    try:
        cells = pa.array(values, pa.float64())
    except pa.ArrowInvalid:  # an integer that is no double, among others
        cells = pa.array([to_double(value) for value in values], pa.float64())
    return bounded(cells)


def bounded(cells: pa.Array) -> Floats:
    """Doubles, infinite from 2^64 on: there orjson makes doubles of integers, so they may have been others."""
    found: Floats = cells.to_numpy(zero_copy_only=False)
    beyond = np.abs(found) >= 2.0**64
    return np.where(beyond, np.inf, found) if beyond.any() else found


def to_double(value: Any) -> Any:
    """An integer as a double, infinite if it is none; anything else as it is."""
    if type(value) is not int:
        return value
    try:
        found = float(value)
    except OverflowError:
        return math.inf
    return found if int(found) == value else math.inf
