"""Which account owns a file and who else can change it; files and folders for our own account alone.

Belongs here: what every part checks before it takes a file that it has searched for (`exposure`,
`read_trusted`), and how everything below FKS_HOME is made (`make_home`, `make_folder`, `open_file`,
`write_text`, `socket_folder`). Accounts are compared as the kernel does: by modes and by ids of the process.

Does not belong here: which files those are. Only the standard library is imported.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

SOCKET_PATH_BYTES = 103
"""The longest path of a socket: macOS has room for 104 bytes with the final zero, Linux for 108."""

_MOST_LINKS = 40
"""As the kernel: more links on one way are a circle."""

_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""Without waiting for the other end of a pipe that somebody put in the place of a file."""


class OwnershipError(Exception):
    """A file or folder belongs to another account, or others can change it: one sentence."""


# What was found ---------------------------------------------------------------------------------------


def exposure(folder: Path, *parts: str) -> str | None:
    """Why what lies at `parts` below `folder` may be another account's work; None if it cannot be.

    The folder, every folder on the way and the file itself must belong to us or to root, and nobody else may write
    them. Links count as what they lead to: a link in such a folder is ours. Raises OSError, as for what is not there.
    """
    if os.name != "posix":
        return None
    path = folder
    for name in ("", *parts):
        path = path / name
        status = path.stat()
        if reason := _exposed(path, path, status):
            return None if _guards_code(path, status) else reason
    return None


def read_trusted(folder: Path, *parts: str) -> str:
    """The text (UTF-8) of a file that passes `exposure`; judged is what was opened, so nothing can change between.

    Raises OwnershipError with the reason, FileNotFoundError for what is no file, OSError and UnicodeDecodeError.
    """
    if os.name != "posix":
        return folder.joinpath(*parts).read_text(encoding="utf-8")
    with ExitStack() as stack:
        path, descriptor, judged = folder, -1, True
        for name in ("", *parts):
            path = path / name
            descriptor = os.open(name, _READ, dir_fd=descriptor) if name else os.open(folder, _READ)
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if judged and (reason := _exposed(path, descriptor, status)):
                if not _guards_code(path, status):
                    raise OwnershipError(reason)
                judged = False
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(errno.ENOENT, "is no file", str(path))
        with open(descriptor, encoding="utf-8", closefd=False) as file:
            return file.read()


def _exposed(path: Path, target: Path | int, status: os.stat_result) -> str | None:
    """`target`: what has the `status`, by path or descriptor."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to {_account(status.st_uid)}"
    if _others_write(target, status):
        return f"{path} can be changed by other accounts (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _guards_code(folder: Path, status: os.stat_result) -> bool:
    """Whether this code lies below: who can change such a folder can change the code, so it protects nothing.

    Thus a container may run as root on a checkout that belongs to a user of its host. In a sticky folder (/tmp)
    only its owner can change what is not his.
    """
    if folder not in Path(__file__).resolve().parents:
        return False
    return status.st_uid not in (os.geteuid(), 0) or not status.st_mode & stat.S_ISVTX


def _others_write(target: Path | int, status: os.stat_result) -> bool:
    """Whether an account besides the owner and root may write. A group counts unless it is the owner's alone."""
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    # With an access list these bits are the most that the list may give, to whomever it names.
    return _has_access_list(target) or not _is_private_group(status.st_gid, status.st_uid)


def _has_access_list(target: Path | int) -> bool:
    try:
        return bool(os.getxattr(target, "system.posix_acl_access"))
    except (AttributeError, OSError):  # no Linux; no list, or a file system without
        return False


def _is_private_group(gid: int, uid: int) -> bool:
    """Whether it is the group that most Linux systems make for each account (umask 002), with nobody else in it."""
    import grp  # absent on Windows, as pwd
    import pwd

    try:
        owner, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = owner.pw_gid == gid and group.gr_name == owner.pw_name
    return is_own and not set(group.gr_mem) - {owner.pw_name}


