"""Root's clusters outside of their homes: the home of each, and which can be removed.

Where root's server cannot enter a folder above its home, its cluster is in `binaries.ROOT_STATE`, in a folder that
only root may write and that holds the path of the home (`home`). Deleting such a home does not delete the cluster.

Does not belong here: creating, starting and stopping a cluster (`supervisor`).
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fks_backfill_dagster.embedded import binaries
from fks_backfill_dagster.embedded.errors import EmbeddedError, explain
from fks_backfill_dagster.embedded.watchdog import Home, is_alive, read_postmaster
from fks_backfill_dagster.ownership import write_text

PREFIX = "cluster-"
"""The prefix of their folder names."""

HOME_FILE = "home"


class State(StrEnum):
    """RUNNING: its server runs. IN_USE: its home exists. ORPHAN: its home is deleted. UNKNOWN: it names no home, such
    as one of an earlier version that was not started since."""

    RUNNING = "running"
    IN_USE = "in use"
    ORPHAN = "orphan"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Cluster:
    """`folder` holds the cluster and its socket; it may be the home itself."""

    folder: Path
    home: Path | None
    state: State

    @property
    def name(self) -> str:
        return self.folder.name

    def size(self) -> int:
        """The bytes of its data on the disk now. Files deleted during the count are skipped; links are not followed."""
        total = 0
        for parent, _, files in os.walk(self.folder / "pg"):
            for name in files:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
        return total


def write_home(folder: Path, home: Path) -> None:
    """Records the home of the cluster in the folder."""
    write_text(folder / HOME_FILE, f"{home}\n")


def of_home(home: Path) -> Cluster | None:
    """The cluster of a home, inside or outside of it; None if it does not exist yet. Raises EmbeddedError."""
    try:
        files = Home(home.expanduser().absolute().resolve())
        if not files.cluster.exists():
            return None
        return Cluster(files.base, files.path, _state(files.base, files.path))
    except OSError as error:
        raise explain(error, home) from error


def elsewhere() -> list[Cluster]:
    """The clusters outside of their homes, by name; empty unless run by root, who alone may list them.

    Raises EmbeddedError.
    """
    if os.name != "posix" or os.geteuid() != 0:
        return []
    try:
        return list(_found())
    except OSError as error:
        raise explain(error, binaries.ROOT_STATE) from error


def _found() -> Iterator[Cluster]:
    for folder in sorted(binaries.ROOT_STATE.glob(f"{PREFIX}*")):
        try:
            found = folder.lstat()
            home = _home_in(folder)
        except FileNotFoundError:  # removed meanwhile
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == 0:
            yield Cluster(folder, home, _state(folder, home))


def remove(cluster: Cluster) -> None:
    """Deletes the cluster with all its data. Raises EmbeddedError if its server runs or its home exists."""
    state = _state(cluster.folder, cluster.home)
    if state is State.RUNNING:
        raise EmbeddedError(
            f"the server of {cluster.folder} is running: stop it, or delete its home {cluster.home}"
        )
    if state is State.IN_USE:
        raise EmbeddedError(
            f"{cluster.folder} is the database of {cluster.home}, which exists: delete that folder first if its"
            " candles are to be deleted"
        )
    try:
        # The files below belong to a uid without an account, the folder itself to root.
        shutil.rmtree(cluster.folder)
    except OSError as error:
        raise explain(error, cluster.folder) from error


def _home_in(folder: Path) -> Path | None:
    try:
        text = (folder / HOME_FILE).read_text().strip()
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return None
    return Path(text) if text else None


def _state(folder: Path, home: Path | None) -> State:
    postmaster = read_postmaster(folder / "pg")
    if postmaster is not None and is_alive(postmaster.pid, folder / "pg"):
        return State.RUNNING
    if home is None:
        return State.UNKNOWN
    return State.IN_USE if _exists(home) else State.ORPHAN


def _exists(home: Path) -> bool:
    """Whether the home exists; also true if that cannot be determined."""
    try:
        home.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
