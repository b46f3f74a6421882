"""The code server itself: Dagster's own, but for two things.

A run's worker is a fork of a process that has imported everything and does nothing else (multiprocessing's
fork server); Dagster's starts a Python that imports everything anew, which takes seconds of CPU. And
"Reload definitions" in the UI reads the settings anew, for which Dagster would start another server.

Does not belong here: starting it (`servers`), and starting it again (`keeper`).
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

# What a run worker imports in the end, so that its fork finds it there. None of these opens a connection when
# it is imported, and what starts threads (OpenBLAS, jemalloc) knows of forks. The definitions themselves are
# not among them: each worker reads the settings as they are.
_IMPORTED = (
    "ccxt",
    "dagster._grpc.server",
    "fks_backfill_dagster.orchestration.build",
    "fks_backfill_dagster.host.launcher",
    "fks_backfill_dagster.host.storage",
    "fks_backfill_dagster.store.rate_limits",
)

# Four launches wait here for their workers, beside ticks, pages and those who watch the server: Python's own
# choice, by the number of cores, is for one client.
_ANSWERS_AT_ONCE = 16

_logger = logging.getLogger("dagster.code_server")


class ForkingServer(DagsterApiServer):
    """Answers what Dagster asks of a code server. It is made when the definitions were loaded, or failed to."""

    def __init__(self, ended: threading.Event, threads: FuturesAwareThreadPoolExecutor) -> None:
        # Without a working folder: Dagster would import from there.
        self._origin = LoadableTargetOrigin(executable_path=sys.executable, module_name=DEFINITIONS)
        super().__init__(
            server_termination_event=ended,
            logger=_logger,
            server_threadpool_executor=threads,
            loadable_target_origin=self._origin,
            lazy_load_user_code=True,  # what is wrong with the definitions is told in the UI, and by `up`
            location_name=LOCATION,
        )
        context = multiprocessing.get_context("forkserver")
        self._mp_ctx = context  # type: ignore[assignment]  # Dagster itself only ever takes "spawn"

    def ReloadCode(self, _request: object, _context: object) -> ReloadCodeReply:
        """Reads the settings anew; the code stays. Who watches this server sees another one."""
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
    """Returns when the server was told to end. It listens when the definitions are loaded."""
    setup_interrupt_handlers()
    write_plain()
    configure_loggers()
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(_IMPORTED))
    forkserver.ensure_running()  # imports while we do
    ended, threads = threading.Event(), FuturesAwareThreadPoolExecutor(_ANSWERS_AT_ONCE)
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
        _logger.info("The code server was told to end.")


if __name__ == "__main__":
    serve(sys.argv[1])
