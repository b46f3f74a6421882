"""The wheel: it is complete, and every command works from an empty folder without the checkout."""

from __future__ import annotations

import email
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host.processes import backgrounds, stop
from fks_backfill_dagster.host.servers import free_port
from fks_backfill_dagster.settings.model import CHECKOUT, CONFIG
from fks_backfill_dagster.simulator import LocalMarket, MarketConfig
from fks_backfill_dagster_tests.postgres import database_url, server_url, template

pytestmark = pytest.mark.server

__all__ = ["database_url", "server_url", "template"]

PACKAGE = "fks_backfill_dagster"
YEAR = ("--start", "2024-01-01", "--end", "2025-01-01")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout, by the locked backend."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=CHECKOUT,
        capture_output=True,
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def environment() -> dict[str, str]:
    """This process's environment without settings, keys and paths of the checkout."""
    dropped = ("FKS_", "DAGSTER_", "PYTHON", "VIRTUAL_ENV")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(dropped) and not name.endswith(("_API_KEY", "_API_TOKEN"))
    }


def files(folder: Path) -> set[str]:
    """All but compiled modules."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return {str(path) for path in found if "__pycache__" not in path.parts}


@dataclass(frozen=True)
class Program:
    """The command of the wheel, run in a folder that is empty at first."""

    command: tuple[str, ...]
    folder: Path
    environment: dict[str, str]

    @property
    def home(self) -> Path:
        return self.folder / ".fks"

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.command, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=280,
        )

    def json(self, *arguments: str) -> Any:
        """The document of a command that has to succeed."""
        done = self(*arguments, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)


def test_the_wheel_is_complete(wheel: Path) -> None:
    ours = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        information = {name for name in archive.namelist() if name.partition("/")[0].endswith(".dist-info")}
        assert set(archive.namelist()) - information == ours
        for name in ("dagster.yaml", "workspace.yaml", str(CONFIG)):
            assert archive.read(f"{PACKAGE}/project/{name}") == (CHECKOUT / name).read_bytes()
        (licence,) = (name for name in information if name.endswith("/licenses/LICENSE"))
        assert b"Apache License" in archive.read(licence)
        (metadata,) = (name for name in information if name.endswith("/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    assert (fields["Requires-Python"], fields["License-Expression"]) == (">=3.11.1", "Apache-2.0")


def test_commands_work_from_an_empty_folder(wheel: Path, database_url: str, tmp_path: Path) -> None:
    """The short case of `test_from_up_to_down_in_a_separate_environment`: unpacked, on the server of the tests."""
    site, folder = tmp_path / "site", tmp_path / "empty"
    folder.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    installed = files(site)
    with LocalMarket(MarketConfig(limits=False)) as market:
        fks = Program(
            (sys.executable, "-P", "-m", PACKAGE),
            folder,
            environment()
            | {
                "PYTHONPATH": str(site),
                "FKS_DATABASE_URL": database_url,
                "FKS_PROVIDERS__BINANCE__BASE_URL": market.binance_url,
                "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": market.archive_url,
            },
        )
        where = "from fks_backfill_dagster.settings import load, model; print(model.SHIPPED, load.load_settings().home)"
        found = subprocess.run(
            [*fks.command[:2], "-c", where], cwd=folder, env=fks.environment, capture_output=True, text=True
        )
        assert found.stdout.split() == [str(site / PACKAGE / "project"), str(fks.home)]
        assert fks.json("backfill", "BTC/USDT", "1d", *YEAR)["total_candles"] == 366
    assert len(fks.json("series", "list")) == 9
    assert fks("export", "BTC/USDT", "1d", "-o", "out.csv").returncode == 0
    assert len((folder / "out.csv").read_text().splitlines()) == 367
    assert files(site) == installed
    assert {path.name for path in folder.iterdir()} <= {"out.csv", ".fks"}


@pytest.fixture
def installed(wheel: Path) -> Iterator[Program]:
    """Installed into a separate environment that uses the dependencies of ours, but not the checkout."""
    yard = Path(tempfile.mkdtemp(prefix="fks-wheel-")).resolve()
    yard.chmod(0o755)  # root's embedded server has to enter
    own, folder = yard / "venv", yard / "empty"
    folder.mkdir(mode=0o755)
    venv.create(own, symlinks=True)
    python = own / "bin" / "python"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "-q",
            "--python",
            str(python),
            "install",
            "--no-index",
            "--no-deps",
            wheel,
        ],
        env=environment(),
        check=True,
    )
    packages = sysconfig.get_path("purelib", vars={"base": str(own), "platbase": str(own)})
    # A folder that a .pth file names is searched, and its own .pth files (the checkout's) are not read.
    places = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(packages, "dependencies.pth").write_text("".join(f"{place}\n" for place in sorted(places)))
    program = Program((str(own / "bin" / "fks-backfill"),), folder, environment())
    before = files(own)
    yield program
    for home in (program.home, program.home / "demo"):
        stop(backgrounds(home))
        EmbeddedPostgres(home).remove()
    changed = files(own) ^ before
    deadline = time.monotonic() + 60
    while left := [one.info for one in psutil.process_iter(["cmdline"]) if _names(one, yard)]:
        if time.monotonic() > deadline:  # a watchdog checks once a second whether it is still needed
            break
        time.sleep(0.1)
    shutil.rmtree(yard)
    assert (changed, left) == (set(), [])


def _names(process: psutil.Process, folder: Path) -> bool:
    return any(str(folder) in word for word in process.info["cmdline"] or ())


@pytest.fixture
def against_simulate(installed: Program) -> Iterator[Program]:
    """The program with the environment that its own `simulate` prints, in the usual home."""
    command = [*installed.command, "simulate", "--port", "0", "--no-limits", "--json"]
    with subprocess.Popen(
        command, cwd=installed.folder, env=installed.environment, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        document = json.loads("".join(iter(running.stdout.readline, "}\n")) + "}")
        assert document["environment"].pop("FKS_HOME") == str(installed.home / "sandbox")
        yield replace(installed, environment=installed.environment | document["environment"])
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 0


@pytest.mark.slow  # `test_commands_work_from_an_empty_folder` is the short case
def test_from_up_to_down_in_a_separate_environment(against_simulate: Program) -> None:
    fks = against_simulate
    assert fks.json("db", "init")["timescaledb"] is False
    assert fks.json("backfill", "BTC/USDT", "1h", *YEAR)["total_candles"] == 8784
    port = free_port()
    up = fks.json("up", "--port", str(port))
    assert (up["url"], up["started"]) == (f"http://127.0.0.1:{port}", True)
    other = fks("up", "--port", str(free_port()))
    assert (other.returncode, other.stdout) == (1, "")
    assert other.stderr.startswith(f"Error: Dagster is already up at {up['url']}, not at port")
    launched = fks.json("launch", "BTC/USDT", "--timeframe", "1d", *YEAR)
    assert launched["succeeded"] is True
    assert launched["series"][0]["partitions"] == ["2024-01-01"]
    assert fks("export", "BTC/USDT", "1d", *YEAR, "-o", "out.csv").returncode == 0
    assert len((fks.folder / "out.csv").read_text().splitlines()) == 367
    assert len(fks.json("series", "list")) == 9
    stopped = fks.json("down")["stopped"]
    assert set(stopped) >= {"code-server", "daemon", "webserver", "database"}
    assert {path.name for path in fks.folder.iterdir()} == {".fks", "out.csv"}


@pytest.mark.slow  # the same, of the demo
def test_the_demo_in_a_separate_environment(installed: Program) -> None:
    done = installed("demo")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"all below {installed.home / 'demo'}\n" in done.stdout
    assert {path.name for path in installed.folder.iterdir()} == {".fks"}
