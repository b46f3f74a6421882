"""Background processes of one home: started detached, found by other processes, stopped with their children.

Each is the leader of its own process group, and `run/<name>.json` holds its pid. A member of the group counts as ours
only if its environment also names our home, so that a reused pid is never signalled. The group also contains orphans of
a killed leader, such as the run workers of a code server.

The keeper (`keeper`) restarts processes that end without `stop`, so `stop` ends it first.

`python -m ...processes HOME` is the guard of a demo: at the end of its standard input it stops all processes of that
home, also if the demo is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fks_backfill_dagster.ownership import make_folder, make_home, open_file, write_text

if TYPE_CHECKING:
    import psutil  # imported where it is used: the keeper, which runs as long as the servers, does not need it

KEEPER = "keeper"
"""The name of the process that restarts the others."""

MARK = "FKS_HOME"
"""The environment variable of every process of a home; child processes inherit it."""

_PLAIN = {"NO_COLOR": "1", "PYTHON_COLORS": "0"}
"""Output goes to a file, so FORCE_COLOR of this process's terminal must not apply."""

STOP_SECONDS = 15.0
"""Grace period before SIGKILL: run workers report their interruption, code servers end."""

KEEP = b"keep"
"""The message to a guard that keeps the servers running."""

# Children of this process, polled to reap zombies.
_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class Background:
    """One named background process of a home, running or not."""

    home: Path
    name: str

    @property
    def log(self) -> Path:
        return self.home / "logs" / f"{self.name}.log"

    @property
    def record(self) -> Path:
        return self.home / "run" / f"{self.name}.json"

    def start(self, command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], port: int) -> None:
        """Starts it with its output in `log`; `port` is where it will listen (0: none).

        It and its children create files for this account only and import nothing from their working folder.
        SIGINT and SIGTERM end it, even if this process ignores them.
        """
        make_home(self.home)
        for folder in (self.log.parent, self.record.parent):
            make_folder(folder)
        with open(open_file(self.log, os.O_WRONLY | os.O_APPEND), "ab") as log, _default_signal_handlers():
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=cwd,
                env={**environment, **_PLAIN, MARK: str(self.home), "PYTHONSAFEPATH": "1"},
                umask=0o077,
                start_new_session=True,
            )
        _children.append(child)
        write_text(self.record, json.dumps({"pid": child.pid, "port": port}))
        # Right after its start the system shows a process without an environment, so without our mark.
        while child.poll() is None and not self.is_running():
            time.sleep(0.01)

    @property
    def pid(self) -> int | None:
        """The pid of the leader, as recorded at its start."""
        return self._recorded("pid")

    @property
    def port(self) -> int | None:
        return self._recorded("port")

    def _recorded(self, key: str) -> int | None:
        try:
            return int(json.loads(self.record.read_text())[key])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def is_running(self) -> bool:
        """Whether the leader is alive."""
        _reap()
        leader = self.pid
        return leader is not None and self._is_ours(leader, leader)

    def members(self) -> list[psutil.Process]:
        """The living processes of the group that are ours."""
        import psutil

        _reap()
        group = self.pid
        if group is None:
            return []
        return [process for process in psutil.process_iter() if self._is_ours(process.pid, group)]

    def _is_ours(self, pid: int, group: int) -> bool:
        try:
            return os.getpgid(pid) == group and _home_of(pid) == str(self.home)
        except OSError:  # gone meanwhile, or another user's
            return False

    def last_words(self, lines: int = 15) -> str:
        """The end of the log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except FileNotFoundError:
            return ""


def backgrounds(home: Path) -> list[Background]:
    """All that were started in this home and not stopped; some may have ended."""
    return [Background(home, path.stem) for path in sorted((home / "run").glob("*.json"))]


def stop(processes: Iterable[Background], *, at_once: bool = False) -> list[str]:
    """Ends them and their children: SIGTERM, then SIGKILL after STOP_SECONDS. Returns the names of those that ran.

    `at_once` sends SIGKILL immediately. The keeper ends before the others and is not among the names.
    """
    wanted = list(processes)
    keepers = [process for process in wanted if process.name == KEEPER]
    others = [process for process in wanted if process.name != KEEPER]
    ran = [process.name for process in others if process.members()]
    for group in (keepers, others):
        if group:
            _end(group, at_once)
    return ran


def stop_all(home: Path) -> list[str]:
    """Stops all processes of a home. Returns the names of those that ran."""
    stop([Background(home, KEEPER)])  # first: a process that it is starting has no record yet
    return stop(backgrounds(home))


def _end(wanted: Sequence[Background], at_once: bool) -> None:
    import psutil

    deadline = time.monotonic() + (0 if at_once else STOP_SECONDS)
    left: set[psutil.Process] = set()
    signalled: set[psutil.Process] = set()
    # A process that is ending has no environment any more, so members seen before stay in the set.
    while left := {*filter(_is_alive, left), *(member for process in wanted for member in process.members())}:
        late = time.monotonic() >= deadline
        for member in left if late else left - signalled:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        signalled |= left
        time.sleep(0.05)
    for process in wanted:
        process.record.unlink(missing_ok=True)


def _home_of(pid: int) -> str | None:
    """The home in the environment of a living process; None without one. Raises OSError if it is unreadable."""
    if not os.path.isdir("/proc/self"):
        return _home_without_proc(pid)
    # Empty in a zombie, and for a moment in a process that has just been started.
    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    name = os.fsencode(f"{MARK}=")
    return next((os.fsdecode(one.removeprefix(name)) for one in variables if one.startswith(name)), None)


def _home_without_proc(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return process.environ().get(MARK) if _is_alive(process) else None
    except psutil.Error as error:
        raise ProcessLookupError(str(error)) from None


def _is_alive(process: psutil.Process) -> bool:
    import psutil

    _reap()
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _reap() -> None:
    for child in _children:
        child.poll()


@contextmanager
def _default_signal_handlers() -> Iterator[None]:
    """Processes started within the block have the default handlers of SIGINT and SIGTERM.

    A shell without job control starts background jobs with SIGINT ignored, children inherit that, and Dagster handles
    SIGTERM as SIGINT: its processes would ignore both. Handlers, unlike ignored signals, are reset in a child.
    """
    ignored = [
        number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) == signal.SIG_IGN
    ]
    if threading.current_thread() is not threading.main_thread():
        ignored = []  # no other thread may set handlers
    for number in ignored:
        signal.signal(number, lambda *_: None)
    try:
        yield
    finally:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)


class Guard:
    """Stops all processes of a home when this process ends, even by SIGKILL; a context manager.

    `keep` makes it leave the servers running.
    """

    def __init__(self, home: Path, cwd: Path) -> None:
        self._home, self._cwd = home, cwd
        self._message = b""

    def __enter__(self) -> Guard:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self._home)],
            stdin=subprocess.PIPE,
            cwd=self._cwd,
            start_new_session=True,  # a Ctrl-C at the terminal must not end it
        )
        return self

    def keep(self) -> None:
        self._message = KEEP

    def __exit__(self, *_: object) -> None:
        """Returns when all processes have ended."""
        self._process.communicate(self._message)


def guard(home: Path) -> None:
    """Waits for the end of stdin, then stops the home's processes."""
    if sys.stdin.buffer.read() != KEEP:
        stop_all(home)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
