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
"""Characters that a column of text keeps if its table must fit a width."""

Cell = str | int | float | bool | datetime | None


def lines(header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> list[str]:
    """Aligned columns, numbers right-aligned. Empty if there are no rows.

    A float is a share, shown in percent. With a `width` the longest texts end in an ellipsis until a line fits;
    numbers and the first column never do, so that a line can be longer than a very narrow terminal.
    """
    if not rows:
        return []
    cells = [[cell(value) for value in row] for row in rows]
    right = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(header))]
    if width is not None:
        header, cells, right = _without_empty(header, cells, right, width)
    widths = _widths(header, cells)
    if width is not None:
        widths = _fitted(widths, _least(cells, right), width)
    return [
        "  ".join(
            _cut(text, size).rjust(size) if to_right else _cut(text, size).ljust(size)
            for text, size, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in (header, *cells)
    ]


def _widths(header: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(header, *cells, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + 2 * (len(widths) - 1)


def _without_empty(
    header: Sequence[str], cells: list[list[str]], right: list[bool], width: int
) -> tuple[Sequence[str], list[list[str]], list[bool]]:
    """A table that is too wide, without the columns in which no row has a value."""
    if _total(_widths(header, cells)) <= width:
        return header, cells, right
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("-", "") for row in cells)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in cells], [right[i] for i in kept]


def _least(cells: Sequence[Sequence[str]], right: Sequence[bool]) -> list[int]:
    """The least width of each column: that of its numbers and of the first column's names, else NARROWEST."""
    longest = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        size if i == 0 or is_number else min(size, NARROWEST)
        for i, (size, is_number) in enumerate(zip(longest, right, strict=True))
    ]


def _fitted(widths: list[int], least: Sequence[int], width: int) -> list[int]:
    """The widths with the widest columns reduced until a line fits, or every column has its least width."""
    widths = list(widths)
    while _total(widths) > width:
        able = [i for i, (size, floor) in enumerate(zip(widths, least, strict=True)) if size > floor]
        if not able:
            break
        widths[max(able, key=lambda i: widths[i])] -= 1
    return widths


def _cut(text: str, size: int) -> str:
    return text if len(text) <= size else f"{text[: size - 1]}{ELLIPSIS}"


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
        quiet=sum(one.quiet for one in counts),
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
