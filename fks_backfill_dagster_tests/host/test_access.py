"""Access to the servers of `up` by pages of other sites, other accounts and hostile runs: all of it is rejected.

The test of the matrix states the rule independently: a request is accepted only with a host name of this server, from
one of its pages or without an origin, as GET of a page or as POST of JSON to GraphQL.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType

import psutil
import pytest
import sqlalchemy as sa

from fks_backfill_dagster.host import code_server, guarded_webserver, servers
from fks_backfill_dagster.host.graphql import Webserver, WrongToken
from fks_backfill_dagster.host.processes import backgrounds
from fks_backfill_dagster.host.servers import WEBSERVER, Servers, ServersError
from fks_backfill_dagster.login import make_token, token_of
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT, KEY_VARIABLES, Settings, SettingsError
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster_tests.host.access import (
    JSON,
    LAUNCH,
    QUERY,
    ROUTES,
    Access,
    changed,
    launch,
    output,
)
from fks_backfill_dagster_tests.host.site import compute_log, site
from fks_backfill_dagster_tests.host.test_servers import until


def _pictures() -> ModuleType:
    """docs/pictures.py, which drives a browser and is outside of packages."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(CHECKOUT / "docs"))
        return importlib.import_module("pictures")


pictures = _pictures()


KEY = "very-secret-key"


@pytest.fixture(scope="module")
def access(running: LocalMarket, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Access]:
    with site(
        tmp_path_factory.mktemp("access") / "home", running, ["BTC/USDT"], "15m", "2024-01-01"
    ) as plain:
        made = changed(plain, FKS_WEBSERVER__LOGIN="true", POLYGON_API_KEY=KEY)
        up = servers.up(
            made.settings,
            port=made.port,
            parts=(WEBSERVER,),
            keep_database=False,
            environment=made.environment,
            say=output.append,
        )
        running.reset_requests()
        yield Access(up, made)


def test_login_by_url_cookie_and_bearer_token(access: Access) -> None:
    token = access.running.token
    assert token is not None
    assert any(f"{access.running.url}/?token={token}" in line for line in output)
    file = access.site.settings.home / "run" / "token"
    assert (file.read_text(), stat.S_IMODE(file.stat().st_mode)) == (token, 0o600)

    own = f"http://{access.place}"
    page = access.send("GET", "/assets", Cookie=access.cookie)
    assert page.status == 200
    assert "<html" in page.body
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    query = access.send("POST", "/graphql", QUERY, Cookie=access.cookie, Content_Type=JSON, Origin=own)
    assert (query.status, list(json.loads(query.body)["data"])) == (200, ["version"])
    assert (
        access.send("POST", "/graphql", QUERY, Authorization=f"Bearer {token}", Content_Type=JSON).status
        == 200
    )
    for path in ROUTES:
        for method in ("GET", "POST"):
            without = access.send(method, path, QUERY if method == "POST" else "", Content_Type=JSON)
            assert without.status in (401, 403, 405), (method, path)
            assert token not in without.body
    with pytest.raises(WrongToken):
        Webserver(access.running.url, "x" * 32).query("{ version }")


def is_accepted(
    host: str, origin: str | None, method: str, content: str | None, path: str, place: str
) -> bool:
    if host != place or origin not in (None, f"http://{place}") or path.startswith("/report_asset"):
        return False
    if path.startswith("/graphql"):
        return method == "POST" and content == JSON
    return method == "GET"


def test_the_access_matrix(access: Access) -> None:
    """With the cookie of a login, which a browser sends from any page."""
    place, cookie, runs = access.place, access.cookie, access.runs()
    hosts = (place, "evil.example", f"evil.example:{place.rpartition(':')[2]}")
    origins = (None, f"http://{place}", "http://evil.example", "http://127.0.0.1:1", "null")
    contents = (JSON, "text/plain", "application/x-www-form-urlencoded", None)
    cases = 0
    for path, host, origin, method in itertools.product(ROUTES, hosts, origins, ("GET", "POST")):
        for content in contents if method == "POST" else (None,):
            body = QUERY if method == "POST" else ""
            found = access.send(
                method, path, body, Host=host, Origin=origin, Content_Type=content, Cookie=cookie
            )
            rejected = found.status in (403, 405, 415, 421)
            case = (method, path, host, origin, content, found.status, found.body[:80])
            assert rejected != is_accepted(host, origin, method, content, path, place), case
            cases += 1
    assert cases == len(ROUTES) * 3 * 5 * 5
    assert access.runs() == runs
    assert access.site.market.requests() == 0


