"""The code server: Dagster's own with two changes.

- A run worker is a fork of a process that has imported all modules (multiprocessing's fork server). Dagster's own
  starts a Python that imports them again, which takes seconds of CPU.
- "Reload definitions" in the UI reloads the settings. Dagster would start another server for that.

Does not belong here: starting it (`servers`), restarting it (`keeper`).
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import threading
import uuid
from multiprocessing import forkserver

from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.utils import FuturesAwareThreadPoolExecutor
from dagster._grpc.__generated__.dagster_api_pb2 import ReloadCodeReply
from dagster._grpc.server import DagsterApiServer, DagsterGrpcServer, LoadedRepositories
from dagster._utils.error import serializable_error_info_from_exc_info
from dagster._utils.interrupts import setup_interrupt_handlers
from dagster._utils.log import configure_loggers

from fks_backfill_dagster.host.code_server import DEFINITIONS, LOCATION
from fks_backfill_dagster.host.plain_logs import write_plain

# Modules that a run worker imports. None of them opens a connection on import, and the libraries that start threads
# (OpenBLAS, jemalloc) support forks. The definitions are not among them: each worker reads the current settings.
_IMPORTED = (
    "ccxt",
    "dagster._grpc.server",
    "fks_backfill_dagster.orchestration.build",
    "fks_backfill_dagster.host.launcher",
    "fks_backfill_dagster.host.storage",
    "fks_backfill_dagster.store.rate_limits",
)

# Four launches that wait for their workers, plus ticks, pages and watchers of the server. Python's default depends on
# the number of cores and is too small for several clients.
_THREADS = 16

_logger = logging.getLogger("dagster.code_server")


class ForkingServer(DagsterApiServer):
    """Dagster's code server API. The constructor loads the definitions; a load error does not raise."""

    def __init__(self, ended: threading.Event, threads: FuturesAwareThreadPoolExecutor) -> None:
        # Without a working folder: Dagster would import from it.
        self._origin = LoadableTargetOrigin(executable_path=sys.executable, module_name=DEFINITIONS)
        super().__init__(
            server_termination_event=ended,
            logger=_logger,
            server_threadpool_executor=threads,
            loadable_target_origin=self._origin,
            lazy_load_user_code=True,  # load errors are shown in the UI and by `up`
            location_name=LOCATION,
        )
        context = multiprocessing.get_context("forkserver")
        self._mp_ctx = context  # type: ignore[assignment]  # Dagster itself only uses "spawn"

    def ReloadCode(self, _request: object, _context: object) -> ReloadCodeReply:
        """Reloads the settings, not the code. The new server id notifies the watchers of this server."""
        with self._reload_lock:
            sys.modules.pop(DEFINITIONS, None)
            try:
                self._loaded_repositories = LoadedRepositories(
                    self._origin, None, self._entry_point, None, code_location_name=LOCATION
                )
                self._serializable_load_error = None
            except Exception:
                self._loaded_repositories = None
                self._serializable_load_error = serializable_error_info_from_exc_info(sys.exc_info())
            self._server_id = str(uuid.uuid4())
        return ReloadCodeReply()


def serve(socket: str) -> None:
    """Serves until an interrupt. It listens once the definitions are loaded."""
    setup_interrupt_handlers()
    write_plain()
    configure_loggers()
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_IMPORTED))
    forkserver.ensure_running()  # imports in parallel with this process
    ended, threads = threading.Event(), FuturesAwareThreadPoolExecutor(_THREADS)
    server = DagsterGrpcServer(
        server_termination_event=ended,
        dagster_api_servicer=ForkingServer(ended, threads),
        logger=_logger,
        threadpool_executor=threads,
        socket=socket,
    )
    try:
        server.serve()  # type: ignore[no-untyped-call]
    except KeyboardInterrupt:
        _logger.info("The code server was interrupted and ends.")


if __name__ == "__main__":
    serve(sys.argv[1])
