"""Dagster as started by `up`, with a scratch database and the local market, for the cases with Dagster."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import REPOSITORY, Webserver
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT, Settings

_AUTOMATION_OFF = {
    "FKS_AUTOMATION__REFRESH": "[]",
    "FKS_AUTOMATION__FILL_GAPS": "false",
    "FKS_AUTOMATION__CHECKS": "false",
    "FKS_AUTOMATION__AUDIT": "false",
    "FKS_AUTOMATION__HOUSEKEEPING": "false",
}


@dataclass(frozen=True, slots=True)
class RunningDagster:
    """The running servers, their settings and environment."""

    settings: Settings
    environment: Mapping[str, str]
    web: Webserver


def environment_of(
    home: Path, database_url: str, market_url: str, symbols: Sequence[Mapping[str, object]], start: str
) -> dict[str, str]:
    """Settings for `symbols`, only Binance at the local market, without automation."""
    home.mkdir(parents=True, exist_ok=True)
    config = home / "backfill.yaml"
    # Thousands of symbols exceed the size of an environment variable; JSON is valid YAML.
    config.write_text(json.dumps({"history_start": start, "symbols": list(symbols)}))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FKS_", "DAGSTER_"))}
    return kept | {
        "FKS_HOME": str(home),
        "FKS_CONFIG": str(config),
        "FKS_DATABASE_URL": database_url,
        "FKS_PROVIDER_PRIORITY__CRYPTO": '["binance"]',
        "FKS_PROVIDERS__BINANCE__BASE_URL": f"{market_url}/binance",
        "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": f"{market_url}/archive",
        "FKS_PROVIDERS__BINANCE__REQUESTS_PER_MINUTE": "1000000",
        **_AUTOMATION_OFF,
    }


@contextmanager
def running_dagster(environment: Mapping[str, str]) -> Iterator[RunningDagster]:
    settings = load_settings(environment, CHECKOUT)
    try:
        up = servers.up(
            settings,
            port=servers.free_port(),
            environment=environment,
            keep_database=False,
            say=lambda text: None,
        )
        yield RunningDagster(settings, environment, up.web)
    finally:
        servers.down(settings, say=lambda text: None)


def requests_of(web: Webserver, schedule: str, at: float) -> list[dict[str, Any]]:
    """The run requests of a tick of this schedule, evaluated by the code server as for the daemon."""
    found = web.query(
        "mutation($s: ScheduleSelector!, $t: Float!) { scheduleDryRun(selectorData: $s, timestamp: $t) {"
        " __typename ... on PythonError { message } ... on DryRunInstigationTick { evaluationResult { skipReason"
        " error { message } runRequests { runKey tags { key value } assetSelection { path } } } } } }",
        s={**REPOSITORY, "scheduleName": schedule},
        t=at,
    )["scheduleDryRun"]
    result = found.get("evaluationResult") or {}
    if found["__typename"] != "DryRunInstigationTick" or result.get("error"):
        raise SystemExit(f"the schedule {schedule} was not evaluated: {found}")
    return list(result["runRequests"] or [])


def launch_all(web: Webserver, job: str, requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Launches a run per request; returns their ids."""
    executions = [
        {
            "selector": {
                **REPOSITORY,
                "pipelineName": job,
                "assetSelection": [{"path": key["path"]} for key in one["assetSelection"]],
                "assetCheckSelection": [],
            },
            "mode": "default",
            "executionMetadata": {
                "tags": [{"key": tag["key"], "value": tag["value"]} for tag in one["tags"]]
            },
        }
        for one in requests
    ]
    ids = []
    for params in executions:
        found = web.query(
            "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
            " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
            p=params,
        )["launchRun"]
        if found["__typename"] != "LaunchRunSuccess":
            raise SystemExit(f"a run was rejected: {found}")
        ids.append(str(found["run"]["runId"]))
    return ids


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one run, in seconds since the epoch."""

    status: str
    launched: float
    started: float
    ended: float


def wait_for_runs(web: Webserver, ids: Sequence[str], seconds: float = 1800) -> list[Times]:
    deadline = time.monotonic() + seconds
    while True:
        found = web.query(
            "query($f: RunsFilter!) { runsOrError(filter: $f, limit: 1000) { ... on Runs { results {"
            " runId status creationTime startTime endTime stats { ... on RunStatsSnapshot { launchTime } } } } } }",
            f={"runIds": list(ids)},
        )["runsOrError"]["results"]
        if len(found) == len(ids) and all(r["status"] in ("SUCCESS", "FAILURE", "CANCELED") for r in found):
            return [
                Times(r["status"], r["stats"]["launchTime"], r["startTime"] or r["endTime"], r["endTime"])
                for r in found
            ]
        if time.monotonic() > deadline:
            raise SystemExit(f"the runs did not end: {[r['status'] for r in found]}")
        time.sleep(0.5)


def duration_of(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
