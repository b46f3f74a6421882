"""The watchdog process, and what it shares with the supervisor: the home's files, locks, the postmaster.

It stops the server when no process uses it any more. It is run as a *file*, `python -I -S watchdog.py HOME`, so
that it starts in milliseconds and imports neither the project nor site-packages: only the standard library
may be imported here, and no other module of the package.

Holders of the locks (flock: the kernel releases one with its last process, also after a kill -9):

    pg.users     every process that uses the server: shared; the watchdog while it decides: exclusive
    pg.start     the process that starts or stops the server: exclusive
    pg.server    initdb, the postmaster and its backends, which inherit it: exclusive; a status check: shared
    pg.watchdog  the watchdog: exclusive
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

POLL_SECONDS = 0.5
IDLE_GRACE_SECONDS = 2.0
FAST_STOP_SECONDS = 60.0
"""A fast shutdown writes a checkpoint; after this time it is aborted, and the next start recovers."""

ANOTHER_WATCHES = 3
"""Exit code: a watchdog of this home is running already."""


class Home(NamedTuple):
    """The files of one embedded server. `path` must be absolute."""

    path: Path

    @property
    def users(self) -> Path:
        return self.path / "pg.users"

    @property
    def start(self) -> Path:
        return self.path / "pg.start"

    @property
    def server(self) -> Path:
        return self.path / "pg.server"

    @property
    def watchdog(self) -> Path:
        return self.path / "pg.watchdog"

    @property
    def keep(self) -> Path:
        """Exists: the server runs until it is stopped, with users or without."""
        return self.path / "pg.keep"

    @property
    def stopped(self) -> Path:
        """Exists: the server was stopped for all processes, and has not been started since."""
        return self.path / "pg.stopped"

    @property
    def location(self) -> Path:
        """Exists only for root: names the directory of the cluster when it cannot be in the home."""
        return self.path / "pg.location"

    @property
    def log(self) -> Path:
        return self.path / "logs" / "postgresql.log"

    @property
    def base(self) -> Path:
        """The directory that contains cluster and socket: the home itself, or what `location` names.

        Only a `location` of root counts: another user must not direct root to a path of their choice.
        """
        try:
            if self.location.lstat().st_uid == 0:
                return Path(self.location.read_text().strip())
        except FileNotFoundError:
            pass
        return self.path

    @property
    def cluster(self) -> Path:
        return self.base / "pg"


class Postmaster(NamedTuple):
    """The contents of postmaster.pid: https://www.postgresql.org/docs/18/storage-file-layout.html."""

    pid: int
    socket_dir: Path
    ready: bool


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    import fcntl  # absent on Windows, which the supervisor refuses earlier

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Releases the lock for every process that shares the descriptor; closing releases only this process's share."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_locked(path: Path, *, by_any: bool = False) -> bool:
    """Whether another process holds the lock exclusively (`by_any`: or shared). Acquires it for an instant."""
    try:
        descriptor = _open_lock(path)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor, shared=not by_any)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """A descriptor for locking a file that the supervisor created."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def read_postmaster(cluster: Path) -> Postmaster | None:
    """None if the file is missing or being written. It may be stale: see `is_alive`."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        return Postmaster(int(lines[0]), Path(lines[4]), len(lines) > 7 and lines[7].strip() == "ready")
    except (FileNotFoundError, IndexError, ValueError):
        return None


def is_alive(pid: int, cluster: Path) -> bool:
    """Whether `pid` is the postmaster of this cluster; false for a zombie and for another process with a reused pid."""
    if os.path.isdir("/proc/self"):
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            return False
        return os.path.basename(command[0]) == b"postgres" and os.fsencode(cluster) in command
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def stop_postmaster(pid: int, cluster: Path) -> None:
    """Fast shutdown; waits until the process has ended. Does nothing if it has ended already."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        if not is_alive(pid, cluster):
            return
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + FAST_STOP_SECONDS
        while is_alive(pid, cluster) and time.monotonic() < deadline:
            time.sleep(0.02)


def watch(home: Home) -> int:
    """Forks: the starter's child returns 0 at once, the forked watchdog returns when the watch ends."""
    own = _open_lock(home.watchdog)
    if not try_lock(own):
        return ANOTHER_WATCHES
    users = _open_lock(home.users)
    if os.fork():  # the starter waits for this process only: the lock is held already, and no zombie remains
        return 0
    _watch_users(home, home.cluster, users)
    os.close(own)  # before `users` is released: the next holder of `users` must see that there is no watchdog
    return 0


def _watch_users(home: Home, cluster: Path, users: int) -> None:
    """Returns with the server stopped, and `users` held or the home deleted."""
    idle_since: float | None = None
    postmaster: Postmaster | None = None
    while True:
        postmaster = read_postmaster(cluster) or postmaster
        if not _is_same_file(users, home.users):
            break
        if try_lock(users):
            idle_since = idle_since or time.monotonic()
            keep = home.keep.exists() and is_locked(home.server)
            if not keep and time.monotonic() - idle_since >= IDLE_GRACE_SECONDS:
                break
            unlock(users)
        else:
            idle_since = None
        time.sleep(POLL_SECONDS)
    if postmaster is not None:
        stop_postmaster(postmaster.pid, cluster)


def _is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the opened file; false once the home was deleted."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(watch(Home(Path(sys.argv[1]))))