def _account(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


# What we make -----------------------------------------------------------------------------------------


def check_home(home: Path) -> None:
    """Raises OwnershipError for a home of another account, or one into which others can put files.

    For root the whole way to it counts: whoever owns a folder on it can put a link in the place of the home, and
    root writes through it. Changes nothing; a home that is not there yet passes.
    """
    if home.is_symlink() and home.lstat().st_uid not in (os.geteuid(), 0):
        raise _foreign(home, home.lstat().st_uid)
    if home.exists():
        _check_ours(home, home.stat())
    if os.geteuid() == 0:
        _check_way(home.absolute())


def make_home(home: Path) -> None:
    """Makes FKS_HOME, or closes an existing one to other accounts: mode 0700. Raises as `check_home`."""
    check_home(home)
    make_folder(home)


def make_folder(folder: Path) -> None:
    """Makes a folder of mode 0700, or takes one of ours, which it closes to other accounts.

    Raises OwnershipError for one of another account or one that others can write, and OSError.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    _check_ours(folder, status)
    if stat.S_IMODE(status.st_mode) & 0o077 and not _lets_server_pass(status):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _check_ours(folder, os.fstat(descriptor))
            os.fchmod(descriptor, 0o700)
        finally:
            os.close(descriptor)


def let_pass(folder: Path, gid: int) -> None:
    """Lets a group through a folder of root's without letting it list: mode 0710.

    `gid` has no name (`account.py`): no account but that of the embedded server is in it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchown(descriptor, -1, gid)
        os.fchmod(descriptor, 0o710)
    finally:
        os.close(descriptor)


def socket_folder(near: Path, file: str, prefix: str, key: Path) -> Path:
    """The folder for a Unix socket named `file`: `near`, or, where that path is too long for a socket, one of the
    temporary folder that is named after `key`. It is not made. Raises OwnershipError where both are too long."""
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"{prefix}-{os.geteuid()}-{digest}"
    for folder in (near, short):
        if len(os.fsencode(folder / file)) <= SOCKET_PATH_BYTES:
            return folder
    raise OwnershipError(
        f"the paths of {near} and of {short.parent} are too long for a socket: set FKS_HOME or TMPDIR to a shorter one"
    )


def open_file(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of a file that only we may read and write (0600); it is made if absent.

    Raises OwnershipError for a link, which is not followed, and for another account's file, and OSError.
    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if path.is_symlink():
            raise OwnershipError(f"{path} is a link, which is not followed here: delete it") from None
        if isinstance(error, PermissionError) and path.exists():
            _check_ours(path, path.stat())
        raise
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise _foreign(path, status.st_uid)
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_text(path: Path, text: str) -> None:
    """Writes a file that only we may read (0600), beside it and by a rename: nobody meets half of it."""
    descriptor, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _check_ours(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise _foreign(path, status.st_uid)
    if _others_write(path, status):
        raise OwnershipError(
            f"{path} can be changed by other accounts (mode {stat.S_IMODE(status.st_mode):04o}), and what is in it"
            f" may be theirs: look through it and `chmod go-rwx {path}`, or set FKS_HOME to another folder"
        )


def _foreign(path: Path, uid: int) -> OwnershipError:
    return OwnershipError(
        f"{path} belongs to {_account(uid)}: run this as that user, or set FKS_HOME to a folder of your own"
    )


def _check_way(home: Path) -> None:
    """Every folder and link on the way must be root's. In one of root's that others can write, a link or a folder that
    they put in the place of the home is theirs, and refused as such."""
    for path, status in _way(home):
        if status.st_uid != 0 and not _guards_code(path, status):
            raise OwnershipError(
                f"root cannot use {home}, because {path} belongs to {_account(status.st_uid)}, who could put a link in"
                f" its place: run this as that user, or set FKS_HOME to a folder that only root can move"
            )


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that the system passes when it opens `path`, and at last what it opens.

    As far as it is there. Raises OSError for a circle of links.
    """
    here, rest, links = Path("/"), list(path.parts[:0:-1]), 0
    yield here, here.lstat()
    while rest:
        name = rest.pop()
        step = here.parent if name == ".." else here / name
        try:
            status = step.lstat()
        except FileNotFoundError:
            return
        yield step, status
        if not stat.S_ISLNK(status.st_mode):
            here = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = Path(os.readlink(step))
        here = Path("/") if target.is_absolute() else here
        rest += [part for part in reversed(target.parts) if part != "/"]


def _lets_server_pass(status: os.stat_result) -> bool:
    """Whether it is a folder as `let_pass` leaves it."""
    import grp

    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o077 != stat.S_IXGRP:
        return False
    try:
        grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    return False
