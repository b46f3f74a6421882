"""The server's log file: the output of initdb, the postmaster and the watchdog."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fks_backfill_dagster.embedded.errors import OTHER_DATABASE, EmbeddedError
from fks_backfill_dagster.ownership import open_file

ROTATE_BYTES = 10_000_000
"""A longer log is rotated to `.1` at a start, which replaces the previous one."""

_REASON = re.compile(r"(?:FATAL|PANIC|ERROR|error):\s+(.*)")


class ServerLog:
    """An open log, with the position set by `mark`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._start = 0

    def mark(self) -> None:
        self._start = os.fstat(self.descriptor).st_size

    def failure(self, what: str) -> EmbeddedError:
        """The error "the embedded PostgreSQL `what`", with the reason that the server logged since `mark`."""
        text = os.pread(self.descriptor, 1_000_000, self._start).decode(errors="replace")
        reasons = _REASON.findall(text)
        last = text.strip().splitlines()[-1:] or ["no reason given"]
        reason = (reasons or last)[-1].strip()
        if "No space left on device" in text or "Disk quota exceeded" in text:
            remedy = "free some disk space, or set FKS_HOME to another disk"
        elif "could not look up effective user ID" in text:
            remedy = "run it as a user that has an entry in /etc/passwd, " + OTHER_DATABASE
        else:
            remedy = f"see {self.path} and fix the cause, " + OTHER_DATABASE
        return EmbeddedError(f"the embedded PostgreSQL {what} ({reason}): {remedy}")


def rotate(path: Path) -> None:
    """Call it only while no server runs: a running one would keep writing to the old file."""
    if path.exists() and path.stat().st_size > ROTATE_BYTES:
        path.replace(path.with_name(path.name + ".1"))


@contextmanager
def open_log(path: Path) -> Iterator[ServerLog]:
    descriptor = open_file(path, os.O_RDWR | os.O_APPEND)
    try:
        log = ServerLog(path, descriptor)
        log.mark()
        yield log
    finally:
        os.close(descriptor)
