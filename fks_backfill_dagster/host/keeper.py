"""The keeper of a home: restarts the servers of `up` that end unexpectedly.

    python -P -m fks_backfill_dagster.host.keeper HOME

There is one per home, for the embedded database, code server, webserver and daemon. `up` writes the `Plan` and starts
the keeper last. Both start a server in the same way and find it by its record (`processes`): the servers survive a
killed keeper, and the next `up` starts another one, which takes them over. `stop` ends the keeper before anything else,
and a keeper whose record is missing or names another process ends without starting anything, so nothing is restarted
after `down`.

Reasons: docs/adr/0025. Does not belong here: the commands of the servers (`servers`). Imports the standard library and
only such modules of the project as do the same, to stay small: the keeper runs as long as the servers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fks_backfill_dagster import ownership
from fks_backfill_dagster.embedded import EmbeddedError, EmbeddedPostgres
from fks_backfill_dagster.host.processes import KEEPER, Background, stop

DATABASE = "database"

POLL_SECONDS = 0.5

STEADY_SECONDS = 60.0
"""After so long a run the count of consecutive ends restarts."""

LONGEST_SECONDS = 60.0

MOST_ENDS = 12
"""Consecutive ends, over some minutes, after which a server is given up: an operator has to fix the cause."""

_RECORD_SECONDS = 10.0
"""How long to wait for the record, which `up` writes right after starting the keeper."""


# Plan and state --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One server. `port`: where it listens (0: none). `withheld`: environment variables to remove."""

    name: str
    command: tuple[str, ...]
    port: int = 0
    withheld: tuple[str, ...] = ()

    def start(self, home: Path, cwd: Path, environment: Mapping[str, str]) -> None:
        """Starts it in the background."""
        given = {name: value for name, value in environment.items() if name not in self.withheld}
        Background(home, self.name).start(self.command, cwd=cwd, environment=given, port=self.port)


@dataclass(frozen=True, slots=True)
class Plan:
    """All servers of a home; they inherit the keeper's environment. `database`: whether the embedded database keeps
    running without users; None: it is not used."""

    cwd: Path
    parts: tuple[Part, ...]
    database: bool | None

    def write(self, home: Path) -> None:
        document = {"cwd": str(self.cwd), "parts": [asdict(part) for part in self.parts]}
        ownership.write_text(_plan_file(home), json.dumps({**document, "database": self.database}))

    @classmethod
    def read(cls, home: Path) -> Plan:
        found = json.loads(_plan_file(home).read_text())
        parts = (
            Part(one["name"], tuple(one["command"]), one["port"], tuple(one["withheld"]))
            for one in found["parts"]
        )
        return cls(Path(found["cwd"]), tuple(parts), found["database"])


def _plan_file(home: Path) -> Path:
    return home / "run" / "keeper.plan"


def _state_file(home: Path) -> Path:
    return home / "run" / "keeper.state"


def problems(home: Path) -> list[str]:
    """Problems of the servers and the keeper of this home, a sentence each; usually none."""
    keeper = Background(home, KEEPER)
    try:
        names = [part.name for part in Plan.read(home).parts]
        given_up = json.loads(_state_file(home).read_text())
    except (OSError, ValueError, KeyError):
        return []
    if keeper.is_running():
        return [
            f"The {name} ended {MOST_ENDS} times in a row and is no longer restarted: see {log}, then run"
            " `fks-backfill up`."
            for name, log in given_up.items()
        ]
    if any(Background(home, name).is_running() for name in names):
        return ["The keeper has ended, so a server that ends is not restarted: run `fks-backfill up`."]
    return []


# Back-off ---------------------------------------------------------------------------------------------


def delay(ends: int) -> float | None:
    """Seconds until the next start after `ends` consecutive ends; None: given up."""
    if ends >= MOST_ENDS:
        return None
    return 0.0 if ends <= 1 else min(2.0 ** (ends - 2), LONGEST_SECONDS)


FAILURES = (OSError, ownership.OwnershipError, EmbeddedError)


