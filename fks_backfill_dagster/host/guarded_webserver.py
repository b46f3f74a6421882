"""The webserver that `up` starts: Dagster's own behind the project's guard, on the loopback address.

Dagster's webserver accepts mutations from any page open in a browser, and has no login.

    python -P -m fks_backfill_dagster.host.guarded_webserver PORT WORKSPACE

Does not belong here: access rules (`guard`), starting it (`servers`).
"""

from __future__ import annotations

import logging
import os
import sys

import uvicorn
from dagster import DagsterInstance
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster._utils.interrupts import setup_interrupt_handlers
from dagster._utils.log import configure_loggers
from dagster_webserver.version import __version__
from dagster_webserver.webserver import DagsterWebserver
from starlette.middleware import Middleware

from fks_backfill_dagster.guard import Guard, Rules
from fks_backfill_dagster.host.plain_logs import write_plain
from fks_backfill_dagster.login import owner_of, token_of
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings

HOST = "127.0.0.1"

_POLL_MILLISECONDS = 2000
"""The polling interval of pages: Dagster's default."""

# Dagster's defaults: statement timeout, age and number of connections.
_STATEMENT_MILLISECONDS, _CONNECTION_SECONDS, _MOST_CONNECTIONS = 15_000, 3_600, 20

_REPORTS = "/report_asset"

_logger = logging.getLogger("dagster-webserver")  # Dagster's name, for its log format


def rules_of(settings: Settings, port: int) -> Rules:
    """The access rules of Dagster's webserver for these settings. Browsers share cookies between ports, so the
    cookie's name contains the port."""
    opened = settings.webserver.report_assets
    return Rules(
        token=token_of(settings),
        cookie=f"fks_backfill_{port}",
        owner=owner_of(settings),
        hosts=frozenset(settings.webserver.hosts),
        posts=("/graphql", _REPORTS) if opened else ("/graphql",),
        closed=() if opened else (_REPORTS,),
    )


class GuardedWebserver(DagsterWebserver[WorkspaceProcessContext, object]):  # type: ignore[type-var]
    """Dagster's webserver with the guard in front of all routes."""

    def __init__(self, context: WorkspaceProcessContext, rules: Rules) -> None:
        self._rules = rules
        super().__init__(context, live_data_poll_rate=_POLL_MILLISECONDS)

    def build_middleware(self) -> list[Middleware]:
        return [Middleware(Guard, rules=self._rules), *super().build_middleware()]


def serve(port: int, workspace: str) -> None:
    """Serves until an interrupt."""
    settings = load_settings()
    rules = rules_of(settings, port)
    if rules.token is None and settings.webserver.login:
        raise SystemExit("there is no token yet: run `fks-backfill up`, which creates it")
    setup_interrupt_handlers()
    write_plain()
    configure_loggers()
    with DagsterInstance.get() as instance:
        instance.optimize_for_webserver(_STATEMENT_MILLISECONDS, _CONNECTION_SECONDS, _MOST_CONNECTIONS)
        with WorkspaceProcessContext(
            instance, version=__version__, workspace_load_target=WorkspaceFileTarget([workspace])
        ) as context:
            _logger.info(f"Serving http://{HOST}:{port} in process {os.getpid()}")
            uvicorn.run(
                GuardedWebserver(context, rules).create_asgi_app(),
                host=HOST,
                port=port,
                log_level="warning",  # no line per request: the URL of a login contains the token
                proxy_headers=False,
                server_header=False,
            )


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2])
