"""The roles of docs/operations.md: the tests run its SQL, and check the rights by using them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql

from fks_backfill_dagster import read_candles
from fks_backfill_dagster.domain.rate_limits import RateLimits, RateWindow
from fks_backfill_dagster.host.storage import DatabaseStorage, dagster_place
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.store import roles
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import StoreError
from fks_backfill_dagster.store.rate_limits import SharedLimiter
from fks_backfill_dagster.store.schema import metadata
from fks_backfill_dagster_tests.postgres import TIMESCALE_URL, needs_timescale
from fks_backfill_dagster_tests.store.builders import Shelf, candles_at, execute, fetch
from fks_backfill_dagster_tests.store.conftest import fresh

PASSWORD = "hunter2"

# Relations of our database, without those of extensions and of PostgreSQL.
RELATIONS = """
SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.relkind IN ('r', 'p', 'v', 'm', 'f', 'S')
  AND n.nspname NOT IN ('pg_catalog', 'information_schema') AND n.nspname NOT LIKE 'pg_toast%'
  AND n.nspname NOT LIKE 'pg_temp%'
  AND NOT EXISTS (
      SELECT FROM pg_depend d
      WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
ORDER BY 1, 2
"""

FUNCTIONS = """
SELECT p.oid::regprocedure::text, p.proname, p.provolatile::text,
       EXISTS (SELECT FROM aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
               WHERE a.grantee = 0 AND a.privilege_type = 'EXECUTE')
FROM pg_proc p WHERE p.pronamespace = 'fks'::regnamespace ORDER BY 1
"""

# Permission denied, or the wrong statement for this kind of relation.
REFUSED = (
    psycopg.errors.InsufficientPrivilege,
    psycopg.errors.WrongObjectType,
    psycopg.errors.ObjectNotInPrerequisiteState,
)

VIEWS = {"ohlcv", "sync_status", "gaps", "corrections", "actions", "findings", "conditions", "validations"}
TABLES_OF_CANDLES = {
    f"candles_{timeframe}" for timeframe in ("1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w")
}
PAST = VIEWS | TABLES_OF_CANDLES | {"alembic_version", "series", "batch", "revision"}


def documented(heading: str) -> str:
    """The SQL below a heading of docs/operations.md."""
    text = (CHECKOUT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {re.escape(heading)}$(.*?)(?=^##)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, heading
    found: list[str] = re.findall(r"^```sql\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)
    assert len(found) == 1, heading
    return found[0]


THE_PROGRAM, A_READER, THE_PAST = (
    documented(heading)
    for heading in ("The program", "A reader", "A reader of the past, and of `read_candles`")
)


class Roles:
    """Unique names instead of those in the document: roles belong to the whole server."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.suffix = uuid.uuid4().hex[:12]
        self.program, self.reader = f"fks_program_{self.suffix}", f"fks_reader_{self.suffix}"
        self.made: list[str] = []

    def run(self, documented_sql: str) -> None:
        """The document's SQL, in the database of the test."""
        text = documented_sql.replace("fks_program", self.program).replace("fks_reader", self.reader)
        text = text.replace("DATABASE candles", f'DATABASE "{sa.make_url(self.url).database}"')
        self.admin(text)
        self.made += [name for name in (self.program, self.reader) if f"CREATE ROLE {name} " in text]

    def admin(self, text: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for statement in filter(str.strip, text.split(";")):
                connection.execute(statement.encode())

    def login(self, name: str) -> str:
        """The URL with which the role logs in."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            text = sql.SQL("ALTER ROLE {} LOGIN PASSWORD {}").format(
                sql.Identifier(name), sql.Literal(PASSWORD)
            )
            connection.execute(text)
        made = sa.make_url(self.url).set(username=name, password=PASSWORD)
        return made.render_as_string(hide_password=False).replace(
            " ", "%20"
        )  # which SQLAlchemy leaves, libpq refuses

    def drop(self) -> None:
        with psycopg.connect(self.url, autocommit=True) as connection:
            for name in self.made:
                role = sql.Identifier(name)
                connection.execute(sql.SQL("DROP OWNED BY {} CASCADE").format(role))
                connection.execute(sql.SQL("DROP ROLE {}").format(role))


@contextmanager
def roles_of(url: str) -> Iterator[Roles]:
    made = Roles(url)
    try:
        yield made
    finally:
        made.drop()


@pytest.fixture
def some(database_url: str) -> Iterator[Roles]:
    """Roles in a database with the schema."""
    with roles_of(database_url) as made:
        yield made


@pytest.fixture
def none_yet(empty_database_url: str) -> Iterator[Roles]:
    """Roles in a database without the schema, from which an administrator revoked the rights of PUBLIC."""
    with roles_of(empty_database_url) as made:
        name = sa.make_url(empty_database_url).database
        made.admin(f'REVOKE ALL ON DATABASE "{name}" FROM PUBLIC')
        if TIMESCALE_URL is not None:
            made.admin("CREATE EXTENSION IF NOT EXISTS timescaledb")
        yield made


def readable(admin: str, role: str) -> set[str]:
    """The relations of the database that the role can read."""
    found = set()
    with psycopg.connect(admin) as connection:
        relations = connection.execute(RELATIONS.encode()).fetchall()
    with psycopg.connect(role, autocommit=True) as connection:
        for schema, name in relations:
            query = sql.SQL("SELECT 1 FROM {} LIMIT 1").format(sql.Identifier(schema, name))
            try:
                connection.execute(query)
            except psycopg.errors.InsufficientPrivilege:
                continue
            found.add(name if schema == "fks" else f"{schema}.{name}")
    return found


def with_dagster(url: str) -> None:
    """Dagster's tables, as `up` makes them."""
    DatabaseStorage(dagster_place(url), makes_tables=True)


# Functions ------------------------------------------------------------------------------------------------


def test_public_may_not_execute_functions_that_write(shared: Database) -> None:
    """The functions that PUBLIC may execute are listed here; the revision that made one gives the reason."""
    found = fetch(shared, FUNCTIONS)
    assert {"ohlcv_as_of", "pace_admit"} <= {str(name) for _, name, _, _ in found}
    everybodys = {name for _, name, volatility, public in found if public and volatility == "v"}
    assert everybodys == {"ohlcv_as_of"}


def test_functions_open_to_public_change_nothing(database: Database) -> None:
    """Tested in a read-only transaction."""
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    named = {"symbol": shelf.series.symbol, "moment": shelf.now()}
    with database.begin() as connection:
        connection.execute(sa.text("SET TRANSACTION READ ONLY"))
        query = "SELECT * FROM fks.ohlcv_as_of(:symbol, '1h', '2024-01-01Z', '2024-02-01Z', :moment)"
        assert len(connection.execute(sa.text(query), named).all()) == 5


# Readers --------------------------------------------------------------------------------------------------


def test_the_document_names_every_view(shared: Database) -> None:
    found = {name for (name,) in fetch(shared, "SELECT viewname FROM pg_views WHERE schemaname = 'fks'")}
    assert found == VIEWS == set(re.findall(r"fks\.(\w+)", A_READER.partition("GRANT SELECT")[2]))


def test_a_reader_reads_the_views_and_nothing_else(some: Roles) -> None:
    with_dagster(some.url)
    some.run(A_READER)
    assert readable(some.url, some.login(some.reader)) == VIEWS


def test_a_reader_of_the_past_reads_the_candles_too(some: Roles) -> None:
    with_dagster(some.url)
    some.run(A_READER)
    some.run(THE_PAST)
    assert readable(some.url, some.login(some.reader)) == PAST


def test_there_are_other_relations(some: Roles) -> None:
    """Otherwise the two tests above would test nothing."""
    with_dagster(some.url)
    everything = readable(some.url, some.url)
    assert {table.name for table in metadata.tables.values()} | VIEWS <= everything
    assert {"dagster.runs", "dagster.event_logs"} <= everything


@pytest.mark.parametrize("of_the_past", [False, True])
def test_a_reader_changes_nothing(some: Roles, of_the_past: bool) -> None:
    some.run(A_READER)
    if of_the_past:
        some.run(THE_PAST)
    with psycopg.connect(some.url) as connection:
        relations = connection.execute(RELATIONS.encode()).fetchall()
        functions = connection.execute(FUNCTIONS.encode()).fetchall()
    with psycopg.connect(some.login(some.reader), autocommit=True) as connection:
        for schema, name in relations:
            relation = sql.Identifier(schema, name)
            for text in ("INSERT INTO {} DEFAULT VALUES", "DELETE FROM {}", "TRUNCATE {}", "DROP TABLE {}"):
                with pytest.raises(REFUSED):
                    connection.execute(sql.SQL(text).format(relation))
        for text in (
            "CREATE TABLE fks.mine (x int)",
            "CREATE SCHEMA mine",
            "CREATE ROLE mine",
            "DROP SCHEMA fks",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(text.encode())
        for signature, name, _, _ in functions:
            if name in ("ohlcv_as_of", "ohlcv_adjusted"):
                continue
            arguments = sql.SQL(", ").join([sql.NULL] * signature.count(",")) + sql.SQL(", NULL")
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match=f"denied for function {name}"):
                connection.execute(sql.SQL("SELECT {}({})").format(sql.Identifier("fks", name), arguments))


def test_a_reader_of_the_past_gets_what_was_held_then(
    some: Roles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_CONFIG", str(tmp_path / "backfill.yaml"))
    (tmp_path / "backfill.yaml").write_text("batch_size_days: 30\n")
    database = Database(some.url)
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 10)
    then = shelf.now()
    shelf.put(0, 10, version=2)
    some.run(A_READER)
    some.run(THE_PAST)
    url = some.login(some.reader)
    symbol = shelf.series.symbol
    before, after = candles_at(shelf.opens(0, 10)), candles_at(shelf.opens(0, 10), 2)
    assert read_candles(symbol, "1h", url=url)["close"].tolist() == after.close.tolist()
    assert read_candles(symbol, "1h", as_of=then, url=url)["close"].tolist() == before.close.tolist()
    database.dispose()


def test_a_reader_of_only_the_views_cannot_read_the_past(some: Roles) -> None:
    some.run(A_READER)
    with (
        psycopg.connect(some.login(some.reader)) as connection,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        connection.execute(
            "SELECT * FROM fks.ohlcv_as_of('A', '1h', '2024-01-01', '2024-01-02', '2024-01-03')"
        )


def test_a_reader_of_the_views_reads_adjusted_candles(some: Roles) -> None:
    """The function runs with the rights of its caller, and reads only views."""
    database = Database(some.url)
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 5)
    some.run(A_READER)
    query = "SELECT close FROM fks.ohlcv_adjusted(%s, '1h', '2024-01-01Z', '2024-01-02Z', 'splits')"
    with psycopg.connect(some.login(some.reader)) as connection:
        rows = connection.execute(query.encode(), (shelf.series.symbol,)).fetchall()
    assert [close for (close,) in rows] == shelf.read().close.tolist()
    database.dispose()


# db init --reader -----------------------------------------------------------------------------------------


def test_the_command_makes_the_reader_of_the_document(some: Roles) -> None:
    with_dagster(some.url)
    database = Database(some.url)
    made = roles.make_reader(database, some.reader)
    some.made.append(some.reader)
    database.dispose()
    assert (made.made, made.can_log_in) == (True, False)
    assert made.granted[-len(VIEWS) :] == tuple(f"SELECT on fks.{view}" for view in sorted(VIEWS))
    assert readable(some.url, some.login(some.reader)) == VIEWS


def test_a_second_time_changes_nothing(some: Roles) -> None:
    some.run(A_READER)
    database = Database(some.url)

    def rights() -> list[tuple[object, ...]]:
        return fetch(
            database,
            "SELECT relname::text, relacl::text, xmin::text FROM pg_class WHERE relnamespace = 'fks'::regnamespace"
            " UNION ALL SELECT nspname::text, nspacl::text, xmin::text FROM pg_namespace"
            " UNION ALL SELECT rolname::text, rolcanlogin::text, xmin::text FROM pg_authid ORDER BY 1",
        )

    ours = {some.reader, *VIEWS, "fks"}
    before = [row for row in rights() if row[0] in ours]
    found = roles.make_reader(database, some.reader)
    assert (found.made, found.granted) == (False, ())
    assert [row for row in rights() if row[0] in ours] == before
    database.dispose()


def test_a_role_that_can_log_in_stays_so(some: Roles) -> None:
    some.admin(f"CREATE ROLE {some.reader} LOGIN")
    some.made.append(some.reader)
    database = Database(some.url)
    found = roles.make_reader(database, some.reader)
    assert (found.made, found.can_log_in) == (False, True)
    assert len(found.granted) >= len(VIEWS) + 1
    database.dispose()


@pytest.mark.parametrize(
    "name", ['a "quoted" one', "Upper", "ünï%s", "semi;DROP ROLE x--", "a'b", ":name", "{}", "sp ace "]
)
def test_a_name_is_taken_as_it_is(some: Roles, name: str) -> None:
    name += some.suffix
    database = Database(some.url)
    assert roles.make_reader(database, name).made
    some.made.append(name)
    assert not roles.make_reader(database, name).made
    assert readable(some.url, some.login(name)) == VIEWS
    database.dispose()


@pytest.mark.parametrize("name", ["public", "pg_of_ours", "none"])
def test_a_name_that_postgresql_reserves(some: Roles, name: str) -> None:
    database = Database(some.url)
    with pytest.raises(StoreError, match=f'"{name}" is reserved'):
        roles.make_reader(database, name)
    database.dispose()


def test_a_superuser_is_refused_as_a_reader(some: Roles) -> None:
    some.admin(f"CREATE ROLE {some.reader} SUPERUSER")
    some.made.append(some.reader)
    database = Database(some.url)
    with pytest.raises(StoreError, match=r"is a superuser .* name another role"):
        roles.make_reader(database, some.reader)
    database.dispose()


def test_the_error_of_a_user_who_may_not_create_roles_names_the_remedy(none_yet: Roles) -> None:
    none_yet.run(THE_PROGRAM)
    database = Database(none_yet.login(none_yet.program))
    database.ensure()
    with pytest.raises(StoreError) as caught:
        roles.make_reader(database, none_yet.reader)
    message = str(caught.value)
    assert PASSWORD not in message
    remedy = f'CREATE ROLE "{none_yet.reader}" NOLOGIN'
    assert message.endswith(
        f"may not create the role {none_yet.reader}: let an administrator run {remedy}, and run this command again."
    )
    none_yet.admin(remedy)
    none_yet.made.append(none_yet.reader)

    # PUBLIC has no rights on the database, and its owner is another role.
    with pytest.raises(
        StoreError, match=r"may not grant every privilege of a reader: let the owner .* run"
    ) as caught:
        roles.make_reader(database, none_yet.reader)
    (grant,) = re.findall(r" run (GRANT CONNECT ON DATABASE .*)\.$", str(caught.value))
    none_yet.admin(grant)
    found = roles.make_reader(database, none_yet.reader)
    assert (found.made, len(found.granted)) == (False, len(VIEWS) + 1)
    assert readable(none_yet.url, none_yet.login(none_yet.reader)) == VIEWS
    database.dispose()


def test_a_reader_cannot_make_a_reader(some: Roles) -> None:
    some.run(A_READER)
    some.run(THE_PAST)
    other = f"fks_other_{some.suffix}"
    some.admin(f"CREATE ROLE {other}")
    some.made.append(other)
    database = Database(some.login(some.reader))
    with pytest.raises(StoreError, match="may not grant every privilege of a reader"):
        roles.make_reader(database, other)
    database.dispose()


# Later versions -------------------------------------------------------------------------------------------


def test_a_view_of_a_later_version_is_granted_by_the_command(some: Roles) -> None:
    some.run(A_READER)
    some.admin("CREATE VIEW fks.later AS SELECT 1 AS x")
    url = some.login(some.reader)
    assert readable(some.url, url) == VIEWS
    database = Database(some.url)
    assert roles.make_reader(database, some.reader).granted == ("SELECT on fks.later",)
    assert readable(some.url, url) == VIEWS | {"later"}
    database.dispose()


def test_an_upgrade_grants_new_views_to_readers_of_every_view(some: Roles) -> None:
    """Only to those: a role with a single view does not get another."""
    some.run(A_READER)
    narrow = f"fks_narrow_{some.suffix}"
    some.admin(
        f"CREATE ROLE {narrow}; GRANT USAGE ON SCHEMA fks TO {narrow}; GRANT SELECT ON fks.ohlcv TO {narrow}"
    )
    some.made.append(narrow)
    database = Database(some.url)
    with database.begin() as connection:
        before = roles.readers(connection)
        connection.execute(sa.text("CREATE VIEW fks.later AS SELECT 1 AS x"))
        roles.grant_views(connection, before)
    assert before == [some.reader]
    assert readable(some.url, some.login(some.reader)) == VIEWS | {"later"}
    assert readable(some.url, some.login(narrow)) == {"ohlcv"}
    database.dispose()


# The program ----------------------------------------------------------------------------------------------


def test_the_program_works_with_the_rights_of_the_document(none_yet: Roles) -> None:
    none_yet.run(THE_PROGRAM)
    url = none_yet.login(none_yet.program)
    database = Database(url)
    database.ensure()
    database.upgrade()
    assert database.has_timescale() is (TIMESCALE_URL is not None)
    shelf = Shelf.of(database, fresh("1h"))
    shelf.put(0, 10)
    shelf.put(0, 10, version=2)
    assert shelf.read().equals(candles_at(shelf.opens(0, 10), 2))
    assert len(shelf.read(shelf.now())) == 10
    assert shelf.audit().differences == ()
    limiter = SharedLimiter(database, {"binance": RateLimits((RateWindow(10),))})
    assert limiter.acquire("binance", 1).wait == 0
    with_dagster(url)
    database.dispose()


@needs_timescale
def test_the_program_makes_hypertables_without_being_a_superuser(none_yet: Roles) -> None:
    none_yet.run(THE_PROGRAM)
    database = Database(none_yet.login(none_yet.program))
    database.ensure()
    found = "SELECT count(*) FROM timescaledb_information.hypertables WHERE hypertable_schema = 'fks'"
    assert fetch(database, found) == [(8,)]
    database.dispose()


def test_the_program_can_do_nothing_else(none_yet: Roles) -> None:
    none_yet.run(THE_PROGRAM)
    none_yet.admin("CREATE SCHEMA other; CREATE TABLE other.secret (x int)")
    url = none_yet.login(none_yet.program)
    database = Database(url)
    database.ensure()
    (rights,) = fetch(
        database,
        "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolreplication OR rolbypassrls FROM pg_roles"
        " WHERE rolname = session_user",
    )
    assert rights == (False,)
    for statement in ("SELECT * FROM other.secret", "CREATE SCHEMA mine", "CREATE TABLE public.mine (x int)"):
        with pytest.raises(StoreError, match="permission denied"):
            execute(database, statement)
    database.dispose()


def test_a_program_that_may_create_schemas_needs_no_administrator(none_yet: Roles) -> None:
    """The alternative: a role with the right to create schemas in the database."""
    name = sa.make_url(none_yet.url).database
    none_yet.admin(
        f"CREATE ROLE {none_yet.program} LOGIN;"
        f' GRANT CONNECT, TEMPORARY, CREATE ON DATABASE "{name}" TO {none_yet.program}'
    )
    none_yet.made.append(none_yet.program)
    url = none_yet.login(none_yet.program)
    database = Database(url)
    database.ensure()
    with_dagster(url)
    database.dispose()


def test_the_error_of_a_program_without_a_schema(none_yet: Roles) -> None:
    none_yet.run(THE_PROGRAM)
    none_yet.admin("DROP SCHEMA fks")
    database = Database(none_yet.login(none_yet.program))
    with pytest.raises(StoreError, match="let an administrator run CREATE SCHEMA fks AUTHORIZATION"):
        database.ensure()
    database.dispose()
