"""Access to the server: its owner and root, only by the socket."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from fks_backfill_dagster.embedded import EmbeddedError, EmbeddedPostgres
from fks_backfill_dagster.embedded.account import name_of
from fks_backfill_dagster_tests.embedded.conftest import cleaned, is_root, one
from fks_backfill_dagster_tests.embedded.test_users import _run as run_start
from fks_backfill_dagster_tests.embedded.test_users import as_user

pytestmark = pytest.mark.server

__all__ = ["as_user"]

needs_root = pytest.mark.skipif(not is_root(), reason="only root can be another user")

# As initdb wrote it for clusters of earlier versions.
OPEN_TO_ALL = """\
local   all             all                                     trust
host    all             all             127.0.0.1/32            trust
host    all             all             ::1/128                 trust
local   replication     all                                     trust
host    replication     all             127.0.0.1/32            trust
host    replication     all             ::1/128                 trust
"""

RULES = "SELECT type, auth_method, error FROM pg_hba_file_rules"
USERS = "SELECT sys_name, pg_username, error FROM pg_ident_file_mappings ORDER BY 1"


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query.encode()).fetchall()


def test_a_new_cluster_accepts_only_its_owner(fresh_home: Path) -> None:
    url = EmbeddedPostgres(fresh_home).start()
    assert rows(url, RULES) == [("local", "peer", None)]
    names = {"root", name_of(os.geteuid())}
    assert rows(url, USERS) == [(name, "all", None) for name in sorted(filter(None, names))]


@pytest.mark.parametrize("before", [OPEN_TO_ALL, "", "not a rule at all"])
def test_the_access_rules_of_an_earlier_version_are_replaced_at_a_start(home: Path, before: str) -> None:
    rules = home / "pg" / "pg_hba.conf"
    rules.write_text(before)
    assert rows(EmbeddedPostgres(home).start(), RULES) == [("local", "peer", None)]
    assert "trust" not in rules.read_text()
    assert rules.stat().st_mode & 0o777 == 0o600
    assert rules.stat().st_uid == (home / "pg").stat().st_uid


def test_the_owner_may_be_any_role(home: Path) -> None:
    """As with a user's own database: a reader is tested with its own name."""
    url = EmbeddedPostgres(home).start()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE reader LOGIN")
    assert one(url.replace("fks@", "reader@"), "SELECT session_user") == "reader"


def connect_as(uid: int, url: str) -> subprocess.CompletedProcess[str]:
    """Logs in as another user in a forked child, so that the user need not be able to run our Python."""
    script = (
        "import os, sys, psycopg\n"
        "os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))\n"
        "try:\n"
        "    print(psycopg.connect(sys.argv[2]).execute('SELECT session_user').fetchone()[0])\n"
        "except psycopg.OperationalError as error:\n"
        "    print(error)\n"
    )
    command = [sys.executable, "-c", script, str(uid), url]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)


@needs_root
def test_another_account_is_refused_even_with_an_open_folder(home: Path) -> None:
    url = EmbeddedPostgres(home).start()
    other = pwd.getpwnam("nobody").pw_uid
    assert "Permission denied" in connect_as(other, url).stdout
    home.chmod(0o711)
    for path in (home / "pg-socket", home / "pg-socket" / ".s.PGSQL.5432"):
        path.chmod(0o777)
    assert 'Peer authentication failed for user "fks"' in connect_as(other, url).stdout


@needs_root
def test_an_owner_without_a_name_is_accepted(open_dir: Path, as_user: list[str]) -> None:
    """In a container a user often has no entry in /etc/passwd, and PostgreSQL's map accepts only names."""
    uid = 54321
    if name_of(uid) is not None:
        pytest.skip(f"here uid {uid} has a name")
    nobody = pwd.getpwnam("nobody")
    numbers = {f"--reuid={nobody.pw_uid}": f"--reuid={uid}", f"--regid={nobody.pw_gid}": f"--regid={uid}"}
    unnamed = [numbers.get(word, word) for word in as_user]
    yard = open_dir / "yard"
    yard.mkdir(mode=0o755)
    os.chown(yard, uid, uid)
    for home in cleaned(yard / ".fks"):
        made = run_start(unnamed, home, "keep", check=False)
        if "initdb" in made.stderr:
            pytest.skip("initdb refuses a user without a name: the cluster has to be there before")
        url = made.stdout.strip()
        assert connect_as(uid, url).stdout.strip() == "fks"
        assert run_start(unnamed, home, "stop").stdout.strip() == "True"
        shutil.rmtree(yard)


@needs_root
@pytest.mark.parametrize("name", ["pg_hba.conf", "pg_ident.conf", "pg_hba.conf.new"])
def test_root_follows_no_link_of_the_account_of_its_server(home: Path, open_dir: Path, name: str) -> None:
    precious = open_dir / "precious"
    precious.write_text("untouched")
    cluster = home / "pg"
    owner = cluster.stat()
    (cluster / name).unlink(missing_ok=True)
    (cluster / name).symlink_to(precious)
    os.chown(cluster / name, owner.st_uid, owner.st_gid, follow_symlinks=False)
    if name.endswith(".new"):  # that account may not write it
        with pytest.raises(EmbeddedError, match=r"could not write its pg_hba\.conf"):
            EmbeddedPostgres(home).start()
    else:
        EmbeddedPostgres(home).start()
        assert not (cluster / name).is_symlink()
    assert precious.read_text() == "untouched"
