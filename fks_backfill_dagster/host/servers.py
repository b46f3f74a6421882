"""Starting and stopping Dagster: `up` and `down`.

The webserver, the daemon and their shared code server run in the background, with logs in `<home>/logs` and process
records in `<home>/run`. A keeper restarts them (`keeper`). DAGSTER_HOME is `<home>/dagster`, with a copy of the
project's dagster.yaml (or of the shipped one if the project has none). The storage is the project's database, so that
the servers, `dagster dev` and all runs share one instance.

Does not belong here: imports of Dagster, which take seconds.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import click

from fks_backfill_dagster import app, ownership
from fks_backfill_dagster.host import code_server
from fks_backfill_dagster.host.graphql import QUEUED, DagsterError, Webserver, WrongToken
from fks_backfill_dagster.host.keeper import Part, Plan
from fks_backfill_dagster.host.processes import KEEPER, Background, stop, stop_all
from fks_backfill_dagster.login import make_token, token_of
from fks_backfill_dagster.settings.model import CONFIG, SHIPPED, Settings

HOST = "127.0.0.1"
PORT = 3000
WEBSERVER, DAEMON = "webserver", "daemon"

_DAEMON = "fks_backfill_dagster.host.daemon"
_FORKING_SERVER = "fks_backfill_dagster.host.forking_server"
_GUARDED_WEBSERVER = "fks_backfill_dagster.host.guarded_webserver"
_KEEPER = "fks_backfill_dagster.host.keeper"

CODE = "code-server"
"""Not among the parts that a caller names: all of them need it."""

START_SECONDS = 120.0
"""A cold start of Dagster on a busy machine; a process that ends is detected immediately."""

EVENTS_AT_ONCE = "100"
"""The batch size of materialization events; batching halves the time of a range run (dagster-postgres only)."""

FRESHNESS_SECONDS = "120"
"""Interval of Dagster's freshness evaluation: it takes seconds for thousands of series."""

UNFINISHED_SECONDS = 5.0
"""The longest wait of `down` for the list of runs."""

Say = Callable[[str], object]


class ServersError(Exception):
    """The servers could not be started: one sentence with the remedy."""


@dataclass(frozen=True, slots=True)
class Servers:
    """The running servers. `token`: required by the webserver; None: no token.

    `started` is false if all of them ran already.
    """

    url: str
    logs: Path
    started: bool
    token: str | None = field(default=None, repr=False)

    @property
    def web(self) -> Webserver:
        return Webserver(self.url, self.token)


def dagster_folder(home: Path) -> Path:
    """Dagster's own folder in a home: its configuration, artifacts and compute logs."""
    return home / "dagster"


def up(
    settings: Settings,
    *,
    port: int | None = None,
    parts: Sequence[str] = (WEBSERVER, DAEMON),
    keep_database: bool = True,
    environment: Mapping[str, str] | None = None,
    say: Say = click.echo,
) -> Servers:
    """Starts the servers that are not running: the embedded database, the code server, Dagster's webserver and daemon,
    and the keeper, which restarts them.

    Reports the addresses. `port` None: the port of the running webserver, or PORT; another port than that of the
    running webserver is an error. `environment` replaces this process's for the servers and their runs. Without
    `keep_database` the embedded database ends with its last user. Returns when the webserver responds, the definitions
    are loaded and every daemon has a heartbeat. Raises ServersError, StoreError or EmbeddedError; servers started by
    then are stopped, and an embedded database that did not run before ends as after any command.
    """
    with _locked(settings):
        _port(settings, port)  # fail before anything is started or stopped
        with app.open_database(settings):
            wanted = [Background(settings.home, name) for name in (CODE, *parts)]
            keeper = Background(settings.home, KEEPER)
            started = bool(_missing(wanted)) or not keeper.is_running()
            if started:
                stop([keeper])  # otherwise it would start the same servers
            missing = _missing(wanted)
            found_port = _port(settings, port)  # the keeper may have started the webserver meanwhile
            web = Webserver(f"http://{HOST}:{found_port}", make_token(settings))
            running = Servers(web.url, settings.home / "logs", started, web.token)
            if started:
                given = {**(os.environ if environment is None else environment), **_own_variables(settings)}
                known, began = _parts(settings, found_port), time.time()
                try:
                    _start(settings, [part for part in known if part.name in missing], given)
                    _wait(web, wanted, began if DAEMON in missing else None)
                except BaseException:
                    stop([Background(settings.home, name) for name in missing])
                    raise
                finally:
                    _start_keeper(settings, known, given, keep_database)
            else:
                _ready(web, None)  # fails if it requires another token than the reported one
            if keep_database:
                _keep_database(settings)
        _report(settings, running, say)
        return running


