"""Warnings and errors of syncs on stderr: each once per command, and in short form without `-v`.

Belongs here: which messages are repeated, and their short form. Does not belong here: progress (`progress`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from fks_backfill_dagster.cli.output import is_verbose, log

if TYPE_CHECKING:
    from fks_backfill_dagster.domain.series import Series
    from fks_backfill_dagster.pipeline.report import SyncReport

_URL = re.compile(r"https?://([^/\s'\"]+?)(?:/[^\s'\",;)]*?)?(?=[:.]?(?:[\s'\",;)]|$))")
_BODY = re.compile(
    r"""\{.*?"(?:msg|message|description|detail|errorMessage|error_message|error|Note|Information|Error\ Message)"
    \s*:\s*"((?:[^"\\]|\\.)+)          # the text for people, in whichever key the provider has it
    (?:".*?)?(?=$|\ \([a-z]|;\ )""",
    re.VERBOSE,
)
_REMAINING = re.compile(r"\b\d[\d,.]* s\b")


def short(message: str) -> str:
    """A message with hosts instead of URLs, and the text of a JSON body instead of the body."""
    return _URL.sub(r"\1", _BODY.sub(r"\1", message))


def shown(message: str) -> str:
    """The message as this command prints it: complete with `-v`, else short."""
    return _form()(message)


def _form() -> Callable[[str], str]:
    return _complete if is_verbose() else short


def _complete(message: str) -> str:
    return message


def waiting_logger() -> Callable[[str], None]:
    """Logs, from any thread, why requests wait for a provider."""
    form = _form()  # threads have no context of the command
    return lambda sentence: log(f"waiting: {form(sentence)}")


class Messages:
    """The messages of one command. One that concerns a provider is logged for the first series that it occurs with."""

    def __init__(self) -> None:
        self._verbose, self._text = is_verbose(), _form()
        self._logged: set[object] = set()

    def warn(self, series: Series, message: str, line: Callable[[str], object] = log) -> None:
        """Logs a warning of a sync by `line`, unless it was logged before."""
        if self._is_new(series, message):
            line(f"{series}: warning: {self._text(message)}")

    def log_rest(self, report: SyncReport) -> None:
        """Logs the errors of a sync and the warnings about its series that were not logged while it ran; with `-v` all
        errors."""
        for message in report.errors:
            if self._is_new(report.series, message) or self._verbose:
                log(f"Error: {report.series}: {self._text(message)}")
        for message in report.warnings:
            # Most histories begin within the range of a first backfill.
            is_beginning = report.listing is not None and message.endswith(report.listing)
            if not (is_beginning or is_about_a_provider(message)):
                self.warn(report.series, message)

    def _is_new(self, series: Series, message: str) -> bool:
        key = message if self._verbose else _key(series, message)
        if key in self._logged:
            return False
        self._logged.add(key)
        return True


def is_about_a_provider(message: str) -> bool:
    """Whether a message of a sync concerns a provider, and so probably further series."""
    from fks_backfill_dagster.settings.sections import PROVIDER_NAMES

    return message.startswith(PROVIDER_NAMES)


def _key(series: Series, message: str) -> object:
    """Equal for two messages of which one suffices: one provider's, with other URLs and remaining seconds."""
    if not is_about_a_provider(message):
        return series, message
    return _REMAINING.sub("s", short(message)).replace(series.symbol, "")
