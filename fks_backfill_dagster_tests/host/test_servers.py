"""Webserver and daemon as `up` starts them: a backfill over GraphQL, kill -9, `down`."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host import servers
from fks_backfill_dagster.host.graphql import DagsterError, Run, Webserver
from fks_backfill_dagster.host.processes import KEEPER, Background, backgrounds, stop_all
from fks_backfill_dagster.host.servers import CODE, DAEMON, WEBSERVER, ServersError
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT, Settings
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.queries import batches, read_candles
from fks_backfill_dagster_tests.accounts import IS_ROOT
from fks_backfill_dagster_tests.test_peers import status, status_for_stranger

CONFIG = """\
history_start: 2024-01-01
provider_priority: {crypto: [binance]}
automation: {refresh: [], checks: false, audit: false, housekeeping: false}
symbols:
  - {symbol: BTC/USDT, asset_class: crypto, timeframes: [15m, 1h]}
  - {symbol: ETH/USDT, asset_class: crypto, timeframes: [15m, 1h]}
"""

MONTHS = ("2024-01-01", "2024-02-01")


@pytest.fixture
def environment(market: LocalMarket, empty_database_url: str, tmp_path: Path) -> dict[str, str]:
    """Separate settings, with the market for Binance and a database without a schema."""
    config = tmp_path / "backfill.yaml"
    config.write_text(CONFIG)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FKS_", "DAGSTER_"))}
    return kept | {
        "FKS_HOME": str(tmp_path / "home"),
        "FKS_CONFIG": str(config),
        "FKS_DATABASE_URL": empty_database_url,
        "FKS_PROVIDERS__BINANCE__BASE_URL": market.binance_url,
        "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": market.archive_url,
    }


@pytest.fixture
def open_home() -> Iterator[Path]:
    """A home for an embedded server: as root it runs under another account, which cannot enter pytest's folder."""
    folder = Path(tempfile.mkdtemp(prefix="fks-")).resolve()
    folder.chmod(0o755)
    yield folder / ".fks"
    stop_all(folder / ".fks")
    EmbeddedPostgres(folder / ".fks").remove()
    shutil.rmtree(folder)


@pytest.fixture
def settings(environment: dict[str, str]) -> Iterator[Settings]:
    made = load_settings(environment, CHECKOUT)
    yield made
    stop_all(made.home)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((servers.HOST, 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], bool], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def shown(web: Webserver, symbol: str) -> dict[str, str]:
    """The partition statuses of a 15m series on the asset page."""
    found = web.query(
        "query($key: AssetKeyInput!) { assetNodeOrError(assetKey: $key) { ... on AssetNode {"
        " assetPartitionStatuses { ... on TimePartitionStatuses { ranges { status startKey endKey } } } } } }",
        key={"path": ["ohlcv", symbol, "15m"]},
    )["assetNodeOrError"]["assetPartitionStatuses"]["ranges"]
    return {month: r["status"] for r in found for month in MONTHS if r["startKey"] <= month <= r["endKey"]}


def ended(web: Webserver, backfill: str, assets: int) -> list[Run]:
    """Waits until all assets of a backfill have finished runs. Returns the runs."""
    runs: list[Run] = []

    def over() -> bool:
        runs[:] = web.backfill(backfill)[1]
        return len({key for run in runs for key in run.assets}) == assets and all(r.finished for r in runs)

    until(over)
    return runs


def test_down_says_what_happens_to_unfinished_runs() -> None:
    assert servers.consequences([]) == []
    going, queued = servers.consequences(["STARTED", "QUEUED", "CANCELING", "QUEUED"])
    assert going.startswith("2 runs are in progress and will end as failed. Committed candles are kept")
    assert queued == "2 runs are in the queue until the next `fks-backfill up`."


