"""The code server that webserver and daemon share: termination of its forked workers, restart after a kill."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest

from fks_backfill_dagster.host import code_server, servers
from fks_backfill_dagster.host.graphql import Webserver
from fks_backfill_dagster.host.processes import Background
from fks_backfill_dagster.host.servers import CODE
from fks_backfill_dagster.settings.model import CHECKOUT, Settings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster_tests.host.test_processes import lives
from fks_backfill_dagster_tests.host.test_servers import environment, free_port, settings, until

__all__ = ["environment", "settings"]


def listens(place: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(place)) == 0


def template_processes(code: Background) -> list[psutil.Process]:
    """The processes from which the workers are forked."""
    return [
        process for process in code.members() if "multiprocessing.forkserver" in " ".join(process.cmdline())
    ]


def test_a_code_server_that_cannot_listen_ends(environment: Mapping[str, str], tmp_path: Path) -> None:
    place = tmp_path / "absent" / "code.sock"
    command = [sys.executable, "-m", "fks_backfill_dagster.host.forking_server", str(place)]
    done = subprocess.run(
        command, cwd=CHECKOUT, env=dict(environment), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert str(place) in done.stderr


def test_a_home_with_a_long_path_has_its_socket_elsewhere(tmp_path: Path) -> None:
    near, far = tmp_path / "home", tmp_path / ("long" * 25) / "home"
    assert code_server.socket_of(near) == near / "run" / "code.sock"
    place = code_server.socket_of(far)
    assert len(os.fsencode(place)) <= 103
    assert place != code_server.socket_of(far / "other")
    code_server.make_folder(place.parent)
    assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    place.parent.rmdir()


def test_a_folder_writable_by_other_accounts_is_rejected(tmp_path: Path) -> None:
    readable, writable = tmp_path / "readable", tmp_path / "writable"
    readable.mkdir()
    code_server.make_folder(readable)  # ours: gets closed
    assert stat.S_IMODE(readable.stat().st_mode) == 0o700
    writable.mkdir()
    writable.chmod(0o777)
    with pytest.raises(code_server.SocketFolder, match="can be changed by other accounts"):
        code_server.make_folder(writable)


@pytest.mark.skipif(os.geteuid() != 0, reason="making a folder of another user needs root")
def test_a_folder_of_another_account_is_rejected(tmp_path: Path) -> None:
    theirs, link = tmp_path / "theirs", tmp_path / "link"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    with pytest.raises(code_server.SocketFolder, match=r"belongs to .*uid 65534"):
        code_server.make_folder(theirs)
    link.symlink_to(tmp_path)
    os.lchown(link, 65534, 65534)
    with pytest.raises(code_server.SocketFolder, match="is a link of another account"):
        code_server.make_folder(link)


def status_of(web: Webserver, run: str) -> str:
    return web.run(run).status


def launch(web: Webserver, symbol: str = "BTC_USDT") -> str:
    """Launches a run of one partition of the symbol's 15m series."""
    found = web.query(
        "mutation($p: ExecutionParams!) { launchRun(executionParams: $p) { __typename"
        " ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
        p={
            "selector": {
                "repositoryName": "__repository__",
                "repositoryLocationName": code_server.LOCATION,
                "pipelineName": "ohlcv_months",
                "assetSelection": [{"path": ["ohlcv", symbol, "15m"]}],
                "assetCheckSelection": [],
            },
            "mode": "default",
            "executionMetadata": {"tags": [{"key": "dagster/partition", "value": "2024-01-01"}]},
        },
    )["launchRun"]
    assert found["__typename"] == "LaunchRunSuccess", found
    return str(found["run"]["runId"])


def test_workers_are_forks_that_can_be_terminated(
    settings: Settings, environment: Mapping[str, str], market: LocalMarket
) -> None:
    for provider in ("binance", "archive"):
        market.plant_fault(provider, "hang", count=None, seconds=15)
    up = servers.up(settings, port=free_port(), environment=environment, say=lambda text: None)
    web, code = up.web, Background(settings.home, CODE)
    run = launch(web)
    until(
        lambda: market.requests() > 0
    )  # it waits for a response: an interruption before its step may get lost
    (template,) = (one for one in template_processes(code) if one.children())
    (worker,) = template.children()
    web.query("mutation($id: String!) { terminateRun(runId: $id) { __typename } }", id=run)
    until(lambda: status_of(web, run) == "CANCELED")
    until(lambda: not lives(worker))

    # kill -9 of all its processes: it is restarted at the same socket.
    market.clear_faults()
    others = [Background(settings.home, name).pid for name in (servers.WEBSERVER, servers.DAEMON)]
    before = code.pid
    for member in code.members():
        os.kill(member.pid, signal.SIGKILL)
    until(lambda: code.is_running() and code.pid != before)
    until(lambda: len(template_processes(code)) == 1)  # that of the old one has ended
    assert [Background(settings.home, name).pid for name in (servers.WEBSERVER, servers.DAEMON)] == others
    until(lambda: web.load_errors() == [] and listens(code_server.socket_of(settings.home)))
    again = launch(web)
    until(lambda: status_of(web, again) == "SUCCESS")

    # "Reload definitions" in the UI reloads the settings and shows their errors.
    config = Path(environment["FKS_CONFIG"])
    text = config.read_text()
    config.write_text(text + "nonsense: 1\n")
    reload(web)
    (error,) = web.load_errors()
    assert "DagsterUserCodeLoadError" in error
    config.write_text(text + "  - {symbol: SOL/USDT, asset_class: crypto, timeframes: [15m]}\n")
    reload(web)
    assert web.load_errors() == []
    assert ["ohlcv", "SOL_USDT", "15m"] in keys(web)
    third = launch(web, "SOL_USDT")
    until(lambda: status_of(web, third) == "SUCCESS")


def reload(web: Webserver) -> None:
    web.query(
        "mutation($name: String!) { reloadRepositoryLocation(repositoryLocationName: $name) { __typename } }",
        name=code_server.LOCATION,
    )


def keys(web: Webserver) -> list[list[str]]:
    return [
        node["assetKey"]["path"] for node in web.query("{ assetNodes { assetKey { path } } }")["assetNodes"]
    ]
