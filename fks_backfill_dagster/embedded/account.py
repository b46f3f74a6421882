"""The account of the server. PostgreSQL refuses to run as root, so root needs another uid, which must reach its files.

A normal user's server runs as that user. Root's server runs as a uid without an account, which no other user of the
machine can become, and in the group of the same number. Below a folder of another account root starts no server:
that account could put links where root writes.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fks_backfill_dagster.embedded.errors import OTHER_DATABASE, EmbeddedError

FREE_UIDS = range(60706, 61184)
"""Uids that no distribution assigns (https://systemd.io/UIDS-GIDS)."""


class Account(NamedTuple):
    uid: int
    gid: int

    @property
    def has_name(self) -> bool:
        return name_of(self.uid) is not None

    @property
    def is_free(self) -> bool:
        """Whether it is an unassigned uid: only root can become it."""
        return self.uid in FREE_UIDS and not self.has_name


def account_for(cluster: Path) -> Account | None:
    """The account of the server of this cluster, which need not exist yet; None: the user of this process.

    Precondition: `ownership.check_home` accepts the home. Raises EmbeddedError for a cluster of another account.
    """
    if os.geteuid() != 0:
        return None
    owner = cluster.stat().st_uid if cluster.exists() else 0
    if owner == 0:
        owner = next(number for number in FREE_UIDS if not (name_of(number) or _names_group(number)))
    elif owner not in FREE_UIDS or name_of(owner):
        raise EmbeddedError(
            f"{cluster} belongs to uid {owner}, and root would write where that account can put links: run this as"
            f" that user, set FKS_HOME to another directory, {OTHER_DATABASE}"
        )
    return Account(owner, owner)


def maker_for(account: Account | None) -> Account | None:
    """The account that runs initdb and single-user mode, which, unlike the server, need a named uid: `nobody`.

    The group is the server's, so that other processes of `nobody` cannot enter the folder of the cluster.
    """
    if account is None:
        return None
    import pwd  # absent on Windows

    return Account(pwd.getpwnam("nobody").pw_uid, account.gid)


def can_traverse(directory: Path, account: Account) -> bool:
    """Whether the account may enter every directory from / down. By modes only: an ACL may allow more."""
    return all(_may_search(path.stat(), account) for path in (directory, *directory.parents))


def give(path: Path, account: Account | None) -> None:
    """Changes the owner of the whole tree. Follows no link, including one created during the walk."""
    if account is None:
        return
    for _, directories, files, parent in os.fwalk(path, follow_symlinks=False):
        for name in (*directories, *files):
            os.chown(name, account.uid, account.gid, dir_fd=parent, follow_symlinks=False)
    os.chown(path, account.uid, account.gid, follow_symlinks=False)


def run(command: Sequence[str], account: Account | None, *, log: int, lock: int, stdin: str = "") -> int:
    """Runs the command as `account` and returns its exit code; its output goes to `log`; it and its children hold
    `lock`."""
    return subprocess.run(
        command,
        user=None if account is None else account.uid,
        group=None if account is None else account.gid,
        extra_groups=None if account is None else [],
        input=stdin.encode(),
        stdout=log,
        stderr=log,
        pass_fds=(lock,),
        cwd="/",
        env=clean_environment(),
        start_new_session=True,  # a Ctrl-C in the starter's terminal must not reach the server
        check=False,
    ).returncode


def clean_environment() -> dict[str, str]:
    """An environment without the providers' keys, and without PG* variables, which would change server settings."""
    environment = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return environment


def _may_search(status: os.stat_result, account: Account) -> bool:
    if status.st_uid == account.uid:
        return bool(status.st_mode & stat.S_IXUSR)
    if status.st_gid == account.gid:
        return bool(status.st_mode & stat.S_IXGRP)
    return bool(status.st_mode & stat.S_IXOTH)


def name_of(uid: int) -> str | None:
    """The name of a user; None for a uid without an account."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def _names_group(gid: int) -> bool:
    import grp

    try:
        grp.getgrgid(gid)
    except KeyError:
        return False
    return True
