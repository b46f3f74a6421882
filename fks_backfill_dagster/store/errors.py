"""Database errors, as messages for the operator.

StoreError                 one sentence with the remedy
  DatabaseUnavailable      unreachable, nonexistent, or the login is refused
    ConnectionLost         the connection ended in the middle of a unit of work
    UnsuitableServer       reachable, but its configuration does not work with this program
  SchemaTooOld             made by an older fks-backfill
  SchemaTooNew             made by a newer fks-backfill
  DatabaseFull             no space left, or a quota is used up
  SeriesChanged            a series is stored with another asset class or calendar
  MixedSources             it holds candles of documented hosts, and the settings name custom ones, or vice versa
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg
import sqlalchemy as sa
from tenacity import retry, retry_if_exception, stop_after_attempt


class StoreError(Exception):
    """Base of all database errors that an operator can act on."""


class DatabaseUnavailable(StoreError):
    pass


class ConnectionLost(DatabaseUnavailable):
    """The unit of work is committed either completely or not at all; see `repeated`."""


class UnsuitableServer(DatabaseUnavailable):
    pass


class SchemaTooOld(StoreError):
    pass


class SchemaTooNew(StoreError):
    pass


class DatabaseFull(StoreError):
    pass


class SeriesChanged(StoreError):
    """Concerns one series only."""


class MixedSources(StoreError):
    """Raised before anything is requested; see `store.sources`."""


def _is_lost(error: BaseException) -> bool:
    """Whether the connection was lost, other than by an interruption of this process."""
    chain: BaseException | None = error
    while chain is not None:
        if not isinstance(chain, Exception):
            return False
        chain = chain.__cause__ or chain.__context__
    return isinstance(error, ConnectionLost) or (
        isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    )


AWAY_SECONDS = 120.0
"""How long a run waits for an unavailable database: after a crash, the recovery of its WAL may take minutes."""

ATTEMPTS = 3

repeated = retry(retry=retry_if_exception(_is_lost), stop=stop_after_attempt(ATTEMPTS), reraise=True)
"""Decorates an idempotent unit of work: it is repeated when its connection is lost. The new connection waits for
a server that is recovering (`sessions`)."""


@dataclass(frozen=True, slots=True)
class Place:
    """A database as messages name it.

    where: its address without the password.
    hidden: values that no message may quote, longest first.
    log: the log of the embedded server; None for a server of FKS_DATABASE_URL.
    """

    where: str
    hidden: tuple[str, ...] = ()
    log: Path | None = None

    def __str__(self) -> str:
        return f"The database {self.where}" if self.log is None else "The embedded PostgreSQL"

    def remedy(self, own: str) -> str:
        """`own` concerns FKS_DATABASE_URL; for the embedded server the remedy names its log instead."""
        if self.log is None:
            return own
        return f"Its log is {self.log}; run the same command again, which starts it if it is not running"


# Not an SQLSTATE of PostgreSQL: the response of a pooler to an unknown parameter.
_REFUSED_PARAMETER = "08P01 parameter"

NOT_READY = "57P03"

# libpq reports a failed connection as text only, without the SQLSTATE. With lc_messages in another language it
# counts as unreachable, and the message quotes the text.
_AT_CONNECT = (
    (re.compile(r"No space left on device|Disk quota exceeded"), "53100"),
    (re.compile(r'FATAL: +database ".*" does not exist|no such database'), "3D000"),
    (re.compile(r'FATAL: +\w+ authentication failed|FATAL: +role ".*"|no pg_hba\.conf entry'), "28000"),
    (re.compile(r"no password supplied|password is required"), "28000"),
    (re.compile(r"FATAL: +(sorry, )?(too many|remaining connection slots)"), "53300"),
    (re.compile(r"no more connections allowed|query_wait_timeout"), "53300"),  # pgbouncer
    (re.compile(r"FATAL: +permission denied for database"), "42501"),
    (re.compile(r"FATAL: +the database system is"), NOT_READY),
    (re.compile(r"unsupported startup parameter"), _REFUSED_PARAMETER),
)

# A prepared statement that exists already, or is missing: the backend belongs to another session now.
_OF_ANOTHER_SESSION = frozenset({"42P05", "26000"})
_TIMED_OUT = frozenset({"57014", "55P03", "25P03", "25P04"})
_ENDED_BY_SERVER = frozenset({"57P01", "57P02", "57P04", "57P05"})

OWN_PORT = "use the server's own port, or a pool in session mode (pool_mode = session)"


@contextmanager
def translated(place: Place) -> Iterator[None]:
    """Turns the driver's errors into StoreErrors.

    Values in `place.hidden` are masked with asterisks. A driver's error that contains one is not chained as the
    cause of the StoreError: causes are logged, and Dagster stores them.
    """
    try:
        yield
    except (sa.exc.DBAPIError, sa.exc.TimeoutError, psycopg.Error) as error:
        raise translate(error, place) from shown_cause(error, place)


def translate(error: Exception, place: Place, *, connecting: bool = False) -> StoreError:
    """The StoreError for an error of SQLAlchemy, psycopg or psycopg2. `connecting`: before a session exists."""
    original = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
    state = state_of(original)
    is_lost = isinstance(error, sa.exc.DBAPIError) and error.connection_invalidated
    is_lost = is_lost or state in _ENDED_BY_SERVER or (not state and _is_operational(original))
    return _translate(original, state, place, is_lost=is_lost and not connecting)


def shown_cause(error: Exception, place: Place) -> Exception | None:
    """The error as the cause of its StoreError; None if its text contains a hidden value."""
    return None if any(secret in str(error) for secret in place.hidden) else error


def _is_operational(error: BaseException) -> bool:
    """By the class name that PEP 249 prescribes, because there are two drivers."""
    return any(kind.__name__ == "OperationalError" for kind in type(error).__mro__)


def state_of(error: BaseException) -> str:
    """The SQLSTATE of a driver's error; an empty string if it is unknown."""
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    if state is None:
        return next((state for pattern, state in _AT_CONNECT if pattern.search(str(error))), "")
    return str(state)


