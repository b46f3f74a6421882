"""Opening a connection: waits for a server that is recovering, and sets the session settings that this program
relies on, whatever the settings of the server, the database, the role or the URL.

Belongs here: what holds for all connections, those of `database` (psycopg) and those of Dagster (psycopg2).
Does not belong here: transactions (`database`), error messages (`errors`).

The settings are SET, not sent as the startup parameter `options`, which poolers refuse or ignore. The user's own
`options` therefore stay in force, except for the settings listed here.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import psycopg
import sqlalchemy as sa
from psycopg import pq
from psycopg.conninfo import make_conninfo
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_fixed

from fks_backfill_dagster.store.errors import (
    NOT_READY,
    Place,
    UnsuitableServer,
    pooled_by_transaction,
    shown_cause,
    state_of,
    translate,
)

ENCODING = "UTF8"

PATIENCE_SECONDS = 60.0
"""How long a connection waits for a server that is starting, stopping or recovering, and for one that refuses
connections after it has accepted some. A recovery after a crash takes seconds."""

_POLL_SECONDS = 0.25
_PING_SECONDS = 2

# The format of values read and written depends on these. Isolation: a statement after a lock has to see what was
# committed before it, also on autocommit connections.
_SETTINGS = {
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "default_transaction_isolation": "read committed",
}

# Waiting for the lock of a series, an upgrade and an audit have no upper bound. A timeout in the URL is meant for
# this program, and stays in force.
_TIMEOUTS = {
    "statement_timeout": 15,
    "lock_timeout": 15,
    "idle_in_transaction_session_timeout": 15,
    "idle_session_timeout": 15,
    "transaction_timeout": 17,
}
"""Timeouts that a session switches off, by the first supported version of PostgreSQL that has them."""

_LIBPQ = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())

_SHARING_CHECKS = 5

_log = logging.getLogger(__name__)


def attach(engine: sa.Engine, place: Place, *, search_path: str, is_patient: bool = False) -> None:
    """Makes this module open every connection of the engine. Connecting raises StoreError.

    `is_patient`: the first connection, too, waits for a server that refuses connections.
    """
    sa.event.listen(engine, "do_connect", _Sessions(place, search_path, is_patient).connect)


class _Sessions:
    """The connections of one engine; its methods are called from any thread."""

    def __init__(self, place: Place, search_path: str, is_patient: bool) -> None:
        self._place = place
        self._settings = _SETTINGS | {"search_path": search_path}
        self._is_patient = is_patient
        self._lock = threading.Lock()
        self._is_own_backend = False

    def connect(
        self, dialect: sa.Dialect, _record: object, arguments: list[Any], named: dict[str, Any]
    ) -> Any:
        """The driver's connection: the handler of SQLAlchemy's event `do_connect`."""
        named["client_encoding"] = ENCODING
        errors = dialect.loaded_dbapi.Error

        def connect() -> Any:
            return dialect.connect(*arguments, **named)

        try:
            raw = self._connect_with_retries(connect, errors, named)
        except errors as error:
            self._is_patient = False  # later connections fail at once: waiting has failed already
            raise translate(error, self._place, connecting=True) from shown_cause(error, self._place)
        try:
            self._prepare(raw, connect)
        except BaseException as error:
            raw.close()
            if isinstance(error, errors):
                raise translate(error, self._place) from shown_cause(error, self._place)
            raise
        self._is_patient = True  # it accepts connections: a later refusal means a restart
        return raw

    # waiting ------------------------------------------------------------------------------------------

    def _connect_with_retries(
        self, connect: Callable[[], Any], errors: type[Exception], named: Mapping[str, Any]
    ) -> Any:
        retrying = Retrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, errors) and self._is_transient(error, named)
            ),
            wait=wait_fixed(_POLL_SECONDS),
            stop=stop_after_delay(PATIENCE_SECONDS),
            before_sleep=self._report,
            reraise=True,
        )
        return retrying(connect)

    def _is_transient(self, error: Exception, named: Mapping[str, Any]) -> bool:
        """Whether the server is likely to accept connections soon.

        Where the text of the error is not recognized (lc_messages in another language), libpq's ping decides, which
        sees the SQLSTATE. It blocks all threads, so it comes last and with a short timeout.
        """
        if state := state_of(error):
            return state == NOT_READY
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return False
        known = {name: value for name, value in named.items() if name in _LIBPQ}
        ping = pq.PGconn.ping(make_conninfo("", **known | {"connect_timeout": _PING_SECONDS}).encode())
        return ping == pq.Ping.REJECT or (ping == pq.Ping.NO_RESPONSE and self._is_patient)

    def _report(self, state: RetryCallState) -> None:
        if state.attempt_number == 1:
            _log.warning("%s is not ready: waiting for it, up to %.0f s.", self._place, PATIENCE_SECONDS)

    # settings -----------------------------------------------------------------------------------------

    def _prepare(self, raw: Any, connect: Callable[[], Any]) -> None:
        raw.autocommit = True
        backend, encoding = _row(raw, "SELECT pg_backend_pid(), current_setting('server_encoding')")
        if encoding != ENCODING:
            raise UnsuitableServer(
                f"{self._place} stores text as {encoding}, this program needs {ENCODING}: create another one with"
                f" CREATE DATABASE name TEMPLATE template0 ENCODING '{ENCODING}' LOCALE 'C', and name it in"
                " FKS_DATABASE_URL."
            )
        # A pooler reports a pid of its own on connecting.
        if backend != raw.info.backend_pid:
            self._refuse_shared_backends(raw, connect)
        settings = self._settings | dict.fromkeys(_timeouts(raw), "0")
        calls = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in settings.items())
        _row(raw, f"SELECT {calls}")
        raw.autocommit = False

    def _refuse_shared_backends(self, raw: Any, connect: Callable[[], Any]) -> None:
        """Raises UnsuitableServer where a pooler gives one backend to several sessions in turn.

        Runs before any setting is set, which would otherwise apply to other clients.
        """
        with self._lock:
            if self._is_own_backend:
                return
            other = connect()
            try:
                other.autocommit = True
                if _share_backends(raw, other):
                    raise pooled_by_transaction(self._place, "two sessions were served by one backend")
            finally:
                other.close()
            self._is_own_backend = True


def _share_backends(one: Any, other: Any) -> bool:
    """Whether a setting of one session is visible in the other, or lost, while both are open."""
    mark = uuid.uuid4().hex
    seen = "SELECT current_setting('fks.session', true)"
    _row(one, f"SELECT set_config('fks.session', '{mark}', false)")
    for _ in range(_SHARING_CHECKS):
        if _row(other, seen) == (mark,) or _row(one, seen) != (mark,):
            return True
    # A session in a transaction keeps its backend: this makes the outcome deterministic.
    other.autocommit = False
    _row(other, seen)
    is_lost = _row(one, seen) != (mark,)
    other.rollback()
    return is_lost


def _timeouts(raw: Any) -> list[str]:
    """The timeouts to switch off: all that the startup parameter `options` does not name."""
    info = raw.info  # of psycopg, or of psycopg2
    parameters = info.dsn_parameters if hasattr(info, "dsn_parameters") else info.get_parameters()
    given = parameters.get("options", "").replace("-", "_").lower()
    version = info.server_version // 10_000
    return [name for name, since in _TIMEOUTS.items() if name not in given and version >= since]


def _row(raw: Any, query: str) -> tuple[Any, ...]:
    with raw.cursor() as cursor:
        cursor.execute(query)
        row = cursor.fetchone()
    assert row is not None
    return tuple(row)
