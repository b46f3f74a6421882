"""Files of other accounts: which are trusted, which are refused, and which of ours are private."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster.ownership import (
    OwnershipError,
    check_home,
    exposure,
    let_pass,
    make_folder,
    make_home,
    open_file,
    read_trusted,
    write_text,
)
from fks_backfill_dagster_tests.accounts import IS_ROOT, as_other, give_to_other, needs_root, other_account
from fks_backfill_dagster_tests.interrupting import interrupted_everywhere

PARTS = ("config", "backfill.yaml")
TEXT = "batch_size_days: 7\n"


@pytest.fixture
def yard() -> Iterator[Path]:
    """A folder that every account may enter, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="fks-")).resolve()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def project(yard: Path) -> Path:
    """A project that only we can change."""
    file = yard.joinpath("project", *PARTS)
    file.parent.mkdir(parents=True)
    file.write_text(TEXT)
    for path in (file, file.parent, file.parents[1]):
        path.chmod(0o644 if path is file else 0o755)
    return yard / "project"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# Discovered files


def test_a_file_that_only_we_can_change_is_trusted(project: Path) -> None:
    assert exposure(project, *PARTS) is None
    assert read_trusted(project, *PARTS) == TEXT


@pytest.mark.parametrize("inside", ["", "config", "config/backfill.yaml"])
def test_a_file_that_others_can_write_is_refused(project: Path, inside: str) -> None:
    path = project / inside
    path.chmod(mode(path) | 0o002)
    assert exposure(project, *PARTS) == f"{path} can be changed by other accounts (mode {mode(path):04o})"
    with pytest.raises(OwnershipError, match=f"^{path} can be changed by other accounts"):
        read_trusted(project, *PARTS)


@needs_root
@pytest.mark.parametrize("inside", ["", "config", "config/backfill.yaml"])
def test_a_file_of_another_account_is_not_trusted(project: Path, inside: str) -> None:
    give_to_other(project / inside)
    expected = f"{project / inside} belongs to nobody (uid {other_account().pw_uid})"
    assert exposure(project, *PARTS) == expected
    with pytest.raises(OwnershipError) as error:
        read_trusted(project, *PARTS)
    assert str(error.value) == expected