@dataclass(slots=True)
class Kept:
    """One supervised server. `is_running` and `begin`, which starts it, may raise any of FAILURES."""

    name: str
    is_running: Callable[[], bool]
    begin: Callable[[], None]
    log: Callable[[str], None]
    ends: int = 0
    given_up: bool = False
    _began: float = field(default=float("-inf"))
    _due: float | None = None
    _failure: str = ""

    def check(self, now: float) -> None:
        """Starts it if a start is due; `now` in seconds of any monotonic clock."""
        try:
            if self.is_running():
                self.given_up = False  # restarted by an operator
            elif not self.given_up:
                self._begin_if_due(now)
        except FAILURES as error:
            if self._failure != str(error):
                self.log(f"the {self.name} could not be started: {error}")
            self._failure = str(error)

    def _begin_if_due(self, now: float) -> None:
        if self._due is None:
            self._note_end(now)
        if self._due is not None and now >= self._due:
            self._due, self._began = None, now
            self.begin()

    def _note_end(self, now: float) -> None:
        self.ends = 1 if now - self._began >= STEADY_SECONDS else self.ends + 1
        wait = delay(self.ends)
        if wait is None:
            self.given_up = True
            self.log(f"the {self.name} has ended {self.ends} times in a row and is no longer restarted")
            return
        self._due = now + wait
        when = f"in {wait:.0f} s" if wait else "now"
        self.log(f"the {self.name} has ended; restarting {when}")


# The process ------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """Raised for SIGTERM or SIGINT where an interruption is safe."""


class Keeper:
    """Supervises the servers of the home's plan until a signal ends it or its record is missing."""

    def __init__(self, home: Path) -> None:
        self._home, self._plan = home, Plan.read(home)
        self._ended = self._interruptible = False
        self._kept = [*self._database(), *map(self._server, self._plan.parts)]

    def run(self) -> None:
        """Supervises until the end; the servers keep running."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        with contextlib.suppress(_Ended):
            self._wait_for_record()
            self._write_state()
            while not self._ended and self._is_in_charge():
                before = self._given_up()
                for one in self._kept:
                    if not self._ended:
                        one.check(time.monotonic())
                if self._given_up() != before:
                    self._write_state()
                with self._may_end():
                    time.sleep(POLL_SECONDS)

    def _database(self) -> Iterator[Kept]:
        keep = self._plan.database
        if keep is None:
            return
        postgres, is_held = EmbeddedPostgres(self._home), False

        def is_running() -> bool:
            """A database that was stopped by `db stop` counts as running: it is not restarted."""
            found = postgres.status()
            if found.running and not is_held:
                begin()  # registers as a user, so that it stays up during the restart of a server
            return found.running or found.stopped

        def begin() -> None:
            nonlocal is_held
            with self._may_end():  # recovery from WAL may take minutes
                postgres.start(keep=keep)
            is_held = True

        yield Kept(DATABASE, is_running, begin, _log)

    def _server(self, part: Part) -> Kept:
        background = Background(self._home, part.name)

        def begin() -> None:
            stop([background], at_once=True)  # its run workers: the new server has no record of them
            part.start(self._home, self._plan.cwd, os.environ)

        return Kept(part.name, background.is_running, begin, _log)

    def _wait_for_record(self) -> None:
        deadline = time.monotonic() + _RECORD_SECONDS
        while not self._is_in_charge() and time.monotonic() < deadline:
            with self._may_end():
                time.sleep(0.02)

    def _is_in_charge(self) -> bool:
        return Background(self._home, KEEPER).pid == os.getpid()

    def _given_up(self) -> list[str]:
        return [one.name for one in self._kept if one.given_up]

    def _write_state(self) -> None:
        logs = {DATABASE: self._home / "logs" / "postgresql.log"}
        state = {name: str(logs.get(name, Background(self._home, name).log)) for name in self._given_up()}
        ownership.write_text(_state_file(self._home), json.dumps(state))

    def _end(self, _number: int, _frame: object) -> None:
        """Ends after the current start, so that the server has its record; otherwise `stop` would miss it."""
        self._ended = True
        if self._interruptible:
            raise _Ended

    @contextmanager
    def _may_end(self) -> Iterator[None]:
        self._interruptible = True
        try:
            if self._ended:
                raise _Ended
            yield
        finally:
            self._interruptible = False


def _log(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime())} UTC {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    Keeper(Path(sys.argv[1])).run()
