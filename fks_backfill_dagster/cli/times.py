"""Times on the command line: `--start`, `--end` and the like, parsed and checked."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fks_backfill_dagster.cli.arguments import usage

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.ranges import TimeRange

F = TypeVar("F", bound=Callable[..., Any])

_FORMS = "2024-01-31, 2024-01, 2024, 2024-01-31T12:00+00:00 or -7d (units m h d w)"

_UNITS = {"m": 60, "h": 3_600, "d": 86_400, "w": 604_800}
"""Seconds."""


class Moment(click.ParamType[int]):
    """A time as microseconds since the epoch: ISO 8601, UTC where no zone is given, or a time before now.

    A year or a month stands for its first instant, at the start of a range as at its end, which is exclusive.
    """

    name = "time"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            micros = _parsed(value.strip())
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a time such as {_FORMS}", param, ctx)
        if micros < 0:
            self.fail(f"{value!r} lies before 1970", param, ctx)
        return micros


def _parsed(text: str) -> int:
    """Raises ValueError or OverflowError for a text of no known form."""
    from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, to_micros

    if relative := re.fullmatch(r"-(\d+) ?([mhdw])", text):
        from fks_backfill_dagster.app import now

        seconds = now() // MICROS_PER_SECOND - int(relative[1]) * _UNITS[relative[2]]
        return seconds * MICROS_PER_SECOND
    if re.fullmatch(r"\d{4}(-\d\d)?", text):
        text += "-01" if "-" in text else "-01-01"
    parsed = datetime.fromisoformat(text)
    return to_micros(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))


def window_option(command: F) -> F:
    """Adds `--start` and `--end`."""
    start = click.option(
        "--start",
        type=Moment(),
        help="Start of the range (inclusive): a time, a month (2024-01), a year (2024), or a time before now (-7d).",
    )
    end = click.option(
        "--end",
        type=Moment(),
        help="End of the range (exclusive), so 2024 or 2024-01 is its first instant, as with --start.",
    )
    return start(end(command))


def sooner(one: int | None, other: int | None) -> int | None:
    return min((moment for moment in (one, other) if moment is not None), default=None)


def check_order(start: int | None, end: int | None) -> None:
    """Raises ValueError for a range that ends where it starts, or before."""
    from fks_backfill_dagster.domain.timeframe import iso

    if start is None or end is None:
        return
    if start == end:
        raise ValueError(
            f"--start and --end are both {iso(start)}: --end is exclusive, so the range is empty"
        )
    if start > end:
        raise ValueError(f"--start {iso(start)} lies after --end {iso(end)}: exchange them")


def check_window(start: int, end: int, now: int) -> TimeRange:
    """`[start, end)`, not empty and not entirely in the future."""
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.timeframe import iso

    with usage():
        if start >= now:
            raise ValueError(f"--start {iso(start)} lies in the future: there are no candles yet")
        check_order(start, end)
        return TimeRange(start, end)
