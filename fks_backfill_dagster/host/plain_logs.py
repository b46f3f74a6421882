"""Logs without colours unless written to a terminal.

Dagster's servers always colour their log, and `up` writes it to files.
"""

from __future__ import annotations

import sys

import coloredlogs  # type: ignore[import-untyped]
from dagster._utils.log import define_default_formatter


def write_plain() -> None:
    """Disables colours in this process unless stdout is a terminal. Call it before Dagster creates its loggers."""
    if not sys.stdout.isatty():
        coloredlogs.ColoredFormatter = _plain_formatter


def _plain_formatter(*_: object, **__: object) -> object:
    return define_default_formatter()
