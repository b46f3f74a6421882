"""Servers, databases, roles and poolers that are set up in unusual ways: each works, with the right numbers, or
`db init` refuses it in one sentence with the remedy.

A row of the table is a setting that is known to have broken a program of this kind. Add a row, not a test.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import Command
from fks_backfill_dagster_tests.odd_servers import Cluster, folder_for_servers, old_pooler, pgbouncer
from fks_backfill_dagster_tests.postgres import TIMESCALE_URL

TWO_DAYS = ("--start", "2024-01-01", "--end", "2024-01-03")
OUTAGE = TimeRange(instant("2024-01-02T05:00"), instant("2024-01-02T08:00"))


@dataclass(frozen=True)
class Odd:
    """An unusual server.

    creation: the clauses of CREATE DATABASE. server: statements in the server's own database, with {db} and {role};
    database: in the new one. as_role: connected to as {role}, which has no privileges of its own. query: parameters
    of the URL. before: a proxy in front of it; pooled: a pgbouncer with this mode and settings. refusal: part of the
    error of `db init`; None: it works. is_short: part of `make test`; the others are for `make test-slow`.
    """

    name: str
    server: tuple[str, ...] = ()
    database: tuple[str, ...] = ()
    creation: str = ""
    as_role: bool = False
    query: tuple[tuple[str, str], ...] = ()
    before: Callable[[str], AbstractContextManager[str]] = nullcontext
    pooled: tuple[str, ...] = ()
    refusal: str | None = None
    is_short: bool = False


def setting(name: str, value: str, *, is_short: bool = False) -> Odd:
    return Odd(f"{name} = {value}", (f"ALTER DATABASE {{db}} SET {name} = {value}",), is_short=is_short)


OWN_SCHEMAS = (
    "REVOKE CREATE ON DATABASE {db} FROM PUBLIC",
    "GRANT CONNECT, TEMPORARY ON DATABASE {db} TO {role}",
)
HANDED_OVER = ("CREATE SCHEMA fks AUTHORIZATION {role}", "CREATE SCHEMA dagster AUTHORIZATION {role}")

TABLE = (
    setting("datestyle", "'German'", is_short=True),
    setting("datestyle", "'SQL, MDY'"),
    setting("datestyle", "'Postgres, DMY'"),
    setting("intervalstyle", "'sql_standard'"),
    setting("timezone", "'Asia/Kathmandu'"),
    setting("extra_float_digits", "-15"),
    setting("bytea_output", "'escape'"),
    setting("standard_conforming_strings", "off"),
    setting("client_encoding", "'LATIN1'"),
    setting("default_transaction_isolation", "'repeatable read'"),
    setting("default_transaction_isolation", "'serializable'", is_short=True),
    setting("search_path", "''", is_short=True),
    setting("search_path", "'nowhere'"),
    setting("statement_timeout", "5"),
    setting("lock_timeout", "1"),
    setting("idle_in_transaction_session_timeout", "1"),
    setting("transform_null_equals", "on"),
    setting("quote_all_identifiers", "on"),
    setting("array_nulls", "off"),
    setting("timescaledb.disable_load", "'off'"),  # as if the library is loaded without the extension
    Odd(
        "a role's settings",
        ("ALTER ROLE {role} SET datestyle = 'German'", *OWN_SCHEMAS),
        HANDED_OVER,
        as_role=True,
    ),
    Odd("schemas made by an administrator", OWN_SCHEMAS, HANDED_OVER, as_role=True, is_short=True),
    Odd("no schema public", database=("DROP SCHEMA public",)),
    Odd("options in the URL", query=(("options", "-c work_mem=8MB"), ("options", "-c datestyle=German"))),
    Odd("a pooler that refuses options", before=old_pooler, is_short=True),
    Odd("pgbouncer in session mode", pooled=("session",)),
    Odd(
        "pgbouncer that ignores options",
        query=(("options", "-c work_mem=8MB"),),
        pooled=("session", "ignore_startup_parameters = options"),
    ),
    Odd(
        "LATIN1",
        creation="TEMPLATE template0 ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C'",
        refusal="stores text as LATIN1, this program needs UTF8: create another one with CREATE DATABASE",
        is_short=True,
    ),
    Odd(
        "SQL_ASCII",
        creation="TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE_PROVIDER libc LOCALE 'C'",
        refusal="stores text as SQL_ASCII, this program needs UTF8: create another one with CREATE DATABASE",
    ),
    Odd(
        "no right to make schemas",
        OWN_SCHEMAS,
        as_role=True,
        is_short=True,
        refusal="may not create one: let an administrator run CREATE SCHEMA fks AUTHORIZATION",
    ),
    Odd(
        "a schema of another role",
        OWN_SCHEMAS,
        ("CREATE SCHEMA fks", "GRANT USAGE ON SCHEMA fks TO {role}"),
        as_role=True,
        refusal="too few rights: let an administrator run ALTER SCHEMA fks OWNER TO",
    ),
    Odd(
        "no temporary tables",
        ("REVOKE TEMPORARY ON DATABASE {db} FROM PUBLIC",),
        HANDED_OVER,
        as_role=True,
        refusal="too few rights: let an administrator run GRANT TEMPORARY ON DATABASE",
    ),
    Odd(
        "tables without a revision",
        database=("CREATE SCHEMA fks", "CREATE TABLE fks.series (id int)"),
        refusal="has tables in the schema fks and no revision",
    ),
    Odd(
        "two revisions",
        database=(
            "CREATE SCHEMA fks",
            "CREATE TABLE fks.alembic_version (version_num varchar(32) PRIMARY KEY)",
            "INSERT INTO fks.alembic_version VALUES ('0005'), ('0006')",
        ),
        refusal="has 2 schema revisions (0005, 0006)",
    ),
    Odd(
        "a parameter of a driver",
        query=(("prepare_threshold", "0"),),
        refusal="has the parameter prepare_threshold, which belongs to a driver",
    ),
    Odd(
        "options, and a pooler that refuses them",
        query=(("options", "-c work_mem=8MB"),),
        before=old_pooler,
        refusal="Remove the parameter from FKS_DATABASE_URL, or use the server's own port",
    ),
    Odd(
        "pgbouncer in transaction mode",
        pooled=("transaction",),
        is_short=True,
        refusal="is behind a pooler in transaction mode",
    ),
    Odd(
        "pgbouncer in transaction mode, in turn",
        pooled=("transaction", "server_round_robin = 1", "min_pool_size = 4"),
        refusal="is behind a pooler in transaction mode",
    ),
    Odd(
        "pgbouncer in statement mode",
        pooled=("statement",),
        refusal="is behind a pooler in transaction mode",
    ),
)


@contextmanager
def made(odd: Odd, server_url: str) -> Iterator[str]:
    """The URL of a new database of this kind."""
    names = {"db": f"fks_odd_{uuid.uuid4().hex[:12]}", "role": f"fks_odd_{uuid.uuid4().hex[:12]}"}
    parsed = sa.make_url(server_url).set(database=names["db"])
    owners = parsed.render_as_string(hide_password=False)
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {names['db']} {odd.creation}")
        connection.execute(f"CREATE ROLE {names['role']} LOGIN PASSWORD 'pass-of-a-role'")
        try:
            for statement in odd.server:
                connection.execute(statement.format_map(names))
            with psycopg.connect(owners, autocommit=True, options="-c statement_timeout=0") as inside:
                for statement in odd.database:
                    inside.execute(statement.format_map(names))
            if odd.as_role:
                parsed = parsed.set(username=names["role"], password="pass-of-a-role")
            with odd.before(parsed.render_as_string(hide_password=False)) as url:
                joined = sa.make_url(url).update_query_pairs(odd.query, append=True)
                yield joined.render_as_string(hide_password=False)
        finally:
            connection.execute(f"DROP DATABASE {names['db']} WITH (FORCE)")
            connection.execute(f"DROP ROLE {names['role']}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A server open to every account of the machine: a pooler refuses to run as root."""
    with folder_for_servers() as folder:
        running = Cluster.make(folder / "a").start().ready()
        yield running
        running.stop()


