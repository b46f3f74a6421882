"""Loss of the database during a run: the run waits and continues, or fails and is retried by Dagster.

All work can be repeated at any time: committed candles are not requested again.

Does not belong here: runs whose worker is gone (`host.launcher`), Dagster's own storage (`host.storage_retries`).
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
    """The part of an op's context that is used here."""

    @property
    def instance(self) -> DagsterInstance: ...

    @property
    def run(self) -> DagsterRun: ...


@contextmanager
def retried(context: RunContext) -> Iterator[None]:
    """Marks a run that fails in the block because of the database for a retry by Dagster.

    dagster.yaml disables retries of all other op failures.
    """
    try:
        yield
    except DatabaseUnavailable:
        context.instance.add_run_tags(context.run.run_id, {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "true"})
        raise


def wait_until_available(database: Database, seconds: float = AWAY_SECONDS) -> bool:
    """Waits until the database responds, `seconds` at most. False if it does not."""
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
