"""Arguments of the commands: series, providers and times, parsed and checked.

An invalid argument is a usage error that names the valid ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fks_backfill_dagster.cli.output import log

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import Settings

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def usage() -> Iterator[None]:
    """Turns a ValueError of the block into a usage error: one sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error), click.get_current_context(silent=True)) from None


# Series -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """The selected series; `many` means that a list was requested, even if it has one element."""

    series: tuple[Series, ...]
    many: bool


def series_arguments(command: F, *, metavar: str = "SYMBOL TIMEFRAME") -> F:
    """`SYMBOL TIMEFRAME`, or `--all [TIMEFRAME]`; given to the command as `names` and `everything`."""
    everything = click.option(
        "--all", "everything", is_flag=True, help="All configured symbols; TIMEFRAME is then optional."
    )
    names = click.argument("names", nargs=-1, metavar=metavar)
    return names(everything(command))


def any_series(command: F) -> F:
    """As `series_arguments`, for a command whose default is all series."""
    return series_arguments(command, metavar="[SYMBOL TIMEFRAME]")


def choose(catalog: Catalog, names: Sequence[str], everything: bool, stored: Iterable[Series] = ()) -> Chosen:
    """The series selected by the arguments of `series_arguments`.

    `--all` and globs select among the configured series, and the `stored` ones for a command that reads them;
    a name that is not configured is looked up in `stored` first.
    """
    with usage():
        if everything:
            if len(names) > 1:
                raise ValueError("--all takes a TIMEFRAME at most, no SYMBOL")
            return Chosen(_matching(catalog, "*", names[0] if names else None, stored), many=True)
        if len(names) != 2:
            raise ValueError("give a SYMBOL and a TIMEFRAME, such as BTC/USDT 1h, or --all")
        symbol, timeframe = names
        if re.search(r"[*?\[]", symbol):
            return Chosen(_matching(catalog, symbol, timeframe, stored), many=True)
        return Chosen((catalog.find_series(symbol, timeframe, stored),), many=False)


def _matching(
    catalog: Catalog, pattern: str, timeframe: str | None, stored: Iterable[Series]
) -> tuple[Series, ...]:
    from fks_backfill_dagster.domain.series import identifier
    from fks_backfill_dagster.settings.types import parse_timeframe

    known = catalog.known(stored)
    symbols = {
        symbol
        for symbol, _ in known
        if fnmatchcase(symbol, pattern) or fnmatchcase(identifier(symbol), pattern)
    }
    if not symbols:
        names = ", ".join(dict.fromkeys(symbol for symbol, _ in known)) or "none"
        raise ValueError(f"{pattern!r} matches no symbol; known: {names}")
    wanted = None if timeframe is None else parse_timeframe(timeframe)
    found = [s for s in known.values() if s.symbol in symbols and wanted in (None, s.timeframe)]
    if not found:
        frames = " ".join(sorted({s.timeframe for s in known.values() if s.symbol in symbols}))
        raise ValueError(
            f"none of these symbols is configured with the timeframe {timeframe}; they have {frames}"
        )
    return tuple(found)


def log_never_synced(chosen: Chosen, stored: Iterable[Series]) -> None:
    """For commands about gaps: logs each series that has no gap only because it was never synced."""
    synced = {s.key for s in stored}
    for one in chosen.series:
        if one.key not in synced:
            log(f"{one}: never synced, so it has no known gaps; run `fks-backfill backfill {one}` first.")


def report_code(catalog: Catalog, chosen: Chosen, stored: Iterable[Series]) -> int:
    """The exit code of a report: 2, with a message, if a series is neither configured nor stored, else 0."""
    known = catalog.known(stored)
    for one in chosen.series:
        if one.key not in known:
            log(f"Error: {one} is neither configured nor stored{_meant(catalog, one)}")
            return 2
    return 0


def warn_of_typos(catalog: Catalog, series: Iterable[Series], stored: Iterable[Series]) -> None:
    """For commands that would create a series: logs a warning with the nearest configured symbol.

    A symbol with stored candles, at any timeframe, is no typo.
    """
    known = {one.symbol for one in stored}
    for symbol in dict.fromkeys(one.symbol for one in series):
        if symbol not in known and (meant := catalog.nearest_symbol(symbol)):
            log(f"warning: {symbol} is not configured, did you mean {meant}?")


def _meant(catalog: Catalog, series: Series) -> str:
    frames = [one.timeframe.value for one in catalog.series if one.symbol == series.symbol]
    if frames:
        return f": {series.symbol} is configured with {' '.join(frames)}."
    near = catalog.nearest_symbol(series.symbol)
    return f"; did you mean {near}?" if near else "; see `fks-backfill series list`."


# Providers --------------------------------------------------------------------------------------------


def check_providers(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the `--provider` options, each known and enabled."""
    with usage():
        settings.check_enabled(names)
    return tuple(names)


# Times ------------------------------------------------------------------------------------------------


class Moment(click.ParamType[int]):
    """A time as microseconds since the epoch: ISO 8601, UTC where no zone is given."""

    name = "time"

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        from fks_backfill_dagster.domain.timeframe import to_micros

        if isinstance(value, int):
            return value
        try:
            parsed = datetime.fromisoformat(value.strip())
            micros = to_micros(parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC))
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a time such as 2024-01-31 or 2024-01-31T12:00:00+00:00", param, ctx)
        if micros < 0:
            self.fail(f"{value!r} lies before 1970", param, ctx)
        return micros


def window_option(command: F) -> F:
    """Adds `--start` and `--end`."""
    start = click.option("--start", type=Moment(), help="Start of the range (inclusive).")
    end = click.option("--end", type=Moment(), help="End of the range (exclusive).")
    return start(end(command))


def sooner(one: int | None, other: int | None) -> int | None:
    return min((moment for moment in (one, other) if moment is not None), default=None)


def check_window(start: int, end: int, now: int) -> TimeRange:
    """`[start, end)`, not empty and not entirely in the future."""
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.timeframe import iso

    with usage():
        if start >= now:
            raise ValueError(f"--start {iso(start)} lies in the future: there are no candles yet")
        if start == end:
            raise ValueError(
                f"--start and --end are both {iso(start)}: --end is exclusive, so the range is empty"
            )
        if start > end:
            raise ValueError(f"--start {iso(start)} lies after --end {iso(end)}: exchange them")
        return TimeRange(start, end)