@contextmanager
def reachable(odd: Odd, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a database of this kind, through the pooler if there is one."""
    if not odd.pooled:
        with made(odd, request.getfixturevalue("server_url")) as url:
            yield url
        return
    cluster = request.getfixturevalue("cluster")
    with pgbouncer(cluster, *odd.pooled) as pooler, made(odd, cluster.url) as url:
        query = sa.make_url(url).query
        pooled = sa.make_url(pooler.url(url)).update_query_dict(
            {name: value for name, value in query.items() if name not in ("host", "port")}
        )
        yield pooled.render_as_string(hide_password=False)


@pytest.mark.parametrize(
    "odd",
    [pytest.param(odd, id=odd.name, marks=() if odd.is_short else pytest.mark.slow) for odd in TABLE],
)
def test_an_unusual_server_works_or_is_refused(
    odd: Odd,
    request: pytest.FixtureRequest,
    fks: Command,
    world: LocalMarket,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if TIMESCALE_URL is not None and odd.as_role:
        pytest.skip("the access rules of an external server are not changed")
    world.plant_outage("binance", OUTAGE)
    with reachable(odd, request) as url:
        monkeypatch.setenv("FKS_DATABASE_URL", url)
        initialized = fks("db", "init")
        if odd.refusal is not None:
            assert (initialized.exit_code, initialized.stdout) == (1, "") or initialized.exit_code == 2
            assert odd.refusal in initialized.stderr
            assert initialized.stderr.count("\n") == 1
            assert "pass-of-a-role" not in initialized.stderr
            return
        assert initialized.exit_code == 0, initialized.stderr
        synced = fks("backfill", "BTC/USDT", "1h", *TWO_DAYS, "--provider", "binance", "--json")
        assert (synced.json["total_candles"], synced.json["missing"]) == (45, 3), synced.stderr
        status = fks("status", "BTC/USDT", "1h", "--json")
        assert (status.json["status"], status.json["total_candles"]) == ("completed", 45)
        assert status.json["oldest_data"] == "2024-01-01T00:00:00+00:00"
        [gap] = fks("gaps", "BTC/USDT", "1h", *TWO_DAYS, "--json").json
        assert (gap["start"], gap["end"], gap["missing_candles"]) == (
            "2024-01-02T05:00:00+00:00",
            "2024-01-02T08:00:00+00:00",
            3,
        )
        assert fks("audit", "BTC/USDT", "1h").exit_code == 0
