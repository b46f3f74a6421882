"""Another account of this machine, for tests of its access to our files. Only root can act as another account."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

IS_ROOT = os.geteuid() == 0

needs_root = pytest.mark.skipif(
    not IS_ROOT, reason="only root can give files to another account or act as one"
)


def other_account() -> pwd.struct_passwd:
    """The account `nobody`: it has a name, a shared group, and no files of ours."""
    return pwd.getpwnam("nobody")


def give_to_other(*paths: Path) -> None:
    for path in paths:
        os.chown(path, other_account().pw_uid, other_account().pw_gid, follow_symlinks=False)


@functools.cache
def as_other() -> tuple[str, ...]:
    """The beginning of a command line that runs as `nobody`. Skips if that account cannot run our Python."""
    user = other_account()
    command = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
    probe = [*command, sys.executable, "-P", "-c", "import fks_backfill_dagster"]
    if not shutil.which("setpriv") or subprocess.run(probe, capture_output=True, cwd="/").returncode != 0:
        pytest.skip("another account cannot run our Python (setpriv and a checkout open to all are needed)")
    return command
