"""Dagster's own storage, whose calls outlast a database that is away for seconds.

Dagster waits some ten seconds for a connection, and a statement that loses its connection fails: a run whose event is
lost by that fails, although its work could go on. Here a call that has lost the database is made again until it is
back. Each call is a transaction of its own, so the worst is an event that is stored twice: its first commit was
answered by nothing.

Does not belong here: what restarts the database (`keeper`), our own tables (`store`).
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from dagster_postgres.utils import DagsterPostgresException

from fks_backfill_dagster.store.errors import AWAY_SECONDS, DatabaseUnavailable, UnsuitableServer

_PAUSE_SECONDS = 0.5

_AWAY = ("08", "57P")
"""Of the SQLSTATE: a connection that failed, a server that is ending or starting."""

_logger = logging.getLogger("dagster.storage")


def make_lasting(storage: object) -> None:
    """Has every public method of this storage wait for a database that is away."""
    for name in dir(type(storage)):
        method = inspect.getattr_static(type(storage), name)
        if not name.startswith("_") and inspect.isfunction(method):
            setattr(storage, name, lasting(getattr(storage, name)))


def lasting(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, made again while the database is away, for AWAY_SECONDS at most."""

    @wraps(call)
    def again(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return call(*arguments, **options)
            except Exception as error:
                if not is_away(error) or time.monotonic() > deadline:
                    raise
                _logger.warning(f"The database is away, {call.__name__} waits for it: {error}")
            time.sleep(_PAUSE_SECONDS)

    return again


def is_away(error: Exception) -> bool:
    """Whether Dagster's storage has lost the database, or does not get to it."""
    if isinstance(
        error, DagsterPostgresException | DatabaseUnavailable
    ):  # "too many retries for DB connection"
        return not isinstance(error, UnsuitableServer)
    state = getattr(getattr(error, "orig", None), "pgcode", None) or ""
    return bool(getattr(error, "connection_invalidated", False)) or state.startswith(_AWAY)
