"""`db init --reader`: output and refusals. The privileges of a reader: store/test_roles.py."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster_tests.cli.conftest import Command


@pytest.fixture
def role(database_url: str, settings: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a role that does not exist; if it does after the test, it is dropped."""
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    name = f"fks reader {uuid.uuid4().hex[:12]}"
    yield name
    with psycopg.connect(database_url, autocommit=True) as connection:
        if connection.execute("SELECT FROM pg_roles WHERE rolname = %s", (name,)).fetchone() is not None:
            for text in ("DROP OWNED BY {}", "DROP ROLE {}"):
                connection.execute(sql.SQL(text).format(sql.Identifier(name)))


def test_a_reader_is_created_once(fks: Command, role: str) -> None:
    result = fks("db", "init", "--reader", role)
    assert (result.exit_code, result.stderr) == (0, "")
    first, second = result.stdout.splitlines()
    assert "has the schema fks, revision" in first
    assert second == (
        f"The role {role} was created and is granted USAGE on schema fks, SELECT on fks.corrections,"
        " SELECT on fks.gaps, SELECT on fks.ohlcv, SELECT on fks.sync_status,"
        " SELECT on fks.validations. It cannot log in: grant it to a role that can, or see docs/operations.md, Roles."
    )
    again = fks("db", "init", "--reader", role)
    assert again.stdout.splitlines()[1].startswith(
        f"The role {role} exists and has all privileges of a reader. It cannot log in"
    )


def test_a_reader_as_json(fks: Command, role: str) -> None:
    document = fks("db", "init", "--reader", role, "--json").json
    assert document["reader"]["name"] == role
    assert (document["reader"]["made"], document["reader"]["can_log_in"]) == (True, False)
    assert "SELECT on fks.ohlcv" in document["reader"]["granted"]
    assert fks("db", "init", "--reader", role, "--json").json["reader"]["granted"] == []
    assert "reader" not in fks("db", "init", "--json").json


@pytest.mark.parametrize("name", ["", "x" * 64, "ü" * 32, "a\0b", "\udcff"])
def test_an_invalid_name_is_refused(fks: Command, role: str, name: str) -> None:
    result = fks("db", "init", "--reader", name)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(
        "Error: Invalid value for '--reader': a role's name has 1 to 63 bytes of UTF-8"
    )
    assert result.stderr.count("\n") == 1


def test_a_superuser_is_refused_in_one_sentence(fks: Command, role: str, database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        (user,) = connection.execute("SELECT current_user").fetchone() or ("",)
    result = fks("db", "init", "--reader", user)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {user} is a superuser of postgresql://")
    assert result.stderr.count("\n") == 1


@pytest.mark.server
def test_a_failure_leaves_no_server_running(
    fks: Command, settings: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded server runs on only after a successful `db init`."""
    monkeypatch.delenv("FKS_DATABASE_URL")
    server = EmbeddedPostgres(tmp_path / "home")
    try:
        assert fks("db", "init", "--reader", "fks").exit_code == 1  # its superuser
        assert not server.status().kept
        assert fks("db", "init").exit_code == 0
        assert server.status().kept
    finally:
        server.remove()