@pytest.mark.server
@needs_root
def test_files_of_root_and_of_the_own_account_are_trusted(project: Path) -> None:
    for owner in (0, other_account().pw_uid):
        for path in (project, project / "config", project.joinpath(*PARTS)):
            os.chown(path, owner, -1)
        code = "import sys; from pathlib import Path; from fks_backfill_dagster.ownership import exposure"
        script = f"{code}; sys.exit(exposure(Path({str(project)!r}), *{PARTS!r}))"
        done = subprocess.run(
            [*as_other(), sys.executable, "-P", "-c", script], capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


@needs_root
def test_a_group_counts_unless_it_is_the_owners_alone(project: Path) -> None:
    file = project.joinpath(*PARTS)
    file.chmod(0o664)
    os.chown(file, 0, 0)  # root's own group, as umask 002 leaves it
    assert exposure(project, *PARTS) is None
    os.chown(file, 0, other_account().pw_gid)
    assert exposure(project, *PARTS) == f"{file} can be changed by other accounts (mode 0664)"


@needs_root
def test_an_access_list_behind_the_owners_own_group_counts(project: Path) -> None:
    file = project.joinpath(*PARTS)
    os.chown(file, 0, 0)
    none, user = 0xFFFFFFFF, other_account().pw_uid
    entries = [(0x01, 6, none), (0x02, 6, user), (0x04, 4, none), (0x10, 6, none), (0x20, 4, none)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", packed)
    except (AttributeError, OSError):
        pytest.skip("this file system has no access lists")
    assert "can be changed by other accounts" in str(exposure(project, *PARTS))


def test_a_link_counts_as_its_target(project: Path, yard: Path) -> None:
    file = project.joinpath(*PARTS)
    real = yard / "real.yaml"
    file.replace(real)
    file.symlink_to(real)
    assert read_trusted(project, *PARTS) == TEXT
    real.chmod(0o666)
    assert exposure(project, *PARTS) == f"{file} can be changed by other accounts (mode 0666)"
    with pytest.raises(OwnershipError):
        read_trusted(project, *PARTS)


def test_a_linked_folder_counts_as_well(project: Path, yard: Path) -> None:
    shared = yard / "shared"
    (project / "config").replace(shared)
    (project / "config").symlink_to(shared)
    assert read_trusted(project, *PARTS) == TEXT
    shared.chmod(0o777)
    with pytest.raises(OwnershipError, match="config can be changed by other accounts"):
        read_trusted(project, *PARTS)


def test_a_sticky_folder_is_not_a_project(project: Path) -> None:
    project.chmod(0o1777)  # as /tmp: others can put a dagster.yaml beside the file
    assert exposure(project, *PARTS) == f"{project} can be changed by other accounts (mode 1777)"


def test_a_pipe_in_place_of_a_file_does_not_block(project: Path) -> None:
    file = project.joinpath(*PARTS)
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(FileNotFoundError):
        read_trusted(project, *PARTS)


# The home


def test_a_home_is_private(yard: Path) -> None:
    old = os.umask(0)
    try:
        make_home(yard / "home")
        make_folder(yard / "home" / "run")
        os.close(open_file(yard / "home" / "run" / "lock"))
        write_text(yard / "home" / "run" / "record", "text")
    finally:
        os.umask(old)
    made = ["home", "home/run", "home/run/lock", "home/run/record"]
    assert [mode(yard / name) for name in made] == [0o700, 0o700, 0o600, 0o600]


def test_an_open_home_of_ours_is_closed(yard: Path) -> None:
    home = yard / "home"
    home.mkdir()
    home.chmod(0o755)
    check_home(home)
    assert mode(home) == 0o755, "a look changes nothing"
    make_home(home)
    assert mode(home) == 0o700


def test_a_home_that_others_can_write_is_refused(yard: Path) -> None:
    home = yard / "home"
    home.mkdir()
    home.chmod(0o777)
    for use in (check_home, make_home, make_folder):
        with pytest.raises(
            OwnershipError, match=rf"^{home} can be changed .*mode 0777.*chmod go-rwx {home}`"
        ):
            use(home)
    assert mode(home) == 0o777
    home.chmod(0o700)
    make_home(home)


@needs_root
@pytest.mark.parametrize("use", [check_home, make_home, make_folder])
def test_a_home_of_another_account_is_refused(yard: Path, use: Callable[[Path], None]) -> None:
    home = yard / "home"
    home.mkdir()
    give_to_other(home)
    with pytest.raises(
        OwnershipError, match=rf"^{home} belongs to nobody \(uid \d+\): run this as that user"
    ):
        use(home)
    assert list(home.iterdir()) == []


@needs_root
def test_a_link_of_another_account_is_refused_as_home(yard: Path) -> None:
    target, home = yard / "target", yard / "home"
    target.mkdir()
    target.chmod(0o755)
    home.symlink_to(target)
    make_home(home)  # our own link
    assert mode(target) == 0o700
    target.chmod(0o755)
    give_to_other(home)
    with pytest.raises(OwnershipError, match="belongs to nobody"):
        make_home(home)
    assert mode(target) == 0o755


@needs_root
def test_root_uses_no_folder_that_another_account_could_swap(yard: Path) -> None:
    theirs = yard / "theirs"
    home = theirs / "deep" / "home"
    home.mkdir(parents=True)
    give_to_other(theirs)
    with pytest.raises(OwnershipError, match=rf"^root cannot use {home}, because {theirs} belongs to nobody"):
        make_home(home)
    os.chown(theirs, 0, 0)
    theirs.chmod(
        0o777
    )  # root's own folder: a file that another account creates there belongs to that account, and is refused for that
    make_home(home)

    (yard / "way").symlink_to(theirs)
    make_home(yard / "way" / "deep" / "home")
    give_to_other(yard / "way")
    with pytest.raises(OwnershipError, match=rf"because {yard / 'way'} belongs to nobody"):
        make_home(yard / "way" / "deep" / "home")


@pytest.mark.server
@needs_root
def test_a_user_has_a_home_in_a_shared_folder(yard: Path) -> None:
    shared = yard / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    code = "import sys; from pathlib import Path; from fks_backfill_dagster.ownership import make_home"
    script = f"{code}; make_home(Path({str(shared / 'home')!r}))"
    subprocess.run([*as_other(), sys.executable, "-P", "-c", script], check=True)
    assert (mode(shared / "home"), (shared / "home").stat().st_uid) == (0o700, other_account().pw_uid)


@pytest.mark.server
@needs_root
def test_another_account_cannot_read_a_home(yard: Path) -> None:
    home = yard / "home"
    make_home(home)
    write_text(home / "secret", "x")
    for command in (["ls", str(home)], ["cat", str(home / "secret")]):
        assert subprocess.run([*as_other(), *command], capture_output=True).returncode != 0
    let_pass(home, 60706)
    make_home(home)
    assert (mode(home), home.stat().st_gid) == (0o710, 60706), "the way of the embedded server stays"
    for command in (["ls", str(home)], ["cat", str(home / "secret")]):
        assert subprocess.run([*as_other(), *command], capture_output=True).returncode != 0
    os.chown(home, 0, other_account().pw_gid)
    make_home(home)
    assert mode(home) == 0o700, "a group that accounts are in does not pass"


# Files in it


def test_no_link_is_followed_to_open_a_file(yard: Path) -> None:
    victim, link = yard / "victim", yard / "lock"
    victim.write_text("precious")
    link.symlink_to(victim)
    with pytest.raises(OwnershipError, match=f"^{link} is a link"):
        open_file(link, os.O_RDWR | os.O_TRUNC)
    write_text(link, "ours")
    assert (victim.read_text(), link.is_symlink(), link.read_text()) == ("precious", False, "ours")


def test_an_open_file_of_ours_is_closed(yard: Path) -> None:
    file = yard / "lock"
    file.write_text("")
    file.chmod(0o666)
    os.close(open_file(file))
    assert mode(file) == 0o600


@needs_root
def test_a_file_of_another_account_is_refused(yard: Path) -> None:
    file = yard / "lock"
    file.write_text("")
    give_to_other(file)
    with pytest.raises(OwnershipError, match=rf"^{file} belongs to nobody"):
        open_file(file)


@pytest.mark.skipif(IS_ROOT, reason="root may write everything")
def test_a_file_that_we_may_not_write_is_an_error_of_the_system(yard: Path) -> None:
    file = yard / "lock"
    file.write_text("")
    file.chmod(0o400)
    with pytest.raises(PermissionError):
        open_file(file)


def test_no_interruption_leaves_a_partial_file(tmp_path: Path) -> None:
    """Interrupted at each line in turn: the text is there as a whole or not at all, and nothing else is."""
    file = tmp_path / "token"
    for number in interrupted_everywhere(lambda: write_text(file, TEXT)):
        assert [path.name for path in tmp_path.iterdir()] in ([], [file.name]), number
        assert not file.exists() or file.read_text() == TEXT
        file.unlink(missing_ok=True)
    assert file.read_text() == TEXT
