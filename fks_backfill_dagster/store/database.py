"""Opening the database: the engine, the schema's revision, and the errors of both."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import psycopg
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fks_backfill_dagster.store import gap_days, roles, sessions, timescale
from fks_backfill_dagster.store.errors import (
    DatabaseUnavailable,
    Place,
    SchemaTooNew,
    SchemaTooOld,
    StoreError,
    UnsuitableServer,
    translated,
)
from fks_backfill_dagster.store.schema import SCHEMA

# TimescaleDB's oldest supported server; multiranges and UNIQUE NULLS NOT DISTINCT need it too.
OLDEST_SERVER = 15

# Our own SQL is schema-qualified; the schema of an extension is looked up.
SEARCH_PATH = "public"

_MIGRATION_LOCK = 4613731

_DEFAULTS = {"connect_timeout": "10", "application_name": "fks-backfill"}

# SQLAlchemy logs an interruption during a rollback with its traceback, and raises it too. Where logging is not
# configured, Python would print that beside our own message.
logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())


class Database:
    """A PostgreSQL or TimescaleDB with (or about to have) the schema `fks`.

    `url` is a libpq URL; any `postgresql[+driver]://` or `postgres://` form is accepted, anything else
    is a StoreError. Connects on first use. Safe to share between threads; close it with `dispose`.
    `log`: the log of the embedded server, which messages then name instead of FKS_DATABASE_URL.
    """

    def __init__(self, url: str, *, pool_size: int = 8, log: Path | None = None) -> None:
        self.url = _with_driver(url)
        self.where = _without_secrets(self.url)
        self.place = Place(self.where, _hidden(self.url), log)
        self._engine = sa.create_engine(
            self.url,
            pool_size=pool_size,
            pool_pre_ping=True,
            pool_timeout=2 * sessions.PATIENCE_SECONDS,
            isolation_level="READ COMMITTED",
            connect_args={name: value for name, value in _DEFAULTS.items() if name not in self.url.query},
        )
        sessions.attach(self._engine, self.place, search_path=SEARCH_PATH)

    def dispose(self) -> None:
        self._engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end of the block, rolled back by an exception."""
        with translated(self.place), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[sa.Connection]:
        """A read-only transaction that sees the database as of its first query."""
        with translated(self.place), self._engine.connect() as connection:
            frozen = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with frozen.begin():
                yield frozen

    @contextmanager
    def autocommit(self) -> Iterator[sa.Connection]:
        """A connection in autocommit mode."""
        with translated(self.place), self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    # The schema -----------------------------------------------------------------------------------

    def revision(self) -> str | None:
        """The schema's revision; None without a schema."""
        with self.begin() as connection:
            return self._revision(connection)

    def check(self) -> None:
        """Raises a StoreError unless the schema has this program's revision."""
        self._refuse_other_revision(self.revision())

    def ensure(self) -> None:
        """Creates a missing schema; otherwise like `check`. Never upgrades: the error names the command."""
        if self.revision() is None:
            self.upgrade()
        self.check()

    def upgrade(self) -> None:
        """Upgrades the schema to this program's revision. Safe to call from several processes at once.

        A role that could read every view before can read every view afterwards.
        """
        with self.begin() as connection:
            self._refuse_old_server(connection)
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            found = self._revision(connection)
            if found is not None and found not in _known_revisions():
                self._refuse_other_revision(found)
            make_schema(connection, SCHEMA, self.place)
            if found is None:
                self._refuse_foreign_tables(connection)
            if found != _head():
                self._refuse_missing_rights(connection)
            readers = roles.readers(connection)
            config = _alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            gap_days.complete(connection)
            roles.grant_views(connection, readers)
            if timescale.install(connection):
                timescale.make_hypertables(connection)

    def _refuse_other_revision(self, found: str | None) -> None:
        head = _head()
        if found == head:
            return
        if found is None:
            raise SchemaTooOld(
                f"The database {self.where} has no schema {SCHEMA} yet: run `fks-backfill db init`."
            )
        if found in _known_revisions():
            raise SchemaTooOld(
                f"The database {self.where} has schema revision {found}, this program needs {head}:"
                " run `fks-backfill db upgrade`."
            )
        raise SchemaTooNew(
            f"The database {self.where} has schema revision {found}, made by a newer fks-backfill"
            f" (this one knows up to {head}): upgrade this program."
        )

    def _refuse_old_server(self, connection: sa.Connection) -> None:
        version = connection.scalar(sa.text("SELECT current_setting('server_version_num')::int / 10000")) or 0
        if version < OLDEST_SERVER:
            raise DatabaseUnavailable(
                f"The database {self.where} is PostgreSQL {version}; {OLDEST_SERVER} or newer is needed."
                " Upgrade the server or point FKS_DATABASE_URL at another one."
            )

    def _revision(self, connection: sa.Connection) -> str | None:
        context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
        found = sorted(context.get_current_heads())
        if len(found) > 1:
            raise StoreError(
                f"{self.place} has {len(found)} schema revisions ({', '.join(found)}) in {SCHEMA}.alembic_version,"
                " which holds one: a backup was restored over another schema. Restore it into an empty database, or"
                f" keep the newest revision (DELETE FROM {SCHEMA}.alembic_version WHERE version_num <> '{found[-1]}')"
                " and run `fks-backfill audit`."
            )
        return found[0] if found else None

    def _refuse_missing_rights(self, connection: sa.Connection) -> None:
        """Besides rights on the schema, a commit needs TEMPORARY: it stages candles in a temporary table."""
        query = (
            "SELECT current_user, current_database(), has_schema_privilege(:schema, 'CREATE'),"
            " has_database_privilege(current_database(), 'TEMPORARY')"
        )
        role, database, may_create, may_stage = connection.execute(sa.text(query), {"schema": SCHEMA}).one()
        grants = []
        if not may_create:
            grants.append(f'ALTER SCHEMA {SCHEMA} OWNER TO "{role}"')
        if not may_stage:
            grants.append(f'GRANT TEMPORARY ON DATABASE "{database}" TO "{role}"')
        if grants:
            raise UnsuitableServer(
                f"{self.place} gives its role {role} too few rights: let an administrator run {'; '.join(grants)}."
            )

    def _refuse_foreign_tables(self, connection: sa.Connection) -> None:
        """A schema without a revision must be empty: ours always has one."""
        query = (
            "SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace(:name)"
            " AND relkind IN ('r', 'p', 'v') AND relname <> 'alembic_version'"
        )
        if connection.scalar(sa.text(query), {"name": SCHEMA}):
            raise UnsuitableServer(
                f"{self.place} has tables in the schema {SCHEMA} and no revision in {SCHEMA}.alembic_version: restore"
                " the schema as a whole from a backup, move it away (ALTER SCHEMA fks RENAME TO ...), or name another"
                " database in FKS_DATABASE_URL."
            )

    def has_timescale(self) -> bool:
        with self.begin() as connection:
            query = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
            return bool(connection.scalar(sa.text(query)))


