"""Opening the database: the engine, the schema's version, and what to tell when either is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from fks_backfill_dagster.store import roles, timescale
from fks_backfill_dagster.store.errors import DatabaseUnavailable, SchemaTooNew, SchemaTooOld, translated
from fks_backfill_dagster.store.schema import SCHEMA

# TimescaleDB's oldest supported server; multiranges and UNIQUE NULLS NOT DISTINCT need it too.
OLDEST_SERVER = 15

_MIGRATION_LOCK = 4613731

# SQLAlchemy logs an interruption in the middle of a rollback with its traceback, and raises it too. Where nobody
# has configured logging, Python would print that beside our own sentence.
logging.getLogger("sqlalchemy").addHandler(logging.NullHandler())


class Database:
    """A PostgreSQL or TimescaleDB with (or about to have) the schema `fks`.

    `url` is a libpq URL; any `postgresql[+driver]://` or `postgres://` form is taken, anything else
    is a StoreError. Nothing is connected until it is used. Safe to share between threads; close it
    with `dispose`.
    """

    def __init__(self, url: str, *, pool_size: int = 8) -> None:
        self.url = _with_driver(url)
        self.where = _without_secrets(self.url)
        self._hidden = _hidden(self.url)
        self._engine = sa.create_engine(
            self.url,
            pool_size=pool_size,
            pool_pre_ping=True,
            # Whatever the server's default: a statement after a lock has to see what came before it.
            isolation_level="READ COMMITTED",
            connect_args={
                "connect_timeout": 10,
                "application_name": "fks-backfill",
                "options": "-c timezone=UTC",
            },
        )

    def dispose(self) -> None:
        self._engine.dispose()

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A transaction: committed at the end of the block, rolled back by an exception."""
        with translated(self.where, self._hidden), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[sa.Connection]:
        """A transaction that only reads, and sees the database as it was at its first query."""
        with translated(self.where, self._hidden), self._engine.connect() as connection:
            frozen = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with frozen.begin():
                yield frozen

    @contextmanager
    def autocommit(self) -> Iterator[sa.Connection]:
        """A connection on which every statement commits by itself."""
        with translated(self.where, self._hidden), self._engine.connect() as connection:
            yield connection.execution_options(isolation_level="AUTOCOMMIT")

    # The schema -----------------------------------------------------------------------------------

    def revision(self) -> str | None:
        """The schema's revision; None where there is no schema yet."""
        with self.begin() as connection:
            return _revision(connection)

    def check(self) -> None:
        """Raises a StoreError unless the schema is exactly what this program was written for."""
        self._judge(self.revision())

    def ensure(self) -> None:
        """Makes the schema where there is none; otherwise as `check`. An upgrade is asked for, never done."""
        if self.revision() is None:
            self.upgrade()
        self.check()

    def upgrade(self) -> None:
        """Brings the schema to this program's revision. Several processes may call it at once.

        Who could read every view before can do so afterwards.
        """
        with self.begin() as connection:
            self._refuse_old_server(connection)
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            found = _revision(connection)
            if found is not None and found not in _known_revisions():
                self._judge(found)
            # CREATE SCHEMA IF NOT EXISTS needs a right even when the schema exists: ask first.
            if connection.scalar(sa.text("SELECT to_regnamespace(:name)"), {"name": SCHEMA}) is None:
                connection.execute(sa.text(f"CREATE SCHEMA {SCHEMA}"))
            readers = roles.readers(connection)
            config = _alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            roles.grant_views(connection, readers)
            if timescale.install(connection):
                timescale.make_hypertables(connection)

    def _judge(self, found: str | None) -> None:
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

    def has_timescale(self) -> bool:
        with self.begin() as connection:
            query = "SELECT EXISTS (SELECT FROM pg_extension WHERE extname = 'timescaledb')"
            return bool(connection.scalar(sa.text(query)))


def _with_driver(url: str) -> sa.URL:
    # SQLAlchemy would pick a driver by its own default, which changed between versions: name it.
    scheme, separator, rest = url.partition("://")
    if scheme.partition("+")[0] not in ("postgresql", "postgres"):
        raise _no_address()
    try:
        parsed = sa.make_url(f"postgresql+psycopg{separator}{rest}")
    except (sa.exc.ArgumentError, ValueError):  # its text may quote a piece of the password
        raise _no_address() from None
    # These parts are shown. A password with a bare @ would pass for the host, one behind an encoded colon for the
    # user, and parameters behind a wrong separator for the user or the database.
    shown = ((parsed.username, ":=?&"), (unquote(parsed.host or ""), "@=&"), (parsed.database, "@=?&"))
    if any(set(part or "") & set(marks) for part, marks in shown):
        raise _no_address()
    return parsed


def _no_address() -> DatabaseUnavailable:
    return DatabaseUnavailable(
        "FKS_DATABASE_URL is not a PostgreSQL address such as postgresql://user:password@host:5432/database"
        " (special characters of a password are percent-encoded)."
    )


# The parameters that messages show: enough to find the server. libpq has secrets among the others (password,
# sslpassword, oauth_client_secret, scram_client_key), gets new ones with every version, and `options` may hold any.
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

# A shorter value would take its letters out of every word of a message.
_SHORTEST_SECRET = 4


def _without_secrets(url: sa.URL) -> str:
    """The address for messages: no password, and of the parameters those only that cannot be a secret."""
    shown = url.set(drivername="postgresql").difference_update_query(url.query.keys() - _SHOWN_PARAMETERS)
    return shown.render_as_string(hide_password=True)


def _hidden(url: sa.URL) -> tuple[str, ...]:
    """What a driver's or a server's message may quote and ours must not: values of parameters that are not shown.

    Longest first. Of `options` it is each value by itself: `-c name=value`.
    """
    given = [value for name in url.query.keys() - _SHOWN_PARAMETERS for value in url.normalized_query[name]]
    words = [word.partition("=")[2] or word for value in given for word in value.split()]
    found = {text for text in (*given, *words) if len(text) >= _SHORTEST_SECRET}
    return tuple(sorted(found, key=len, reverse=True))


def _revision(connection: sa.Connection) -> str | None:
    context = MigrationContext.configure(connection, opts={"version_table_schema": SCHEMA})
    return context.get_current_revision()


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