def test_from_up_to_down(
    settings: Settings,
    environment: Mapping[str, str],
    market: LocalMarket,
    empty_database_url: str,
    background_job: None,
) -> None:
    output: list[str] = []
    port = free_port()
    # Without the daemon, which polls for backfills at its start and then only every 30 s.
    first = servers.up(settings, port=port, parts=(WEBSERVER,), environment=environment, say=output.append)
    web = first.web
    assert status(port) == 200, "a process of this account needs no token"
    if IS_ROOT:
        assert status_for_stranger(port) == 401
        assert status_for_stranger(port, first.token or "") == 200
    for provider in ("binance", "archive"):
        market.plant_fault(
            provider, "status", count=None, status=400, symbol="ETHUSDT", start="2024-02-01", end="2024-03-01"
        )
    backfill = web.launch_backfill(
        {
            ("ohlcv", "BTC_USDT", "15m"): MONTHS,
            ("ohlcv", "ETH_USDT", "15m"): MONTHS,
            ("ohlcv", "BTC_USDT", "1h"): ("2024-01-01", "2024-01-01"),
        }
    )
    with pytest.raises(ServersError, match=rf"Dagster is already up at {first.url}, not at port"):
        servers.up(settings, port=free_port(), environment=environment, say=output.append)
    assert {one.name for one in backgrounds(settings.home)} == {CODE, WEBSERVER, KEEPER}
    second = servers.up(settings, environment=environment, say=output.append)
    assert (second.url, second.started) == (first.url, True)
    third = servers.up(settings, port=port, environment=environment, say=output.append)
    assert (third.url, third.started) == (first.url, False)
    assert output[-6] == "Dagster is already up."
    assert f"  settings  {settings.config_file}" in output

    # Assets of both grains; exactly the month without a response is failed.
    runs = ended(web, backfill, assets=3)
    failed = [run for run in runs if run.status == "FAILURE"]
    assert [run.status for run in runs if run not in failed] == ["SUCCESS"]
    (failure,) = web.failures(failed[0].id)
    assert "ETH/USDT 15m: 1 of 2 partitions (2024-02-01)" in failure
    assert shown(web, "BTC_USDT") == dict.fromkeys(MONTHS, "MATERIALIZED")
    assert shown(web, "ETH_USDT") == {"2024-01-01": "MATERIALIZED", "2024-02-01": "FAILED"}

    # The stored candles equal the market's, and the lineage names Dagster's runs.
    database = Database(empty_database_url)
    january = TimeRange(instant("2024-01-01"), instant("2024-02-01"))
    stored = read_candles(database, Catalog(settings).find_series("ETH/USDT", "15m"), january)
    truth = market.truth("binance", "ETHUSDT", Timeframe.M15, january)
    assert all((ours == theirs).all() for ours, theirs in zip(stored.columns(), truth.columns(), strict=True))
    assert {batch.run_id for batch in batches(database)} == {run.id for run in runs}
    database.dispose()

    # Only the checks, without a request.
    market.reset_requests()
    checks = [
        (("ohlcv", symbol, "15m"), name)
        for symbol in ("BTC_USDT", "ETH_USDT")
        for name in ("ohlc_sanity", "completeness", "data_freshness")
    ]
    run = web.launch_checks(checks)
    until(lambda: web.run(run).finished)
    assert web.run(run).status == "SUCCESS"
    assert market.requests() == 0
    found = {o.name: o.passed for o in web.check_outcomes(("ohlcv", "BTC_USDT", "15m"))}
    assert found == {"ohlc_sanity": True, "completeness": True, "data_freshness": False}  # of January 2024

    # kill -9 of one server: it is restarted; `down` stops all processes.
    daemon = Background(settings.home, DAEMON)
    survivor, before = Background(settings.home, WEBSERVER).pid, daemon.pid
    assert before is not None
    os.kill(before, signal.SIGKILL)
    until(lambda: daemon.is_running() and daemon.pid != before)
    assert Background(settings.home, WEBSERVER).pid == survivor
    groups = [Background(settings.home, name) for name in (KEEPER, CODE, DAEMON, WEBSERVER)]
    assert not any(ignored(group.pid) for group in groups)
    servers.stop_part(settings, DAEMON)  # which would start the queued run
    web.launch_checks(checks)
    assert servers.down(settings, say=output.append) == [CODE, WEBSERVER]
    assert output[-2:] == [
        "1 run is in the queue until the next `fks-backfill up`.",
        f"Stopped: {CODE}, {WEBSERVER}.",
    ]
    assert not any(group.members() for group in groups)
    assert not web.answers()
    assert servers.down(settings, say=output.append) == []
    assert output[-1] == "Nothing was running."

    logs = [path for path in settings.home.rglob("*") if path.suffix in (".log", ".out", ".err")]
    assert {path.stem for path in logs} >= {KEEPER, CODE, DAEMON, WEBSERVER}
    assert [path for path in logs if b"\x1b" in path.read_bytes()] == []


