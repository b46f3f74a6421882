"""Making a cluster: initdb, the settings, the database. It gets its name when it is complete."""

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
# Written once, when this cluster was made. Change settings with ALTER SYSTEM or in postgresql.conf.
listen_addresses = ''               # a socket only, nothing on the network
unix_socket_permissions = 0700
max_connections = 200               # Dagster takes a connection per event
shared_buffers = 256MB
work_mem = 16MB
maintenance_work_mem = 128MB
wal_level = minimal                 # nobody replicates from here
max_wal_senders = 0
max_wal_size = 4GB                  # bulk loads: few checkpoints
min_wal_size = 256MB
checkpoint_timeout = 15min
synchronous_commit = on             # what was reported as committed survives a power cut
autovacuum = on
jit = off                           # short queries: compiling costs more than it gives
timezone = 'UTC'
log_timezone = 'UTC'
log_checkpoints = off
"""

# By the account whose folder it is: root would write through a link that it has put there.
_ADD_SETTINGS = (
    r"""umask 077; cat >"$1/fks.conf" && printf "\ninclude = 'fks.conf'\n" >>"$1/postgresql.conf" """
)


ACCESS = """\
# Written at every start. A socket in a folder of its owner's (0700), nothing on the network.
local all all {method}
"""

USERS = """\
# Written at every start. Whom the folder of the socket lets in, as whatever role they ask for.
"""


def write_access(cluster: Path, account: Account | None, log: ServerLog, lock: int) -> None:
    """Writes who may log in: the user of the server, and root, by the kernel's word. Nobody by TCP.

    Clusters of earlier versions let in whoever reached the socket, or any TCP port. An owner without a name cannot be
    named in PostgreSQL's list; for one that somebody can be, the folder stays the only rule.
    """
    own = Account(os.geteuid(), os.getegid()) if account is None else account
    names = {name for uid in (0, own.uid) if (name := name_of(uid)) is not None}
    only_root = account is not None and own.is_free
    method = "peer map=owner" if own.has_name or only_root else "trust"
    users = USERS + "".join(f'owner "{name}" all\n' for name in sorted(names))
    for name, text in (("pg_hba.conf", ACCESS.format(method=method)), ("pg_ident.conf", users)):
        # By the owner of the folder, who may have put a link there.
        script = 'umask 077 && cat >"$1.new" && mv -f "$1.new" "$1"'
        command = ["/bin/sh", "-c", script, "sh", str(cluster / name)]
        if run(command, account, log=log.descriptor, lock=lock, stdin=text) != 0:
            raise log.failure(f"could not get its {name}")


def check_version(cluster: Path) -> bool:
    """Whether there is a cluster of our version; EmbeddedError if there is something else."""
    try:
        version = (cluster / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        if cluster.is_dir() and any(cluster.iterdir()):
            raise EmbeddedError(
                f"{cluster} is not empty and no PostgreSQL cluster: move it away, or set FKS_HOME elsewhere"
            ) from None
        return False
    if version != MAJOR_VERSION:
        raise EmbeddedError(
            f"{cluster} was made by PostgreSQL {version}, this program brings PostgreSQL {MAJOR_VERSION}: "
            f"load it with pg_dump of PostgreSQL {version} into a new one, or move it away to begin anew"
        )
    return True


def make_cluster(cluster: Path, binaries: Path, account: Account | None, log: ServerLog, lock: int) -> None:
    """initdb in a place of its own, then one rename. `lock` is held by initdb: nobody meddles if we die."""
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
    """The same cluster on every machine: no locale of the system is used, text sorts by code point."""
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
        raise log.failure("could not be made")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