def make_schema(connection: sa.Connection, name: str, place: Place) -> None:
    """Creates a missing schema. Raises UnsuitableServer where this role may not."""
    # CREATE SCHEMA IF NOT EXISTS needs the privilege even when the schema exists: check first.
    if connection.scalar(sa.text("SELECT to_regnamespace(:name)"), {"name": name}) is not None:
        return
    may_create = "SELECT current_user, has_database_privilege(current_database(), 'CREATE')"
    role, may = connection.execute(sa.text(may_create)).one()
    if not may:
        raise UnsuitableServer(
            f"{place} has no schema {name}, and its role {role} may not create one: let an administrator run"
            f' CREATE SCHEMA {name} AUTHORIZATION "{role}" in it.'
        )
    connection.execute(sa.text(f"CREATE SCHEMA IF NOT EXISTS {name}"))


def _with_driver(url: str) -> sa.URL:
    # SQLAlchemy's default driver differs between versions: name it.
    scheme, separator, rest = url.partition("://")
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise _no_address()
    try:
        parsed = sa.make_url(f"postgresql+psycopg{separator}{rest}")
    except (sa.exc.ArgumentError, ValueError):  # its text may quote a part of the password
        raise _no_address() from None
    # Messages show these parts. A password with a bare @ would be parsed as the host, one after an encoded colon as
    # the user, and parameters after a wrong separator as the user or the database.
    shown = ((parsed.username, ":=?&"), (unquote(parsed.host or ""), "@=&"), (parsed.database, "@=?&"))
    if any(set(part or "") & set(marks) for part, marks in shown):
        raise _no_address()
    if of_driver := sorted(parsed.query.keys() & _OF_THE_DRIVER):
        raise DatabaseUnavailable(
            f"FKS_DATABASE_URL has the parameter {of_driver[0]}, which belongs to a driver, not to PostgreSQL: remove"
            " it (prepared statements need no setting; a pooler has to be in session mode)."
        )
    return _without_repetitions(parsed)


def _without_repetitions(url: sa.URL) -> sa.URL:
    """Joins repeated `options`; of any other repeated parameter the last one holds, as in libpq. Hosts stay a list."""
    given = {name: values for name, values in url.query.items() if not isinstance(values, str)}
    joined = {
        name: " ".join(values) if name == "options" else values[-1]
        for name, values in given.items()
        if name not in ("host", "port")
    }
    return url.update_query_dict(joined)


# Arguments of psycopg's `connect` that SQLAlchemy would pass on as text.
_OF_THE_DRIVER = frozenset(inspect.signature(psycopg.Connection.connect).parameters) - {"conninfo", "kwargs"}


def _no_address() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "FKS_DATABASE_URL is not a PostgreSQL address such as postgresql://user:password@host:5432/database"
        " (special characters of a password are percent-encoded)."
    )


# The parameters that messages show: enough to find the server. The others include secrets (password, sslpassword,
# oauth_client_secret, scram_client_key), new versions of libpq add more, and `options` may contain any.
_SHOWN_PARAMETERS = frozenset(
    (
        "application_name",
        "channel_binding",
        "connect_timeout",
        "gssencmode",
        "host",
        "hostaddr",
        "port",
        "sslmode",
        "sslrootcert",
        "target_session_attrs",
    )
)

# Masking a shorter value would make messages unreadable.
_SHORTEST_SECRET = 4


def _without_secrets(url: sa.URL) -> str:
    """The address for messages: no password, and only the parameters that cannot be a secret."""
    shown = url.set(drivername="postgresql").difference_update_query(url.query.keys() - _SHOWN_PARAMETERS)
    return shown.render_as_string(hide_password=True)


def _hidden(url: sa.URL) -> tuple[str, ...]:
    """Values that a driver's or a server's message may quote and ours must not: of the parameters that are not shown.

    Longest first; of `options` (`-c name=value`) each value separately.
    """
    given = [value for name in url.query.keys() - _SHOWN_PARAMETERS for value in url.normalized_query[name]]
    words = [word.partition("=")[2] or word for value in given for word in value.split()]
    found = {text for text in (*given, *words) if len(text) >= _SHORTEST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def _alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_alembic_config())


def _head() -> str:
    head = _scripts().get_current_head()
    assert head is not None
    return head


def _known_revisions() -> set[str]:
    return {script.revision for script in _scripts().walk_revisions()}