def down(settings: Settings, *, say: Say = click.echo) -> list[str]:
    """Stops the servers of `up`, orphans of killed servers, and the embedded database.

    Reports the runs that have not ended, and other users of the database, before it stops them. Returns the names of
    the servers that ran.
    """
    with _locked(settings):
        for line in consequences(_unfinished(settings)):
            say(line)
        ran = stop_all(settings.home)
        embedded = app.embedded(settings)
        if embedded is not None:
            if embedded.status().in_use:
                say("Other commands use the embedded database: they end with an error, and can be run again.")
            if embedded.stop():
                ran.append("database")
    say(f"Stopped: {', '.join(ran)}." if ran else "Nothing was running.")
    return ran


def _unfinished(settings: Settings) -> list[str]:
    """The status of every run that has not ended; none if the webserver does not respond."""
    server = Background(settings.home, WEBSERVER)
    if not (server.is_running() and server.port):
        return []
    web = Webserver(f"http://{HOST}:{server.port}", token_of(settings), timeout=UNFINISHED_SECONDS)
    try:
        return web.unfinished()
    except DagsterError:
        return []


def consequences(statuses: Sequence[str]) -> list[str]:
    """Sentences about the unfinished runs, which `down` ends or leaves in the queue."""
    queued = statuses.count(QUEUED)
    going = len(statuses) - queued
    lines = []
    if going:
        lines.append(
            f"{_runs(going)} in progress and will end as failed. Committed candles are kept; the next refresh fetches"
            " the rest of the current partitions, `fks-backfill launch` that of earlier ones."
        )
    if queued:
        lines.append(f"{_runs(queued)} in the queue until the next `fks-backfill up`.")
    return lines


def _runs(count: int) -> str:
    return "1 run is" if count == 1 else f"{count:,} runs are"


