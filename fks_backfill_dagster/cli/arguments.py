"""Arguments of the commands: series and providers, parsed and checked. Times are in `times`.

Every command takes series in the same form: `SYMBOL... [TIMEFRAME]`, or `--all [TIMEFRAME]`. An invalid argument is a
usage error that names the valid ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fks_backfill_dagster.cli.completion import complete_provider, complete_series, complete_symbol
from fks_backfill_dagster.cli.output import log

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Instrument, Series
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.model import Settings

F = TypeVar("F", bound=Callable[..., Any])

MOST_NAMES = 12
"""Series that a sentence names."""


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


def series_arguments(command: F, *, metavar: str = "SYMBOL... [TIMEFRAME]") -> F:
    """`SYMBOL... [TIMEFRAME]`, or `--all [TIMEFRAME]`; given to the command as `names` and `everything`."""
    everything = click.option("--all", "everything", is_flag=True, help="All configured symbols.")
    names = click.argument("names", nargs=-1, metavar=metavar, shell_complete=complete_series)
    return names(everything(command))


def any_series(command: F) -> F:
    """Like `series_arguments`, for a command whose default is all series."""
    return series_arguments(command, metavar="[SYMBOL... [TIMEFRAME]]")


def symbol_arguments(command: F) -> F:
    """`[SYMBOL]...` without a timeframe, given to the command as `names`; see `choose_instruments`."""
    return click.argument("names", nargs=-1, metavar="[SYMBOL]...", shell_complete=complete_symbol)(command)


def choose(catalog: Catalog, names: Sequence[str], everything: bool, stored: Iterable[Series] = ()) -> Chosen:
    """The series selected by the arguments of `series_arguments`.

    A symbol without a timeframe has all of its timeframes. `--all`, globs and symbols without a timeframe select among
    the configured series, and the `stored` ones for a command that reads them; a name that is not configured is looked
    up in `stored` first.
    """
    with usage():
        symbols, timeframe = split(names)
        if bool(symbols) == everything:
            raise ValueError(
                "--all takes a TIMEFRAME at most, no SYMBOL"
                if everything
                else "give a SYMBOL and a TIMEFRAME, such as BTC/USDT 1h, a SYMBOL for all of its timeframes, or --all"
            )
        if len(symbols) == 1 and timeframe and not _is_glob(symbols[0]):
            return Chosen((catalog.find_series(symbols[0], timeframe, stored),), many=False)
        found = [_series_of(catalog, symbol, timeframe, stored) for symbol in symbols or ["*"]]
        return Chosen(_in_order(catalog, dict.fromkeys(one for each in found for one in each)), many=True)


def choose_stored(
    catalog: Catalog, names: Sequence[str], everything: bool, stored: Sequence[Series]
) -> Chosen:
    """Like `choose`, for a command that reads what is stored: without names every stored series."""
    if names or everything:
        return choose(catalog, names, everything, stored)
    return Chosen(tuple(stored), many=True)


def choose_instruments(
    catalog: Catalog, names: Sequence[str], stored: Iterable[Series] = ()
) -> tuple[Instrument, ...]:
    """The configured and stored instruments of these symbols or globs, or all of them if none is named."""
    from fks_backfill_dagster.domain.series import identifier

    known = catalog.known(stored).values()
    found = list(known) if not names else []
    with usage():
        for name in names:
            if is_timeframe(name):
                raise ValueError(
                    f"{name} is a timeframe, and actions belong to a symbol as a whole: leave it out"
                )
            if _is_glob(name):
                found += _matching(catalog, name, None, known)
                continue
            wanted = identifier(name.strip()).upper()
            mine = [one for one in known if identifier(one.symbol).upper() == wanted]
            if not mine:
                nearest = nearest_symbols(name, (one.symbol for one in known))
                raise ValueError(f"{name} is neither configured nor stored; {nearest}")
            found += mine
    return tuple(dict.fromkeys(one.instrument for one in found))


def split(names: Sequence[str]) -> tuple[Sequence[str], str | None]:
    """The symbols among the arguments, and the timeframe after them, if any. Raises ValueError for another order."""
    symbols, timeframe = (names[:-1], names[-1]) if names and is_timeframe(names[-1]) else (names, None)
    if misplaced := next((name for name in symbols if is_timeframe(name)), None):
        raise ValueError(f"{misplaced} must follow the symbols, as in BTC/USDT ETH/USDT 1h")
    return symbols, timeframe


def is_timeframe(text: str) -> bool:
    """Whether an argument is meant as a timeframe, valid or not; no symbol has this form."""
    return re.fullmatch(r"\d+ ?[A-Za-z]{1,5}", text) is not None


def nearest_symbols(wrong: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name or a glob that matches nothing: the three nearest of the known symbols."""
    from difflib import get_close_matches

    names = {symbol.upper(): symbol for symbol in known}
    near = get_close_matches(re.sub(r"[*?\[\]]", "", wrong).upper(), list(names), n=3, cutoff=0.0)
    if not near:
        return "no symbol is configured"
    return f"the nearest: {', '.join(names[one] for one in near)}; `fks-backfill series list` shows all"


