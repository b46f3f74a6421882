"""Root and normal users, and homes that the server's account cannot enter."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster.embedded import EmbeddedError, EmbeddedPostgres, binaries
from fks_backfill_dagster.embedded.account import Account, account_for, can_traverse, give
from fks_backfill_dagster.embedded.cluster import make_cluster
from fks_backfill_dagster.embedded.log import open_log
from fks_backfill_dagster.embedded.watchdog import Home
from fks_backfill_dagster.ownership import open_file
from fks_backfill_dagster_tests.accounts import as_other
from fks_backfill_dagster_tests.embedded.conftest import (
    CHECKOUT,
    START,
    cleaned,
    gone,
    is_root,
    one,
    open_directory,
    until,
)

pytestmark = pytest.mark.server

needs_root = pytest.mark.skipif(not is_root(), reason="only root can be refused by PostgreSQL")


@pytest.fixture
def closed_home(open_dir: Path) -> Iterator[Path]:
    """Below a directory that only this user may enter, like /root."""
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    yield from cleaned(closed / ".fks")


def test_a_home_below_a_closed_directory(closed_home: Path) -> None:
    postgres = EmbeddedPostgres(closed_home)
    url = postgres.start()
    assert one(url) == 1
    data_dir = postgres.status().data_dir
    assert data_dir.is_relative_to(binaries.ROOT_STATE if is_root() else closed_home)
    postgres.stop()
    assert postgres.start() == url
    postgres.remove()
    assert not data_dir.exists()


@needs_root
def test_a_server_of_root_runs_as_an_unassigned_uid(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    postgres.start()
    uid = postgres.status().data_dir.stat().st_uid
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    pid = postgres.status().pid
    owner = Path(f"/proc/{pid}").stat().st_uid if Path("/proc/self").exists() else uid
    assert owner == uid != 0


def test_a_private_home_of_its_own_keeps_its_cluster(open_dir: Path) -> None:
    private = open_dir / "private"
    private.mkdir(mode=0o700)
    for home in cleaned(private):
        postgres = EmbeddedPostgres(home)
        assert one(postgres.start()) == 1
        assert postgres.status().data_dir == home / "pg"
        # Root's server enters it by a group that no account is in.
        assert home.stat().st_mode & 0o777 == (0o710 if is_root() else 0o700)
        assert home.stat().st_gid == postgres.status().data_dir.stat().st_gid


@needs_root
def test_a_deleted_cluster_elsewhere_is_not_silently_recreated(closed_home: Path) -> None:
    postgres = EmbeddedPostgres(closed_home)
    postgres.start()
    postgres.stop()
    location = Home(closed_home).location
    shutil.rmtree(Home(closed_home).base)
    with pytest.raises(EmbeddedError, match=f"delete {location} to start empty"):
        postgres.start()
    location.unlink()


@pytest.fixture
def executable_dir() -> Iterator[Path]:
    yield from open_directory(tempfile.gettempdir())  # memory is often mounted noexec


@needs_root
def test_binaries_that_the_account_cannot_reach_are_copied_once(
    home: Path, executable_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = executable_dir / "state"
    monkeypatch.setattr(binaries, "ROOT_STATE", state)
    monkeypatch.setattr(binaries, "_usable", lambda directory, account: False)
    postgres = EmbeddedPostgres(home)
    assert one(postgres.start()) == 1
    (copy,) = state.glob("postgresql-18-*")
    made = copy.stat().st_ctime_ns
    postgres.stop()
    assert one(postgres.start()) == 1
    assert copy.stat().st_ctime_ns == made
    assert sum(path.stat().st_size for path in copy.rglob("*") if path.is_file()) < 30_000_000


def test_traversal_by_modes(open_dir: Path) -> None:
    other = Account(60706, 60706)
    inner = open_dir / "a" / "b"
    inner.mkdir(parents=True)
    (open_dir / "a").chmod(0o755)
    inner.chmod(0o755)
    assert can_traverse(inner, other)
    (open_dir / "a").chmod(0o700)
    assert not can_traverse(inner, other)
    assert can_traverse(inner, Account(os.geteuid(), os.getegid()))


@pytest.fixture
def as_user(open_dir: Path) -> list[str]:
    """The beginning of a command line that runs Python with our packages as a normal user."""
    if not is_root():
        return [sys.executable]
    entry = pwd.getpwnam("nobody")
    user = Account(entry.pw_uid, entry.pw_gid)
    packages = next(Path(path) for path in sys.path if (Path(path) / binaries.WHEEL).is_dir())
    pythons = [Path(sys.executable).resolve(), Path("/usr/bin/python3").resolve()]
    python = next((p for p in pythons if p.exists() and can_traverse(p.parent, user)), None)
    if python is None or not shutil.which("setpriv") or not can_traverse(packages, user):
        pytest.skip("no Python that a normal user could run (setpriv and reachable packages are needed)")
    ours = open_dir / "ours"  # the checkout itself may be closed to others
    package = CHECKOUT / "fks_backfill_dagster"
    shutil.copytree(package / "embedded", ours / package.name / "embedded")
    shutil.copy(package / "ownership.py", ours / package.name)
    identity = [f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups"]
    path = f"PYTHONPATH={ours}:{packages}"
    return ["setpriv", *identity, "env", path, "PYTHONDONTWRITEBYTECODE=1", str(python)]


def test_a_normal_user_has_a_separate_server(open_dir: Path, as_user: list[str]) -> None:
    yard = open_dir / "yard"
    yard.mkdir(mode=0o700)
    if is_root():
        shutil.chown(yard, "nobody")
    for home in cleaned(yard / ".fks"):
        url = _run(as_user, home, "keep").stdout.strip()
        assert one(url) == 1
        assert (home / "pg").stat().st_uid == yard.stat().st_uid

        assert {path.stat().st_uid for path in home.rglob("*")} == {yard.stat().st_uid}
        assert {path.stat().st_mode & 0o077 for path in (home, *home.rglob("*")) if not path.is_socket()} == {
            0
        }
        if (
            is_root()
        ):  # where another account can put links, root changes nothing, not even to stop the server
            postgres = EmbeddedPostgres(home)
            for method in (postgres.start, postgres.stop, postgres.remove, postgres.status):
                with pytest.raises(
                    EmbeddedError, match=rf"{home} belongs to nobody .*: run this as that user"
                ):
                    method()
        assert one(url) == 1
        assert _run(as_user, home, "stop").stdout.strip() == "True"
        assert until(lambda: gone(home))  # noqa: B023 - called before the loop goes on
        shutil.rmtree(yard)  # the clean-up, also run by root, would refuse it


@needs_root
def test_a_cluster_of_another_account_is_refused(home: Path) -> None:
    os.chown(home / "pg", pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(EmbeddedError, match=rf"{home / 'pg'} belongs to uid \d+, and root would write"):
        EmbeddedPostgres(home).start()
    os.chown(home / "pg", 0, 0)


@needs_root
def test_a_planted_link_for_the_settings_of_a_new_cluster_is_not_followed(
    open_dir: Path, executable_dir: Path
) -> None:
    """As if another process of the account that runs initdb had created it."""
    victim = open_dir / "victim"
    victim.write_text("precious")
    initdb = executable_dir / "initdb"
    initdb.write_text(f"#!/bin/sh\nln -s {victim} {open_dir / 'pg.new' / 'fks.conf'}\n")
    initdb.chmod(0o755)
    lock = open_file(open_dir / "lock")
    account = account_for(open_dir / "pg")
    with open_log(open_dir / "log") as log, pytest.raises(EmbeddedError, match="could not be created"):
        make_cluster(open_dir / "pg", executable_dir, account, log, lock)
    os.close(lock)
    assert victim.read_text() == "precious"


@needs_root
def test_a_change_of_owner_does_not_follow_links(open_dir: Path) -> None:
    tree, outside = open_dir / "tree", open_dir / "outside"
    for folder in (tree / "inner", outside):
        folder.mkdir(parents=True)
        (folder / "file").write_text("")
    (tree / "link").symlink_to(outside)
    give(tree, Account(60706, 60706))
    assert {path.lstat().st_uid for path in (tree, *tree.rglob("*"))} == {60706}
    assert {path.stat().st_uid for path in (outside, outside / "file")} == {0}


@needs_root
def test_other_accounts_cannot_reach_the_cluster_of_root(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    postgres.start()
    sockets, cluster = home / "pg-socket", postgres.status().data_dir
    assert (home / "logs").stat().st_mode & 0o777 == 0o700
    for path in (home, home / "pg.users", sockets, cluster, cluster / "fks.conf"):
        code = f"import os, sys; sys.exit(os.access({str(path)!r}, os.R_OK))"
        assert subprocess.run([*as_other(), sys.executable, "-c", code], cwd="/").returncode == 0, path
    for path in home.glob("pg.*"):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_home_that_may_not_be_written(open_dir: Path, as_user: list[str]) -> None:
    locked = open_dir / "locked"
    locked.mkdir(mode=0o555)
    done = _run(as_user, locked / ".fks", check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("EmbeddedError: ")
    assert "set FKS_HOME to a directory of your own" in done.stderr


def _run(as_user: list[str], home: Path, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [*as_user, "-c", START, str(home), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/", check=check)
