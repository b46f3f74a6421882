"""Readers: database roles that may read the views of the schema, and nothing else of it.

Belongs here: the privileges of a reader, and their extension to new views. Does not belong here: passwords and
logins, which an administrator manages; the roles of docs/operations.md that `db init` does not create.
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
    """A role that reads the views. `made`: whether this call created it. `granted`: the privileges it got now."""

    name: str
    made: bool
    can_log_in: bool
    granted: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Grant:
    """A privilege on one object, as GRANT and as a check whether a role has it."""

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
        # has_table_privilege parses a quoted, qualified name; the others take the plain name.
        name = ".".join(f'"{part}"' for part in self.object) if self.kind == "TABLE" else self.object[0]
        check = sql.SQL("SELECT {}(%s::name, %s::text, %s::text)").format(
            sql.Identifier(f"has_{self.kind.lower()}_privilege")
        )
        row = cursor.execute(check, (role, name, self.privilege)).fetchone()
        return bool(row and row[0])


def make_reader(database: Database, name: str) -> Reader:
    """Grants `name` the privileges of a reader, and creates the role if it does not exist. Idempotent.

    A new role has no LOGIN: an administrator decides how it logs in (password, certificate, membership), and no
    password passes through this program. An existing role keeps its other privileges.
    Raises StoreError for a superuser, and where this user may not create the role or grant a privilege.
    """
    with database.begin() as connection, cursor_of(connection) as cursor:
        found = _role(cursor, name)
        made = found is None and _make(connection, database, name)
        is_super, can_log_in = found or _role(cursor, name) or (False, False)
        if is_super:
            raise StoreError(
                f"{name} is a superuser of {database.where} and can do everything: name another role."
            )
        missing = [grant for grant in _grants(cursor) if not grant.is_held(cursor, name)]
        _grant(connection, missing, name)
        refused = [grant for grant in missing if not grant.is_held(cursor, name)]
        if refused:
            statements = "; ".join(grant.statement(name).as_string(cursor) for grant in refused)
            raise StoreError(
                f"The user of {database.where} may not grant every privilege of a reader: let the owner of the database"
                f" or of the schema {SCHEMA} run {statements}."
            )
        return Reader(name, made, can_log_in, tuple(grant.text for grant in missing))


def readers(connection: sa.Connection) -> list[str]:
    """The roles with SELECT on every view, except their owner; empty where there are no views."""
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
    """Grants these readers the views that they cannot read yet."""
    with cursor_of(connection) as cursor:
        views = _views(cursor)
        for name in names:
            _grant(connection, [grant for grant in views if not grant.is_held(cursor, name)], name)


def _role(cursor: psycopg.Cursor[Any], name: str) -> tuple[bool, bool] | None:
    """Whether the role is a superuser and whether it can log in; None for a nonexistent role."""
    return cursor.execute("SELECT rolsuper, rolcanlogin FROM pg_roles WHERE rolname = %s", (name,)).fetchone()


def _make(connection: sa.Connection, database: Database, name: str) -> bool:
    """False where another session created it at the same time: roles belong to the server, not to the database."""
    try:
        with connection.begin_nested(), cursor_of(connection) as cursor:
            cursor.execute(sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)))
    except (psycopg.errors.DuplicateObject, psycopg.errors.UniqueViolation):
        return False
    except psycopg.errors.InsufficientPrivilege:
        with cursor_of(connection) as cursor:
            remedy = sql.SQL("CREATE ROLE {} NOLOGIN").format(sql.Identifier(name)).as_string(cursor)
        raise StoreError(
            f"The user of {database.where} may not create the role {name}: let an administrator run {remedy}, and run"
            " this command again."
        ) from None
    return True


def _grants(cursor: psycopg.Cursor[Any]) -> list[_Grant]:
    """The privileges of a reader. PUBLIC usually has CONNECT, except where it was revoked."""
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
    """Grants what this user may grant. Without the grant option, PostgreSQL raises an error or only warns."""
    for grant in grants:
        try:
            with connection.begin_nested(), cursor_of(connection) as cursor:
                cursor.execute(grant.statement(name))
        except psycopg.errors.InsufficientPrivilege:
            continue
