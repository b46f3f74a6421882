"""The clusters of root that lie outside of their homes: which home each is of, and which can be removed.

Where a folder above a home keeps root's server out, its cluster is in `binaries.ROOT_STATE`, in a folder that root
alone may write and that holds the path of the home (`home`). Who deletes such a home leaves the cluster behind.

Does not belong here: making, starting and stopping a cluster (`supervisor`).
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
"""Of the names of their folders."""

HOME_FILE = "home"


class State(StrEnum):
    """RUNNING: its server runs. IN_USE: its home exists. ORPHAN: its home is gone. UNKNOWN: it names no home, as one
    of an earlier version that was not started since."""

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
        """Bytes of its data on the disk, as it is now. What goes meanwhile counts as nothing; no link is followed."""
        total = 0
        for parent, _, files in os.walk(self.folder / "pg"):
            for name in files:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(parent, name)).st_blocks * 512
        return total


def write_home(folder: Path, home: Path) -> None:
    """Records whose cluster the folder holds."""
    write_text(folder / HOME_FILE, f"{home}\n")


def of_home(home: Path) -> Cluster | None:
    """The cluster of a home, wherever it is; None where it has none yet. Raises EmbeddedError."""
    try:
        files = Home(home.expanduser().absolute().resolve())
        if not files.cluster.exists():
            return None
        return Cluster(files.base, files.path, _state(files.base, files.path))
    except OSError as error:
        raise explain(error, home) from error


def elsewhere() -> list[Cluster]:
    """All that lie outside of their homes, by name; empty for everybody but root, who alone may list them.

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
    """Deletes it with all its data. Raises EmbeddedError where its server runs or its home exists, as it is now."""
    state = _state(cluster.folder, cluster.home)
    if state is State.RUNNING:
        raise EmbeddedError(
            f"the server of {cluster.folder} runs: stop it, or delete its home {cluster.home}"
        )
    if state is State.IN_USE:
        raise EmbeddedError(
            f"{cluster.folder} is the database of {cluster.home}, which exists: delete that folder first if its"
            " candles are to go"
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
    """Also one that cannot be looked at: only what is known to be gone is gone."""
    try:
        home.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
