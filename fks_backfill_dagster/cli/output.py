"""What every command shares in speaking: results to stdout, everything else to stderr.

Belongs here: the `--json` option, tables, numbers and moments for people, the exception of a command
that failed. Does not belong here: what is said.
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
    """The command could not do it: one sentence with the remedy, exit code 1."""

    exit_code = 1


def json_option(command: F) -> F:
    """Adds `--json`, given to the command as `as_json`."""
    option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
    return option(command)


def example(*lines: str) -> str:
    """An epilog of examples: its line breaks are kept, one line of example each."""
    shown = "\n".join(f"  fks-backfill {line}" for line in lines)
    return f"\b\n{'Examples' if len(lines) > 1 else 'Example'}:\n{shown}"


def tell(text: str) -> None:
    """A line for the person at the terminal."""
    click.echo(text, err=True)


def last_words(text: str) -> None:
    """As `tell`, of a command that a signal ends: its terminal may be gone."""
    with suppress(OSError):
        tell(text)


def answer(text: str) -> None:
    """A line of the result."""
    click.echo(text)


def answer_json(document: object) -> None:
    click.echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))


def answer_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; see `tables.lines`."""
    from fks_backfill_dagster import tables  # it brings numpy: not for --help

    for line in tables.lines(header, rows):
        answer(line)


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