def stop_part(settings: Settings, name: str) -> None:
    """Stops one server for a restart, and the keeper: no server is restarted until the next `up`."""
    with _locked(settings):
        stop([Background(settings.home, one) for one in (KEEPER, name)])


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _locked(settings: Settings) -> Iterator[None]:
    """Serializes `up` and `down` of a home; the kernel releases the lock of a process that dies."""
    run = settings.home / "run"
    try:
        ownership.make_home(settings.home)
        ownership.make_folder(run)
        lock = ownership.open_file(run / "up.lock")
    except ownership.OwnershipError as error:
        raise ServersError(f"{error}.") from None
    except OSError as error:
        raise ServersError(
            f"{error.filename or run} cannot be used ({error.strerror}): set FKS_HOME to a folder of your own."
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _port(settings: Settings, wanted: int | None) -> int:
    """The current or future port of the webserver. Raises ServersError if it runs on another port than `wanted`."""
    server = Background(settings.home, WEBSERVER)
    running = server.port if server.is_running() else None
    if running and wanted and wanted != running:
        raise ServersError(
            f"Dagster is already up at http://{HOST}:{running}, not at port {wanted}: stop it with"
            " `fks-backfill down`, then start it at the new port."
        )
    return running or wanted or PORT


def _keep_database(settings: Settings) -> None:
    """Keeps the embedded database running until `down`. The last step of `up`, so that a failed one keeps nothing."""
    if embedded := app.embedded(settings):
        embedded.start(keep=True)
        embedded.release()


def _missing(wanted: Sequence[Background]) -> set[str]:
    """The names of processes that do not run."""
    return {process.name for process in wanted if not process.is_running()}


def _own_variables(settings: Settings) -> dict[str, str]:
    """Variables of the servers and their runs in addition to the environment of `up`."""
    own = {
        "DAGSTER_HOME": str(dagster_folder(settings.home)),
        "DAGSTER_EVENT_BATCH_SIZE": EVENTS_AT_ONCE,
        "FRESHNESS_DAEMON_INTERVAL_SECONDS": FRESHNESS_SECONDS,
        # A backfill waits while the settings cannot be loaded, as in the middle of an edit.
        "DAGSTER_BACKFILL_RETRY_DEFINITION_CHANGED_ERROR": "1",
    }
    if settings.config_file is not None:
        own["FKS_CONFIG"] = str(settings.config_file)
    return own


def _workspace(settings: Settings) -> Path:
    return dagster_folder(settings.home) / "workspace.yaml"


def _parts(settings: Settings, port: int) -> list[Part]:
    """The servers of `up`, in start order."""
    socket_of_code, workspace = str(_code_socket(settings)), str(_workspace(settings))
    # -P: modules in the working folder cannot shadow others.
    run, token = (sys.executable, "-P", "-m"), ("FKS_API_TOKEN",)  # the webserver alone needs it
    return [
        Part(CODE, (*run, _FORKING_SERVER, socket_of_code), withheld=token),
        Part(WEBSERVER, (*run, _GUARDED_WEBSERVER, str(port), workspace), port),
        Part(DAEMON, (*run, _DAEMON, workspace), withheld=token),
    ]


def _start(settings: Settings, missing: Sequence[Part], environment: Mapping[str, str]) -> None:
    folder = dagster_folder(settings.home)
    ownership.make_folder(folder)
    ownership.write_text(folder / "dagster.yaml", _project_file(settings, "dagster.yaml"))
    variables = (
        settings.root / ".env"
    )  # Dagster reads it from the working folder of its servers, for every run
    if variables.exists() and (reason := ownership.exposure(settings.root, variables.name)):
        raise _not_used(variables, reason)
    for part in missing:
        # Orphans of a killed server get SIGKILL: after SIGTERM a run worker would report its run as failed, and
        # Dagster would not retry it.
        stop([Background(settings.home, part.name)], at_once=True)
        if part.name == WEBSERVER:
            _check_port(part.port)
    code_socket = _code_socket(settings)
    code_server.write_workspace(_workspace(settings), code_socket)
    for part in missing:
        part.start(settings.home, settings.root, environment)
        if part.name == CODE:
            _wait_for(Background(settings.home, CODE), code_socket)


def _start_keeper(
    settings: Settings, parts: Sequence[Part], environment: Mapping[str, str], database: bool
) -> None:
    """Starts the keeper of the running servers, if any."""
    kept = tuple(part for part in parts if Background(settings.home, part.name).is_running())
    if not kept:
        return
    Plan(settings.root, kept, None if app.embedded(settings) is None else database).write(settings.home)
    command = (sys.executable, "-P", "-m", _KEEPER, str(settings.home))
    Part(KEEPER, command).start(settings.home, settings.root, environment)


def _project_file(settings: Settings, name: str) -> str:
    """The text of a file in the project folder, or of the shipped one if it does not exist.

    Raises ServersError if another account can change or create the file: the servers run in that folder.
    """
    file = settings.root / name
    try:
        return ownership.read_trusted(settings.root, name)
    except FileNotFoundError:
        return (SHIPPED / name).read_text(encoding="utf-8")
    except ownership.OwnershipError as error:
        raise _not_used(file if os.path.lexists(file) else settings.root, str(error)) from None


def _not_used(file: Path, reason: str) -> ServersError:
    return ServersError(f"{file} is not used, because {reason}: run this in a folder of your own.")


def _check_port(port: int) -> None:
    if not _is_free(port):
        raise ServersError(
            f"port {port} on {HOST} is in use, so Dagster's webserver cannot listen there: stop the process that"
            " does, or choose another port."
        )


def _code_socket(settings: Settings) -> Path:
    """The socket of the code server; creates its folder."""
    try:
        place = code_server.socket_of(settings.home)
        code_server.make_folder(place.parent)
    except code_server.SocketFolder as error:
        raise ServersError(f"{error}.") from None
    return place


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _wait_for(process: Background, place: Path) -> None:
    """Waits until it listens: then its definitions are loaded, and webserver and daemon find them."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(place)) == 0:
                return
        _check_running(process)
        time.sleep(0.05)
    raise ServersError(
        f"the {process.name} was not ready after {START_SECONDS:.0f} seconds: see {process.log}."
    )


def _check_running(process: Background) -> None:
    if not process.is_running():
        raise ServersError(
            f"Dagster's {process.name} ended while it was starting; the end of {process.log}:\n"
            f"{process.last_words()}"
        )


def _wait(web: Webserver, processes: Sequence[Background], daemons_since: float | None) -> None:
    """Waits for the webserver and, if `daemons_since` is set, for a heartbeat of every daemon since then."""
    deadline = time.monotonic() + START_SECONDS
    while not _ready(web, daemons_since):
        for process in processes:
            _check_running(process)
        if time.monotonic() > deadline:
            logs = " and ".join(str(process.log) for process in processes)
            raise ServersError(f"Dagster was not ready after {START_SECONDS:.0f} seconds: see {logs}.")
        time.sleep(0.1)
    # A webserver that was not restarted may still refer to the previous code server.
    errors = web.load_errors() and web.reloaded()
    if errors:
        raise ServersError(f"the definitions failed to load: {errors[0].strip()}")


def _ready(web: Webserver, daemons_since: float | None) -> bool:
    try:
        return web.answers() and (daemons_since is None or not web.late_daemons(daemons_since))
    except WrongToken:
        raise ServersError(
            f"the webserver at {web.url} was started with another token: stop it with `fks-backfill down`, then"
            " start it again."
        ) from None
    except DagsterError:
        return False


def _report(settings: Settings, running: Servers, say: Say) -> None:
    database = (
        "FKS_DATABASE_URL" if settings.database_url else f"the embedded PostgreSQL in {settings.home / 'pg'}"
    )
    say("Dagster is up." if running.started else "Dagster is already up.")
    say(f"  UI        {running.web.visit}")
    say(f"  database  {database}")
    say(f"  settings  {settings.config_file or f'no file: the defaults, as in {SHIPPED / CONFIG}'}")
    say(f"  logs      {settings.home / 'logs'}")
    say("Stop it with `fks-backfill down`.")
