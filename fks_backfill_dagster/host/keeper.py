"""The keeper of a home: starts again what `up` has started, when it ends without being asked to.

    python -P -m fks_backfill_dagster.host.keeper HOME

There is one per home, for the embedded database, code server, webserver and daemon. `up` writes down what there is
to keep (`Plan`) and starts the keeper last. Both start a server in the same way and find it by its record
(`processes`): a keeper that was killed leaves the servers running, and the next `up` starts another one, which takes
them over. `stop` ends the keeper before anything else, and a keeper whose record is gone or names another one ends
without starting anything, so nothing comes back after `down`.

Reasons: docs/adr/0025. Does not belong here: what the servers are (`servers`). Only the standard library is imported,
and of the project what does the same: the keeper lives as long as the servers do.
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

LOOK_SECONDS = 0.5

STEADY_SECONDS = 60.0
"""What has run so long has started well: when it ends, that is its first end again."""

LONGEST_SECONDS = 60.0

MOST_ENDS = 12
"""So many ends in a row, over some minutes, and it is given up: what is wrong needs a person."""

_RECORD_SECONDS = 10.0
"""`up` writes the record right after it has started the keeper."""


# What there is to keep --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Part:
    """One server. `port` is where it listens (0: nowhere), `withheld` are variables that it does not get."""

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
    """All servers of a home; their environment is the keeper's own. `database`: whether the embedded one runs on
    without users; None where the database is another one."""

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
    """What is wrong with what `up` has started in this home, a sentence each; usually nothing."""
    keeper = Background(home, KEEPER)
    try:
        names = [part.name for part in Plan.read(home).parts]
        given_up = json.loads(_state_file(home).read_text())
    except (OSError, ValueError, KeyError):
        return []
    if keeper.is_running():
        return [
            f"The {name} ended {MOST_ENDS} times in a row and is not started any more: see {log}, then run"
            " `fks-backfill up`."
            for name, log in given_up.items()
        ]
    if any(Background(home, name).is_running() for name in names):
        return [
            "The keeper of the servers has ended, so none of them would be started again: run `fks-backfill up`."
        ]
    return []


# The rule ---------------------------------------------------------------------------------------------


def delay(ends: int) -> float | None:
    """Seconds until the next start of what has ended so many times in a row; None: it is given up."""
    if ends >= MOST_ENDS:
        return None
    return 0.0 if ends <= 1 else min(2.0 ** (ends - 2), LONGEST_SECONDS)


FAILURES = (OSError, ownership.OwnershipError, EmbeddedError)


@dataclass(slots=True)
class Kept:
    """One thing that is to run. `is_running` and `begin`, which starts it, may raise any of FAILURES."""

    name: str
    is_running: Callable[[], bool]
    begin: Callable[[], None]
    log: Callable[[str], None]
    ends: int = 0
    given_up: bool = False
    _began: float = field(default=float("-inf"))
    _due: float | None = None
    _failure: str = ""

    def look(self, now: float) -> None:
        """Starts it if it is time for that; `now` in seconds of any clock that only goes forward."""
        try:
            if self.is_running():
                self.given_up = False  # a person has started it meanwhile
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
            self.log(f"the {self.name} has ended {self.ends} times in a row and is not started any more")
            return
        self._due = now + wait
        when = f"in {wait:.0f} s" if wait else "at once"
        self.log(f"the {self.name} has ended; it is started again {when}")


# The process ------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """SIGTERM or SIGINT, where they may interrupt."""


class Keeper:
    """Keeps what the plan of the home names until a signal ends it, or its record is gone."""

    def __init__(self, home: Path) -> None:
        self._home, self._plan = home, Plan.read(home)
        self._ended = self._interruptible = False
        self._kept = [*self._database(), *map(self._server, self._plan.parts)]

    def run(self) -> None:
        """Returns when it is to end; what it keeps runs on."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._end)
        with contextlib.suppress(_Ended):
            self._wait_for_record()
            self._write_state()
            while not self._ended and self._is_in_charge():
                before = self._given_up()
                for one in self._kept:
                    if not self._ended:
                        one.look(time.monotonic())
                if self._given_up() != before:
                    self._write_state()
                with self._may_end():
                    time.sleep(LOOK_SECONDS)

    def _database(self) -> Iterator[Kept]:
        keep = self._plan.database
        if keep is None:
            return
        postgres, is_held = EmbeddedPostgres(self._home), False

        def is_running() -> bool:
            """`db stop` ends it for as long as nothing else starts it."""
            found = postgres.status()
            if found.running and not is_held:
                begin()  # a user of it, so that it stays while a server is being started again
            return found.running or found.stopped

        def begin() -> None:
            nonlocal is_held
            with self._may_end():  # it may have minutes of WAL to read
                postgres.start(keep=keep)
            is_held = True

        yield Kept(DATABASE, is_running, begin, _log)

    def _server(self, part: Part) -> Kept:
        background = Background(self._home, part.name)

        def begin() -> None:
            stop([background], at_once=True)  # its workers: the new one does not know them
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
        """A server that is just being started gets its record first: else `stop` would not find it."""
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
