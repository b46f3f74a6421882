"""A GraphQL client of a running Dagster.

Belongs here: the queries and mutations that the command line and the demo need. Does not belong here: starting the
webserver (`servers`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

from fks_backfill_dagster.guard import TOKEN

# Requests to this machine bypass proxies.
_open = build_opener(ProxyHandler({})).open

REPOSITORY = {"repositoryName": "__repository__", "repositoryLocationName": "fks_backfill"}
"""The location name in workspace.yaml."""

_PAUSE_SECONDS = 0.5

FINISHED = frozenset({"SUCCESS", "FAILURE", "CANCELED"})
QUEUED = "QUEUED"
UNFINISHED = (QUEUED, "NOT_STARTED", "STARTING", "STARTED", "CANCELING")


class DagsterError(Exception):
    """Raised when Dagster is unreachable or returns an error; the text is Dagster's message."""


class Unreachable(DagsterError):
    """Dagster is unreachable."""


class WrongToken(DagsterError):
    """The webserver requires another token."""


@dataclass(frozen=True, slots=True)
class Run:
    """A run: `assets` are its selected keys, `partitions` its first and last one.

    `will_retry`: its worker was lost and Dagster is about to retry it; `retried`: the retry exists.
    """

    id: str
    status: str
    assets: tuple[tuple[str, ...], ...] = ()
    partitions: tuple[str, str] | None = None
    will_retry: bool = False
    retried: bool = False

    @property
    def finished(self) -> bool:
        return self.status in FINISHED and (self.retried or not self.will_retry)


@dataclass(frozen=True, slots=True)
class Backfill:
    """A backfill: its status, its runs so far, and the error that fails it, if any."""

    status: str
    runs: Sequence[Run]
    error: str | None = None


@dataclass(frozen=True, slots=True)
class CheckOutcome:
    """The last evaluation of one check; `passed` is None if it has not run."""

    asset: tuple[str, ...]
    name: str
    passed: bool | None


