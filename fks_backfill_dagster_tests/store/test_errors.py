"""Error messages of the database: one sentence with the place and the remedy, without the password."""

from __future__ import annotations

import logging
import subprocess
import sys
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.store import database as database_module
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import (
    DatabaseFull,
    DatabaseUnavailable,
    Place,
    StoreError,
    UnsuitableServer,
    translate,
)
from fks_backfill_dagster_tests.postgres import TIMESCALE_URL
from fks_backfill_dagster_tests.store.builders import Shelf, execute
from fks_backfill_dagster_tests.store.conftest import fresh

PASSWORD = "hunter2"


def as_user(url: str, **changes: Any) -> str:
    """The same address with a password, and with other parts changed."""
    parsed = sa.make_url(url).set(password=PASSWORD, **changes)
    return parsed.render_as_string(hide_password=False)


def message_of(url: str, kind: type[StoreError] = DatabaseUnavailable) -> str:
    """The error message when the database is opened and queried; the password is not in it."""
    with pytest.raises(kind) as caught:
        Database(url).check()
    message = str(caught.value)
    assert PASSWORD not in message
    assert "\n" not in message
    return message


@contextmanager
def role(url: str, options: str) -> Iterator[str]:
    """A role of the server for the time of a test."""
    name = f"fks_test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {name} {options}")
        try:
            yield name
        finally:
            connection.execute(f"DROP OWNED BY {name}")
            connection.execute(f"DROP ROLE {name}")


def test_no_server() -> None:
    message = message_of(f"postgresql://fks:{PASSWORD}@127.0.0.1:1/fks")
    assert message.startswith(
        "The database postgresql://fks:***@127.0.0.1:1/fks does not answer (connection failed"
    )
    assert message.endswith(
        "Start it or correct FKS_DATABASE_URL; what was committed is kept, run the same command again."
    )


def test_an_absent_database(server_url: str) -> None:
    message = message_of(as_user(server_url, database="absent"))
    assert "/absent" in message
    assert message.endswith("does not exist. Create it, or correct FKS_DATABASE_URL.")


def test_an_unknown_user(server_url: str) -> None:
    message = message_of(as_user(server_url, username="nobody_of_that_name"))
    assert "refused the login" in message
    assert message.endswith("Correct the user or password in FKS_DATABASE_URL.")


def test_a_user_who_may_not_log_in(server_url: str) -> None:
    with role(server_url, "NOLOGIN") as name:
        assert "refused the login" in message_of(as_user(server_url, username=name))


def test_a_wrong_password(server_url: str) -> None:
    if TIMESCALE_URL is not None:
        pytest.skip("the access rules of a server that is not ours stay as they are")
    with role(server_url, "LOGIN PASSWORD 'another'") as name:
        with psycopg.connect(server_url, autocommit=True) as connection:
            (rules,) = connection.execute("SHOW hba_file").fetchone() or ("",)
            path = Path(rules)
            path.write_text(f"local all {name} scram-sha-256\n{path.read_text()}")
            connection.execute("SELECT pg_reload_conf()")
        assert "refused the login" in message_of(as_user(server_url, username=name))
        without = sa.make_url(server_url).set(username=name)
        assert "refused the login" in message_of(without.render_as_string())


def test_too_many_connections(server_url: str) -> None:
    with role(server_url, "LOGIN CONNECTION LIMIT 0") as name:
        message = message_of(as_user(server_url, username=name))
        assert "has no connection left" in message


@pytest.mark.parametrize(
    "url",
    [
        "",
        "fks",
        f"mysql://fks:{PASSWORD}@127.0.0.1/fks",
        f"postgresql://fks:{PASSWORD}@127.0.0.1:port/fks",
        f"postgresql://fks:begin@{PASSWORD}@127.0.0.1/fks",
        f"postgresql://fks:{PASSWORD}@one:1,two:2/fks",
        f"host=127.0.0.1 user=fks password={PASSWORD}",
        f"postgresql:fks:{PASSWORD}@127.0.0.1/fks",
        f"postgresql://fks%3A{PASSWORD}@127.0.0.1/fks",
        f"postgresql://fks%3A{PASSWORD}%40127.0.0.1/fks",
        f"postgresql://fks?password={PASSWORD}@127.0.0.1/fks",
        f"postgresql://127.0.0.1/fks&password={PASSWORD}",
        f"postgresql://127.0.0.1/fks%3Fpassword={PASSWORD}",
        f"postgresql://127.0.0.1&password={PASSWORD}/fks",
        f"postgresql://127.0.0.1/fks/{PASSWORD}@127.0.0.1",
    ],
)
def test_an_invalid_address(url: str) -> None:
    with pytest.raises(
        DatabaseUnavailable, match="FKS_DATABASE_URL is not a PostgreSQL address such as"
    ) as caught:
        Database(url)
    assert PASSWORD not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg", "postgresql+psycopg2"])