@pytest.mark.parametrize(
    ("host", "origin", "method", "content"),
    [
        (None, "http://evil.example", "POST", "text/plain"),
        (None, "http://evil.example", "POST", JSON),
        (None, None, "POST", "text/plain"),
        ("evil.example", "http://evil.example", "POST", JSON),
    ],
)
def test_a_page_of_another_site_cannot_launch_a_run(
    access: Access, host: str | None, origin: str | None, method: str, content: str
) -> None:
    body = json.dumps({"query": LAUNCH, "variables": {"p": launch()}})
    found = access.send(
        method, "/graphql", body, Host=host, Origin=origin, Content_Type=content, Cookie=access.cookie
    )
    assert found.status in (403, 415, 421)
    by_address = access.send(
        "GET", "/graphql?query=mutation%7B__typename%7D", Cookie=access.cookie, Origin=origin
    )
    assert by_address.status in (403, 405)
    assert access.runs() == 0


@pytest.mark.parametrize(
    ("resource", "field", "value"),
    [
        ("binance", "base_url", "http://127.0.0.1:9"),
        ("polygon", "base_url", {"env": "POLYGON_API_KEY"}),
        ("polygon", "requests_per_minute", {"env": "POLYGON_API_KEY"}),
        ("timescaledb", "url", {"env": "POLYGON_API_KEY"}),
        ("io_manager", "base_dir", {"env": "POLYGON_API_KEY"}),
    ],
)
def test_a_run_with_another_resource_is_rejected(
    access: Access, resource: str, field: str, value: object
) -> None:
    config = {"resources": {resource: {"config": {field: value}}}}
    web = access.running.web
    found = web.query(LAUNCH, p=launch(**config))["launchRun"]
    assert found["__typename"] == "RunConfigValidationInvalid"
    assert f'"{field}" at path root:resources:{resource}' in found["errors"][0]["message"]
    assert KEY not in str(found)
    assert access.runs() == 0


def test_without_a_login_the_guard_is_still_active(access: Access) -> None:
    open_rules = guarded_webserver.rules_of(changed(access.site, FKS_WEBSERVER__LOGIN="false").settings, 3000)
    assert open_rules.token is None
    assert (open_rules.posts, open_rules.closed) == (("/graphql",), ("/report_asset",))


@pytest.mark.parametrize(
    ("variables", "owner"),
    [
        ({}, os.geteuid()),
        ({"FKS_WEBSERVER__LOGIN": "others"}, os.geteuid()),
        ({"FKS_WEBSERVER__LOGIN": "true"}, None),
        ({"FKS_API_TOKEN": "x" * 32}, None),
        ({"FKS_API_TOKEN": "x" * 32, "FKS_WEBSERVER__LOGIN": "others"}, None),
    ],
)
def test_the_account_without_a_token(tmp_path: Path, variables: dict[str, str], owner: int | None) -> None:
    (tmp_path / "run").mkdir()
    settings = load_settings({"FKS_HOME": str(tmp_path), **variables}, tmp_path)
    assert make_token(settings) is not None
    rules = guarded_webserver.rules_of(settings, 3000)
    assert (rules.token, rules.owner) == (token_of(settings), owner)


