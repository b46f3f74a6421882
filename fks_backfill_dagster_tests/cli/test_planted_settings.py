"""The command on a machine with other accounts: their settings, their modules, their homes, their links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host.servers import free_port
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.accounts import IS_ROOT, as_other, give_to_other, needs_root
from fks_backfill_dagster_tests.cli.conftest import Command, Outcome

PROGRAM = Path(sys.executable).with_name("fks-backfill")
"""The installed one: `python -m` would add the working folder to the path."""

MODULES = ("click", "dagster", "json", "psutil", "psycopg", "pydantic", "sqlalchemy", "sitecustomize", "yaml")

Run = Callable[..., Outcome]


@pytest.fixture
def theirs(settings: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a project and modules: another account's, or, not as root, writable for all."""
    folder = Path(tempfile.mkdtemp(prefix="fks-theirs-")).resolve()
    (folder / "config").mkdir()
    (folder / "config" / "backfill.yaml").write_text("batch_size_days: 3\n")
    (folder / "dagster.yaml").write_text(
        "local_artifact_storage: {module: planted, class: Planted, config: {}}\n"
    )
    for name in (*MODULES, "planted", "fks_backfill_dagster"):
        code = f"import pathlib; pathlib.Path({str(folder / 'imported')!r}).write_text({name!r})\n"
        (folder / f"{name}.py").write_text(f"{code}raise SystemExit('a planted module')\n")
    folder.chmod(0o777)
    if IS_ROOT:
        give_to_other(folder, *folder.rglob("*"))
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def program(settings: Path) -> Run:
    """The installed command in the working folder."""
    if not PROGRAM.exists():
        pytest.skip(f"the command is not installed: there is no {PROGRAM}")

    def run(*arguments: str) -> Outcome:
        done = subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=200)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.mark.server
@pytest.mark.parametrize("arguments", [["status"], ["up"], ["backfill", "BTC/USDT", "1h"], ["db", "url"]])
def test_planted_settings_are_reported_and_not_used(
    program: Run, theirs: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.delenv("FKS_CONFIG")
    result = program(*arguments)
    file = theirs / "config" / "backfill.yaml"
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"Error: {file}: is not used, because {theirs} ")
    assert "set FKS_CONFIG" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.slow  # `host/test_processes.py` has the market and the guard
def test_nothing_planted_is_imported_from_up_to_down(
    program: Run, theirs: Path, world: LocalMarket, settings: Path, tmp_path: Path
) -> None:
    """In another account's folder, with own settings: servers, a run of Dagster, stop."""
    start = ("--start", "2024-01-01", "--end", "2024-02-01")
    try:
        up = program("up", "--port", str(free_port()))
        assert up.exit_code == 0, up.stderr
        assert f"  settings  {settings}" in up.stdout.splitlines()
        launched = program("launch", "BTC/USDT", "--timeframe", "1h", *start)
        status = program("status", "BTC/USDT", "1h")
        opened = _open_to_others(tmp_path / "home")
    finally:
        down = program("down")
    assert launched.exit_code == 0, launched.stderr
    assert status.stdout.splitlines()[-1] == f"Settings: {settings}"
    assert down.stdout.startswith("Stopped: code-server, daemon, webserver"), down.stderr
    assert not (theirs / "imported").exists(), (theirs / "imported").read_text()
    assert opened == []


@pytest.mark.server
def test_no_file_of_the_embedded_database_is_open_to_others(
    program: Run, settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FKS_DATABASE_URL")
    home = tmp_path / "home"
    try:
        assert program("db", "init").exit_code == 0
        ours = [path for path in _open_to_others(home) if not path.is_socket()]
    finally:
        EmbeddedPostgres(home).remove()
    assert ours == []


def _open_to_others(home: Path) -> list[Path]:
    """The files that grant any permission to the group or to others."""
    found = [path for path in (home, *home.rglob("*")) if not path.is_symlink()]
    return [path for path in found if path.stat().st_mode & 0o077]


@needs_root
@pytest.mark.parametrize("arguments", [["up"], ["down"], ["status"], ["db", "url"], ["db", "stop"]])
def test_root_does_nothing_in_the_home_of_another_account(
    fks: Command, theirs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    home = theirs / "home"
    links = [
        "run/up.lock",
        "logs/postgresql.log",
        "logs/webserver.log",
        "dagster/dagster.yaml",
        "pg.users",
        "pg.start",
    ]
    for name in links:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).symlink_to(victim)
    give_to_other(home, *home.rglob("*"))
    monkeypatch.setenv("FKS_HOME", str(home))
    monkeypatch.delenv("FKS_DATABASE_URL")
    before = sorted(home.rglob("*"))
    result = fks(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{home} belongs to nobody" in result.stderr
    assert "run this as that user" in result.stderr
    assert result.stderr.count("\n") == 1
    assert (victim.read_text(), victim.stat().st_uid) == ("precious", 0)
    assert sorted(home.rglob("*")) == before


@needs_root
def test_a_link_in_the_place_of_the_home_is_not_followed(
    fks: Command, theirs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o755)
    (theirs / "home").symlink_to(victim)
    monkeypatch.setenv("FKS_HOME", str(theirs / "home"))  # the link is root's, the folder around it is not
    result = fks("down")
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"because {theirs} belongs to nobody" in result.stderr
    assert (list(victim.iterdir()), victim.stat().st_mode & 0o777) == ([], 0o755)


@pytest.mark.parametrize("name", ["run", "run/up.lock", "dagster/dagster.yaml"])
def test_links_planted_in_an_open_home_are_not_followed(
    fks: Command, world: LocalMarket, tmp_path: Path, name: str
) -> None:
    """Links planted while the home was open are not followed once it is closed."""
    home, victim = tmp_path / "home", tmp_path / "victim"
    victim.write_text("precious")
    (home / name).parent.mkdir(parents=True)
    (home / name).symlink_to(victim)
    home.chmod(0o777)
    result = fks("up", "--port", str(free_port()))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"{home} can be changed by other accounts (mode 0777)" in result.stderr
    assert f"`chmod go-rwx {home}`" in result.stderr
    assert result.stderr.count("\n") == 1
    home.chmod(0o700)
    if name == "run/up.lock":
        result = fks("down")
        assert result.exit_code == 1
        assert f"{home / name} is a link" in result.stderr
    assert victim.read_text() == "precious"


@needs_root
def test_another_account_cannot_read_a_home(process: Command, world: LocalMarket, tmp_path: Path) -> None:
    yard = Path(tempfile.mkdtemp(prefix="fks-")).resolve()
    yard.chmod(0o755)
    os.environ["FKS_HOME"] = str(yard / "home")  # restored by the fixture that has set it
    try:
        assert process("down").exit_code == 0
        for path in (yard / "home", yard / "home" / "run", yard / "home" / "run" / "up.lock"):
            code = f"import os, sys; sys.exit(os.access({str(path)!r}, os.R_OK))"
            done = subprocess.run([*as_other(), sys.executable, "-c", code], cwd="/")
            assert done.returncode == 0, f"{path} can be read"
    finally:
        shutil.rmtree(yard)
