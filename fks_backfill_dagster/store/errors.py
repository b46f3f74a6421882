"""What can go wrong with the database, in words for its user.

StoreError                 one sentence with the remedy
  DatabaseUnavailable      it does not answer, does not exist, or refuses the login
  SchemaTooOld             made by an older fks-backfill
  SchemaTooNew             made by a newer fks-backfill
  DatabaseFull             no space left, or a quota is used up
  SeriesChanged            a series is stored as one of another asset class or calendar
  MixedSources             it holds candles of documented hosts, and the settings name custom ones, or vice versa
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psycopg
import sqlalchemy as sa


class StoreError(Exception):
    """Base of all database errors that a user can do something about."""


class DatabaseUnavailable(StoreError):
    pass


class SchemaTooOld(StoreError):
    pass


class SchemaTooNew(StoreError):
    pass


class DatabaseFull(StoreError):
    pass


class SeriesChanged(StoreError):
    """Concerns one series, and leaves all others alone."""


class MixedSources(StoreError):
    """Raised before anything is requested; see `store.sources`."""


# libpq tells why a connection failed in words only, without the SQLSTATE. A server that speaks
# another language is then understood as one that does not answer, with its words quoted.
_AT_THE_DOOR = (
    (re.compile(r'FATAL: +database ".*" does not exist'), "3D000"),
    (re.compile(r'FATAL: +\w+ authentication failed|FATAL: +role ".*"|no pg_hba\.conf entry'), "28000"),
    (re.compile(r"no password supplied|password is required"), "28000"),
    (re.compile(r"FATAL: +(sorry, )?(too many|remaining connection slots)"), "53300"),
    (re.compile(r"FATAL: +permission denied for database"), "42501"),
)


@contextmanager
def translated(where: str, hidden: Sequence[str] = ()) -> Iterator[None]:
    """Turns the driver's errors into StoreErrors. `where` is the database without its password.

    What is in `hidden` is asterisks in the sentence. Where the driver's own text holds some of it, that is no
    cause of the StoreError either: causes are logged, and Dagster stores them.
    """
    try:
        yield
    except (sa.exc.DBAPIError, psycopg.Error) as error:
        original = error.orig if isinstance(error, sa.exc.DBAPIError) and error.orig is not None else error
        quoted = any(secret in str(error) for secret in hidden)
        raise _translate(original, where, hidden) from (None if quoted else error)


def _state(error: BaseException) -> str:
    state = getattr(error, "sqlstate", None)
    if state is None:
        return next((state for words, state in _AT_THE_DOOR if words.search(str(error))), "")
    return str(state)


def _said(error: BaseException, hidden: Sequence[str]) -> str:
    """The server's sentence without its CONTEXT and LINE; the whole text where there was no server."""
    said = _text(error)
    for secret in hidden:
        said = said.replace(secret, "***")
    return said


def _text(error: BaseException) -> str:
    diagnosis = error.diag if isinstance(error, psycopg.Error) else None
    if diagnosis is None or diagnosis.message_primary is None:
        return " ".join(str(error).split())
    return " ".join(filter(None, (diagnosis.message_primary, diagnosis.message_hint)))


def _translate(error: BaseException, where: str, hidden: Sequence[str]) -> StoreError:
    state, said = _state(error), _said(error, hidden)
    if state in ("53100", "53400"):
        return DatabaseFull(
            f"The database {where} has no room left ({said}). What was committed is kept;"
            " free space and run the same command again."
        )
    if state == "53300":
        return DatabaseUnavailable(
            f"The database {where} has no connection left ({said}). Raise max_connections or stop other clients."
        )
    if state == "3D000":
        return DatabaseUnavailable(
            f"The database {where} does not exist. Create it, or correct FKS_DATABASE_URL."
        )
    if state.startswith("28"):
        return DatabaseUnavailable(
            f"The database {where} refused the login ({said}). Correct the user or password in FKS_DATABASE_URL."
        )
    if state == "42501":
        return StoreError(
            f"The database {where} does not allow this ({said}). Grant the role the right to its schema fks."
        )
    if state == "25006":
        return DatabaseUnavailable(
            f"The database {where} is read-only ({said}). Point FKS_DATABASE_URL at the primary server."
        )
    if isinstance(error, psycopg.OperationalError) or state.startswith(("08", "57P")):
        return DatabaseUnavailable(
            f"The database {where} does not answer ({said}). Start it or correct FKS_DATABASE_URL;"
            " what was committed is kept, run the same command again."
        )
    return StoreError(f"The database {where} reported an error: {said}")
