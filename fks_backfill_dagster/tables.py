"""Results as aligned text tables, the same on the command line and in the demo's report.

Belongs here: the format of cells, the layout of columns, the coverage table. Does not belong here: computing
the values, output.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.store.coverage import Counts

ELLIPSIS = "…"
NARROWEST = 8
"""Characters that a column of texts or times keeps if its table must fit a width."""

Cell = str | int | float | bool | datetime | None


def lines(header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> list[str]:
    """Aligned columns, numbers right-aligned. Empty if there are no rows.

    A float is a share, shown in percent. With a `width` the longest texts end in an ellipsis until a line fits, and
    times only if that does not suffice. Numbers and the first column are never shortened, so that a line can be longer
    than a very narrow terminal.
    """
    if not rows:
        return []
    columns = [_Column(name, [row[i] for row in rows]) for i, name in enumerate(header)]
    if width is not None and _total(columns) > width:
        columns = [one for i, one in enumerate(columns) if i == 0 or not one.is_empty]
        _fit(columns, width)
    return ["  ".join(texts).rstrip() for texts in zip(*(one.texts() for one in columns), strict=True)]


class _Column:
    """One column: its texts, and its width, which may be less than that of its longest text."""

    def __init__(self, name: str, values: Sequence[object]) -> None:
        self._cells = [cell(value) for value in values]
        self._name = name
        self.is_number = all(isinstance(value, int | float | None) for value in values)
        self.is_time = any(isinstance(value, datetime) for value in values)
        self.longest = max(map(len, self._cells))
        self.width = max(len(name), self.longest)

    @property
    def is_empty(self) -> bool:
        return all(text in ("-", "") for text in self._cells)

    def texts(self) -> list[str]:
        """The heading and the cells, all of the column's width."""
        texts = [_cut(text, self.width) for text in (self._name, *self._cells)]
        return [text.rjust(self.width) if self.is_number else text.ljust(self.width) for text in texts]


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}{ELLIPSIS}"


def _total(columns: Sequence[_Column]) -> int:
    return sum(one.width for one in columns) + 2 * (len(columns) - 1)


def _fit(columns: Sequence[_Column], width: int) -> None:
    """Reduces the widest columns until a line fits, or every column has its least width."""
    for whole_times in (True, False):
        least = [
            one.longest
            if i == 0 or one.is_number or (one.is_time and whole_times)
            else min(one.longest, NARROWEST)
            for i, one in enumerate(columns)
        ]
        while _total(columns) > width:
            able = [one for one, floor in zip(columns, least, strict=True) if one.width > floor]
            if not able:
                break
            max(able, key=lambda one: one.width).width -= 1


def cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return percent(value)
    if isinstance(value, datetime):
        return short(value)
    return str(value)


def percent(share: float) -> str:
    """A share in percent, never rounded up to 100 %."""
    return "100 %" if share == 1 else f"{min(share * 100, 99.99):.2f} %"


def short(when: datetime) -> str:
    """A moment in UTC, without trailing zero parts: 2024-01-01, 2024-01-01 04:30 or with seconds."""
    if (when.hour, when.minute, when.second) == (0, 0, 0):
        return f"{when:%Y-%m-%d}"
    return f"{when:%Y-%m-%d %H:%M}" if when.second == 0 else f"{when:%Y-%m-%d %H:%M:%S}"


# Coverage ---------------------------------------------------------------------------------------------

COVERAGE = (
    "series",
    "expected",
    "stored",
    "coverage",
    "open gaps",
    "newest (UTC)",
    "lag",
    "next attempt (UTC)",
)


@dataclass(frozen=True, slots=True)
class CoverageRow:
    """One series in the table; `counts` is None if it was never synced.

    `newest` is an open time, `next_attempt` the earliest next attempt of its gaps, `lag` in closed candles.
    """

    series: Series
    counts: Counts | None
    open_gaps: int
    newest: int | None
    lag: int | None
    next_attempt: int | None

    def cells(self, now: int) -> tuple[Cell, ...]:
        if self.counts is None:
            return (str(self.series), *[None] * (len(COVERAGE) - 1))
        return (
            str(self.series),
            *_counted(self.counts, self.open_gaps),
            None if self.newest is None else to_datetime(self.newest),
            self.lag,
            _attempt(self.next_attempt, now),
        )


def coverage_total(rows: Sequence[CoverageRow], now: int) -> tuple[Cell, ...]:
    """The sums, and the earliest of the next attempts."""
    counts = [row.counts for row in rows if row.counts is not None]
    total = Counts(
        expected=sum(one.expected for one in counts),
        missing=sum(one.missing for one in counts),
        no_trade=sum(one.no_trade for one in counts),
    )
    return (
        f"total of {len(rows):,}",
        *_counted(total, sum(row.open_gaps for row in rows)),
        None,
        None,
        _attempt(_first(row.next_attempt for row in rows), now),
    )


def _counted(counts: Counts, open_gaps: int) -> tuple[Cell, ...]:
    coverage = counts.coverage if counts.expected else None
    return (counts.expected, counts.stored, coverage, open_gaps)


def _attempt(when: int | None, now: int) -> Cell:
    if when is None:
        return None
    return "due now" if when <= now else to_datetime(when).replace(microsecond=0)


def _first(moments: Iterable[int | None]) -> int | None:
    return min((moment for moment in moments if moment is not None), default=None)
