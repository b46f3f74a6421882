"""Background processes of one home: started detached, found again by another process, stopped whole.

Each is the leader of a process group of its own, and `run/<name>.json` holds its pid. Neither is
believed by itself: a member of the group counts as ours only if its environment names our home, so a
pid that was given to another process meanwhile is left alone. That also finds what a killed leader left
behind: the run workers of a code server.

The keeper (`keeper`) starts again what ends without `stop`, so `stop` ends it first.

`python -m ...processes HOME` is the guard of a demo: it waits for the end of its standard input and
then stops everything of that home, so a demo that is killed leaves nothing behind.
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
    import psutil  # imported where it is used: the keeper, which lives as long as the servers, does without

KEEPER = "keeper"
"""The name of the process that starts the others again."""

MARK = "FKS_HOME"
"""The variable that every process of a home carries, and all that it starts inherit."""

_PLAIN = {"NO_COLOR": "1", "PYTHON_COLORS": "0"}
"""Its output is a file, also where FORCE_COLOR is set for the terminal of this process."""

STOP_SECONDS = 15.0
"""For a run worker to report that it was interrupted, and a code server to end. Then they are killed."""

KEEP = b"keep"
"""What a guard is told when the servers are to stay."""

# Those that this process has started: polled, so that none stays a zombie while we live.
_children: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True, slots=True)
class Background:
    """One named background process of a home, whether it runs or not."""

    home: Path
    name: str

    @property
    def log(self) -> Path:
        return self.home / "logs" / f"{self.name}.log"

    @property
    def record(self) -> Path:
        return self.home / "run" / f"{self.name}.json"

    def start(self, command: Sequence[str], *, cwd: Path, environment: Mapping[str, str], port: int) -> None:
        """Starts it with its output in `log`; `port` is where it will listen (0: nowhere).

        It and all that it starts write for this account alone, and import nothing from their working folder.
        SIGINT and SIGTERM end it, also when this process ignores them.
        """
        make_home(self.home)
        for folder in (self.log.parent, self.record.parent):
            make_folder(folder)
        with open(open_file(self.log, os.O_WRONLY | os.O_APPEND), "ab") as log, _nothing_ignored():
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
        # For a moment after its start the system shows a process without an environment, so without our mark.
        while child.poll() is None and not self.is_running():
            time.sleep(0.01)

    @property
    def pid(self) -> int | None:
        """Of the leader when it was started."""
        return self._told("pid")

    @property
    def port(self) -> int | None:
        return self._told("port")

    def _told(self, key: str) -> int | None:
        try:
            return int(json.loads(self.record.read_text())[key])
        except (FileNotFoundError, ValueError, KeyError):
            return None

    def is_running(self) -> bool:
        """Whether the leader itself lives."""
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
    """All that were started in this home and not stopped, running or not."""
    return [Background(home, path.stem) for path in sorted((home / "run").glob("*.json"))]


def stop(processes: Iterable[Background], *, at_once: bool = False) -> list[str]:
    """Ends them and all that they started: asked first, killed after STOP_SECONDS. Names of those that ran.

    `at_once` kills without asking. The keeper ends before the others, and is not among the names.
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
    """Stops everything of a home. Names of what ran."""
    stop([Background(home, KEEPER)])  # first: what it is just starting has no record yet
    return stop(backgrounds(home))


def _end(wanted: Sequence[Background], at_once: bool) -> None:
    import psutil

    deadline = time.monotonic() + (0 if at_once else STOP_SECONDS)
    left: set[psutil.Process] = set()
    asked: set[psutil.Process] = set()
    # A member that is ending has no environment any more: who was seen once is waited for.
    while left := {*filter(_lives, left), *(member for process in wanted for member in process.members())}:
        late = time.monotonic() >= deadline
        for member in left if late else left - asked:
            with contextlib.suppress(psutil.Error):
                member.send_signal(signal.SIGKILL if late else signal.SIGTERM)
        asked |= left
        time.sleep(0.05)
    for process in wanted:
        process.record.unlink(missing_ok=True)


def _home_of(pid: int) -> str | None:
    """The home that a living process carries the mark of; None of any other. Raises OSError where that is unknown."""
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
        return process.environ().get(MARK) if _lives(process) else None
    except psutil.Error as error:
        raise ProcessLookupError(str(error)) from None


def _lives(process: psutil.Process) -> bool:
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
def _nothing_ignored() -> Iterator[None]:
    """What is started within the block has the default handlers of SIGINT and SIGTERM.

    A shell without job control starts a job in the background with SIGINT ignored, children inherit that, and
    Dagster handles SIGTERM as SIGINT: its processes would ignore both. A handler, unlike what is ignored, is reset.
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
    """Stops everything of a home when this process ends, however it ends; a context manager.

    `keep` tells it to leave the servers alone.
    """

    def __init__(self, home: Path, cwd: Path) -> None:
        self._home, self._cwd = home, cwd
        self._word = b""

    def __enter__(self) -> Guard:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, str(self._home)],
            stdin=subprocess.PIPE,
            cwd=self._cwd,
            start_new_session=True,  # a Ctrl-C at the terminal is not for it
        )
        return self

    def keep(self) -> None:
        self._word = KEEP

    def __exit__(self, *_: object) -> None:
        """Returns when everything has ended."""
        self._process.communicate(self._word)


def guard(home: Path) -> None:
    """Waits until whoever holds the other end of stdin is gone, then stops the home's processes."""
    if sys.stdin.buffer.read() != KEEP:
        stop_all(home)


if __name__ == "__main__":
    guard(Path(sys.argv[1]))