def test_any_scheme_of_postgresql(scheme: str) -> None:
    database = Database(f"{scheme}://fks:{PASSWORD}@127.0.0.1:1/fks")
    assert database.where == "postgresql://fks:***@127.0.0.1:1/fks"


def test_a_password_among_the_parameters() -> None:
    database = Database(f"postgresql:///fks?host=/nowhere&password={PASSWORD}&sslpassword={PASSWORD}")
    assert database.where == "postgresql:///fks?host=%2Fnowhere"
    assert PASSWORD in database.url.render_as_string(hide_password=False)  # and it is still used
    assert PASSWORD not in message_of(f"postgresql:///fks?host=/nowhere&password={PASSWORD}")


def parameters_of_libpq() -> list[str]:
    return [option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()]


PLACE = {"host", "hostaddr", "port", "user", "dbname", "service", "servicefile"}
"""The parameters without which the connection fails, or leads elsewhere."""


def test_the_client_knows_parameters_with_secrets() -> None:
    assert {"password", "passfile", "options", "sslpassword"} <= set(parameters_of_libpq())


@pytest.mark.parametrize(
    "name",
    ["oauth_client_secret", "scram_client_key", "Password", "PASSWORD", "a_parameter_of_tomorrow"],
)
def test_a_parameter_of_another_client_version(name: str) -> None:
    database = Database(f"postgresql://fks@127.0.0.1:1/fks?{name}={PASSWORD}&sslmode=disable")
    assert database.where == "postgresql://fks@127.0.0.1:1/fks?sslmode=disable"
    with pytest.raises(StoreError) as caught:
        database.check()
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    "name", sorted(set(parameters_of_libpq()) - PLACE - set(database_module._SHOWN_PARAMETERS))
)
def test_a_parameter_that_is_not_shown(name: str, server_url: str) -> None:
    """Neither by us, nor in the text of the client or the server, nor in a logged traceback.

    Whether a connection with the value succeeds does not matter.
    """
    url = sa.make_url(server_url).update_query_dict({name: PASSWORD})
    database = Database(url.render_as_string(hide_password=False))
    assert PASSWORD not in database.where
    output = ""
    try:
        database.revision()
    except StoreError as error:
        output = "".join(traceback.format_exception(error))
    finally:
        database.dispose()
    assert PASSWORD not in output


def test_parameter_values_quoted_by_the_client_are_hidden() -> None:
    message = message_of(f"postgresql://fks@127.0.0.1:1/fks?load_balance_hosts={PASSWORD}")
    assert '"***"' in message


def test_the_parameters_of_the_place_are_shown() -> None:
    url = "postgresql://fks@one.example:1/fks?sslmode=require&target_session_attrs=read-write"
    assert Database(url).where == url


def test_several_hosts_are_shown_without_the_password() -> None:
    url = f"postgresql://fks:{PASSWORD}@/fks?host=one.example:1&host=two.example:2&passfile=/home/{PASSWORD}"
    where = Database(url).where
    assert PASSWORD not in where
    assert "one.example" in where
    assert "two.example" in where


# Missing rights -------------------------------------------------------------------------------------------


def test_a_role_that_may_only_read(database: Database, database_url: str) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    with role(database_url, f"LOGIN PASSWORD '{PASSWORD}'") as name:
        execute(
            database,
            f"GRANT USAGE ON SCHEMA fks TO {name}",
            f"GRANT SELECT ON ALL TABLES IN SCHEMA fks TO {name}",
        )
        limited = Database(as_user(database_url, username=name))
        limited.check()
        assert len(shelf.on(limited).read()) == 5
        assert len(shelf.on(limited).read(shelf.now())) == 5
        with pytest.raises(
            StoreError, match=r"does not allow this .* Grant the role the right to its schema fks"
        ):
            shelf.on(limited).put(5, 10)
        limited.dispose()
    assert shelf.status().total_candles == 5


def test_a_role_without_any_right(database_url: str) -> None:
    with role(database_url, f"LOGIN PASSWORD '{PASSWORD}'") as name:
        message = message_of(as_user(database_url, username=name), StoreError)
    assert "permission denied for schema fks" in message


