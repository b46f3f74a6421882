"""The keeper: restarts with growing delays until a server is given up; no restart after `stop`.

With small test servers. With Dagster's: test_servers.py (the daemon), test_kills.py (all of them).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host import keeper
from fks_backfill_dagster.host.keeper import (
    DATABASE,
    MOST_ENDS,
    STEADY_SECONDS,
    Kept,
    Part,
    Plan,
    delay,
)
from fks_backfill_dagster.host.processes import KEEPER, MARK, Background, backgrounds, stop_all
from fks_backfill_dagster_tests.embedded.conftest import open_directory, quick_disk
from fks_backfill_dagster_tests.host.test_processes import lives, until

# A server with a worker, like the code server.
_SERVER = (
    "import subprocess, sys, time;"
    " subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
)
_FAST_KEEPER = """
import sys
from pathlib import Path
from fks_backfill_dagster.host import keeper
keeper.MOST_ENDS = 3
keeper.POLL_SECONDS = keeper.LONGEST_SECONDS = 0.01
keeper.Keeper(Path(sys.argv[1])).run()
"""


# Back-off


def test_the_delays_grow_and_end() -> None:
    waits = [delay(ends) for ends in range(1, MOST_ENDS + 1)]
    assert waits[:8] == [0, 1, 2, 4, 8, 16, 32, 60]
    assert set(waits[8:-1]) == {60}
    assert waits[-1] is None


class World:
    """A simulated server and clock, with the starts and the log."""

    def __init__(self, begin: Callable[[], None] | None = None) -> None:
        self.now, self.runs, self.began = 1000.0, True, list[float]()
        self.log = list[str]()
        self.kept = Kept("server", lambda: self.runs, begin or self.begin, self.log.append)

    def begin(self) -> None:
        self.began.append(self.now)
        self.runs = True

    def pass_seconds(self, seconds: float) -> None:
        """Checks four times a second."""
        for _ in range(round(seconds * 4)):
            self.now += 0.25
            self.kept.check(self.now)


def test_an_ended_server_is_restarted_immediately() -> None:
    world = World()
    world.pass_seconds(10)
    assert world.began == []
    world.runs = False
    world.pass_seconds(1)
    assert len(world.began) == 1
    assert world.log == ["the server has ended; restarting now"]


def test_a_server_that_ran_long_is_restarted_immediately_again() -> None:
    world = World()
    for _ in range(3 * MOST_ENDS):
        world.runs = False
        world.pass_seconds(STEADY_SECONDS + 1)
    assert len(world.began) == 3 * MOST_ENDS
    assert not world.kept.given_up


def test_a_server_that_ends_repeatedly_is_given_up() -> None:
    world = World(begin=lambda: world.began.append(world.now))  # never comes up
    world.runs = False
    world.pass_seconds(3600)
    assert world.kept.given_up
    assert len(world.began) == MOST_ENDS - 1
    apart = [round(later - earlier) for earlier, later in zip(world.began, world.began[1:], strict=False)]
    assert apart == sorted(apart)
    assert world.log[-1] == f"the server has ended {MOST_ENDS} times in a row and is no longer restarted"

    world.runs = True  # restarted by an operator
    world.pass_seconds(STEADY_SECONDS + 1)
    world.runs = False
    world.pass_seconds(1)
    assert len(world.began) == MOST_ENDS


def test_a_start_that_fails_counts_as_an_end() -> None:
    def fail() -> None:
        raise OSError("no such thing")

    world = World(begin=fail)
    world.runs = False
    world.pass_seconds(3600)
    assert world.kept.given_up
    assert "the server could not be started: no such thing" in world.log


# The process


@pytest.fixture
def home() -> Iterator[Path]:
    for folder in open_directory(quick_disk()):
        yield folder / "home"
        stop_all(folder / "home")
        EmbeddedPostgres(folder / "home").remove()


def keep(
    home: Path, *codes: str, database: bool | None = None, keeper_code: str | None = None
) -> list[Background]:
    """Starts servers with this code and their keeper, as `up` does."""
    parts = tuple(Part(f"server{n}", (sys.executable, "-c", code)) for n, code in enumerate(codes))
    for part in parts:
        part.start(home, Path.cwd(), os.environ)
    Background(home, KEEPER).record.parent.mkdir(parents=True, exist_ok=True)
    Plan(Path.cwd(), parts, database).write(home)
    run = ("-c", keeper_code) if keeper_code else ("-P", "-m", keeper.__name__)
    Part(KEEPER, (sys.executable, *run, str(home))).start(home, Path.cwd(), os.environ)
    return [Background(home, part.name) for part in parts]


def of_home(home: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == str(home) and lives(process):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.server
def test_a_killed_server_is_restarted_and_its_orphans_are_stopped(home: Path) -> None:
    first, second = keep(home, _SERVER, _SERVER)
    until(lambda: len(first.members()) == 2)
    before, pid, other = first.members(), first.pid, second.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    until(lambda: first.is_running() and first.pid != pid)
    assert not any(lives(process) for process in before)
    assert second.pid == other

    # The whole group, as after a shortage of memory.
    until(lambda: len(first.members()) == 2)
    before, pid = first.members(), first.pid
    for process in before:
        process.kill()
    until(lambda: first.is_running() and first.pid != pid)
    assert "the server0 has ended; restarting now" in Background(home, KEEPER).last_words()


@pytest.mark.server
def test_servers_survive_a_killed_keeper_and_the_next_one_takes_them_over(home: Path) -> None:
    (server,) = keep(home, _SERVER)
    process = Background(home, KEEPER)
    until(lambda: (home / "run" / "keeper.state").exists())
    assert keeper.problems(home) == []
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.is_running())
    pid = server.pid
    assert server.is_running()
    (problem,) = keeper.problems(home)
    assert problem == "The keeper has ended, so a server that ends is not restarted: run `fks-backfill up`."

    process.start(
        [sys.executable, "-P", "-m", keeper.__name__, str(home)],
        cwd=Path.cwd(),
        environment=os.environ,
        port=0,
    )
    assert keeper.problems(home) == []
    assert server.pid == pid
    os.kill(pid or 0, signal.SIGKILL)
    until(lambda: server.is_running() and server.pid != pid)


@pytest.mark.server
@pytest.mark.parametrize("late", [False, True])
def test_no_server_is_restarted_after_a_stop(home: Path, late: bool) -> None:
    """Even while the keeper is about to restart a server."""
    (server,) = keep(home, _SERVER)
    until(lambda: (home / "run" / "keeper.state").exists())
    pid = server.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    if late:
        until(lambda: server.pid != pid)  # the record is removed or replaced
    stop_all(home)
    assert of_home(home) == []
    assert backgrounds(home) == []


@pytest.mark.server
def test_a_keeper_without_its_record_ends(home: Path) -> None:
    keep(home, _SERVER)
    process = Background(home, KEEPER)
    until(lambda: (home / "run" / "keeper.state").exists())
    (old,) = process.members()
    process.record.unlink()  # as if the home was deleted
    until(lambda: not lives(old))
    assert Background(home, "server0").is_running()


@pytest.mark.server
def test_a_given_up_server_is_reported(home: Path) -> None:
    keep(home, _SERVER, "", keeper_code=_FAST_KEEPER)
    until(lambda: bool(keeper.problems(home)))
    (problem,) = keeper.problems(home)
    log = home / "logs" / "server1.log"
    assert problem.startswith("The server1 ended ")
    assert problem.endswith(
        f"times in a row and is no longer restarted: see {log}, then run `fks-backfill up`."
    )
    assert Background(home, "server0").is_running()


def one(url: str) -> bool:
    try:
        with psycopg.connect(url) as connection:
            return connection.execute("SELECT 1").fetchone() == (1,)
    except psycopg.OperationalError:
        return False


@pytest.mark.server
def test_a_killed_database_is_restarted_and_a_stopped_one_is_not(home: Path) -> None:
    postgres = EmbeddedPostgres(home)
    url = postgres.start(keep=True)
    postgres.release()
    keep(home, _SERVER, database=True)
    for _ in range(2):
        pid = postgres.status().pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        until(lambda: postgres.status().pid not in (None, pid) and one(url))  # noqa: B023
    assert postgres.status().kept
    assert f"the {DATABASE} has ended; restarting" in Background(home, KEEPER).last_words()

    assert postgres.stop()
    # The restart of a server shows that the keeper has checked.
    server = Background(home, "server0")
    pid = server.pid
    os.kill(pid or 0, signal.SIGKILL)
    until(lambda: server.is_running() and server.pid != pid)
    assert not postgres.status().running
    assert one(postgres.start())
    postgres.release()


@pytest.mark.server
def test_the_keeper_is_a_user_of_the_database(home: Path) -> None:
    """Without `keep` it ends with its last user, but not during the restart of a server."""
    postgres = EmbeddedPostgres(home)
    postgres.start()
    keep(home, _SERVER, database=False)
    until(lambda: (home / "run" / "keeper.state").exists())
    until(lambda: postgres.status().in_use)
    postgres.release()
    until(lambda: postgres.status().in_use)
    stop_all(home)
    until(lambda: not postgres.status().running)


@pytest.mark.server
def test_a_keeper_imports_no_heavy_modules(home: Path) -> None:
    """It runs as long as the servers, so it must not import heavy modules."""
    keep(home, _SERVER)
    until(lambda: (home / "run" / "keeper.state").exists())
    (process,) = Background(home, KEEPER).members()
    mapped = {Path(each.path).parts for each in process.memory_maps()} if sys.platform == "linux" else set()
    assert not {"psutil", "numpy", "pydantic_core", "sqlalchemy", "grpc"} & {
        part for parts in mapped for part in parts
    }
