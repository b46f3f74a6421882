"""The error of this package, and messages for failed system calls."""

from __future__ import annotations

import errno

_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})

OTHER_DATABASE = "or name a PostgreSQL of your own in FKS_DATABASE_URL"


class EmbeddedError(Exception):
    """The embedded PostgreSQL failed: one sentence with the place and the remedy."""


def explain(error: OSError, home: object) -> EmbeddedError:
    place = error.filename if error.filename is not None else home
    if error.errno in _NOT_WRITABLE:
        return EmbeddedError(
            f"{place} cannot be used by this user ({error.strerror}): "
            f"set FKS_HOME to a directory of your own, {OTHER_DATABASE}"
        )
    if error.errno in _DISK_FULL:
        return EmbeddedError(f"the disk of {place} is full: free some space, or set FKS_HOME to another disk")
    if error.errno in _NO_LOCKS:
        return EmbeddedError(
            f"the file system of {place} has no file locks: set FKS_HOME to a local disk, {OTHER_DATABASE}"
        )
    return EmbeddedError(
        f"the embedded PostgreSQL of {home} failed at {place} ({error.strerror}): "
        f"set FKS_HOME to another directory, {OTHER_DATABASE}"
    )
