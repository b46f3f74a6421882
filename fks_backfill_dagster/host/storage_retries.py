"""Retries for Dagster's storage while the database is unavailable.

Dagster waits about ten seconds for a connection, and a statement that loses its connection fails: a run whose event
is lost fails, although its work could continue. Here a call that loses the database is retried until the database is
available. Each call is a transaction of its own, so at worst an event is stored twice: when its commit succeeded
without a response.

Does not belong here: restarting the database (`keeper`), the project's own tables (`store`).
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
"""SQLSTATE prefixes: connection failure, server shutdown or startup."""

_logger = logging.getLogger("dagster.storage")


def add_retries(storage: object) -> None:
    """Wraps each public method of this storage in `with_retries`."""
    for name in dir(type(storage)):
        method = inspect.getattr_static(type(storage), name)
        if not name.startswith("_") and inspect.isfunction(method):
            setattr(storage, name, with_retries(getattr(storage, name)))


def with_retries(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, retried while the database is unavailable, for AWAY_SECONDS at most."""

    @wraps(call)
    def retrying(*arguments: Any, **options: Any) -> Any:
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            try:
                return call(*arguments, **options)
            except Exception as error:
                if not is_away(error) or time.monotonic() > deadline:
                    raise
                _logger.warning(f"The database is unavailable, {call.__name__} is retried: {error}")
            time.sleep(_PAUSE_SECONDS)

    return retrying


def is_away(error: Exception) -> bool:
    """Whether the error of Dagster's storage is a lost or failed connection to the database."""
    if isinstance(
        error, DagsterPostgresException | DatabaseUnavailable
    ):  # "too many retries for DB connection"
        return not isinstance(error, UnsuitableServer)
    state = getattr(getattr(error, "orig", None), "pgcode", None) or ""
    return bool(getattr(error, "connection_invalidated", False)) or state.startswith(_AWAY)