def _is_glob(symbol: str) -> bool:
    return re.search(r"[*?\[]", symbol) is not None


def _series_of(
    catalog: Catalog, symbol: str, timeframe: str | None, stored: Iterable[Series]
) -> tuple[Series, ...]:
    if _is_glob(symbol):
        return _matching(catalog, symbol, timeframe, stored)
    if timeframe is None:
        return _of_symbol(catalog, symbol, stored)
    return (catalog.find_series(symbol, timeframe, stored),)


def _of_symbol(catalog: Catalog, written: str, stored: Iterable[Series]) -> tuple[Series, ...]:
    """Every configured or stored series of a symbol in any notation."""
    from fks_backfill_dagster.domain.series import identifier

    wanted = identifier(written.strip()).upper()
    known = catalog.known(stored)
    found = [one for one in known.values() if identifier(one.symbol).upper() == wanted]
    if not found:
        catalog.find_series(written, "1d")  # an error if the form is not that of a symbol
        raise ValueError(
            f"{written} is not configured, so it needs a TIMEFRAME, such as 1h;"
            f" {nearest_symbols(written, (symbol for symbol, _ in known))}"
        )
    return tuple(found)


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
        raise ValueError(
            f"{pattern!r} matches no symbol; {nearest_symbols(pattern, (symbol for symbol, _ in known))}"
        )
    wanted = None if timeframe is None else parse_timeframe(timeframe)
    found = [s for s in known.values() if s.symbol in symbols and wanted in (None, s.timeframe)]
    if not found:
        frames = " ".join(sorted({s.timeframe for s in known.values() if s.symbol in symbols}))
        raise ValueError(
            f"none of these symbols is configured with the timeframe {timeframe}; they have {frames}"
        )
    return tuple(found)


def _in_order(catalog: Catalog, found: Iterable[Series]) -> tuple[Series, ...]:
    """In the order of the settings; those that are only stored at the end."""
    order = {key: position for position, key in enumerate(catalog.known(()))}
    return tuple(sorted(found, key=lambda one: order.get(one.key, len(order))))


def log_never_synced(chosen: Chosen, stored: Iterable[Series]) -> None:
    """For commands about gaps: logs which series have no gap only because they were never synced."""
    synced = {one.key for one in stored}
    never = [one for one in chosen.series if one.key not in synced]
    if len(never) == 1:
        log(
            f"{never[0]}: never synced, so it has no known gaps; run `fks-backfill backfill {never[0]}` first."
        )
    elif never:
        log(f"{named(never)}: never synced, so they have no known gaps; run `fks-backfill backfill` first.")


def named(series: Sequence[Series]) -> str:
    """The first of many series, and how many there are besides."""
    names = ", ".join(str(one) for one in series[:MOST_NAMES])
    return f"{names} and {len(series) - MOST_NAMES:,} more" if len(series) > MOST_NAMES else names


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


def providers_option(command: F) -> F:
    """`--provider`, given to the command as `providers`."""
    option = click.option(
        "--provider",
        "providers",
        multiple=True,
        metavar="P",
        shell_complete=complete_provider,
        help="Request this provider only; repeat it for several, in order of priority.",
    )
    return option(command)


def check_providers(settings: Settings, names: Sequence[str]) -> tuple[str, ...]:
    """The names of the `--provider` options, each known and enabled."""
    with usage():
        settings.check_enabled(names)
    return tuple(names)
