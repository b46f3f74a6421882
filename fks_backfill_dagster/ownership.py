"""File ownership: checks that no other account can change a file, and private files and folders.

Belongs here: the checks before a discovered file is used (`exposure`, `read_trusted`), and the creation of everything
below FKS_HOME (`make_home`, `make_folder`, `open_file`, `write_text`, `socket_folder`). Accounts are compared as the
kernel does: by modes and by the ids of the process.

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
from functools import partial
from pathlib import Path

SOCKET_PATH_BYTES = 103
"""The longest path of a socket: macOS has room for 104 bytes with the final zero, Linux for 108."""

_MOST_LINKS = 40
"""As in the kernel: more links in one path count as a loop."""

_READ = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
"""Non-blocking: a pipe in place of a file must not block the open."""


class OwnershipError(Exception):
    """A file or folder belongs to another account, or others can change it: one sentence."""


# Checks -----------------------------------------------------------------------------------------------


def exposure(folder: Path, *parts: str) -> str | None:
    """The reason why another account may have written the file at `parts` below `folder`; None if it cannot have.

    The folder, every folder on the path and the file itself must belong to us or to root, and no other account may
    write them. Links are followed: a link in such a folder is ours. Raises OSError, for example for a missing file.
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
    """The text (UTF-8) of a file that passes `exposure`. The checks use the opened descriptors, so that nothing can
    be replaced in between.

    Raises OwnershipError with the reason, FileNotFoundError if it is not a file, OSError and UnicodeDecodeError.
    """
    if os.name != "posix":
        return folder.joinpath(*parts).read_text(encoding="utf-8")
    with ExitStack() as stack:
        path, descriptor, is_checked = folder, -1, True
        for name in ("", *parts):
            path = path / name
            descriptor = os.open(name, _READ, dir_fd=descriptor) if name else os.open(folder, _READ)
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if is_checked and (reason := _exposed(path, descriptor, status)):
                if not _guards_code(path, status):
                    raise OwnershipError(reason)
                is_checked = False
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise FileNotFoundError(errno.ENOENT, "is not a file", str(path))
        with open(descriptor, encoding="utf-8", closefd=False) as file:
            return file.read()


def _exposed(path: Path, target: Path | int, status: os.stat_result) -> str | None:
    """`target`: the path or descriptor that `status` describes."""
    if status.st_uid not in (os.geteuid(), 0):
        return f"{path} belongs to {_account(status.st_uid)}"
    if _others_write(target, status):
        return f"{path} can be changed by other accounts (mode {stat.S_IMODE(status.st_mode):04o})"
    return None


def _guards_code(folder: Path, status: os.stat_result) -> bool:
    """Whether this code lies below: an account that can change such a folder can change the code anyway.

    A container may therefore run as root on a checkout that belongs to a user of its host. In a sticky folder (/tmp)
    only the folder's owner can change files of others.
    """
    if folder not in Path(__file__).resolve().parents:
        return False
    return status.st_uid not in (os.geteuid(), 0) or not status.st_mode & stat.S_ISVTX


def _others_write(target: Path | int, status: os.stat_result) -> bool:
    """Whether an account besides the owner and root may write. A group counts unless it is the owner's private one."""
    if status.st_mode & stat.S_IWOTH:
        return True
    if not status.st_mode & stat.S_IWGRP:
        return False
    # With an access list these bits are the mask: the most that the list may grant to any account.
    return _has_access_list(target) or not _is_private_group(status.st_gid, status.st_uid)


def _has_access_list(target: Path | int) -> bool:
    try:
        return bool(os.getxattr(target, "system.posix_acl_access"))
    except (AttributeError, OSError):  # not Linux; no list, or a file system without lists
        return False


def _is_private_group(gid: int, uid: int) -> bool:
    """Whether it is the group that most Linux systems create per account (umask 002), without other members."""
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