def test_the_command_line_of_dagster_cannot_launch_such_a_run(access: Access, tmp_path: Path) -> None:
    """`dagster job launch` does not validate the configuration; the run fails before its first request."""
    config = tmp_path / "run.yaml"
    config.write_text("resources: {binance: {config: {base_url: 'http://127.0.0.1:9'}}}\n")
    folder = servers.dagster_folder(access.site.settings.home)
    tags = json.dumps({"dagster/partition": "2024-01-01"})
    command = [sys.executable, "-m", "dagster", "job", "launch", "-w", str(folder / "workspace.yaml")]
    command += ["-j", "ohlcv_months", "-c", str(config), "--tags", tags]
    done = subprocess.run(
        command,
        env={**access.site.environment, "DAGSTER_HOME": str(folder)},
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert 'unexpected config entry "base_url" at path root:resources:binance' in done.stderr + done.stdout
    assert access.site.market.requests() == 0


def test_only_the_webserver_listens_on_the_network(access: Access) -> None:
    home = access.site.settings.home
    members = [process for one in backgrounds(home) for process in one.members()]
    listening = {
        (place.laddr.ip, place.laddr.port)
        for process in members
        for place in process.net_connections("inet")
        if place.status == psutil.CONN_LISTEN
    }
    assert len(members) > 2
    assert listening == {("127.0.0.1", access.site.port)}
    folder = code_server.socket_of(home).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


# Requests of a page of another site without a preflight: simple requests, sockets, frames, images.
EVIL_PAGE = """<!doctype html><iframe id=frame src="{url}/"></iframe><img src="{url}/graphql?query=%7Bversion%7D">
<script>
const results = {{}};
const body = JSON.stringify({body});
const simple = (name, path, options) => fetch("{url}" + path, {{method: "POST", credentials: "include", ...options}})
  .then(answer => results[name] = answer.type + " " + answer.status, error => results[name] = "rejected");
const socket = new Promise(done => {{
  const opened = new WebSocket("{url}/graphql".replace("http", "ws"), "graphql-ws");
  opened.onopen = () => {{ results.socket = "opened"; done(); }};
  opened.onerror = () => {{ results.socket = "rejected"; done(); }};
}});
Promise.all([
  simple("text", "/graphql", {{mode: "no-cors", headers: {{"Content-Type": "text/plain"}}, body}}),
  simple("json", "/graphql", {{headers: {{"Content-Type": "application/json"}}, body}}),
  simple("report", "/report_asset_check/ohlcv/BTC_USDT/15m?check_name=completeness&passed=true", {{mode: "no-cors"}}),
  socket,
]).then(() => {{ window.results = results; }});
</script>"""


@pytest.mark.skipif(
    not any(map(shutil.which, pictures.BROWSERS)), reason=f"no browser ({', '.join(pictures.BROWSERS)})"
)
def test_a_page_of_another_site_in_a_real_browser(access: Access) -> None:
    web, runs = access.running.web, access.runs()
    body = {"query": LAUNCH, "variables": {"p": launch()}}
    page_of_others = EVIL_PAGE.format(url=web.url, body=json.dumps(body)).encode()

    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page_of_others)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as other, pictures.browser() as page:
        Thread(target=other.serve_forever, daemon=True).start()
        page.call("Page.navigate", url=web.visit)
        until(
            lambda: (
                "BTC_USDT" in str(page.value("document.body.innerText"))
                or page.value("location.search") == ""
            )
        )
        own = f"fetch('/graphql', {{method: 'POST', headers: {{'Content-Type': '{JSON}'}}, body: '{QUERY}'}})"
        page.value(f"{own}.then(answer => window.own = answer.status)")
        until(lambda: page.value("window.own") == 200)  # the login has set its cookie

        for host in ("127.0.0.1", "localhost"):  # the same site, and another one
            page.call("Page.navigate", url=f"http://{host}:{other.server_port}/")
            until(lambda: page.value("Boolean(window.results)"))
            found = page.value("window.results")
            assert found["socket"] == "rejected"
            assert found["json"] == "rejected"  # the preflight request is rejected
            assert page.value("document.getElementById('frame').contentDocument") is None
        other.shutdown()
    assert access.runs() == runs
    assert access.site.market.requests() == 0
    asset = "{ assetChecksOrError { ... on AssetChecks { checks { executionForLatestMaterialization { status } } } } }"
    key = {"path": ["ohlcv", "BTC_USDT", "15m"]}
    shown = web.query(
        f"query($key: AssetKeyInput!) {{ assetNodeOrError(assetKey: $key) {{ ... on AssetNode {asset} }} }}",
        key=key,
    )
    assert "SUCCEEDED" not in str(shown)  # no check was reported as passed


