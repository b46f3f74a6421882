"""A home with all servers of `up`, for black-box tests.

The (embedded) database, webserver, daemon and market are real. A test waits with `until`, which shows Dagster's events
on a timeout. The settings disable all automation; a test enables its subject.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fks_backfill_dagster import app
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import REPOSITORY, Webserver
from fks_backfill_dagster.host.processes import Background, Guard
from fks_backfill_dagster.host.servers import DAEMON, WEBSERVER
from fks_backfill_dagster.login import token_of
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT, KEY_VARIABLES, Settings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store.database import Database

_CONFIG = """\
history_start: {start}
provider_priority: {{crypto: [binance]}}
automation: {{refresh: [], checks: false, housekeeping: false}}
symbols:
"""
_SYMBOL = "  - {{symbol: {symbol}, asset_class: crypto, timeframes: [{timeframe}]}}\n"

Messages = list[tuple[str, str]]
"""Events of a run: type and message, in order."""


@dataclass(frozen=True)
class Site:
    """The servers of one home. `web` responds after `up`."""

    settings: Settings
    environment: Mapping[str, str]
    market: LocalMarket
    port: int

    @property
    def web(self) -> Webserver:
        return Webserver(f"http://{servers.HOST}:{self.port}", token_of(self.settings))

    def up(self, *parts: str) -> None:
        """Starts those that do not run; the database ends with its last user."""
        servers.up(
            self.settings,
            port=self.port,
            parts=parts or (WEBSERVER, DAEMON),
            keep_database=False,
            environment=self.environment,
            say=lambda text: None,
        )

    @contextmanager
    def database(self) -> Iterator[Database]:
        with app.open_database(self.settings) as opened:
            yield opened

    # --- over GraphQL ---

    def launch_job(self, name: str) -> str:
        """Launches a run of this job, as its page does. Returns the id."""
        found = self.web.query(
            "mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename"
            " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
            params={"selector": {**REPOSITORY, "pipelineName": name}, "mode": "default"},
        )["launchRun"]
        assert found["__typename"] == "LaunchRunSuccess", found
        return str(found["run"]["runId"])

    def runs(self) -> list[dict[str, Any]]:
        """All runs, the newest first: id, jobName, status, tags as a mapping, parentRunId."""
        found = self.web.query(
            "{ runsOrError { ... on Runs { results { id jobName status parentRunId tags { key value } } } } }"
        )["runsOrError"]["results"]
        return [{**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found]

    def run(self, identity: str) -> dict[str, Any]:
        (found,) = [run for run in self.runs() if run["id"] == identity]
        return found

    def messages(self, run: str) -> Messages:
        found = self.web.query(
            "query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {"
            " __typename ... on MessageEvent { message } } } } }",
            id=run,
        )["logsForRun"]
        return [(event["__typename"], event.get("message") or "") for event in found.get("events", [])]

    def asset(self, path: Sequence[str], fields: str) -> dict[str, Any]:
        """These fields of one asset."""
        found: dict[str, Any] = self.web.query(
            f"query($key: AssetKeyInput!) {{ assetNodeOrError(assetKey: $key) {{ ... on AssetNode {{ {fields} }} }} }}",
            key={"path": list(path)},
        )["assetNodeOrError"]
        return found

    # --- waiting ---

    def until(self, true: Callable[[], bool], seconds: float = 90) -> None:
        """Waits until the condition holds; fails with the events of the runs and the daemon's log."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self._diagnosis()}"
            time.sleep(0.2)

    def until_ended(self, run: str, seconds: float = 90) -> str:
        """The status with which the run ended."""
        self.until(lambda: self.web.run(run).finished, seconds)
        return self.web.run(run).status

    def _diagnosis(self) -> str:
        """For failure messages: every run with its last events, and the end of the daemon's log."""
        lines = []
        for run in self.runs():
            lines.append(f"{run['jobName']} {run['id']}: {run['status']} {json.dumps(run['tags'])}")
            lines += [f"    {kind}: {text[:300]}" for kind, text in self.messages(run["id"])[-6:]]
        return "\n".join([*lines, "", Background(self.settings.home, DAEMON).last_words(60)])


def compute_log(web: Webserver, run: str) -> list[str]:
    """The lines of a run's first compute log, as shown on its page."""
    found = web.query(
        "query($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {"
        " ... on LogsCapturedEvent { logKey } } } } }",
        id=run,
    )["logsForRun"]["events"]
    key = next(event["logKey"] for event in found if event.get("logKey"))
    logs = web.query(
        "query($key: [String!]!) { capturedLogs(logKey: $key) { stdout stderr } }",
        key=[run, "compute_logs", key],
    )["capturedLogs"]
    return "".join(filter(None, (logs["stdout"], logs["stderr"]))).splitlines()


@contextmanager
def site(
    home: Path, market: LocalMarket, symbols: Sequence[str], timeframe: str, start: str
) -> Iterator[Site]:
    """The site in `home`, without running servers; all servers are stopped when the block ends, even by a kill."""
    home.mkdir(parents=True)
    config = home / "backfill.yaml"
    listed = "".join(_SYMBOL.format(symbol=symbol, timeframe=timeframe) for symbol in symbols)
    config.write_text(_CONFIG.format(start=start) + listed)
    kept = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(("FKS_", "DAGSTER_")) or name in KEY_VARIABLES.values())
    }
    environment = kept | {
        "FKS_HOME": str(home),
        "FKS_CONFIG": str(config),
        "FKS_PROVIDERS__BINANCE__BASE_URL": market.binance_url,
        "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": market.archive_url,
    }
    settings = load_settings(environment, CHECKOUT)
    with Guard(home, settings.root):
        try:
            yield Site(settings, environment, market, servers.free_port())
        finally:
            servers.down(settings, say=lambda text: None)
            EmbeddedPostgres(home).remove()  # as root it may be outside the home
