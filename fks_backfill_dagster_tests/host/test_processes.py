"""Background processes: found by other processes, stopped with their children, not confused with foreign ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fks_backfill_dagster.host import processes
from fks_backfill_dagster.host.processes import Background, Guard, backgrounds, stop
from fks_backfill_dagster.ownership import OwnershipError
from fks_backfill_dagster.settings.model import CHECKOUT

pytestmark = pytest.mark.server

# A leader with a child process.
_LEADER = (
    "import subprocess, sys, time;"
    " subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)"
)
_STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    stop(backgrounds(tmp_path))


def started(home: Path, code: str = _LEADER, members: int = 2) -> Background:
    process = Background(home, "server")
    process.start([sys.executable, "-c", code], cwd=home, environment=os.environ, port=4711)
    until(lambda: len(process.members()) == members)
    return process


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_another_process_finds_it(home: Path) -> None:
    started(home)
    (found,) = backgrounds(home)
    assert (found.name, found.port, found.is_running()) == ("server", 4711, True)


def test_it_is_found_immediately(home: Path) -> None:
    """At first the system shows a process without its environment, so it could be taken for ended."""
    for number in range(40):
        process = Background(home, f"server{number}")
        process.start([sys.executable, "-c", _STUBBORN], cwd=home, environment=os.environ, port=0)
        assert process.is_running()
        process.members()[0].kill()


def test_it_is_stopped_with_its_children(home: Path) -> None:
    process = started(home)
    members = process.members()
    assert stop([process]) == ["server"]
    assert not any(lives(member) for member in members)
    assert backgrounds(home) == []


def test_orphans_of_a_killed_leader_are_stopped(home: Path) -> None:
    process = started(home)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    until(lambda: not process.is_running())
    (orphan,) = process.members()
    stop([process])
    assert not lives(orphan)


def test_a_process_that_ignores_sigterm_is_killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.3)
    process = started(home, _STUBBORN, members=1)
    time.sleep(0.2)  # wait until it ignores the signal
    stop([process])
    assert process.members() == []


def test_a_reused_pid_is_not_signalled(home: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True
    ) as foreign:
        process = Background(home, "server")
        process.record.parent.mkdir(parents=True)
        process.record.write_text(json.dumps({"pid": foreign.pid, "port": 1}))
        assert not process.is_running()
        assert stop([process]) == []
        assert foreign.poll() is None
        foreign.kill()


def test_a_damaged_record_counts_as_not_running(home: Path) -> None:
    process = Background(home, "server")
    process.record.parent.mkdir(parents=True)
    process.record.write_text("{")
    assert (process.pid, process.is_running()) == (None, False)


def test_its_files_are_closed_to_other_accounts(home: Path) -> None:
    code = "import subprocess, sys; open('made', 'w'); subprocess.run(['mkdir', 'folder'])"
    process = Background(home / "home", "server")
    process.start([sys.executable, "-c", code], cwd=home, environment=os.environ, port=0)
    until((home / "folder").exists)
    modes = {"home": 0o700, "home/run": 0o700, "home/logs": 0o700, "home/logs/server.log": 0o600}
    modes |= {"home/run/server.json": 0o600, "made": 0o600, "folder": 0o700}
    assert {name: (home / name).stat().st_mode & 0o777 for name in modes} == modes


_STARTS = """
import os, signal, sys, time
from pathlib import Path
from fks_backfill_dagster.host.processes import Background, stop
home = Path(sys.argv[1])
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
server = Background(home, "server")
server.start([sys.executable, "-c", sys.argv[2]], cwd=home, environment=os.environ, port=0)
while "\\n" not in server.last_words():
    time.sleep(0.02)
print(server.last_words(), [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)])
stop([server])
"""


def test_a_process_started_by_a_background_job_ends_by_signals(home: Path) -> None:
    """A shell without job control starts background jobs with SIGINT ignored, and children inherit that."""
    shown = (
        "import signal, time; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler);"
        " print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", _STARTS, str(home), shown]
    done = subprocess.run(command, capture_output=True, text=True, cwd=CHECKOUT, check=True, timeout=60)
    assert done.stdout == "True\nTrue [True, True]\n"


def test_a_log_that_is_a_link_is_not_written(home: Path) -> None:
    victim = home / "victim"
    victim.write_text("precious")
    process = Background(home, "server")
    process.log.parent.mkdir()
    process.log.symlink_to(victim)
    with pytest.raises(OwnershipError, match="is a link"):
        process.start(["/bin/echo", "text"], cwd=home, environment=os.environ, port=0)
    assert victim.read_text() == "precious"


def plant(folder: Path, *names: str) -> None:
    """Creates modules that shadow those of the same name and write a file `imported`."""
    for name in names:
        code = f"import pathlib; pathlib.Path({str(folder / 'imported')!r}).write_text({name!r})\n"
        (folder / f"{name}.py").write_text(code + "raise SystemExit('a planted module')\n")


def test_a_process_and_its_children_import_nothing_from_their_working_folder(home: Path) -> None:
    """The market, started as by the demo, and a Python process that starts another one."""
    plant(home, "json", "yaml", "psutil", "click", "fks_backfill_dagster", "sitecustomize")
    market = Background(home, "market")
    command = [sys.executable, "-m", "fks_backfill_dagster", "simulate", "--port", "0"]
    market.start(command, cwd=home, environment=os.environ, port=0)
    until(lambda: "The local market listens" in market.last_words() or not market.is_running())
    assert market.is_running(), market.last_words()
    child = Background(home, "child")
    code = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import yaml; open(\"done\", \"w\")'])"
    )
    child.start([sys.executable, "-c", code], cwd=home, environment=os.environ, port=0)
    until(lambda: (home / "done").exists() or not child.is_running())
    assert not (home / "imported").exists(), child.last_words()


def test_the_guard_imports_nothing_from_its_working_folder(home: Path) -> None:
    plant(home, "json", "psutil", "fks_backfill_dagster")
    with Guard(home, home):
        Background(home, "server").start(["/bin/sleep", "60"], cwd=home, environment=os.environ, port=0)
    assert not (home / "imported").exists()
    assert not Background(home, "server").is_running()


_DEMO = """
import os, sys, time
from pathlib import Path
from fks_backfill_dagster.host.processes import Background, Guard
home = Path(sys.argv[1])
with Guard(home, Path.cwd()) as guard:
    Background(home, "server").start(
        [sys.executable, "-c", "import time; time.sleep(60)"], cwd=home, environment=os.environ, port=0
    )
    if sys.argv[2] == "killed":
        print("started", flush=True)
        time.sleep(60)
    if sys.argv[2] == "keep":
        guard.keep()
"""


def demo(home: Path, how: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _DEMO, str(home), how], stdout=subprocess.PIPE, text=True, cwd=CHECKOUT
    )


def test_the_guard_stops_all_processes_when_its_demo_is_killed(home: Path) -> None:
    with demo(home, "killed") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        server = Background(home, "server")
        assert server.is_running()
        process.kill()
    until(lambda: not server.is_running())


@pytest.mark.parametrize(("how", "left"), [("ends", False), ("keep", True)])
def test_the_guard_stops_or_keeps_the_servers_when_the_demo_ends(home: Path, how: str, left: bool) -> None:
    with demo(home, how) as process:
        assert process.wait(30) == 0
    assert Background(home, "server").is_running() is left
