"""Faults: what can be switched on, which request gets it, and what it does to rows.

Belongs here: the list of kinds, matching and counting, and the changes to a page's rows. How an
answer is held up or cut on the socket is the server's business; what an archive does with changed
rows is the archive's.
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
    """The value is what JSON calls it."""

    # of any answer
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

Row = Any  # a list (Binance) or a dict (Polygon): the JSON face


@dataclass(frozen=True, slots=True)
class Fields:
    """Where a wire row keeps its values: list positions or dict keys. `text` for decimals in quotes."""

    ts: Any
    open: Any
    high: Any
    low: Any
    text: bool


@dataclass(frozen=True, slots=True)
class Fault:
    """One planted fault.

    provider: one of PROVIDERS, or archive. symbol (BTCUSDT, X:BTCUSD), path (a part of path and query),
    window and only narrow down which requests match. Of those, the first to get it is the nth; count of
    them get it (None: all from there on); or probability, per request. status and body (in place of the
    provider's own) are of kind status, seconds of hang, drip and Retry-After, rows how many rows a row
    fault changes, other (a plain symbol) of other_symbol.

    window: requests that touch it match; a fault of rows needs an answer with a row in it. Kinds that
    change single rows change those in it. only: the same, and nothing but rows in it is changed by any
    kind: empty then leaves them out, short the second half of them, other_symbol exchanges them.
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
        """What an answer has to hold."""
        return tuple(window for window in (self.window, self.only) if window is not None)


class Held(Protocol):
    """What an answer is about: a stretch of time, or where it has rows."""

    def touches(self, fault: Fault) -> bool:
        """Whether the answer concerns every window of the fault."""
        ...


@dataclass(frozen=True, slots=True)
class Asked:
    """An answer by the time it was asked for; None: by none."""

    span: TimeRange | None

    def touches(self, fault: Fault) -> bool:
        return all(self.span is not None and self.span.intersect(window) for window in fault.windows)


class Page:
    """An answer by its own rows where the fault is one of rows. A page in the middle of a chain was asked
    for with all that follows it. `stamps` gives microseconds, and is called once, if at all."""

    def __init__(self, asked: Asked, stamps: Callable[[], Sequence[int]]) -> None:
        self._asked = asked
        self._stamps = cache(stamps)

    def touches(self, fault: Fault) -> bool:
        if fault.kind not in ROWS or not fault.windows:
            return self._asked.touches(fault)
        return all(any(map(window.contains, self._stamps())) for window in fault.windows)


class Faults:
    """The faults that are switched on. Drawing for `probability` is seeded: a test can repeat it."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._planted: dict[int, Fault] = {}
        self._hits: dict[int, int] = {}
        self._matched: dict[int, int] = {}
        self._stuck: dict[str, Fault] = {}

    def plant(self, make: Callable[[int], Fault]) -> Fault:
        """Switches on what `make` builds for a new id."""
        with self._lock:
            fault = make(next(self._ids))
            self._planted[fault.id], self._hits[fault.id], self._matched[fault.id] = fault, 0, 0
            return fault

    def clear(self) -> None:
        with self._lock:
            self._planted.clear()
            self._stuck.clear()

    def planted(self) -> list[tuple[Fault, int]]:
        """Each fault with how many requests it has hit."""
        return [(fault, self._hits[fault.id]) for fault in list(self._planted.values())]

    def pick(
        self, provider: str, kinds: frozenset[Kind], symbol: str | None, target: str, held: Held
    ) -> Fault | None:
        """The first fault of one of `kinds` that hits this request; counts the hit."""
        if not self._planted:
            return None
        with self._lock:
            for fault in self._planted.values():
                if (
                    fault.provider == provider
                    and fault.kind in kinds
                    and _matches(fault, symbol, target, held)
                    and self._hit(fault)
                ):
                    self._hits[fault.id] += 1
                    return fault
        return None

    def pick_file(
        self, provider: str, kinds: frozenset[Kind], symbol: str | None, path: str, held: Held
    ) -> Fault | None:
        """As `pick`, but a file that was hit keeps its fault: an archive and its checksum, asked for
        one after the other, must tell of the same bytes. `count` counts files then."""
        if path not in self._stuck and (fault := self.pick(provider, kinds, symbol, path, held)):
            self._stuck[path] = fault
        return self._stuck.get(path)

    def _hit(self, fault: Fault) -> bool:
        """Whether a request that matches gets the fault; counts the match."""
        self._matched[fault.id] += 1
        if self._matched[fault.id] < fault.nth:
            return False
        if fault.probability is not None:
            return self._random.random() < fault.probability
        return fault.count is None or self._hits[fault.id] < fault.count


def _matches(fault: Fault, symbol: str | None, target: str, held: Held) -> bool:
    if fault.symbol is not None and fault.symbol != symbol:
        return False
    if fault.path is not None and fault.path not in target:
        return False
    return held.touches(fault)


def mixed(honest: list[Row], other: list[Row], fields: Fields, divisor: int, only: TimeRange) -> list[Row]:
    """The honest rows, but for those in `only`, which are the other symbol's at the same times; those
    that it does not have are absent."""
    theirs = {row[fields.ts]: row for row in other}
    rows = [
        theirs.get(row[fields.ts]) if only.contains(int(row[fields.ts]) * divisor) else row for row in honest
    ]
    return [row for row in rows if row is not None]


def spoil(fault: Fault, rows: list[Row], fields: Fields, divisor: int) -> list[Row]:
    """The rows as this fault would have them.

    `divisor` is the row timestamps' unit in microseconds (1000 for milliseconds). Without a window
    the `fault.rows` rows in the middle are hit, so that good neighbours stand on both sides.
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
