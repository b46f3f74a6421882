"""Starting and stopping Dagster: `up` and `down`.

The webserver, the daemon and the code server that both share run in the background, with logs in
`<home>/logs` and what is needed to find them again in `<home>/run`. A keeper starts again what ends (`keeper`).
DAGSTER_HOME is `<home>/dagster`, where a copy of the project's dagster.yaml stands (of the program's own where the
project has none); its storage is our database, so that these, `dagster dev` and every run share one instance
whichever way they were started.

Does not belong here: Dagster's own modules. They take seconds to import, and its processes do that.
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
from fks_backfill_dagster.host.graphql import DagsterRefused, Webserver, WrongToken
from fks_backfill_dagster.host.keeper import Part, Plan
from fks_backfill_dagster.host.processes import KEEPER, Background, stop, stop_all
from fks_backfill_dagster.login import make_token
from fks_backfill_dagster.settings.model import CONFIG, SHIPPED, Settings

HOST = "127.0.0.1"
PORT = 3000
WEBSERVER, DAEMON = "webserver", "daemon"

_DAEMON = "fks_backfill_dagster.host.daemon"
_FORKING_SERVER = "fks_backfill_dagster.host.forking_server"
_GUARDED_WEBSERVER = "fks_backfill_dagster.host.guarded_webserver"
_KEEPER = "fks_backfill_dagster.host.keeper"

CODE = "code-server"
"""Not among the parts that a caller names: whichever runs needs it."""

START_SECONDS = 120.0
"""A cold start of Dagster on a busy machine; a process that ends is noticed at once."""

EVENTS_AT_ONCE = "100"
"""Materialization events of a range run are written in batches: half the time (dagster-postgres only)."""

FRESHNESS_SECONDS = "120"
"""Between two looks at the freshness of all series: thousands cost seconds, and none is stale within minutes."""

Say = Callable[[str], object]


class ServersError(Exception):
    """The servers could not be started: one sentence with the remedy."""


@dataclass(frozen=True, slots=True)
class Servers:
    """Where the running servers are, and the token that the webserver asks for (None: it asks for none).

    `started` is false when all of them ran already.
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
    """Starts what is not running: the embedded database, the code server, Dagster's webserver and daemon, and the
    keeper, which starts each of them again when it ends.

    Reports where. `port` None is that of the running webserver, or PORT; another one than the running webserver's is
    an error. `environment` replaces this process's for the servers and their runs. Without `keep_database` the embedded
    database ends with its last user. Returns when the webserver answers, the definitions are loaded and every daemon
    has given a sign of life. Raises ServersError, StoreError or EmbeddedError; what was started by then is stopped, and
    an embedded database that did not run before ends as after any command.
    """
    with _alone(settings):
        _port(settings, port)  # an error comes before anything is started or stopped
        with app.open_database(settings):
            wanted = [Background(settings.home, name) for name in (CODE, *parts)]
            keeper = Background(settings.home, KEEPER)
            started = bool(_missing(wanted)) or not keeper.is_running()
            if started:
                stop([keeper])  # it would start what is being started here
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
                    _keep(settings, known, given, keep_database)
            else:
                _ready(web, None)  # it may require another token than the one that is reported
            if keep_database:
                _keep_database(settings)
        _tell(settings, running, say)
        return running


def down(settings: Settings, *, say: Say = click.echo) -> list[str]:
    """Stops what `up` started, also what a killed server left behind, and the embedded database.

    Names of what was running.
    """
    with _alone(settings):
        ran = stop_all(settings.home)
        embedded = app.embedded(settings)
        if embedded is not None and embedded.stop():
            ran.append("database")
    say(f"Stopped: {', '.join(ran)}." if ran else "Nothing was running.")
    return ran


def stop_part(settings: Settings, name: str) -> None:
    """Stops one of them, as a restart of it begins. The others are not kept until the next `up`."""
    with _alone(settings):
        stop([Background(settings.home, one) for one in (KEEPER, name)])


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    """Two `up` at the same time wait for each other; the kernel frees the lock of one that dies."""
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
    """Where the webserver listens or will listen. Raises ServersError if it runs and `wanted` is another port."""
    server = Background(settings.home, WEBSERVER)
    running = server.port if server.is_running() else None
    if running and wanted and wanted != running:
        raise ServersError(
            f"Dagster is up at http://{HOST}:{running}, and goes on there, not at port {wanted}: stop it with"
            " `fks-backfill down`, then start it at the other port."
        )
    return running or wanted or PORT


