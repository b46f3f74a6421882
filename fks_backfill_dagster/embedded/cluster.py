"""Creates a cluster: initdb, settings, database. It is renamed to its final path when it is complete."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fks_backfill_dagster.embedded.account import Account, give, maker_for, name_of, run
from fks_backfill_dagster.embedded.binaries import MAJOR_VERSION
from fks_backfill_dagster.embedded.errors import EmbeddedError
from fks_backfill_dagster.embedded.log import ServerLog

DATABASE = "fks"
SUPERUSER = "fks"

SETTINGS = """\
# Written once, when this cluster was created. Change settings with ALTER SYSTEM or in postgresql.conf.
listen_addresses = ''               # a socket only, nothing on the network
unix_socket_permissions = 0700
max_connections = 200               # Dagster takes a connection per event
shared_buffers = 256MB
work_mem = 16MB
maintenance_work_mem = 128MB
wal_level = minimal                 # no replication
max_wal_senders = 0
max_wal_size = 4GB                  # bulk loads: few checkpoints
min_wal_size = 256MB
checkpoint_timeout = 15min
synchronous_commit = on             # what was reported as committed survives a power cut
autovacuum = on
jit = off                           # short queries: compiling costs more than it saves
timezone = 'UTC'
log_timezone = 'UTC'
log_checkpoints = off
"""

# Run by the account that owns the folder: root would write through a link that this account put there.
_ADD_SETTINGS = (
    r"""umask 077; cat >"$1/fks.conf" && printf "\ninclude = 'fks.conf'\n" >>"$1/postgresql.conf" """
)


ACCESS = """\
# Written at every start. A socket in a folder of the server's owner (0700), nothing on the network.
local all all {method}
"""

USERS = """\
# Written at every start. The accounts that may enter the folder of the socket, as any role.
"""


def write_access(cluster: Path, account: Account | None, log: ServerLog, lock: int) -> None:
    """Writes the access rules: the user of the server and root, verified by the kernel (peer); no TCP.

    Clusters of earlier versions accepted every connection to the socket, or to any TCP port. PostgreSQL's map needs a
    name for the owner; for an owner without one that other processes can have, the folder stays the only protection.
    """
    own = Account(os.geteuid(), os.getegid()) if account is None else account
    names = {name for uid in (0, own.uid) if (name := name_of(uid)) is not None}
    only_root = account is not None and own.is_free
    method = "peer map=owner" if own.has_name or only_root else "trust"
    users = USERS + "".join(f'owner "{name}" all\n' for name in sorted(names))
    for name, text in (("pg_hba.conf", ACCESS.format(method=method)), ("pg_ident.conf", users)):
        # Run by the owner of the folder, who may have put a link there.
        script = 'umask 077 && cat >"$1.new" && mv -f "$1.new" "$1"'
        command = ["/bin/sh", "-c", script, "sh", str(cluster / name)]
        if run(command, account, log=log.descriptor, lock=lock, stdin=text) != 0:
            raise log.failure(f"could not write its {name}")


def check_version(cluster: Path) -> bool:
    """Whether a cluster of our version exists. Raises EmbeddedError if there is anything else."""
    try:
        version = (cluster / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        if cluster.is_dir() and any(cluster.iterdir()):
            raise EmbeddedError(
                f"{cluster} is not empty and not a PostgreSQL cluster: move it away, or set FKS_HOME elsewhere"
            ) from None
        return False
    if version != MAJOR_VERSION:
        raise EmbeddedError(
            f"{cluster} was made by PostgreSQL {version}, this program includes PostgreSQL {MAJOR_VERSION}: "
            f"load it with pg_dump of PostgreSQL {version} into a new one, or move it away to start empty"
        )
    return True


def make_cluster(cluster: Path, binaries: Path, account: Account | None, log: ServerLog, lock: int) -> None:
    """Runs initdb in a separate folder, then renames it. initdb holds `lock`, so that no other process interferes
    if this one dies."""
    part = cluster.with_name("pg.new")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    maker = maker_for(account)
    give(part, maker)
    log.mark()
    try:
        _run_to_end(_initdb(binaries, part), maker, log, lock)
        _run_to_end(["/bin/sh", "-c", _ADD_SETTINGS, "sh", str(part)], maker, log, lock, stdin=SETTINGS)
        single = [str(binaries / "postgres"), "--single", "-D", str(part), "-c", "exit_on_error=on"]
        _run_to_end([*single, "postgres"], maker, log, lock, stdin=f"CREATE DATABASE {DATABASE}\n")
        give(part, account)
        part.rename(cluster)
        _sync_directory(cluster.parent)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _initdb(binaries: Path, target: Path) -> list[str]:
    """The command for the same cluster on every machine: no system locale, text sorts by code point."""
    return [
        str(binaries / "initdb"),
        f"--pgdata={target}",
        f"--username={SUPERUSER}",
        "--encoding=UTF8",
        "--locale=C",
        "--locale-provider=builtin",
        "--builtin-locale=C.UTF-8",
        "--auth-local=peer",  # `write_access` replaces both before the first start
        "--auth-host=reject",
        "--no-instructions",
    ]


def _run_to_end(
    command: list[str], account: Account | None, log: ServerLog, lock: int, *, stdin: str = ""
) -> None:
    if run(command, account, log=log.descriptor, lock=lock, stdin=stdin) != 0:
        raise log.failure("could not be created")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