# Files and folders of our own -------------------------------------------------------------------------


def check_home(home: Path) -> None:
    """Raises OwnershipError for a home of another account, or one that others can write.

    For root the whole path counts: the owner of a folder on it can replace the home by a link, and root would write
    through it. Changes nothing; a home that does not exist yet passes.
    """
    if home.is_symlink() and home.lstat().st_uid not in (os.geteuid(), 0):
        raise _foreign(home, home.lstat().st_uid)
    if home.exists():
        _check_ours(home, home.stat())
    if os.geteuid() == 0:
        _check_path(home.absolute())


def make_home(home: Path) -> None:
    """Creates FKS_HOME, or closes an existing one to other accounts: mode 0700. Raises like `check_home`."""
    check_home(home)
    make_folder(home)


def make_folder(folder: Path) -> None:
    """Creates a folder of mode 0700, or closes an existing one of ours to other accounts.

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
    """Lets a group enter a folder of root without listing it: mode 0710.

    `gid` has no name (`account.py`): only the account of the embedded server has it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchown(descriptor, -1, gid)
        os.fchmod(descriptor, 0o710)
    finally:
        os.close(descriptor)


def socket_folder(near: Path, file: str, prefix: str, key: Path) -> Path:
    """The folder for a Unix socket named `file`: `near`, or, if that path is too long for a socket, one in the
    temporary folder with a digest of `key` as its name. Not created. Raises OwnershipError if both are too long."""
    digest = hashlib.sha256(os.fsencode(key)).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"{prefix}-{os.geteuid()}-{digest}"
    for folder in (near, short):
        if len(os.fsencode(folder / file)) <= SOCKET_PATH_BYTES:
            return folder
    raise OwnershipError(
        f"the paths of {near} and of {short.parent} are too long for a socket: set FKS_HOME or TMPDIR to a shorter one"
    )


def open_file(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of a file that only we may read and write (0600), created if missing.

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
    """Writes a file that only we may read (0600) atomically, by a temporary file and a rename.

    Its name is known before it exists, so that a signal at any moment leaves none behind.
    """
    part = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        with open(part, "x", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
            file.write(text)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _check_ours(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise _foreign(path, status.st_uid)
    if _others_write(path, status):
        raise OwnershipError(
            f"{path} can be changed by other accounts (mode {stat.S_IMODE(status.st_mode):04o}), and its contents may"
            f" be theirs: check them and `chmod go-rwx {path}`, or set FKS_HOME to another folder"
        )


def _foreign(path: Path, uid: int) -> OwnershipError:
    return OwnershipError(
        f"{path} belongs to {_account(uid)}: run this as that user, or set FKS_HOME to a folder of your own"
    )


def _check_path(home: Path) -> None:
    """Every folder and link on the path must be root's. In a folder of root that others can write, a link or folder
    that they put in place of the home belongs to them, and is refused for that."""
    for path, status in _components(home):
        if status.st_uid != 0 and not _guards_code(path, status):
            raise OwnershipError(
                f"root cannot use {home}, because {path} belongs to {_account(status.st_uid)}, who could replace it by"
                f" a link: run this as that user, or set FKS_HOME to a folder that only root can move"
            )


def _components(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that the system passes when it opens `path`, then the target; up to a missing one.

    Raises OSError for a loop of links.
    """
    here, remaining, links = Path("/"), list(path.parts[:0:-1]), 0
    yield here, here.lstat()
    while remaining:
        name = remaining.pop()
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
        remaining += [part for part in reversed(target.parts) if part != "/"]


def _lets_server_pass(status: os.stat_result) -> bool:
    """Whether it is a folder in the state that `let_pass` sets."""
    import grp

    if status.st_uid != 0 or stat.S_IMODE(status.st_mode) & 0o077 != stat.S_IXGRP:
        return False
    try:
        grp.getgrgid(status.st_gid)
    except KeyError:
        return True
    return False
