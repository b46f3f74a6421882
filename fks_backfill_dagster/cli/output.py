"""Output of all commands: results to stdout, everything else to stderr.

Belongs here: the options that every command spells alike (`--json`, `--verbose`, `--wide`), tables, formatted
numbers and times, the exception of a failed command. Does not belong here: the content of messages.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

_LOGGER = "fks_backfill_dagster"
_VERBOSITY, _WIDE = f"{_LOGGER}.verbosity", f"{_LOGGER}.wide"
"""Keys in the context of a command."""


class Failed(click.ClickException):
    """The command failed: one sentence with the remedy, exit code 1."""

    exit_code = 1


def json_option(command: F) -> F:
    """Adds `--json`, given to the command as `as_json`."""
    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    return option(command)


def verbose_option(command: F) -> F:
    """Adds `-v`; the command reads it from `is_verbose`."""
    option = click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=_set_verbosity,
        help="Print details, such as every batch and the URLs of failed requests; -vv for debug messages too.",
    )
    return option(command)


def wide_option(command: F) -> F:
    """Adds `--wide`, which `print_table` applies."""
    option = click.option(
        "--wide",
        is_flag=True,
        expose_value=False,
        callback=_set_wide,
        help="Print tables in full, even if they are wider than the terminal.",
    )
    return option(command)


class _Stderr(logging.Handler):
    """The log of our own loggers, above progress bars and in redirected output like any other message."""

    def emit(self, record: logging.LogRecord) -> None:
        log_if_possible(f"{record.levelname.lower()}: {record.getMessage()}")


def _set_verbosity(context: click.Context, option: click.Parameter, count: int) -> None:
    context.meta[_VERBOSITY] = count
    if not count:
        return
    logger, handler = logging.getLogger(_LOGGER), _Stderr()
    before = logger.level
    logger.setLevel(logging.INFO if count == 1 else logging.DEBUG)
    logger.addHandler(handler)

    def restore() -> None:
        logger.setLevel(before)
        logger.removeHandler(handler)

    context.call_on_close(restore)


def _set_wide(context: click.Context, option: click.Parameter, wide: bool) -> None:
    context.meta[_WIDE] = wide


def is_verbose() -> bool:
    """Whether the running command has `-v`."""
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(_VERBOSITY))


def example(*lines: str) -> str:
    """An epilog of examples, one line each, with its line breaks kept."""
    shown = "\n".join(f"  fks-backfill {line}" for line in lines)
    return f"\b\n{'Examples' if len(lines) > 1 else 'Example'}:\n{shown}"


def log(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def log_if_possible(text: str) -> None:
    """Like `log`, for a command that a signal ends: its terminal may be closed."""
    with suppress(OSError):
        log(text)


def is_on_terminal() -> bool:
    """Whether a person can see a question on stderr and answer it."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def confirm(question: str, refusal: str) -> None:
    """Asks on stderr. Raises Failed with `refusal` for any answer but yes."""
    try:
        click.confirm(question, abort=True, err=True)
    except click.Abort:
        log("")  # ends the line of the prompt
        raise Failed(refusal) from None


def print_line(text: str) -> None:
    """A line of the result."""
    click.echo(text)


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns, which fit the terminal unless `--wide` is given; see `tables.lines`."""
    from fks_backfill_dagster import tables  # imports numpy: not for --help

    for line in tables.lines(header, rows, _width()):
        print_line(line if _is_encodable(tables.ELLIPSIS) else line.replace(tables.ELLIPSIS, "~"))


def _is_encodable(text: str) -> bool:
    """Whether the encoding of stdout, that of the locale, has these characters."""
    try:
        text.encode(sys.stdout.encoding)
    except UnicodeEncodeError:
        return False
    return True


def _width() -> int | None:
    """The width of the terminal; None for a pipe or a file, even if COLUMNS is exported, and with `--wide`."""
    context = click.get_current_context(silent=True)
    if (context is not None and context.meta.get(_WIDE)) or not sys.stdout.isatty():
        return None
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError):
        return None


def short(when: datetime) -> str:
    """See `tables.short`."""
    from fks_backfill_dagster import tables

    return tables.short(when)


def many(number: int, noun: str) -> str:
    """`1 batch`, `2 batches`, `4,308 candles`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    if noun == "series":
        plural = noun
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        plural = f"{noun[:-1]}ies"
    return f"{number:,} {noun if number == 1 else plural}"


def duration(seconds: float) -> str:
    """An estimate from the rate limits, so two units are enough."""
    if seconds < 1:
        return "< 1 s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
