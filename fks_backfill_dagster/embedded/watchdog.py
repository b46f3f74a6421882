"""The watchdog process, and what it shares with the supervisor: the home's files, locks, the postmaster.

It stops the server when nobody uses it any more. It is run as a *file*, `python -I -S watchdog.py HOME`, so
that it costs some milliseconds and imports neither the project nor site-packages: only the standard library
may be imported here, and no other module of the package.

Who holds which lock (flock: the kernel releases it with the last process, also after a kill -9):

    pg.users     every process that uses the server: shared; the watchdog when it decides: exclusive
    pg.start     who starts or stops the server: exclusive
    pg.server    initdb, the postmaster and its backends, which inherit it: exclusive; who looks: shared
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
"""A fast shutdown writes a checkpoint; after this time it is cut short, and the next start recovers."""

ANOTHER_WATCHES = 3
"""Exit code: a watchdog of this home is there already."""


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
        """Exists: the server was stopped for everybody, and has not been started since."""
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

        Only a pointer made by root counts: another user must not send root to a place of his choice.
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
    """What postmaster.pid says: https://www.postgresql.org/docs/18/storage-file-layout.html."""

    pid: int
    socket_dir: Path
    ready: bool


def try_lock(descriptor: int, *, shared: bool = False) -> bool:
    import fcntl  # absent on Windows, where the supervisor says so before it comes here

    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def unlock(descriptor: int) -> None:
    """Releases it for every process that shares the descriptor; closing releases only one's own part."""
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_locked(path: Path, *, by_any: bool = False) -> bool:
    """Whether another process holds the lock exclusively (`by_any`: or shared). Takes it for an instant."""
    try:
        descriptor = _open_lock(path)
    except FileNotFoundError:
        return False
    try:
        return not try_lock(descriptor, shared=not by_any)
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    """A descriptor to lock, of a file that the supervisor has made."""
    return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)


def read_postmaster(cluster: Path) -> Postmaster | None:
    """None if there is no file or it is being written. It may be stale: see `is_alive`."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
        return Postmaster(int(lines[0]), Path(lines[4]), len(lines) > 7 and lines[7].strip() == "ready")
    except (FileNotFoundError, IndexError, ValueError):
        return None


def is_alive(pid: int, cluster: Path) -> bool:
    """Whether `pid` is the postmaster of this cluster. A zombie and a stranger with a reused pid are not."""
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
    """Fast shutdown, and waits until the process is gone. Does nothing if it is gone already."""
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
    """Returns 0 in the starter's child at once, when the watch is taken over; the watch itself ends later."""
    own = _open_lock(home.watchdog)
    if not try_lock(own):
        return ANOTHER_WATCHES
    users = _open_lock(home.users)
    if os.fork():  # the starter waits for this process only: the lock is known to be held, no zombie remains
        return 0
    _watch_users(home, home.cluster, users)
    os.close(own)  # before `users` goes: who then takes `users` must see that nobody watches any more
    return 0


def _watch_users(home: Home, cluster: Path, users: int) -> None:
    """Returns with `users` held and the server stopped, or with the home gone and the server stopped."""
    idle_since: float | None = None
    postmaster: Postmaster | None = None
    while True:
        postmaster = read_postmaster(cluster) or postmaster
        if not _is_still(users, home.users):
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


def _is_still(descriptor: int, path: Path) -> bool:
    """Whether the path leads to the opened file: not so once somebody has deleted the home."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(watch(Home(Path(sys.argv[1]))))
