"""The code server of `up`: one for the webserver and the daemon, its run workers forked and not started anew.

Left to themselves, the webserver and the daemon start a code server each, the daemon another one every
minute, and each of those a Python per run that imports everything again: seconds of CPU before the first
line of work. Here they share one, and a run's worker is a fork of a process that has imported everything
and does nothing else (multiprocessing's fork server).

`python -m ...code_server PORT` is its keeper: it starts the server, and starts it again when it was killed.
The definitions are those of the moment at which the server started; a new start reads them anew.

Does not belong here: who starts the keeper and finds it again (`servers`, `processes`); what is served
(`definitions`).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HOST = "127.0.0.1"
LOCATION = "fks_backfill"
"""As workspace.yaml names it."""

DEFINITIONS = "fks_backfill_dagster.orchestration.definitions"

# What a run worker imports in the end, so that its fork finds it there. None of these opens a connection when
# it is imported, and what starts threads (OpenBLAS, jemalloc) knows of forks. The definitions themselves are
# not among them: they read settings, and what is wrong with those is the server's to tell.
_IMPORTED = (
    "ccxt",
    "dagster._grpc.impl",
    "fks_backfill_dagster.orchestration.build",
    "fks_backfill_dagster.orchestration.launcher",
    "fks_backfill_dagster.orchestration.storage",
    "fks_backfill_dagster.store.pacing",
)

WORKSPACE = """\
# Written by `fks-backfill up`: its webserver and daemon share the code server that it has started.
load_from:
  - grpc_server: {{host: "{host}", port: {port}, location_name: {location}}}
"""


def write_workspace(path: Path, port: int) -> None:
    """The file that leads to the code server at `port`."""
    path.write_text(WORKSPACE.format(host=HOST, port=port, location=LOCATION))


def keep(port: int) -> int:
    """Runs the server until it ends by itself; its exit code. One that was killed is started again."""
    while True:
        code = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(port), "serve"], check=False
        ).returncode
        if code >= 0:
            return code


def serve(port: int) -> None:
    """The server itself; returns when it was told to end. It listens when the definitions are loaded."""
    import logging
    import multiprocessing
    import threading
    from multiprocessing import forkserver

    from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
    from dagster._core.utils import FuturesAwareThreadPoolExecutor
    from dagster._grpc.server import DagsterApiServer, DagsterGrpcServer
    from dagster._utils.interrupts import setup_interrupt_handlers
    from dagster._utils.log import configure_loggers

    setup_interrupt_handlers()
    configure_loggers()
    logger = logging.getLogger("dagster.code_server")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    forkserver.ensure_running()
    ended = threading.Event()
    threads = FuturesAwareThreadPoolExecutor()
    api = DagsterApiServer(
        server_termination_event=ended,
        logger=logger,
        server_threadpool_executor=threads,
        loadable_target_origin=LoadableTargetOrigin(
            executable_path=sys.executable, module_name=DEFINITIONS, working_directory=str(Path.cwd())
        ),
        lazy_load_user_code=True,  # what is wrong with the definitions is told in the UI, and by `up`
        location_name=LOCATION,
    )
    api._mp_ctx = context  # type: ignore[assignment]  # Dagster itself only ever takes "spawn"
    server = DagsterGrpcServer(
        server_termination_event=ended,
        dagster_api_servicer=api,
        logger=logger,
        threadpool_executor=threads,
        host=HOST,
        port=port,
    )
    try:
        server.serve()  # type: ignore[no-untyped-call]
    except KeyboardInterrupt:
        logger.info("The code server was told to end.")


def main(arguments: Sequence[str]) -> int:
    port = int(arguments[0])
    if arguments[1:] == ["serve"]:
        serve(port)
        return 0
    return keep(port)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
