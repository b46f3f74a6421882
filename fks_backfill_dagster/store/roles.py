"""Readers: roles of the database that may read the views of the schema, and nothing else of it.

Belongs here: what a reader is granted, and that it keeps up with the schema. Does not belong here: passwords and
who may log in, which are the administrator's; the roles of docs/operations.md that `db init` does not make.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psycopg
import sqlalchemy as sa
from psycopg import sql

from fks_backfill_dagster.store.driver import cursor_of
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.schema import SCHEMA

if TYPE_CHECKING:
    from fks_backfill_dagster.store.database import Database


@dataclass(frozen=True, slots=True)
class Reader:
    """A role that reads the views. `made`: by this call. `granted`: what it was granted by this call."""

    name: str
    made: bool
    can_log_in: bool
    granted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Grant:
    """A privilege on one object, as GRANT and as the question whether a role has it."""

    privilege: str
    kind: str
    object: tuple[str, ...]

    @property
    def text(self) -> str:
        kind = "" if self.kind == "TABLE" else f"{self.kind.lower()} "
        return f"{self.privilege} on {kind}{'.'.join(self.object)}"

    def statement(self, role: str) -> sql.Composed:
        return sql.SQL("GRANT {} ON {} {} TO {}").format(
            sql.SQL(self.privilege), sql.SQL(self.kind), sql.Identifier(*self.object), sql.Identifier(role)
        )

    def is_held(self, cursor: psycopg.Cursor[Any], role: str) -> bool:
        # The name as SQL has it, for has_table_privilege takes it apart; the others take it as it is.
        name = ".".join(f'"{part}"' for part in self.object) if self.kind == "TABLE" else self.object[0]
        question = sql.SQL("SELECT {}(%s::name, %s::text, %s::text)").format(
            sql.Identifier(f"has_{self.kind.lower()}_privilege")
        )
        row = cursor.execute(question, (role, name, self.privilege)).fetchone()
        return bool(row and row[0])


def make_reader(database: Database, name: str) -> Reader:
    """Grants `name` what a reader has; a second call changes nothing. A role that does not exist is made.

    It is made without LOGIN: whether by password, certificate or membership, how somebody logs in is not for this
    program to decide, and no password passes through it. A role that exists keeps whatever else it has.
    Raises StoreError for a superuser, and where this user may not make the role or grant it something.
    """
    with database.begin() as connection, cursor_of(connection) as cursor:
        found = _role(cursor, name)
        made = found is None and _make(connection, database, name)
        is_super, can_log_in = found or _role(cursor, name) or (False, False)
        if is_super:
            raise StoreError(
                f"{name} is a superuser of {database.where} and can do everything: name a role that is none."
            )
        missing = [grant for grant in _grants(cursor) if not grant.is_held(cursor, name)]
        _grant(connection, missing, name)
        left = [grant for grant in missing if not grant.is_held(cursor, name)]
        if left:
            statements = "; ".join(grant.statement(name).as_string(cursor) for grant in left)
            raise StoreError(
                f"The user of {database.where} may not grant all that a reader needs: let the owner of the database"
                f" or of the schema {SCHEMA} run {statements}."
            )
        return Reader(name, made, can_log_in, tuple(grant.text for grant in missing))


def readers(connection: sa.Connection) -> list[str]:
    """The roles that were granted every view there is, apart from their owner; none where there are no views."""
    with cursor_of(connection) as cursor:
        cursor.execute(
            "SELECT r.rolname FROM pg_class c, aclexplode(c.relacl) a, pg_roles r"
            " WHERE c.relkind = 'v' AND c.relnamespace = to_regnamespace(%(schema)s)::oid"
            "   AND a.privilege_type = 'SELECT' AND r.oid = a.grantee AND a.grantee <> c.relowner"
            " GROUP BY r.rolname HAVING count(DISTINCT c.oid) = ("
            "   SELECT count(*) FROM pg_class WHERE relkind = 'v'"
            "   AND relnamespace = to_regnamespace(%(schema)s)::oid)"
            " ORDER BY 1",
            {"schema": SCHEMA},
        )
        return [str(name) for (name,) in cursor]


def grant_views(connection: sa.Connection, names: Iterable[str]) -> None:
    """Grants these readers the views that they do not have yet."""
    with cursor_of(connection) as cursor:
        views = _views(cursor)
        for name in names:
            _grant(connection, [grant for grant in views if not grant.is_held(cursor, name)], name)


def _role(cursor: psycopg.Cursor[Any], name: str) -> tuple[bool, bool] | None:
    """Whether the role is a superuser and whether it can log in; None where there is no such role."""
    return cursor.execute("SELECT rolsuper, rolcanlogin FROM pg_roles WHERE rolname = %s", (name,)).fetchone()


def _make(connection: sa.Connection, database: Database, name: str) -> bool:
    """False where somebody else made it at the same moment: roles belong to the server, not to the database."""
    try:
        with connection.begin_nested(), cursor_of(connection) as cursor:
            cursor.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)))
    except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
        return False
    except psycopg.errors.InsufficientPrivilege:
        with cursor_of(connection) as cursor:
            remedy = sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)).as_string(cursor)
        raise StoreError(
            f"The user of {database.where} may not make the role {name}: let an administrator run {remedy}, and run"
            " this command again."
        ) from None
    return True


def _grants(cursor: psycopg.Cursor[Any]) -> list[_Grant]:
    """What a reader has. CONNECT is everybody's as a rule, but for databases that are closed to the public."""
    row = cursor.execute("SELECT current_database()").fetchone()
    assert row is not None
    return [
        _Grant("CONNECT", "DATABASE", (str(row[0]),)),
        _Grant("USAGE", "SCHEMA", (SCHEMA,)),
        *_views(cursor),
    ]


def _views(cursor: psycopg.Cursor[Any]) -> list[_Grant]:
    cursor.execute("SELECT viewname FROM pg_views WHERE schemaname = %s ORDER BY 1", (SCHEMA,))
    return [_Grant("SELECT", "TABLE", (SCHEMA, str(name))) for (name,) in cursor.fetchall()]


def _grant(connection: sa.Connection, grants: Sequence[_Grant], name: str) -> None:
    """Grants what this user may grant: who may grant nothing gets an error of PostgreSQL, or only a warning."""
    for grant in grants:
        try:
            with connection.begin_nested(), cursor_of(connection) as cursor:
                cursor.execute(grant.statement(name))
        except psycopg.errors.InsufficientPrivilege:
            continue
