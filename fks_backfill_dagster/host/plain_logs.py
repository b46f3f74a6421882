"""Logs without colours where they are not written to a terminal.

Dagster's servers colour their log whatever it is written to, and `up` writes it to files.
"""

from __future__ import annotations

import sys

import coloredlogs  # type: ignore[import-untyped]
from dagster._utils.log import define_default_formatter


def write_plain() -> None:
    """Has this process write plain lines, unless to a terminal. To be called before Dagster makes its loggers."""
    if not sys.stdout.isatty():
        coloredlogs.ColoredFormatter = _plain_formatter


def _plain_formatter(*_: object, **__: object) -> object:
    return define_default_formatter()
