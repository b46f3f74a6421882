"""What a run does when it loses the database: it waits and goes on, and is started once more if that does not help.

Everything here may be done again at any time: what was committed is not requested again.

Does not belong here: runs whose worker is gone (`launcher`), Dagster's own storage (`lasting`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from dagster import DagsterInstance, DagsterRun
from dagster._core.storage.tags import RETRY_ON_ASSET_OR_OP_FAILURE_TAG

from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import AWAY_SECONDS, DatabaseUnavailable

_PAUSE_SECONDS = 0.5


class RunContext(Protocol):
    """What every op's context has."""

    @property
    def instance(self) -> DagsterInstance: ...

    @property
    def run(self) -> DagsterRun: ...


@contextmanager
def retried(context: RunContext) -> Iterator[None]:
    """A run that fails in the block for want of the database is retried by Dagster, as one whose worker is gone.

    dagster.yaml has no other failure of an op retried.
    """
    try:
        yield
    except DatabaseUnavailable:
        context.instance.add_run_tags(context.run.run_id, {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "true"})
        raise


def is_back(database: Database, seconds: float = AWAY_SECONDS) -> bool:
    """Waits until the database answers, `seconds` at most."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            database.revision()
        except DatabaseUnavailable:
            if time.monotonic() > deadline:
                return False
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