@pytest.mark.slow
def test_no_secret_is_found_anywhere(running: LocalMarket, tmp_path: Path) -> None:
    """A secret in every variable that holds one; then all pages, logs, files and tables."""
    named = [*KEY_VARIABLES.values(), "FKS_API_TOKEN"]
    secrets = {name: f"hush-{name.lower().replace('_', '-')}-{'x' * 32}" for name in named}
    with site(tmp_path / "home", running, ["BTC/USDT"], "15m", "2024-01-01") as plain:
        hook = '["https://hooks.example/hush-hook"]'
        made = changed(plain, **secrets, FKS_WEBSERVER__LOGIN="true", FKS_ALERTS__URLS=hook)
        made.up()
        web = made.web
        run = str(web.query(LAUNCH, p=launch())["launchRun"]["run"]["runId"])
        until(lambda: web.run(run).finished)
        assert web.run(run).status == "SUCCESS"

        access = Access(Servers(web.url, made.settings.home / "logs", True, web.token), made)
        seen = [access.send("GET", path, Authorization=f"Bearer {web.token}").body for path in ROUTES]
        answers = (web.query(query, **({"run": run} if "$run" in query else {})) for query in EVERYTHING)
        seen += map(json.dumps, answers)
        seen += [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
        seen += [" ".join(filter(None, compute_log(web, run)))]
        with made.database() as database, database.begin() as connection:
            tables = connection.execute(
                sa.text(
                    "SELECT format('%I.%I', schemaname, tablename) FROM pg_tables"
                    " WHERE schemaname IN ('fks', 'dagster')"
                )
            ).scalars()
            for table in list(tables):
                seen += connection.execute(sa.text(f"SELECT CAST(t AS text) FROM {table} t")).scalars()
        assert len(seen) > 200
        files = [path for path in made.settings.home.rglob("*") if path.is_file()]
        seen += [path.read_bytes().decode("latin-1") for path in files]
        assert any(path.name == "webserver.log" for path in files)
    assert [text[:200] for text in seen if "hush-" in text] == []


EVERYTHING = (
    "{ instance { info runQueuingSupported hasInfo } }",
    "{ workspaceOrError { ... on Workspace { locationEntries { name displayMetadata { key value }"
    " locationOrLoadError { ... on RepositoryLocation { environmentPath dagsterLibraryVersions { name version } } }"
    " } } } }",
    "{ repositoriesOrError { ... on RepositoryConnection { nodes { allTopLevelResourceDetails { name description"
    " configFields { name description defaultValueAsJson } configuredValues { key value type } } } } } }",
    "query($run: ID!) { runOrError(runId: $run) { ... on Run { runConfigYaml tags { key value } } } }",
    "query($run: ID!) { logsForRun(runId: $run) { ... on EventConnection { events { __typename"
    " ... on MessageEvent { message } } } } }",
)
"""Queries of Dagster's pages whose responses could contain settings."""


def test_the_token_survives_a_restart_and_another_token_is_an_error(access: Access) -> None:
    site = access.site

    def up(settings: Settings) -> Servers:
        return servers.up(
            settings,
            port=site.port,
            environment=site.environment,
            keep_database=False,
            say=output.append,
            parts=(WEBSERVER,),
        )

    servers.stop_part(site.settings, WEBSERVER)
    again = up(site.settings)
    assert again.token == access.running.token
    other = site.settings.model_copy(
        update={"api_token": load_settings({"FKS_API_TOKEN": "y" * 40}, CHECKOUT).api_token}
    )
    with pytest.raises(
        ServersError, match="was started with another token: stop it with `fks-backfill down`"
    ):
        up(other)
    with pytest.raises(SettingsError, match="FKS_API_TOKEN: must be 32 or more"):
        load_settings({"FKS_API_TOKEN": "y" * 31}, CHECKOUT)