def _described(error: BaseException, place: Place) -> str:
    """The server's message without CONTEXT and LINE; the whole text for errors that no server sent."""
    text = _text(error)
    for secret in place.hidden:
        text = text.replace(secret, "***")
    return text


def _text(error: BaseException) -> str:
    diagnosis = getattr(error, "diag", None)
    if diagnosis is None or diagnosis.message_primary is None:
        return " ".join(str(error).split())
    return " ".join(filter(None, (diagnosis.message_primary, diagnosis.message_hint)))


def _translate(error: BaseException, state: str, place: Place, *, is_lost: bool) -> StoreError:
    described = _described(error, place)
    if state in ("53100", "53400"):
        return DatabaseFull(
            f"{place} has no room left ({described}). What was committed is kept;"
            " free space and run the same command again."
        )
    if state == "53300":
        return DatabaseUnavailable(
            f"{place} has no connection left ({described}). Raise max_connections (the size of its pool, where"
            " there is a pooler) or stop other clients."
        )
    if state == "3D000":
        return DatabaseUnavailable(
            f"{place} does not exist. {place.remedy('Create it, or correct FKS_DATABASE_URL')}."
        )
    if state.startswith("28"):
        remedy = place.remedy("Correct the user or password in FKS_DATABASE_URL")
        return DatabaseUnavailable(f"{place} refused the login ({described}). {remedy}.")
    if state == "42501":
        return StoreError(
            f"{place} does not allow this ({described}). Grant the role the right to its schema fks, and"
            " TEMPORARY in the database."
        )
    if state == "25006":
        remedy = place.remedy("Point FKS_DATABASE_URL at the primary server")
        return DatabaseUnavailable(f"{place} is read-only ({described}). {remedy}.")
    if state == NOT_READY:
        return DatabaseUnavailable(
            f"{place} is not ready yet ({described}). Wait until it is, and run the same command again; what was"
            " committed is kept."
        )
    if state == _REFUSED_PARAMETER:
        return UnsuitableServer(
            f"The pooler in front of {place.where} refuses the connection ({described}). Remove the parameter from"
            f" FKS_DATABASE_URL, or {OWN_PORT}."
        )
    if state in _OF_ANOTHER_SESSION:
        return pooled_by_transaction(place, described)
    if state in _TIMED_OUT:
        return StoreError(
            f"{place} canceled a statement ({described}). If FKS_DATABASE_URL sets a timeout in its options,"
            " raise or remove it."
        )
    if is_lost or _is_operational(error) or state.startswith(("08", "57P")):
        return _unanswered(place, described, is_lost=is_lost)
    return StoreError(f"{place} reported an error: {described}")


def _unanswered(place: Place, described: str, *, is_lost: bool) -> StoreError:
    remedy = place.remedy("Start it or correct FKS_DATABASE_URL")
    kind = ConnectionLost if is_lost else DatabaseUnavailable
    if place.log is None:
        remedy += "; what was committed is kept, run the same command again"
    else:
        remedy += "; what was committed is kept"
    return kind(f"{place} does not answer ({described}). {remedy}.")


def pooled_by_transaction(place: Place, seen: str) -> UnsuitableServer:
    """The error for a pooler in transaction mode; `seen`: by what it was detected."""
    return UnsuitableServer(
        f"{place} is behind a pooler in transaction mode ({seen}), in which session settings leak between"
        f" clients: {OWN_PORT} in FKS_DATABASE_URL."
    )
