"""The server's log file: everything that initdb, the postmaster and the watchdog say goes there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fks_backfill_dagster.embedded.errors import OTHER_DATABASE, EmbeddedError
from fks_backfill_dagster.ownership import open_file

ROTATE_BYTES = 10_000_000
"""At a start a longer log becomes `.1`; the one before that goes."""

_REASON = re.compile(r"(?:FATAL|PANIC|ERROR|error):\s+(.*)")


class ServerLog:
    """An open log, and what was written to it since `mark`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self._start = 0

    def mark(self) -> None:
        self._start = os.fstat(self.descriptor).st_size

    def failure(self, what: str) -> EmbeddedError:
        """The embedded PostgreSQL `what`, with the reason that the server gave."""
        text = os.pread(self.descriptor, 1_000_000, self._start).decode(errors="replace")
        reasons = _REASON.findall(text)
        last = text.strip().splitlines()[-1:] or ["no reason given"]
        reason = (reasons or last)[-1].strip()
        if "No space left on device" in text or "Disk quota exceeded" in text:
            remedy = "free some disk space, or set FKS_HOME to another disk"
        elif "could not look up effective user ID" in text:
            remedy = "run it as a user that has an entry in /etc/passwd, " + OTHER_DATABASE
        else:
            remedy = f"the whole story is in {self.path}; mend it, " + OTHER_DATABASE
        return EmbeddedError(f"the embedded PostgreSQL {what} ({reason}): {remedy}")


def rotate(path: Path) -> None:
    """Only while no server runs: it would go on writing into the old one."""
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
