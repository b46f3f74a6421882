"""How every connection begins: with patience for a server that recovers, and with the settings that this program
relies on, whatever the settings of the server, the database, the role or the URL.

Belongs here: what holds for all connections, those of `database` (psycopg) and those of Dagster (psycopg2).
Does not belong here: transactions (`database`), the sentences of errors (`errors`).

The settings are SET, not sent as the startup parameter `options`: poolers refuse that one, or ignore it. So what a
user puts into `options` is kept, for all that is not listed here.
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
connections though it had accepted some. A recovery after a crash takes seconds."""

_POLL_SECONDS = 0.25
_PING_SECONDS = 2

# What the code reads and writes depends on these. Isolation: a statement after a lock has to see what was committed
# before it, on connections without a transaction, too.
_SETTINGS = {
    "timezone": "UTC",
    "datestyle": "ISO, MDY",
    "intervalstyle": "postgres",
    "extra_float_digits": "1",
    "standard_conforming_strings": "on",
    "default_transaction_isolation": "read committed",
}

# A batch waits for another one on its series, an upgrade and an audit take as long as they take. A limit that is in
# the URL is meant for this program, and stays.
_TIMEOUTS = {
    "statement_timeout": 15,
    "lock_timeout": 15,
    "idle_in_transaction_session_timeout": 15,
    "idle_session_timeout": 15,
    "transaction_timeout": 17,
}
"""With the first version of PostgreSQL that has it, of those that this program works with."""

_LIBPQ = frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())

_ROUNDS = 5

_log = logging.getLogger(__name__)


def attach(engine: sa.Engine, place: Place, *, search_path: str, is_patient: bool = False) -> None:
    """Every connection of this engine begins as this module has it.

    `is_patient`: also the first one waits for a server that refuses connections. Connecting raises StoreError.
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
        """A connection of the driver, as SQLAlchemy's event `do_connect` has it."""
        named["client_encoding"] = ENCODING
        errors = dialect.loaded_dbapi.Error

        def one_more() -> Any:
            return dialect.connect(*arguments, **named)

        try:
            raw = self._connected(one_more, errors, named)
        except errors as error:
            self._is_patient = False  # whoever waits after this one waits for the same
            raise translate(error, self._place, connecting=True) from shown_cause(error, self._place)
        try:
            self._prepare(raw, one_more)
        except BaseException as error:
            raw.close()
            if isinstance(error, errors):
                raise translate(error, self._place) from shown_cause(error, self._place)
            raise
        self._is_patient = True  # it accepts connections: where it refuses one later, it is being restarted
        return raw

    # waiting ------------------------------------------------------------------------------------------

    def _connected(self, one: Callable[[], Any], errors: type[Exception], named: Mapping[str, Any]) -> Any:
        waiting = Retrying(
            retry=retry_if_exception(
                lambda error: isinstance(error, errors) and self._is_passing(error, named)
            ),
            wait=wait_fixed(_POLL_SECONDS),
            stop=stop_after_delay(PATIENCE_SECONDS),
            before_sleep=self._report,
            reraise=True,
        )
        return waiting(one)

    def _is_passing(self, error: Exception, named: Mapping[str, Any]) -> bool:
        """Whether the server will accept connections in a moment, as far as can be seen.

        Where the words of the error are not known (a server of another language), by libpq's own question, which knows
        the SQLSTATE. It holds all threads up for as long as it takes, so it is asked last and briefly.
        """
        if state := state_of(error):
            return state == NOT_READY
        if isinstance(error, psycopg.errors.ConnectionTimeout):
            return False
        known = {name: value for name, value in named.items() if name in _LIBPQ}
        answer = pq.PGconn.ping(make_conninfo("", **known | {"connect_timeout": _PING_SECONDS}).encode())
        return answer == pq.Ping.REJECT or (answer == pq.Ping.NO_RESPONSE and self._is_patient)

    def _report(self, state: RetryCallState) -> None:
        if state.attempt_number == 1:
            _log.warning("%s is not ready: waiting for it, up to %.0f s.", self._place, PATIENCE_SECONDS)

    # settings -----------------------------------------------------------------------------------------

    def _prepare(self, raw: Any, one_more: Callable[[], Any]) -> None:
        raw.autocommit = True
        backend, encoding = _row(raw, "SELECT pg_backend_pid(), current_setting('server_encoding')")
        if encoding != ENCODING:
            raise UnsuitableServer(
                f"{self._place} stores text as {encoding}, this program needs {ENCODING}: make another one with"
                f" CREATE DATABASE name TEMPLATE template0 ENCODING '{ENCODING}' LOCALE 'C', and name it in"
                " FKS_DATABASE_URL."
            )
        # A pooler answers with a number of its own when it is connected to.
        if backend != raw.info.backend_pid:
            self._refuse_shared_backends(raw, one_more)
        settings = self._settings | dict.fromkeys(_timeouts(raw), "0")
        calls = ", ".join(f"set_config('{name}', '{value}', false)" for name, value in settings.items())
        _row(raw, f"SELECT {calls}")
        raw.autocommit = False

    def _refuse_shared_backends(self, raw: Any, one_more: Callable[[], Any]) -> None:
        """Raises UnsuitableServer where a pooler gives one backend to several sessions in turn.

        Before anything is set: it would be set for other clients.
        """
        with self._lock:
            if self._is_own_backend:
                return
            other = one_more()
            try:
                other.autocommit = True
                if _share_backends(raw, other):
                    raise pooled_by_transaction(self._place, "two sessions were served by one backend")
            finally:
                other.close()
            self._is_own_backend = True


def _share_backends(one: Any, other: Any) -> bool:
    """Whether what one session sets is seen by the other, or lost, while both are open."""
    mark = uuid.uuid4().hex
    seen = "SELECT current_setting('fks.session', true)"
    _row(one, f"SELECT set_config('fks.session', '{mark}', false)")
    for _ in range(_ROUNDS):
        if _row(other, seen) == (mark,) or _row(one, seen) != (mark,):
            return True
    # While the other one is in a transaction, it keeps a backend for itself: there is no turn with luck.
    other.autocommit = False
    _row(other, seen)
    is_lost = _row(one, seen) != (mark,)
    other.rollback()
    return is_lost


def _timeouts(raw: Any) -> list[str]:
    """Those that are switched off in a session: all that its startup parameter `options` does not name."""
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