def test_a_database_that_is_read_only(database: Database, database_url: str) -> None:
    shelf = Shelf.of(database, fresh("1h"))
    name = sa.make_url(database_url).database
    execute(database, f'ALTER DATABASE "{name}" SET default_transaction_read_only = on')
    standby = Database(database_url)
    with pytest.raises(DatabaseUnavailable, match=r"is read-only .* Point FKS_DATABASE_URL at the primary"):
        shelf.on(standby).put(0, 5)
    standby.dispose()


def test_a_used_up_quota(database: Database) -> None:
    """The limit on temporary files is a quota that every server has."""
    with pytest.raises(DatabaseFull, match=r"no room left \(temporary file size exceeds .?temp_file_limit"):
        execute(
            database,
            "SET LOCAL temp_file_limit = '64kB'",
            "SET LOCAL work_mem = '64kB'",
            "SELECT count(*) FROM (SELECT n FROM generate_series(1, 200000) n ORDER BY -n OFFSET 1) x",
        )


def test_a_full_disk_at_the_login() -> None:
    """libpq returns the server's text without an SQLSTATE."""
    error = psycopg.OperationalError(
        "connection failed: FATAL:  could not write init file: No space left on device"
    )
    assert isinstance(translate(error, Place("x"), connecting=True), DatabaseFull)


STATES = ["", "08006", "25006", "28P01", "3D000", "53100", "53300", "57P01", "57P03"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("connecting", [True, False])
def test_messages_of_the_embedded_server_name_no_variable(state: str, connecting: bool) -> None:
    """FKS_DATABASE_URL does not apply to it. If it is not running, its log has the reason."""
    kind = psycopg.errors.lookup(state) if state else psycopg.OperationalError
    own, embedded = Place("postgresql://fks@/fks"), Place("postgresql://fks@/fks", log=Path("/home/me/log"))
    output = str(translate(kind("no"), embedded, connecting=connecting))
    assert "FKS_DATABASE_URL" not in output
    assert output.startswith("The embedded PostgreSQL")
    if "FKS_DATABASE_URL" in str(translate(kind("no"), own, connecting=connecting)):
        assert "Its log is /home/me/log" in output


@pytest.mark.parametrize("state", ["42P05", "26000"])
def test_a_pooler_that_was_changed_to_transaction_mode(state: str) -> None:
    """Detected by a statement that was prepared in one session and is executed in another."""
    found = translate(psycopg.errors.lookup(state)('prepared statement "_pg3_0" already exists'), Place("x"))
    assert isinstance(found, UnsuitableServer)
    assert "use the server's own port, or a pool in session mode" in str(found)


def test_out_of_locks_is_not_a_full_disk(database: Database) -> None:
    with pytest.raises(StoreError, match=r"max_locks_per_transaction") as caught:
        execute(
            database,
            "DO $$ BEGIN RAISE EXCEPTION 'out of shared memory' USING ERRCODE = '53200',"
            " HINT = 'You might need to increase max_locks_per_transaction.'; END $$",
        )
    assert not isinstance(caught.value, DatabaseFull)


def test_any_other_error_is_one_line(database: Database) -> None:
    with pytest.raises(StoreError, match=r'reported an error: relation "absent" does not exist$'):
        execute(database, "SELECT * FROM absent")


def test_no_log_holds_the_password(empty_database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Even if the program logs everything, including SQLAlchemy's statements, connections and their failures."""
    caplog.set_level(logging.DEBUG)
    for name in ("sqlalchemy", "sqlalchemy.engine", "sqlalchemy.pool", "psycopg", "alembic"):
        caplog.set_level(logging.DEBUG, name)
    with role(empty_database_url, f"LOGIN SUPERUSER PASSWORD '{PASSWORD}'") as name:
        for url in (
            as_user(empty_database_url, username=name),
            f"postgresql://fks:{PASSWORD}@127.0.0.1:1/fks",
        ):
            database = Database(url)
            with suppress(StoreError):
                database.upgrade()
            database.dispose()
    assert "CREATE SCHEMA" in caplog.text
    assert "connection failed" in caplog.text
    assert PASSWORD not in caplog.text


_INTERRUPTED = """
import sys, sqlalchemy as sa
from fks_backfill_dagster.store.database import Database

database = Database(sys.argv[1])

@sa.event.listens_for(database._engine, "reset")
def interrupt(*_):
    raise KeyboardInterrupt

try:
    with database.begin() as connection:
        connection.execute(sa.text("SELECT 1"))
except KeyboardInterrupt:
    print("interrupted")
"""


def test_an_interruption_in_a_rollback_prints_no_traceback(database_url: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, database_url], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")
