"""The lease of a series: it shows the status `syncing` while a sync runs, and expires soon after a kill."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from fks_backfill_dagster.providers.base import Cancelled
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import repeated

# A lease survives one or two missed heartbeats, and expires soon after a kill -9.
LEASE_SECONDS = 30.0
_HEARTBEAT_SECONDS = 10.0


@contextmanager
def hold_lease(database: Database, identity: int) -> Iterator[str]:
    """Holds the lease of the series (status `syncing`) while the block runs; it expires soon after a kill."""
    owner = uuid.uuid4().hex
    ended = threading.Event()

    @repeated
    def renew() -> None:
        with database.begin() as connection:
            ledger.hold_lease(connection, identity, owner, LEASE_SECONDS)

    def beat() -> None:
        while not ended.wait(_HEARTBEAT_SECONDS):
            try:
                renew()
            except Exception:  # the next commit fails with the same error and reports it
                continue

    renew()
    heartbeat = threading.Thread(target=beat, name="lease", daemon=True)
    heartbeat.start()
    try:
        yield owner
    finally:
        ended.set()
        heartbeat.join()


def is_interruption(failure: BaseException) -> bool:
    """Whether a sync was interrupted from outside (Ctrl-C, a signal), which is no error of its series.

    An interrupted statement or request raises various errors: the interruption is one of the exceptions in their
    chain of causes.
    """
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, Cancelled) or not isinstance(seen, Exception):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
