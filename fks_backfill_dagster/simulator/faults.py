"""Faults: kinds, matching of requests, effects on rows.

In scope: the kinds, matching and counting, and the changes to a page's rows. Out of scope: delayed and
truncated responses on the socket (`server`), archives with changed rows (`archive`).
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Protocol

from fks_backfill_dagster.domain.ranges import TimeRange


class Kind(StrEnum):
    """The value is the name in JSON."""

    # of any response
    STATUS = "status"
    HANG = "hang"
    DRIP = "drip"
    RESET = "reset"
    TRUNCATED = "truncated"
    HTML = "html"
    # of rows, in pages and in archives
    EMPTY = "empty"
    SHORT = "short"
    MISSING = "missing"
    DUPLICATED = "duplicated"
    UNSORTED = "unsorted"
    OFF_GRID = "off_grid"
    NAN = "nan"
    NEGATIVE = "negative"
    HIGH_BELOW_LOW = "high_below_low"
    OTHER_SYMBOL = "other_symbol"
    # of archives
    WRONG_CHECKSUM = "wrong_checksum"
    CORRUPT_ZIP = "corrupt_zip"
    ARCHIVE_404 = "archive_404"


TRANSPORT = frozenset({Kind.STATUS, Kind.HANG, Kind.DRIP, Kind.RESET, Kind.TRUNCATED, Kind.HTML})
FILE = frozenset({Kind.CORRUPT_ZIP, Kind.ARCHIVE_404})
ROWS = frozenset(Kind) - TRANSPORT - FILE - {Kind.WRONG_CHECKSUM}

Row = Any  # a list (Binance) or a dict (Polygon)


@dataclass(frozen=True, slots=True)
class Fields:
    """List positions or dict keys of the values of a wire row. `text`: decimals are strings."""

    ts: Any
    open: Any
    high: Any
    low: Any
    text: bool


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted fault.

    provider: one of PROVIDERS, or archive. symbol (BTCUSDT, X:BTCUSD), path (a part of path and query),
    window and only select requests. Of the matching requests, the nth is the first to get the fault, and
    count get it (None: all from then on); or probability, per request. status and body (in place of the
    provider's own) belong to kind status, seconds to hang, drip and Retry-After, other (a plain symbol) to
    other_symbol; rows is the number of rows that a row fault changes.

    window: requests that overlap it match; a row fault needs a response with a row in it. Kinds that
    change single rows change those in it. only: the same, and all kinds change only rows in it: empty
    omits them, short omits the second half of them, other_symbol replaces them.
    """

    id: int
    provider: str
    kind: Kind
    count: int | None = 1
    nth: int = 1
    probability: float | None = None
    symbol: str | None = None
    path: str | None = None
    window: TimeRange | None = None
    only: TimeRange | None = None
    status: int = 500
    body: str | None = None
    seconds: float = 1.0
    rows: int = 10
    other: str | None = None

    @property
    def windows(self) -> tuple[TimeRange, ...]:
        """The windows that a response must overlap."""
        return tuple(window for window in (self.window, self.only) if window is not None)


class Extent(Protocol):
    """The times of a response: its requested span, or its rows."""

    def overlaps(self, fault: Fault) -> bool:
        """Whether the response overlaps every window of the fault."""
        ...


@dataclass(frozen=True, slots=True)
class RequestedSpan:
    """A response by its requested span; None: a request without one."""

    span: TimeRange | None

    def overlaps(self, fault: Fault) -> bool:
        return all(self.span is not None and self.span.intersect(window) for window in fault.windows)


class Page:
    """A response by its own rows for a row fault: the requested span of a page in a chain includes all
    following pages. `stamps` returns microseconds and is called at most once."""

    def __init__(self, requested: RequestedSpan, stamps: Callable[[], Sequence[int]]) -> None:
        self._requested = requested
        self._stamps = cache(stamps)

    def overlaps(self, fault: Fault) -> bool:
        if fault.kind not in ROWS or not fault.windows:
            return self._requested.overlaps(fault)
        return all(any(map(window.contains, self._stamps())) for window in fault.windows)