def ignored(pid: int | None) -> set[int]:
    """The signals among SIGINT and SIGTERM that a process ignores."""
    if sys.platform != "linux":
        return set()
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line[:7] == "SigIgn:"]
    mask = int(line.split()[1], 16)
    return {number for number in (signal.SIGINT, signal.SIGTERM) if mask & 1 << number - 1}


@pytest.fixture
def background_job() -> Iterator[None]:
    """SIGINT ignored, as in a background job of a shell without job control: Dagster would ignore SIGTERM too."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_port_in_use_is_an_error_and_no_process_is_left(
    settings: Settings, environment: Mapping[str, str]
) -> None:
    with socket.socket() as other:
        other.bind((servers.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServersError, match=rf"port {port} on 127\.0\.0\.1 is in use"):
            servers.up(settings, port=port, environment=environment, say=lambda text: None)
    assert backgrounds(settings.home) == []


def test_the_dagster_yaml_of_the_project_replaces_the_shipped_one(settings: Settings, tmp_path: Path) -> None:
    elsewhere = settings.model_copy(update={"root": tmp_path})
    shipped = (CHECKOUT / "dagster.yaml").read_text()
    assert servers._project_file(elsewhere, "dagster.yaml") == shipped
    (tmp_path / "dagster.yaml").write_text("nux: {enabled: true}\n")
    assert servers._project_file(elsewhere, "dagster.yaml") == "nux: {enabled: true}\n"


def test_a_folder_writable_by_other_accounts_is_an_error(
    settings: Settings, environment: Mapping[str, str], tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    elsewhere = settings.model_copy(update={"root": shared})
    with pytest.raises(ServersError, match=rf"^{shared} is not used, because .*mode 0777.*of your own"):
        servers.up(elsewhere, environment=environment, say=lambda text: None)
    assert backgrounds(settings.home) == []


def test_a_failed_up_leaves_no_embedded_database(environment: Mapping[str, str], open_home: Path) -> None:
    """A database that ran before continues, also one that runs until `db stop`."""
    own = {**environment, "FKS_HOME": str(open_home)}
    del own["FKS_DATABASE_URL"]
    settings = load_settings(own, CHECKOUT)
    database = EmbeddedPostgres(open_home)
    with socket.socket() as other:
        other.bind((servers.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        for kept in (False, True):
            if kept:
                database.start(keep=True)
                database.release()
            with pytest.raises(ServersError, match="is in use"):
                servers.up(settings, port=port, environment=own, say=lambda text: None)
            assert database.status().kept is kept
            if not kept:
                until(lambda: not database.status().running)
    assert database.status().running
    assert backgrounds(open_home) == []


@pytest.mark.parametrize("name", ["dagster.yaml", ".env"])
def test_files_writable_by_other_accounts_are_rejected(
    settings: Settings, environment: Mapping[str, str], tmp_path: Path, name: str
) -> None:
    """dagster.yaml names code for every server, .env sets variables for every run."""
    root = tmp_path / "project"
    root.mkdir()
    shutil.copy(CHECKOUT / "dagster.yaml", root)
    (root / ".env").write_text("FKS_BATCH_SIZE_DAYS=7\n")
    (root / name).chmod(0o666)
    elsewhere = settings.model_copy(update={"root": root})
    with pytest.raises(ServersError, match=rf"{root / name} is not used, because .*mode 0666.*of your own"):
        servers.up(elsewhere, environment=environment, say=lambda text: None)
    assert backgrounds(settings.home) == []


def test_a_server_that_ends_is_reported_with_the_end_of_its_log(
    settings: Settings, environment: Mapping[str, str]
) -> None:
    broken = {**environment, "FKS_BATCH_SIZE_DAY": "3"}
    with pytest.raises(ServersError, match=r"(?s)ended while it was starting.*FKS_BATCH_SIZE_DAY"):
        servers.up(settings, port=free_port(), environment=broken, say=lambda text: None)
    assert backgrounds(settings.home) == []


@pytest.mark.server
def test_an_unreachable_webserver_is_reported() -> None:
    url = f"http://{servers.HOST}:{free_port()}"
    with pytest.raises(DagsterError, match=f"{url} is not reachable"):
        Webserver(url).query("{ version }")
