"""What a command is about: series, providers and times as they are written, checked.

All that is wrong with them is a usage error that names what would be right.
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

from fks_backfill_dagster.cli.output import tell

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.settings.model import Settings

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def usage() -> Iterator[None]:
    """A ValueError of the block is the user's: a sentence and exit code 2."""
    try:
        yield
    except ValueError as error:
        raise click.UsageError(str(error), click.get_current_context(silent=True)) from None


# Series -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Chosen:
    """The series a command is about; `many` tells that a list was asked for, even if it has one element."""

    series: tuple[Series, ...]
    many: bool


def series_arguments(command: F, *, metavar: str = "SYMBOL TIMEFRAME") -> F:
    """`SYMBOL TIMEFRAME`, or `--all [TIMEFRAME]`; given to the command as `names` and `everything`."""
    everything = click.option(
        "--all", "everything", is_flag=True, help="All configured symbols; TIMEFRAME may then be left out."
    )
    names = click.argument("names", nargs=-1, metavar=metavar)
    return names(everything(command))


def any_series(command: F) -> F:
    """As `series_arguments`, of a command that takes all series where none is named."""
    return series_arguments(command, metavar="[SYMBOL TIMEFRAME]")


def choose(
    settings: Settings, names: Sequence[str], everything: bool, stored: Iterable[Series] = ()
) -> Chosen:
    """The series meant by the arguments of `series_arguments`.

    `--all` and globs choose among the configured ones, and `stored` ones where a command reads them;
    a name that is not configured means a stored one first.
    """
    with usage():
        if everything:
            if len(names) > 1:
                raise ValueError("--all takes a TIMEFRAME or nothing, no SYMBOL")
            return Chosen(_matching(settings, "*", names[0] if names else None, stored), many=True)
        if len(names) != 2:
            raise ValueError("give a SYMBOL and a TIMEFRAME, such as BTC/USDT 1h, or --all")
        symbol, timeframe = names
        if re.search(r"[*?\[]", symbol):
            return Chosen(_matching(settings, symbol, timeframe, stored), many=True)
        return Chosen((settings.find_series(symbol, timeframe, stored),), many=False)


def _matching(
    settings: Settings, pattern: str, timeframe: str | None, stored: Iterable[Series]
) -> tuple[Series, ...]:
    from fks_backfill_dagster.domain.series import identifier
    from fks_backfill_dagster.settings.types import parse_timeframe

    known = {(s.symbol, s.timeframe): s for s in (*stored, *settings.series())}
    symbols = {
        symbol
        for symbol, _ in known
        if fnmatchcase(symbol, pattern) or fnmatchcase(identifier(symbol), pattern)
    }
    if not symbols:
        names = ", ".join(dict.fromkeys(symbol for symbol, _ in known)) or "none"
        raise ValueError(f"{pattern!r} matches no symbol; there are: {names}")
    wanted = None if timeframe is None else parse_timeframe(timeframe)
    found = [s for s in known.values() if s.symbol in symbols and wanted in (None, s.timeframe)]
    if not found:
        frames = " ".join(sorted({s.timeframe for s in known.values() if s.symbol in symbols}))
        raise ValueError(
            f"none of the symbols has the timeframe {timeframe} in the settings; they have {frames}"
        )
    order = {key: position for position, key in enumerate((s.symbol, s.timeframe) for s in settings.series())}
    return tuple(sorted(found, key=lambda s: order.get((s.symbol, s.timeframe), len(order))))


def tell_never_synced(chosen: Chosen, stored: Iterable[Series]) -> None:
    """For commands about gaps: there are none where nothing was ever synced, which is no good news."""
    synced = {(s.symbol, s.timeframe) for s in stored}
    for one in chosen.series:
        if (one.symbol, one.timeframe) not in synced:
            tell(f"{one}: never synced, so no gap of it is known; run `fks-backfill backfill {one}` first.")


def report_code(settings: Settings, chosen: Chosen, stored: Iterable[Series]) -> int:
    """The exit code of a report: 2 for one series that is neither configured nor stored, which is told, else 0."""
    known = {(s.symbol, s.timeframe) for s in (*stored, *settings.series())}
    for one in chosen.series:
        if (one.symbol, one.timeframe) not in known:
            tell(f"Error: {one} is neither configured nor stored{_meant(settings, one)}")
            return 2
    return 0


def warn_of_typos(settings: Settings, series: Iterable[Series], stored: Iterable[Series]) -> None:
    """For commands that would create a series: tells which one was probably meant, and lets them go on.

    A symbol of which something is stored was meant before, whatever its timeframe.
    """
    known = {one.symbol for one in stored}
    for symbol in dict.fromkeys(one.symbol for one in series):
        if symbol not in known and (meant := settings.nearest_symbol(symbol)):
            tell(f"warning: {symbol} is not configured, did you mean {meant}?")


def _meant(settings: Settings, series: Series) -> str:
    frames = [one.timeframe.value for one in settings.series() if one.symbol == series.symbol]
    if frames:
        return f": {series.symbol} is configured with {' '.join(frames)}."
    near = settings.nearest_symbol(series.symbol)
    return f"; did you mean {near}?" if near else "; see `fks-backfill series list`."


# Providers --------------------------------------------------------------------------------------------


def check_providers(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """The `--provider` options, each of them known and enabled."""
    with usage():
        for name in names:
            if not settings.provider(name).enabled:
                raise ValueError(f"{name} is disabled: set providers.{name}.enabled to true in the settings")
    return tuple(names)


# Times ------------------------------------------------------------------------------------------------


class Moment(click.ParamType[int]):
    """A moment as microseconds since the epoch: ISO 8601, UTC where no zone is given."""

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
    start = click.option("--start", type=Moment(), help="The first candle opens here or later.")
    end = click.option("--end", type=Moment(), help="Every candle opens before this (exclusive).")
    return start(end(command))


def sooner(one: int | None, other: int | None) -> int | None:
    return min((moment for moment in (one, other) if moment is not None), default=None)


def check_window(start: int, end: int, now: int) -> TimeRange:
    """`[start, end)` with something of the past in it."""
    from fks_backfill_dagster.domain.ranges import TimeRange
    from fks_backfill_dagster.domain.timeframe import iso

    with usage():
        if start >= now:
            raise ValueError(f"--start {iso(start)} lies in the future: there are no candles yet")
        if start == end:
            raise ValueError(
                f"--start and --end are both {iso(start)}: --end is exclusive, so nothing is left"
            )
        if start > end:
            raise ValueError(f"--start {iso(start)} lies after --end {iso(end)}: exchange them")
        return TimeRange(start, end)