class Faults:
    """The active faults. Random draws for `probability` are seeded, so that tests are repeatable."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._planted: dict[int, Fault] = {}
        self._hits: dict[int, int] = {}
        self._matched: dict[int, int] = {}
        self._file_faults: dict[str, Fault] = {}

    def plant(self, make: Callable[[int], Fault]) -> Fault:
        """Activates the fault that `make` builds for a new id."""
        with self._lock:
            fault = make(next(self._ids))
            self._planted[fault.id], self._hits[fault.id], self._matched[fault.id] = fault, 0, 0
            return fault

    def clear(self) -> None:
        with self._lock:
            self._planted.clear()
            self._file_faults.clear()

    def planted(self) -> list[tuple[Fault, int]]:
        """Each fault with its number of hits."""
        return [(fault, self._hits[fault.id]) for fault in list(self._planted.values())]

    def pick(
        self, provider: str, kinds: frozenset[Kind], symbol: str | None, target: str, extent: Extent
    ) -> Fault | None:
        """The first fault of one of `kinds` that applies to this request; counts the hit."""
        if not self._planted:
            return None
        with self._lock:
            for fault in self._planted.values():
                if (
                    fault.provider == provider
                    and fault.kind in kinds
                    and _matches(fault, symbol, target, extent)
                    and self._hit(fault)
                ):
                    self._hits[fault.id] += 1
                    return fault
        return None

    def pick_file(
        self, provider: str, kinds: frozenset[Kind], symbol: str | None, path: str, extent: Extent
    ) -> Fault | None:
        """Like `pick`, but a file keeps its fault: an archive and its checksum are separate requests and
        must refer to the same bytes. `count` counts files."""
        if path not in self._file_faults and (fault := self.pick(provider, kinds, symbol, path, extent)):
            self._file_faults[path] = fault
        return self._file_faults.get(path)

    def _hit(self, fault: Fault) -> bool:
        """Whether a matching request gets the fault; counts the match."""
        self._matched[fault.id] += 1
        if self._matched[fault.id] < fault.nth:
            return False
        if fault.probability is not None:
            return self._random.random() < fault.probability
        return fault.count is None or self._hits[fault.id] < fault.count


def _matches(fault: Fault, symbol: str | None, target: str, extent: Extent) -> bool:
    if fault.symbol is not None and fault.symbol != symbol:
        return False
    if fault.path is not None and fault.path not in target:
        return False
    return extent.overlaps(fault)


def mixed(original: list[Row], other: list[Row], fields: Fields, divisor: int, only: TimeRange) -> list[Row]:
    """The original rows, with those in `only` replaced by the other symbol's rows of the same times, or
    omitted if it has none."""
    replacements = {row[fields.ts]: row for row in other}
    rows = [
        replacements.get(row[fields.ts]) if only.contains(int(row[fields.ts]) * divisor) else row
        for row in original
    ]
    return [row for row in rows if row is not None]


def apply_fault(fault: Fault, rows: list[Row], fields: Fields, divisor: int) -> list[Row]:
    """The rows with this fault.

    `divisor` is the row timestamps' unit in microseconds (1000 for milliseconds). Without a window
    the `fault.rows` rows in the middle are changed, so that they have good neighbours on both sides.
    """
    span = fault.only or fault.window
    if fault.only is None and fault.kind in (Kind.EMPTY, Kind.SHORT):
        return [] if fault.kind is Kind.EMPTY else rows[: len(rows) // 2]
    if span is not None:
        hit = [i for i, row in enumerate(rows) if span.contains(int(row[fields.ts]) * divisor)]
    else:
        middle = max((len(rows) - fault.rows) // 2, 0)
        hit = list(range(middle, min(middle + fault.rows, len(rows))))
    if fault.kind is Kind.SHORT:
        hit = hit[len(hit) // 2 :]
    if fault.kind is Kind.UNSORTED:
        changed = list(rows)
        for index, row in zip(hit, [rows[i] for i in reversed(hit)], strict=True):
            changed[index] = row
        return changed
    chosen = set(hit)
    if fault.kind in (Kind.MISSING, Kind.EMPTY, Kind.SHORT):
        return [row for index, row in enumerate(rows) if index not in chosen]
    if fault.kind is Kind.DUPLICATED:
        return [row for index, row in enumerate(rows) for _ in range(2 if index in chosen else 1)]
    return [_bad(fault.kind, row, fields, divisor) if i in chosen else row for i, row in enumerate(rows)]


def _bad(kind: Kind, row: Row, fields: Fields, divisor: int) -> Row:
    changed = row.copy()
    if kind is Kind.OFF_GRID:
        changed[fields.ts] = row[fields.ts] + 7_000_000 // divisor
    elif kind is Kind.NAN:
        changed[fields.open] = "NaN" if fields.text else float("nan")
    elif kind is Kind.NEGATIVE:
        changed[fields.low] = f"-{row[fields.low]}" if fields.text else -row[fields.low]
    elif kind is Kind.HIGH_BELOW_LOW:
        changed[fields.high] = "0.00001" if fields.text else 0.00001
    return changed
