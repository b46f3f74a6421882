"""Half-open time ranges `[start, end)` and sets of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.timeframe import iso, to_micros

Instants = NDArray[np.int64]


@dataclass(frozen=True, order=True, slots=True)
class TimeRange:
    """`[start, end)` in microseconds since the epoch, UTC. Empty when start == end.

    Raises ValueError when start lies after end.
    """

    start: int
    end: int

    def __post_init__(self) -> None:
        if self.start > self.end:
            raise ValueError(f"the range starts ({iso(self.start)}) after its end ({iso(self.end)})")

    @classmethod
    def of(cls, start: datetime, end: datetime) -> TimeRange:
        return cls(to_micros(start), to_micros(end))

    def __str__(self) -> str:
        return f"[{iso(self.start)}, {iso(self.end)})"

    def __bool__(self) -> bool:
        return self.start < self.end

    @property
    def duration(self) -> int:
        """Length in microseconds."""
        return self.end - self.start

    def intersect(self, other: TimeRange) -> TimeRange:
        """The common part; empty (at the later start) when there is none."""
        start = max(self.start, other.start)
        return TimeRange(start, max(start, min(self.end, other.end)))

    def contains(self, instant: int) -> bool:
        return self.start <= instant < self.end


class RangeSet:
    """A set of instants as sorted, disjoint, non-touching ranges; immutable.

    `starts` and `ends` are int64 arrays of equal length. All operations are vectorised and cost
    O((n + m) log(n + m)).
    """

    __slots__ = ("ends", "starts")

    starts: Instants
    ends: Instants

    def __init__(self, ranges: Iterable[TimeRange] = ()) -> None:
        pairs = [(r.start, r.end) for r in ranges if r]
        edges = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        self.starts, self.ends = _normalised(edges[:, 0], edges[:, 1])

    @classmethod
    def from_arrays(cls, starts: Instants, ends: Instants) -> RangeSet:
        """From parallel arrays in any order, overlapping or not; empty ranges are dropped."""
        made = cls.__new__(cls)
        keep = starts < ends
        made.starts, made.ends = _normalised(
            np.asarray(starts, np.int64)[keep], np.asarray(ends, np.int64)[keep]
        )
        return made

    def __iter__(self) -> Iterator[TimeRange]:
        for start, end in zip(self.starts.tolist(), self.ends.tolist(), strict=True):
            yield TimeRange(start, end)

    def __len__(self) -> int:
        return len(self.starts)

    def __bool__(self) -> bool:
        return len(self.starts) > 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RangeSet):
            return NotImplemented
        return np.array_equal(self.starts, other.starts) and np.array_equal(self.ends, other.ends)

    def __hash__(self) -> int:
        return hash((self.starts.tobytes(), self.ends.tobytes()))

    def __repr__(self) -> str:
        return f"RangeSet({', '.join(map(str, self))})"

    def __or__(self, other: RangeSet) -> RangeSet:
        return RangeSet.from_arrays(
            np.concatenate([self.starts, other.starts]), np.concatenate([self.ends, other.ends])
        )

    def __and__(self, other: RangeSet) -> RangeSet:
        return _intersection(self, other)

    def __sub__(self, other: RangeSet) -> RangeSet:
        if not self or not other:
            return self
        hull = TimeRange(
            min(int(self.starts[0]), int(other.starts[0])),
            max(int(self.ends[-1]), int(other.ends[-1])),
        )
        return self & other.complement(hull)

    def complement(self, within: TimeRange) -> RangeSet:
        """The part of `within` that is not in this set."""
        clipped = self & RangeSet([within])
        starts = np.concatenate([[within.start], clipped.ends])
        ends = np.concatenate([clipped.starts, [within.end]])
        return RangeSet.from_arrays(starts, ends)

    def contains(self, instants: Instants) -> NDArray[np.bool_]:
        """For each instant whether it lies in the set: bool array of the same length."""
        index = np.searchsorted(self.starts, instants, side="right") - 1
        inside = np.zeros(len(instants), dtype=bool)
        found = index >= 0
        inside[found] = instants[found] < self.ends[index[found]]
        return inside

    @property
    def hull(self) -> TimeRange:
        """From the first start to the last end; `[0, 0)` for the empty set."""
        if not self:
            return TimeRange(0, 0)
        return TimeRange(int(self.starts[0]), int(self.ends[-1]))

    def merge_closer_than(self, distance: int) -> RangeSet:
        """Joins neighbours at most `distance` microseconds apart."""
        if len(self) < 2:
            return self
        apart = (self.starts[1:] - self.ends[:-1]) > distance
        return RangeSet.from_arrays(
            self.starts[np.concatenate([[True], apart])], self.ends[np.concatenate([apart, [True]])]
        )


def among(some: Instants, others: Instants) -> NDArray[np.bool_]:
    """Which of `some` are in `others`, too. Neither has to ascend.

    Fast for a small overlap, as that of neighbouring responses: only the common range is compared.
    """
    if not (len(some) and len(others)):
        return np.zeros(len(some), dtype=bool)
    low, high = max(some.min(), others.min()), min(some.max(), others.max())
    mask: NDArray[np.bool_] = (some >= low) & (some <= high)
    mask[mask] = np.isin(some[mask], others[(others >= low) & (others <= high)])
    return mask


def inside(opens: Instants, part: TimeRange) -> Instants:
    """The ascending instants that lie in a range."""
    first, last = np.searchsorted(opens, [part.start, part.end])
    return opens[first:last]


def before(opens: Instants, end: int) -> Instants:
    """The ascending instants before `end`."""
    return opens[: int(np.searchsorted(opens, end))]


def common(one: Instants, other: Instants) -> Instants:
    """The instants of both, each without duplicates."""
    return np.intersect1d(one, other, assume_unique=True)


def _normalised(starts: Instants, ends: Instants) -> tuple[Instants, Instants]:
    """Sorts the ranges and merges those that overlap or touch."""
    if len(starts) == 0:
        return starts.astype(np.int64), ends.astype(np.int64)
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    opens = np.concatenate([[True], starts[1:] > reach[:-1]])
    closes = np.concatenate([opens[1:], [True]])
    return starts[opens], reach[closes]


def _intersection(a: RangeSet, b: RangeSet) -> RangeSet:
    """Where both sets are present (a sweep over all edges)."""
    edges = np.concatenate([a.starts, b.starts, a.ends, b.ends])
    steps = np.repeat(np.array([1, -1], dtype=np.int8), len(a) + len(b))
    order = np.argsort(edges, kind="stable")  # starts come first in `edges`, so ties open before they close
    edges, both = edges[order], np.cumsum(steps[order]) == 2
    return RangeSet.from_arrays(edges[:-1][both[:-1]], edges[1:][both[:-1]])
