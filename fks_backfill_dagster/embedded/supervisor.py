"""Starts, shares and stops the embedded PostgreSQL of one home.

Every process that uses the server holds a shared lock, which the kernel releases when the process ends, also after a
kill -9. The watchdog (watchdog.py) stops the server when the lock is free. There is no use count, and a pid is
trusted only together with a lock.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from fks_backfill_dagster.embedded import watchdog
from fks_backfill_dagster.embedded.account import (
    Account,
    account_for,
    can_traverse,
    clean_environment,
    give,
    run,
)
from fks_backfill_dagster.embedded.binaries import binaries_for, root_state
from fks_backfill_dagster.embedded.cluster import (
    DATABASE,
    SUPERUSER,
    check_version,
    make_cluster,
    write_access,
)
from fks_backfill_dagster.embedded.clusters import HOME_FILE, PREFIX, write_home
from fks_backfill_dagster.embedded.errors import OTHER_DATABASE, EmbeddedError, explain
from fks_backfill_dagster.embedded.log import ServerLog, open_log, rotate
from fks_backfill_dagster.embedded.watchdog import Home, Postmaster, is_locked, try_lock
from fks_backfill_dagster.ownership import (
    OwnershipError,
    check_home,
    let_pass,
    make_folder,
    make_home,
    open_file,
    socket_folder,
    write_text,
)

PORT = 5432
"""Part of the name of the socket file, not a network port. The URL contains it so that PGPORT does not change it."""

START_SECONDS = 300.0
"""A start may have to recover gigabytes of WAL first."""

LINGER_SECONDS = 30.0
"""How long backends may outlive a killed postmaster."""

_POLL_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Status:
    """`in_use`: a process uses the server. `kept`: it runs until `stop`. `stopped`: it was stopped on purpose, by
    `stop`. `version`: None until the first start."""

    running: bool
    pid: int | None
    url: str | None
    in_use: bool
    kept: bool
    stopped: bool
    version: str | None
    data_dir: Path


class EmbeddedPostgres:
    """The PostgreSQL below `home`. Cheap to create; any number of objects, threads and processes may share it.

    A forked child counts as a separate user of the server as long as it lives. Every method raises EmbeddedError, also
    for a home of another account.
    """

    def __init__(self, home: Path) -> None:
        if os.name != "posix":
            raise EmbeddedError(
                "the embedded PostgreSQL needs Linux or macOS: on Windows use WSL, " + OTHER_DATABASE
            )
        self._named = home.expanduser().absolute()
        self._home = Home(self._named.resolve())
        self._use: int | None = None
        self._mutex = threading.RLock()

    @property
    def log(self) -> Path:
        """The path of the server's log, which also has the reason of a failed start."""
        return self._home.log

    def start(self, *, keep: bool = False) -> str:
        """Starts the server if needed and returns its libpq URL. It runs until this process ends or calls `release`.

        With `keep` it runs until `stop`, also without users.
        """
        with self._mutex, self._explained():
            make_home(self._named)
            make_folder(self._home.log.parent)
            self._register()
            try:
                with self._start_lock():
                    self._home.stopped.unlink(missing_ok=True)
                    postmaster = self._running()
                    if postmaster is None:
                        rotate(self._home.log)
                    with open_log(self._home.log) as log:
                        postmaster = postmaster or self._start(log)
                        self._ensure_watchdog(log)
                    if keep:
                        os.close(open_file(self._home.keep))
            except BaseException:
                self.release()
                raise
            return _url(postmaster)

    def release(self) -> None:
        """Ends the use of the server by this process. Does nothing if it does not use it."""
        with self._mutex:
            if self._use is not None:
                os.close(self._use)  # not LOCK_UN, which would also release the lock of forked children
                self._use = None

    def stop(self) -> bool:
        """Stops the server for all processes, kept or not. Returns whether it ran."""
        with self._mutex, self._explained():
            check_home(self._named)
            self.release()
            if not self._home.server.exists():
                return False
            with self._start_lock():
                self._home.keep.unlink(missing_ok=True)
                os.close(open_file(self._home.stopped))
                return self._stop()

    def remove(self) -> None:
        """Stops the server and deletes the cluster with all its data: for tests and throw-away homes."""
        with self._mutex, self._explained():
            check_home(self._named)
            self.release()
            if not self._home.server.exists():
                return
            with self._start_lock():
                self._home.keep.unlink(missing_ok=True)
                self._stop()
                base = self._home.base
                for path in (base / "pg", base / "pg.new", self._socket_dir()):
                    shutil.rmtree(path, ignore_errors=True)
                if base != self._home.path:
                    (base / HOME_FILE).unlink(missing_ok=True)
                    base.rmdir()
                    self._home.location.unlink()

    def status(self) -> Status:
        """The current state. Starts and changes nothing."""
        with self._explained():
            check_home(self._named)
            postmaster = self._running()
            try:
                version = (self._home.cluster / "PG_VERSION").read_text().strip()
            except FileNotFoundError:
                version = None
            return Status(
                running=postmaster is not None,
                pid=postmaster.pid if postmaster else None,
                url=_url(postmaster) if postmaster else None,
                in_use=is_locked(self._home.users, by_any=True),
                kept=self._home.keep.exists(),
                stopped=self._home.stopped.exists(),
                version=version,
                data_dir=self._home.cluster,
            )

    # locks

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OwnershipError as error:
            raise EmbeddedError(str(error)) from None
        except OSError as error:
            raise explain(error, self._home.path) from error

    def _register(self) -> None:
        """Registers this process as a user: the watchdog does not stop the server any more. Waits while it is stopping
        it."""
        if self._use is not None and not _is_same_file(self._use, self._home.users):
            self.release()  # the home was deleted
        if self._use is None:
            descriptor = open_file(self._home.users)
            try:
                self._wait_for(descriptor, shared=True)
            except BaseException:
                os.close(descriptor)
                raise
            self._use = descriptor

    @contextmanager
    def _start_lock(self) -> Iterator[None]:
        descriptor = open_file(self._home.start)
        try:
            self._wait_for(descriptor, shared=False)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
            yield
        finally:
            os.close(descriptor)

    def _wait_for(self, descriptor: int, *, shared: bool) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not try_lock(descriptor, shared=shared):
            if time.monotonic() > deadline:
                holder = self._home.start.read_text().strip() or "unknown"
                raise EmbeddedError(
                    f"another process (the last was {holder}) has been starting or stopping the embedded "
                    f"PostgreSQL of {self._home.path} for {START_SECONDS:.0f} seconds: see "
                    f"{self._home.log}, end that process and try again"
                )
            time.sleep(_POLL_SECONDS)

    # the server; all methods below need the start lock, except _running

    def _running(self) -> Postmaster | None:
        """The postmaster if it accepts connections."""
        if not is_locked(self._home.server):
            return None
        cluster = self._home.cluster
        postmaster = watchdog.read_postmaster(cluster)
        if postmaster is None or not postmaster.ready or not watchdog.is_alive(postmaster.pid, cluster):
            return None
        return postmaster

    def _start(self, log: ServerLog) -> Postmaster:
        server = open_file(self._home.server)
        try:
            running = self._wait_for_last_server(server)
            if running is not None:
                return running
            account = account_for(self._home.cluster)
            self._choose_base(account)
            binaries = binaries_for(account)
            cluster = self._home.cluster
            if not check_version(cluster):
                make_cluster(cluster, binaries, account, log, server)
            self._launch(binaries, account, log, server)
        finally:
            os.close(server)  # a running server has inherited it
        return self._wait_until_ready(log)

    def _wait_for_last_server(self, server: int) -> Postmaster | None:
        """Acquires the server lock, or returns the server that another process was starting when it died."""
        begin = time.monotonic()
        while not try_lock(server):
            if running := self._running():
                return running
            postmaster = watchdog.read_postmaster(self._home.cluster)
            starting = postmaster is not None and watchdog.is_alive(postmaster.pid, self._home.cluster)
            if time.monotonic() - begin > (START_SECONDS if starting else LINGER_SECONDS):
                raise EmbeddedError(
                    f"{self._home.cluster} is in use by a PostgreSQL that this process cannot see (in another "
                    f"container, perhaps): stop it there, or set FKS_HOME to a directory that is not shared"
                )
            time.sleep(_POLL_SECONDS)
        return None

    def _choose_base(self, account: Account | None) -> None:
        """Lets root's server enter the home. If it cannot enter a folder above, cluster and socket are elsewhere."""
        base = self._home.base
        if base != self._home.path and not base.is_dir():
            raise EmbeddedError(
                f"the database of {self._home.path} was in {base}, which does not exist any more: restore it, "
                f"or delete {self._home.location} to start empty"
            )
        if account is None:
            return
        if base != self._home.path:
            write_home(base, self._home.path)  # folders of earlier versions do not name their home
        if can_traverse(base.parent, account):
            let_pass(base, account.gid)
            return
        if self._home.cluster.exists():
            raise EmbeddedError(
                f"the embedded PostgreSQL would run as uid {account.uid}, which cannot enter {base}: allow it "
                f"(chmod o+x on its directories), set FKS_HOME to another directory, {OTHER_DATABASE}"
            )
        elsewhere = root_state() / f"{PREFIX}{secrets.token_hex(8)}"
        make_folder(elsewhere)
        write_home(elsewhere, self._home.path)
        let_pass(elsewhere, account.gid)
        write_text(self._home.location, f"{elsewhere}\n")

    def _launch(self, binaries: Path, account: Account | None, log: ServerLog, server: int) -> None:
        """Starts the server. This process holds the lock, so the last server has ended and its files are stale."""
        cluster = self._home.cluster
        (cluster / "postmaster.pid").unlink(missing_ok=True)
        sockets = self._make_socket_dir(account)
        for stale in sockets.iterdir():
            stale.unlink()
        log.mark()
        write_access(cluster, account, log, server)
        # The shell exits at once, so that init adopts the server: a killed server must not remain as our zombie.
        command = ["/bin/sh", "-c", '"$@" &', "sh", str(binaries / "postgres")]
        command += ["-D", str(cluster), "-k", str(sockets), "-p", str(PORT), "-c", "listen_addresses="]
        run(command, account, log=log.descriptor, lock=server)

    def _wait_until_ready(self, log: ServerLog) -> Postmaster:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if postmaster := self._running():
                return postmaster
            if not is_locked(self._home.server):
                raise log.failure("did not start")
            time.sleep(_POLL_SECONDS)
        raise log.failure(f"was not ready after {START_SECONDS:.0f} seconds")

    def _stop(self) -> bool:
        postmaster = watchdog.read_postmaster(self._home.cluster)
        if postmaster is None or not is_locked(self._home.server):
            return False
        if not watchdog.is_alive(postmaster.pid, self._home.cluster):
            return False
        watchdog.stop_postmaster(postmaster.pid, self._home.cluster)
        return True

    def _ensure_watchdog(self, log: ServerLog) -> None:
        if is_locked(self._home.watchdog):
            return
        os.close(open_file(self._home.watchdog))  # the watchdog creates no files
        command = [sys.executable, "-I", "-S", watchdog.__file__, str(self._home.path)]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log.descriptor,  # not the caller's pipe: a process that captures our output must not wait for it
            stderr=log.descriptor,
            cwd="/",
            env=clean_environment(),
            start_new_session=True,
            check=False,
        )
        if done.returncode not in (0, watchdog.ANOTHER_WATCHES):
            raise EmbeddedError(
                f"the watchdog of the embedded PostgreSQL did not start: see {self._home.log}"
            )

    # the socket

    def _socket_dir(self) -> Path:
        """Below the home; a short name in the temporary directory if that path is too long for a socket."""
        return socket_folder(self._home.base / "pg-socket", f".s.PGSQL.{PORT}", "fks", self._home.cluster)

    def _make_socket_dir(self, account: Account | None) -> Path:
        """Creates a directory that only the server's user may enter. Refuses one that another account created."""
        directory = self._socket_dir()
        try:
            directory.mkdir(mode=0o700)
            give(directory, account)
        except FileExistsError:
            found = directory.lstat()
            owners = {os.geteuid()} if account is None else {account.uid, 0}
            if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or found.st_mode & 0o077:
                raise EmbeddedError(
                    f"{directory} should be a private directory for the socket, but belongs to another account or "
                    f"is open to one (uid {found.st_uid}): delete it, or set TMPDIR to a directory of your own"
                ) from None
            give(directory, account)
        return directory


def _url(postmaster: Postmaster) -> str:
    return f"postgresql://{SUPERUSER}@/{DATABASE}?host={quote(str(postmaster.socket_dir))}&port={PORT}"


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