@dataclass(frozen=True, slots=True)
class Webserver:
    """The webserver at `url`, which requires `token` (None: no token). While it is unreachable, a query is retried for
    `patience` seconds: the keeper restarts a killed webserver."""

    url: str
    token: str | None = field(default=None, repr=False)
    patience: float = 0.0
    timeout: float = 60.0
    """Seconds that one query may take."""

    @property
    def visit(self) -> str:
        """The URL for a browser; it includes the token for the login."""
        return self.url if self.token is None else f"{self.url}/?{urlencode({TOKEN: self.token})}"

    def query(self, query: str, **variables: object) -> dict[str, Any]:
        """The `data` of the response. Raises DagsterError."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                return self._ask(query, variables)
            except Unreachable:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _ask(self, query: str, variables: Mapping[str, object]) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        request = Request(f"{self.url}/graphql", body, headers)
        try:
            with _open(request, timeout=self.timeout) as response:
                document = json.loads(response.read())
        except HTTPError as error:
            if error.code == 401:
                raise WrongToken(
                    f"{self.url} requires another token: set FKS_API_TOKEN to the value that `fks-backfill up` had"
                ) from None
            raise DagsterError(f"{self.url} returned {error.code}: {error.read()[:500]!r}") from None
        except (URLError, HTTPException, OSError, ValueError) as error:
            raise Unreachable(f"{self.url} is not reachable: {error}") from None
        if document.get("errors"):
            raise DagsterError("; ".join(error["message"] for error in document["errors"]))
        data: dict[str, Any] = document["data"]
        return data

    # --- health ---

    def answers(self) -> bool:
        try:
            return bool(self.query("{ version }")["version"])
        except WrongToken:
            raise
        except DagsterError:
            return False

    def late_daemons(self, since: float) -> list[str]:
        """Required daemons without a heartbeat since `since` (seconds since the epoch)."""
        found = self.query(
            "{ instance { daemonHealth { allDaemonStatuses { daemonType required lastHeartbeatTime } } } }"
        )
        return [
            status["daemonType"]
            for status in found["instance"]["daemonHealth"]["allDaemonStatuses"]
            if status["required"] and (status["lastHeartbeatTime"] or 0) < since
        ]

    def load_errors(self) -> list[str]:
        """Load errors of code locations; empty if all are loaded."""
        found = self.query(
            "{ workspaceOrError { __typename ... on PythonError { message } ... on Workspace {"
            " locationEntries { name locationOrLoadError { __typename ... on PythonError { message } } } } } }"
        )["workspaceOrError"]
        if found["__typename"] == "PythonError":
            return [found["message"]]
        outcomes = [entry["locationOrLoadError"] for entry in found["locationEntries"]]
        return [o["message"] for o in outcomes if o and o["__typename"] == "PythonError"]

    def reloaded(self) -> list[str]:
        """Reloads the code location; returns its load errors, empty if it loads."""
        self.query(
            "mutation($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) { __typename } }",
            name=REPOSITORY["repositoryLocationName"],
        )
        return self.load_errors()

    # --- mutations ---

    def launch_backfill(self, partitions: Mapping[tuple[str, ...], tuple[str, str]]) -> str:
        """Launches a backfill of assets over partition ranges (first, last key); grains may be mixed.

        Returns the id of the backfill. Raises DagsterError.
        """
        wanted = [
            {"assetKey": {"path": list(key)}, "partitions": {"ranges": [{"start": first, "end": last}]}}
            for key, (first, last) in partitions.items()
        ]
        found = self.query(
            "mutation($params: LaunchBackfillParams!) { launchPartitionBackfill(backfillParams: $params) {"
            " __typename ... on LaunchBackfillSuccess { backfillId } ... on PythonError { message } } }",
            params={"partitionsByAssets": wanted, "title": "fks-backfill"},
        )["launchPartitionBackfill"]
        if found["__typename"] != "LaunchBackfillSuccess":
            raise DagsterError(
                f"Dagster rejected the backfill: {found.get('message') or found['__typename']}"
            )
        return str(found["backfillId"])

    def launch_checks(self, checks: Sequence[tuple[tuple[str, ...], str]]) -> str:
        """Launches a run of these checks (asset, name) only; returns its id. Raises DagsterError."""
        wanted = [{"assetKey": {"path": list(asset)}, "name": name} for asset, name in checks]
        selector = {**REPOSITORY, "pipelineName": "__ASSET_JOB", "assetSelection": []}
        found = self.query(
            "mutation($params: ExecutionParams!) { launchRun(executionParams: $params) { __typename"
            " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
            params={"selector": {**selector, "assetCheckSelection": wanted}, "mode": "default"},
        )["launchRun"]
        if found["__typename"] != "LaunchRunSuccess":
            raise DagsterError(f"Dagster rejected the run: {found.get('message') or found['__typename']}")
        return str(found["run"]["runId"])

    # --- definitions ---

    def defined(self, assets: Sequence[tuple[str, ...]]) -> set[tuple[str, ...]]:
        """The assets among these that the loaded definitions contain."""
        found = self.query(
            "query($keys: [AssetKeyInput!]) { assetNodes(assetKeys: $keys) { assetKey { path } isMaterializable } }",
            keys=[{"path": list(asset)} for asset in assets],
        )["assetNodes"]
        return {tuple(node["assetKey"]["path"]) for node in found if node["isMaterializable"]}

    def first_partition(self, asset: tuple[str, ...]) -> str | None:
        """The key of the asset's first partition; None if the asset is not defined."""
        found = self.query(
            "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {"
            " partitionKeyConnection(limit: 1, ascending: true) { results } } } }",
            key={"path": list(asset)},
        )["assetNodeOrError"]
        connection = found.get("partitionKeyConnection")
        return connection["results"][0] if connection and connection["results"] else None

    # --- outcomes ---

    def backfill(self, identity: str) -> tuple[str, list[Run]]:
        """The status of a backfill and its runs so far. Raises DagsterError, also when it has failed."""
        found = self.backfill_state(identity)
        if found.error:
            raise DagsterError(f"the backfill failed: {found.error}")
        return found.status, list(found.runs)

    def backfill_state(self, identity: str) -> Backfill:
        """The state of a backfill. Raises DagsterError if it does not exist."""
        found = self.query(
            "query($id: String!) { partitionBackfillOrError(backfillId: $id) { __typename"
            " ... on PartitionBackfill { status error { message }"
            " runs { id status tags { key value } assetSelection { path } } }"
            " ... on PythonError { message } } }",
            id=identity,
        )["partitionBackfillOrError"]
        if found["__typename"] != "PartitionBackfill":
            raise DagsterError(str(found.get("message") or found["__typename"]))
        error = found["error"]["message"] if found["error"] else None
        return Backfill(found["status"], [_run(run) for run in found["runs"]], error)

    def materializations(self, runs: Sequence[str]) -> dict[str, int]:
        """Partitions materialized so far by each run, over all of its assets."""
        if not runs:
            return {}
        found = self.query(
            "query($ids: [String]!) { runsOrError(filter: {runIds: $ids}) { ... on Runs { results { id"
            " stats { ... on RunStatsSnapshot { materializations } } } } } }",
            ids=list(runs),
        )["runsOrError"].get("results", [])
        return {run["id"]: run["stats"].get("materializations", 0) for run in found}

    def failed_partitions(self, asset: tuple[str, ...], keys: Sequence[str]) -> list[str]:
        """The partitions among `keys` that Dagster shows as failed. Raises DagsterError for an undefined asset."""
        found = self.query(
            "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { __typename ... on AssetNode {"
            " assetPartitionStatuses { ... on TimePartitionStatuses { ranges { status startKey endKey } } } } } }",
            key={"path": list(asset)},
        )["assetNodeOrError"]
        if found["__typename"] != "AssetNode":
            raise DagsterError(f"{'/'.join(asset)}: {found['__typename']}")
        ranges = [r for r in found["assetPartitionStatuses"]["ranges"] if r["status"] == "FAILED"]
        return [key for key in keys if any(r["startKey"] <= key <= r["endKey"] for r in ranges)]

    def run(self, identity: str) -> Run:
        """The run with its status only. Raises DagsterError if it does not exist."""
        found = self.query(
            "query($id: ID!) { runOrError(runId: $id) { __typename ... on Run { status } } }", id=identity
        )["runOrError"]
        if found["__typename"] != "Run":
            raise DagsterError(f"run {identity}: {found['__typename']}")
        return Run(identity, found["status"])

    def unfinished(self) -> list[str]:
        """The status of every run that has not ended."""
        found = self.query(
            "query($statuses: [RunStatus!]) { runsOrError(filter: {statuses: $statuses}) {"
            " ... on Runs { results { status } } } }",
            statuses=list(UNFINISHED),
        )["runsOrError"]
        return [run["status"] for run in found.get("results", [])]

    def failures(self, run: str) -> list[str]:
        """The step errors of a failed run."""
        found = self.query(
            "query($id: ID!) { logsForRun(runId: $id) { __typename ... on EventConnection { events {"
            " __typename ... on ExecutionStepFailureEvent { error { message } } } } } }",
            id=run,
        )["logsForRun"]
        events = found.get("events", [])
        return [e["error"]["message"] for e in events if e["__typename"] == "ExecutionStepFailureEvent"]

    def check_outcomes(self, asset: tuple[str, ...]) -> list[CheckOutcome]:
        """The last evaluation of each check of an asset."""
        found = self.query(
            "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { __typename ... on AssetNode {"
            " assetChecksOrError { ... on AssetChecks { checks { name executionForLatestMaterialization"
            " { status } } } } } } }",
            key={"path": list(asset)},
        )["assetNodeOrError"]
        checks = found["assetChecksOrError"]["checks"] if found["__typename"] == "AssetNode" else []
        last = ((check["name"], check["executionForLatestMaterialization"]) for check in checks)
        return [
            CheckOutcome(asset, name, done["status"] == "SUCCEEDED" if done else None) for name, done in last
        ]


def _run(found: Mapping[str, Any]) -> Run:
    assets = tuple(tuple(key["path"]) for key in found["assetSelection"] or ())
    tags = {tag["key"]: tag["value"] for tag in found["tags"]}
    one = tags.get("dagster/partition")
    first = tags.get("dagster/asset_partition_range_start", one)
    last = tags.get("dagster/asset_partition_range_end", one)
    return Run(
        found["id"],
        found["status"],
        assets,
        (first, last) if first and last else None,
        will_retry=tags.get("dagster/will_retry") == "true",
        retried="dagster/auto_retry_run_id" in tags,
    )
