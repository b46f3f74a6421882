"""Homes for real servers, processes that use them, and their clean-up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from fks_backfill_dagster.embedded import EmbeddedPostgres

CHECKOUT = Path(__file__).resolve().parents[2]

START = """
import sys
from pathlib import Path
from fks_backfill_dagster.embedded import EmbeddedError, EmbeddedPostgres
try:
    postgres = EmbeddedPostgres(Path(sys.argv[1]))
    print(postgres.stop() if "stop" in sys.argv else postgres.start(keep="keep" in sys.argv), flush=True)
except EmbeddedError as error:
    sys.exit(f"EmbeddedError: {error}")
if "stay" in sys.argv:
    sys.stdin.read()
"""


class Use:
    """Another process that starts the server and uses it until it is ended or killed."""

    def __init__(self, home: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(home), "stay"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
        )

    def url(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


def processes_of(home: Path) -> list[psutil.Process]:
    """Postmaster and watchdog of the home, found by their command lines; backends by their postmaster."""
    named = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if any(word == str(home) or word.startswith(f"{home}/") for word in words) and "-c" not in words[1:2]:
            named.append(process)
    return named


def until(condition: Callable[[], bool], seconds: float = 15.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def one(url: str, query: str = "SELECT 1") -> object:
    with psycopg.connect(url) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def gone(home: Path) -> bool:
    return not processes_of(home)


def quick_disk() -> str:
    """A folder in memory if there is room: the tests are about processes, not disks."""
    memory = "/dev/shm"
    roomy = os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 2_000_000_000
    return memory if roomy else tempfile.gettempdir()


def open_directory(parent: str) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="fks-", dir=parent)).resolve()
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's own."""
    yield from open_directory(quick_disk())


@pytest.fixture
def fresh_home(open_dir: Path) -> Iterator[Path]:
    """FKS_HOME of one test; its processes are stopped afterwards in any case."""
    yield from cleaned(open_dir / ".fks")


@pytest.fixture(scope="session")
def seed() -> Iterator[Path]:
    """A cluster to copy: initdb is most of a first start."""
    for path in open_directory(quick_disk()):
        postgres = EmbeddedPostgres(path)
        postgres.start()
        postgres.stop()
        yield path / "pg"


@pytest.fixture
def home(fresh_home: Path, seed: Path) -> Path:
    """A home that was started before."""
    fresh_home.mkdir()
    subprocess.run(["cp", "-a", str(seed), str(fresh_home / "pg")], check=True)
    return fresh_home


def cleaned(path: Path) -> Iterator[Path]:
    yield path
    EmbeddedPostgres(path).remove()
    shutil.rmtree(
        path, ignore_errors=True
    )  # this process may still use the server: deleting the home ends that
    assert until(lambda: gone(path)), f"left behind: {processes_of(path)}"


@pytest.fixture
def use(fresh_home: Path) -> Iterator[Callable[[], Use]]:
    made: list[Use] = []

    def make() -> Use:
        made.append(Use(fresh_home))
        return made[-1]

    yield make
    for one_use in made:
        one_use.kill()


def is_root() -> bool:
    return os.geteuid() == 0
