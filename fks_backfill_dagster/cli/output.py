"""Output of all commands: results to stdout, everything else to stderr.

Belongs here: the `--json` option, tables, formatted numbers and times, the exception of a failed
command. Does not belong here: the content of messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


class Failed(click.ClickException):
    """The command failed: one sentence with the remedy, exit code 1."""

    exit_code = 1


def json_option(command: F) -> F:
    """Adds `--json`, given to the command as `as_json`."""
    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    return option(command)


def example(*lines: str) -> str:
    """An epilog of examples, one line each, with its line breaks kept."""
    shown = "\n".join(f"  fks-backfill {line}" for line in lines)
    return f"\b\n{'Examples' if len(lines) > 1 else 'Example'}:\n{shown}"


def log(text: str) -> None:
    """A line on stderr."""
    click.echo(text, err=True)


def log_if_possible(text: str) -> None:
    """As `log`, for a command that a signal ends: its terminal may be closed."""
    with suppress(OSError):
        log(text)


def print_line(text: str) -> None:
    """A line of the result."""
    click.echo(text)


def print_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; see `tables.lines`."""
    from fks_backfill_dagster import tables  # imports numpy: not for --help

    for line in tables.lines(header, rows):
        print_line(line)


def short(when: datetime) -> str:
    """See `tables.short`."""
    from fks_backfill_dagster import tables

    return tables.short(when)


def many(number: int, noun: str) -> str:
    """`1 batch`, `2 batches`, `4,308 candles`."""
    plural = f"{noun}es" if noun.endswith("ch") else f"{noun}s"
    if noun == "series":
        plural = noun
    return f"{number:,} {noun if number == 1 else plural}"
