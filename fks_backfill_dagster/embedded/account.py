"""Who runs the server. PostgreSQL refuses root, so for root another account must, and must reach its files.

A server of a normal user runs as that user. A server of root runs as the owner of the cluster or of the home;
if that is root too, as a uid that no account has: so nobody else on the machine can be that user.
"""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FIRST_FREE_UID, LAST_FREE_UID = 60706, 61183
"""The range that no distribution gives out (https://systemd.io/UIDS-GIDS)."""


class Account(NamedTuple):
    uid: int
    gid: int

    @property
    def has_name(self) -> bool:
        return name_of(self.uid) is not None

    @property
    def is_free(self) -> bool:
        """Whether it is one of those that nobody is given: only root can be it."""
        return FIRST_FREE_UID <= self.uid <= LAST_FREE_UID and not self.has_name


def account_for(home: Path, cluster: Path) -> Account | None:
    """None: the user of this process. The links' owners count, not the targets': a link is no transfer."""
    if os.geteuid() != 0:
        return None
    for path in (cluster, home):
        if os.path.lexists(path) and (status := path.lstat()).st_uid != 0:
            return Account(status.st_uid, status.st_gid)
    uid = FIRST_FREE_UID
    while name_of(uid) is not None:
        uid += 1
    return Account(uid, uid)


def nobody() -> Account:
    import pwd  # absent on Windows

    entry = pwd.getpwnam("nobody")
    return Account(entry.pw_uid, entry.pw_gid)


def can_traverse(directory: Path, account: Account) -> bool:
    """Whether every directory from the root down may be entered. Modes only: an ACL may allow more."""
    return all(_may_search(path.stat(), account) for path in (directory, *directory.parents))


def give(path: Path, account: Account | None) -> None:
    """Hands the whole tree over (no links followed)."""
    if account is None:
        return
    os.chown(path, account.uid, account.gid, follow_symlinks=False)
    for parent, directories, files in os.walk(path):
        for name in (*directories, *files):
            os.chown(os.path.join(parent, name), account.uid, account.gid, follow_symlinks=False)


def run(command: Sequence[str], account: Account | None, *, log: int, lock: int, stdin: str = "") -> int:
    """Runs it to its end as `account`; output goes to `log`; it and its children hold `lock`. The exit code."""
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
        start_new_session=True,  # a Ctrl-C in the starter's terminal is not for the server
        check=False,
    ).returncode


def clean_environment() -> dict[str, str]:
    """The keys of the providers have no business in the server, and PG* variables would change its settings."""
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
    """The name of a user; None for a uid that no account has."""
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None
