"""Root's clusters outside of their homes: they name their home, and only those of deleted homes are removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster.embedded import EmbeddedError, EmbeddedPostgres, binaries, clusters
from fks_backfill_dagster.embedded.clusters import Cluster, State
from fks_backfill_dagster_tests.embedded.conftest import is_root, one, open_directory, quick_disk, until

pytestmark = pytest.mark.server

needs_root = pytest.mark.skipif(not is_root(), reason="only root has clusters outside of their homes")


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The replacement for /var/lib/fks-backfill."""
    for path in open_directory(quick_disk()):
        monkeypatch.setattr(binaries, "ROOT_STATE", path / "state")
        (path / "state").mkdir()
        yield path / "state"


@pytest.fixture
def closed_home(open_dir: Path) -> Iterator[Path]:
    closed = open_dir / "closed"
    closed.mkdir(mode=0o700)
    yield closed / ".fks"
    EmbeddedPostgres(closed / ".fks").remove()


def planted(state: Path, name: str, home: Path | None) -> Path:
    """A cluster of some bytes."""
    folder = state / f"{clusters.PREFIX}{name}"
    (folder / "pg").mkdir(parents=True)
    (folder / "pg" / "data").write_bytes(b"x" * 8192)
    if home is not None:
        clusters.write_home(folder, home)
    return folder


def found(folder: Path) -> Cluster:
    (cluster,) = [each for each in clusters.elsewhere() if each.folder == folder]
    return cluster


@needs_root
def test_a_cluster_names_its_home_and_is_removed_after_it(state: Path, closed_home: Path) -> None:
    postgres = EmbeddedPostgres(closed_home)
    assert one(postgres.start()) == 1
    folder = postgres.status().data_dir.parent
    assert folder.parent == state
    assert (folder / "home").stat().st_mode & 0o777 == 0o600
    running = found(folder)
    assert (running.home, running.state) == (closed_home, State.RUNNING)
    assert running.size() > 5_000_000
    with pytest.raises(EmbeddedError, match="is running: stop it"):
        clusters.remove(running)

    postgres.stop()
    assert found(folder).state is State.IN_USE
    mine = clusters.of_home(closed_home)
    assert mine is not None
    assert (mine.folder, mine.home, mine.state) == (folder, closed_home, State.IN_USE)
    with pytest.raises(EmbeddedError, match=f"is the database of {closed_home}, which exists"):
        clusters.remove(running)
    assert one(postgres.start()) == 1

    shutil.rmtree(closed_home)  # its watchdog notices, and stops the server
    assert until(lambda: found(folder).state is State.ORPHAN)
    clusters.remove(found(folder))
    assert clusters.elsewhere() == []
    assert not folder.exists()


@needs_root
def test_a_cluster_of_an_earlier_version_names_its_home_after_a_start(state: Path, closed_home: Path) -> None:
    postgres = EmbeddedPostgres(closed_home)
    postgres.start()
    postgres.stop()
    folder = postgres.status().data_dir.parent
    (folder / "home").unlink()
    assert found(folder).state is State.UNKNOWN
    postgres.start()
    postgres.stop()
    assert found(folder).home == closed_home


@needs_root
def test_a_home_that_cannot_be_checked_counts_as_in_use(state: Path, open_dir: Path) -> None:
    home = open_dir / "home"
    home.symlink_to(open_dir / "nowhere")  # such as a disk that is not mounted
    (open_dir / "file").write_text("")
    states = {
        name: found(planted(state, name, path)).state
        for name, path in {
            "link": home,
            "gone": open_dir / "gone",
            "file": open_dir / "file" / "below",
            "nameless": None,
        }.items()
    }
    assert states == {
        "link": State.IN_USE,
        "gone": State.ORPHAN,
        "file": State.ORPHAN,
        "nameless": State.UNKNOWN,
    }


@needs_root
def test_only_folders_of_root_count(state: Path, open_dir: Path) -> None:
    mine, theirs = planted(state, "mine", open_dir / "gone"), planted(state, "theirs", open_dir / "gone")
    os.chown(theirs, 65534, 65534)
    (state / f"{clusters.PREFIX}link").symlink_to(open_dir)
    assert [each.folder for each in clusters.elsewhere()] == [mine]
    (mine / "pg" / "link").symlink_to(theirs)
    clusters.remove(found(mine))
    assert (theirs / "pg" / "data").exists()


def test_a_home_that_lets_its_server_pass_keeps_its_cluster(home: Path) -> None:
    cluster = clusters.of_home(home)
    assert cluster is not None
    assert (cluster.folder, cluster.home, cluster.state) == (home, home, State.IN_USE)
    EmbeddedPostgres(home).start()
    running = clusters.of_home(home)
    assert running is not None
    assert running.state is State.RUNNING


def test_a_home_without_a_cluster_has_none(fresh_home: Path) -> None:
    assert clusters.of_home(fresh_home) is None
