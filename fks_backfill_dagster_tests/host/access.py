"""Requests to the webserver of a site, with and without its token."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from fks_backfill_dagster.host.graphql import REPOSITORY
from fks_backfill_dagster.host.servers import Servers
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster_tests.host.site import Site

JSON = "application/json"
QUERY = json.dumps({"query": "{ version }"})
LAUNCH = (
    "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
    " ... on RunConfigValidationInvalid { errors { message } } ... on LaunchRunSuccess { run { runId } } } }"
)

# One path per route of the webserver (`build_routes`).
ROUTES = (
    "/server_info",
    "/dagit_info",
    "/graphql",
    "/logs/a/b/c.out",
    "/notebook?path=a.ipynb&repoLocName=fks_backfill",
    "/dagit/notebook?path=a.ipynb&repoLocName=fks_backfill",
    "/download_debug/0",
    "/report_asset_materialization/ohlcv/BTC_USDT/15m",
    "/report_asset_check/ohlcv/BTC_USDT/15m?check_name=completeness&passed=true",
    "/report_asset_observation/ohlcv/BTC_USDT/15m",
    "/assets/ohlcv/BTC_USDT/15m",
    "/",
)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: str


@dataclass(frozen=True)
class Access:
    """A webserver of `up` and an independent client."""

    running: Servers
    site: Site

    @property
    def place(self) -> str:
        return urlsplit(self.running.url).netloc

    def send(self, method: str, path: str, body: str = "", **headers: str | None) -> Answer:
        """Sends a request with these headers; Host defaults to the server's own."""
        given = {name.replace("_", "-"): value for name, value in headers.items() if value is not None}
        connection = http.client.HTTPConnection(self.place, timeout=60)
        connection.request(method, path, body=body or None, headers={"Host": self.place} | given)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
        connection.close()
        return Answer(answer.status, dict(answer.getheaders()), text)

    @property
    def cookie(self) -> str:
        """The cookie of a browser after the login."""
        first = self.send(
            "GET", urlsplit(self.running.web.visit).path + "?" + urlsplit(self.running.web.visit).query
        )
        assert (first.status, first.headers["location"]) == (303, "/")
        name, _, rest = first.headers["set-cookie"].partition(";")
        assert rest == " Path=/; HttpOnly; SameSite=Strict"
        return name

    def runs(self) -> int:
        found = self.running.web.query("{ runsOrError { ... on Runs { count } } }")
        return int(found["runsOrError"]["count"])


def changed(plain: Site, **variables: str) -> Site:
    """The site with further variables of the environment."""
    environment = {**plain.environment, **variables}
    return replace(plain, settings=load_settings(environment, CHECKOUT), environment=environment)


output: list[str] = []
"""The output of `up`."""


def launch(**config: object) -> dict[str, object]:
    """The execution parameters of the launchpad for one partition, with a run configuration."""
    selector = {
        **REPOSITORY,
        "pipelineName": "ohlcv_months",
        "assetSelection": [{"path": ["ohlcv", "BTC_USDT", "15m"]}],
        "assetCheckSelection": [],
    }
    tags = [{"key": "dagster/partition", "value": "2024-01-01"}]
    return {
        "selector": selector,
        "mode": "default",
        "runConfigData": config,
        "executionMetadata": {"tags": tags},
    }
