"""Servers with unusual properties: a PostgreSQL that a test may kill, stop and copy, and poolers in front of one."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.embedded.account import Account, account_for, clean_environment, give, maker_for
from fks_backfill_dagster.embedded.binaries import binaries_for

PORT = 5432
NEVER = Path("/nonexistent")


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come true"
        time.sleep(0.02)


def _as(account: Account | None) -> dict[str, object]:
    """The arguments of subprocess that make it run as this account."""
    if account is None:
        return {}
    return {"user": account.uid, "group": account.gid, "extra_groups": []}


class Cluster:
    """A separate PostgreSQL for a test, on a socket. Run by root, it has the account of the embedded ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._account = account_for(NEVER)
        self._postmaster: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def url(self) -> str:
        return f"postgresql://fks@/postgres?host={quote(str(self.folder))}&port={PORT}"

    @classmethod
    def make(cls, folder: Path, *settings: str) -> Cluster:
        """A new cluster, not started."""
        cluster = cls(folder)
        folder.mkdir()
        maker = maker_for(cluster._account)
        give(folder, maker)
        initdb = [binaries_for(cluster._account) / "initdb", "-D", cluster.data, "-U", "fks", "--auth=trust"]
        options = ["--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        environment = clean_environment()
        subprocess.run(
            [*initdb, *options], check=True, capture_output=True, cwd="/", env=environment, **_as(maker)
        )  # type: ignore[call-overload]
        cluster.configure("listen_addresses = ''", "fsync = off", "log_min_messages = fatal", *settings)
        give(folder, cluster._account)
        return cluster

    def copied(self, folder: Path) -> Cluster:
        """A copy at another place. The original must not be running."""
        copy = Cluster(folder)
        shutil.copytree(self.folder, folder)
        give(folder, self._account)
        return copy

    def configure(self, *settings: str) -> None:
        with (self.data / "postgresql.conf").open("a") as file:
            file.writelines(f"{line}\n" for line in settings)

    def touch(self, name: str) -> None:
        (self.data / name).touch()
        give(self.data, self._account)

    def start(self) -> Cluster:
        """Returns when it listens, which is before it accepts connections."""
        command = [
            binaries_for(self._account) / "postgres",
            "-D",
            self.data,
            "-k",
            self.folder,
            "-p",
            str(PORT),
        ]
        log = (self.folder / "log").open("ab")
        self._postmaster = subprocess.Popen(
            command, stdout=log, stderr=log, cwd="/", env=clean_environment(), **_as(self._account)
        )  # type: ignore[call-overload]
        log.close()
        until(lambda: (self.folder / f".s.PGSQL.{PORT}").exists())
        return self

    def is_ready(self) -> bool:
        try:
            psycopg.connect(self.url).close()
        except psycopg.OperationalError:
            return False
        return True

    def ready(self) -> Cluster:
        until(self.is_ready)
        return self

    def signal(self, number: int) -> None:
        assert self._postmaster is not None
        self._postmaster.send_signal(number)

    def stop(self) -> None:
        """Fast shutdown."""
        if self._postmaster is not None and self._postmaster.poll() is None:
            self._postmaster.send_signal(signal.SIGINT)
            self._postmaster.wait(60)

    def kill_backend(self, pid: int) -> None:
        """The server treats it as a crash: it ends all sessions, and recovers."""
        os.kill(pid, signal.SIGKILL)


@contextmanager
def folder_for_servers() -> Iterator[Path]:
    """A folder that the account of the servers can enter, and whose name is short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="fks-odd-"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


# Poolers ------------------------------------------------------------------------------------------------

_SSL, _GSS = 80877103, 80877104
_REFUSAL = b"SFATAL\0VFATAL\0C08P01\0Munsupported startup parameter: options\0\0"


@contextmanager
def old_pooler(url: str) -> Iterator[str]:
    """The URL of a relay to the server of `url` that refuses the startup parameter `options`, as pgbouncer up to
    1.19 does."""
    parsed = sa.make_url(url)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, parsed), daemon=True).start()
        port = listener.getsockname()[1]
        relayed = sa.URL.create("postgresql", parsed.username, None, "127.0.0.1", port, parsed.database)
        yield relayed.render_as_string()


def _accept(listener: socket.socket, url: sa.URL) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listener.accept()
            threading.Thread(target=_serve, args=(client, url), daemon=True).start()


def _serve(client: socket.socket, url: sa.URL) -> None:
    with contextlib.suppress(OSError, struct.error), client:
        while True:
            length, code = struct.unpack("!II", client.recv(8, socket.MSG_WAITALL))
            if code not in (_SSL, _GSS):
                break
            client.sendall(b"N")
        body = client.recv(length - 8, socket.MSG_WAITALL)
        if b"options" in body.split(b"\0")[0::2]:
            client.sendall(b"E" + struct.pack("!I", len(_REFUSAL) + 4) + _REFUSAL)
            return
        with _connected(url) as server:
            server.sendall(struct.pack("!II", length, code) + body)
            threading.Thread(target=_pump, args=(client, server), daemon=True).start()
            _pump(server, client)


def _connected(url: sa.URL) -> socket.socket:
    host, port = url.query.get("host", url.host), url.query.get("port", url.port or PORT)
    if str(host).startswith("/"):
        server = socket.socket(socket.AF_UNIX)
        server.connect(f"{host}/.s.PGSQL.{port}")
        return server
    return socket.create_connection((str(host), int(str(port))))


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Pgbouncer:
    """A running pgbouncer. `url`: the URL of a database of the server through it."""

    port: int

    def url(self, direct: str) -> str:
        database = sa.make_url(direct).database
        return f"postgresql://fks@127.0.0.1:{self.port}/{database}"


@contextmanager
def pgbouncer(server: Cluster, pool_mode: str, *settings: str) -> Iterator[Pgbouncer]:
    """Debian's pgbouncer in front of this server; skips if it is not installed. Run by root, it has the account of the
    server."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed")
    account = account_for(NEVER)
    with folder_for_servers() as folder, socket.create_server(("127.0.0.1", 0)) as free:
        own_port = free.getsockname()[1]
        free.close()
        config = folder / "pgbouncer.ini"
        config.write_text(
            f"[databases]\n* = host={server.folder} port={PORT} user=fks\n[pgbouncer]\n"
            f"listen_addr = 127.0.0.1\nlisten_port = {own_port}\nunix_socket_dir =\nauth_type = any\n"
            f"pool_mode = {pool_mode}\n" + "".join(f"{line}\n" for line in settings)
        )
        give(folder, account)
        running = subprocess.Popen(
            [program, str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            **_as(account),  # type: ignore[call-overload]
        )
        try:
            until(lambda: _listens(own_port))
            yield Pgbouncer(own_port)
        finally:
            running.terminate()
            running.wait(30)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