def _keep_database(settings: Settings) -> None:
    """From now on the embedded database runs until `down`. The last step of `up`: one that fails leaves none behind."""
    if embedded := app.embedded(settings):
        embedded.start(keep=True)
        embedded.release()


def _missing(wanted: Sequence[Background]) -> set[str]:
    """The names of those that do not run."""
    return {process.name for process in wanted if not process.is_running()}


def _own_variables(settings: Settings) -> dict[str, str]:
    """What the servers and their runs get besides the environment of `up`."""
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
    """All that `up` can start, in the order in which it is started."""
    socket_of_code, workspace = str(_code_socket(settings)), str(_workspace(settings))
    # -P: a module in the working folder is not taken for Python's own.
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
    variables = settings.root / ".env"  # Dagster reads it in the working folder of its servers, for every run
    if variables.exists() and (reason := ownership.exposure(settings.root, variables.name)):
        raise _not_used(variables, reason)
    for part in missing:
        # What a killed one left behind is killed too: a worker that is asked to end reports itself that its
        # run has failed, while nothing is there to start it once more.
        stop([Background(settings.home, part.name)], at_once=True)
        if part.name == WEBSERVER:
            _check_port(part.port)
    code_socket = _code_socket(settings)
    code_server.write_workspace(_workspace(settings), code_socket)
    for part in missing:
        part.start(settings.home, settings.root, environment)
        if part.name == CODE:
            _wait_for(Background(settings.home, CODE), code_socket)


def _keep(settings: Settings, parts: Sequence[Part], environment: Mapping[str, str], database: bool) -> None:
    """Starts the keeper of those that run; none where nothing does."""
    kept = tuple(part for part in parts if Background(settings.home, part.name).is_running())
    if not kept:
        return
    Plan(settings.root, kept, None if app.embedded(settings) is None else database).write(settings.home)
    command = (sys.executable, "-P", "-m", _KEEPER, str(settings.home))
    Part(KEEPER, command).start(settings.home, settings.root, environment)


def _project_file(settings: Settings, name: str) -> str:
    """The text of a file in the folder of the project, or of the program's own where there is none.

    Raises ServersError where another account can change it, or could put one there: the servers run in that folder.
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
            f"port {port} on {HOST} is in use, so Dagster's webserver cannot listen there: stop what does,"
            " or choose another port."
        )


def _code_socket(settings: Settings) -> Path:
    """Where the code server listens, in a folder that is there."""
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
    """Until it listens: then its definitions are loaded, and the others find them at their first look."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(place)) == 0:
                return
        _still_runs(process)
        time.sleep(0.05)
    raise ServersError(
        f"the {process.name} was not ready after {START_SECONDS:.0f} seconds: see {process.log}."
    )


def _still_runs(process: Background) -> None:
    if not process.is_running():
        raise ServersError(
            f"Dagster's {process.name} ended while it was starting; the end of {process.log}:\n"
            f"{process.last_words()}"
        )


def _wait(web: Webserver, processes: Sequence[Background], daemons_since: float | None) -> None:
    """`daemons_since`: every daemon needs a heartbeat since then; None: they are not waited for."""
    deadline = time.monotonic() + START_SECONDS
    while not _ready(web, daemons_since):
        for process in processes:
            _still_runs(process)
        if time.monotonic() > deadline:
            logs = " and ".join(str(process.log) for process in processes)
            raise ServersError(f"Dagster was not ready after {START_SECONDS:.0f} seconds: look into {logs}.")
        time.sleep(0.1)
    # A webserver that ran on may still know the code server that is gone.
    errors = web.load_errors() and web.reloaded()
    if errors:
        raise ServersError(f"the definitions did not load: {errors[0].strip()}")


def _ready(web: Webserver, daemons_since: float | None) -> bool:
    try:
        return web.answers() and (daemons_since is None or not web.late_daemons(daemons_since))
    except WrongToken:
        raise ServersError(
            f"the webserver at {web.url} was started with another token: stop it with `fks-backfill down`, then"
            " start it again."
        ) from None
    except DagsterRefused:
        return False


def _tell(settings: Settings, running: Servers, say: Say) -> None:
    database = (
        "FKS_DATABASE_URL" if settings.database_url else f"the embedded PostgreSQL in {settings.home / 'pg'}"
    )
    say("Dagster is up." if running.started else "Dagster is up already.")
    say(f"  UI        {running.web.visit}")
    say(f"  database  {database}")
    say(f"  settings  {settings.config_file or f'no file: the defaults, as in {SHIPPED / CONFIG}'}")
    say(f"  logs      {settings.home / 'logs'}")
    say("Stop it with `fks-backfill down`.")
