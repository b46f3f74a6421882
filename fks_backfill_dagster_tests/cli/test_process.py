"""The command as a process: imports, stdout, servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.host.servers import free_port
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import CHECKOUT, Command, start
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY

pytestmark = pytest.mark.server


def imported(*arguments: str) -> set[str]:
    """The top-level modules a command has imported at its end."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('\\nIMPORTED', *{m.partition('.')[0] for m in sys.modules}))\n"
        "from fks_backfill_dagster.cli import main\n"
        f"main({list(arguments)!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("IMPORTED")[2].split())


def test_help_imports_nothing_heavy() -> None:
    heavy = {"ccxt", "dagster", "pandas", "numpy", "pyarrow", "pydantic", "sqlalchemy", "requests", "rich"}
    assert imported("--help") & heavy == set()
    assert imported("backfill", "--help") & heavy == set()


def test_reports_import_no_provider_and_no_dagster(world: LocalMarket) -> None:
    heavy = {"ccxt", "dagster", "pandas", "pyarrow", "requests", "rich"}
    assert imported("status") & heavy == set()
    assert imported("gaps", "BTC/USDT", "1h") & heavy == set()


def test_stdout_holds_only_the_document(process: Command, world: LocalMarket) -> None:
    result = process("backfill", "BTC/USDT", "1h", *JANUARY, "--json")
    assert result.exit_code == 0
    assert result.json["total_candles"] == 744
    assert "744 candles to fetch" in result.stderr
    status = process("status", "BTC/USDT", "1h", "--json")
    assert (status.json["total_candles"], status.stderr) == (744, "")


def test_a_terminal_shows_a_bar(world: LocalMarket) -> None:
    ours, theirs = os.openpty()
    line = ("backfill", "BTC/USDT", "1h", "--start", "2024-01-01", "--end", "2024-04-01", "--json")
    with start(*line, stderr=theirs) as running:
        os.close(theirs)
        shown = b""
        with suppress(OSError):  # Linux reports the closed end as an error
            while more := os.read(ours, 65_536):
                shown += more
        assert running.stdout is not None
        report = json.loads(running.stdout.read())
    os.close(ours)
    assert report["total_candles"] == 2184
    assert "3/3" in shown.decode()
    assert "2,184 candles" in shown.decode()
    assert "written from" not in shown.decode()


# The local market


def test_simulate_prints_settings_that_work(
    settings: Path, fks: Command, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    outage = "binance@BTC/USDT=2024-01-05T03:00/2024-01-05T07:00"
    with start("simulate", "--port", "0", "--no-limits", "--outage", outage) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline().strip().removeprefix("export ") for _ in range(4)]
        for line in lines:
            monkeypatch.setenv(*line.split("=", 1))
        report = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--json").json
        filled = fks("backfill", "BTC/USDT", "1h", *JANUARY, "--json").json
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=20)
    assert (report["total_candles"], report["missing"]) == (740, 4)
    assert (filled["total_candles"], filled["missing"]) == (4, 0)
    assert running.returncode == 0
    assert "Traceback" not in stderr


def exported(stdout: str) -> dict[str, str]:
    """The environment of a shell after it has evaluated the block."""
    script = f"{stdout}\nexec {sys.executable} -c 'import json, os; print(json.dumps(dict(os.environ)))'"
    with subprocess.Popen(["/bin/sh", "-c", script], stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        found: dict[str, str] = json.loads(shell.stdout.read())
    return found


def test_the_environment_of_a_running_market_is_printed_without_starting_another(
    fks: Command, market: LocalMarket, tmp_path: Path
) -> None:
    port = market.url.rpartition(":")[2]
    result = fks("simulate", "--env", "--port", port)
    assert (result.exit_code, result.stderr) == (0, "")
    found = exported(result.stdout)
    assert found["FKS_PROVIDERS__OANDA__BASE_URL"] == market.oanda_url
    assert found["FKS_HOME"] == str(tmp_path / "home" / "sandbox")
    assert "FKS_DATABASE_URL" not in found, "it would take precedence over the home"
    document = fks("simulate", "--env", "--port", port, "--json").json
    assert document["url"] == market.url
    assert document["unset"] == ["FKS_DATABASE_URL"]
    assert document["environment"].items() <= found.items()


def test_the_sandbox_home_is_not_nested_and_can_be_chosen(
    fks: Command, market: LocalMarket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("simulate", "--env", "--port", market.url.rpartition(":")[2])
    monkeypatch.setenv("FKS_HOME", exported(fks(*line).stdout)["FKS_HOME"])
    assert exported(fks(*line).stdout)["FKS_HOME"] == str(tmp_path / "home" / "sandbox")
    assert exported(fks(*line, "--home", "it's mine").stdout)["FKS_HOME"] == str(tmp_path / "it's mine")


def test_the_environment_of_a_market_that_does_not_run_yet(fks: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    result = fks("simulate", "--env", "--port", str(port))
    assert result.exit_code == 0
    assert result.stderr.startswith(f"Nothing listens at http://127.0.0.1:{port} yet: start")
    assert result.stderr.count("\n") == 1
    assert exported(result.stdout)["FKS_PROVIDERS__POLYGON__BASE_URL"] == f"http://127.0.0.1:{port}/polygon"


class Another(BaseHTTPRequestHandler):
    """A server that is not a market."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"It works!")

    def log_message(self, *_: object) -> None:
        pass


def test_no_environment_is_printed_for_another_server(fks: Command) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Another) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        result = fks("simulate", "--env", "--port", str(server.server_port))
        server.shutdown()
    assert (result.exit_code, result.stdout) == (1, "")
    assert "is not a local market" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_pasted_block_writes_nothing_into_the_real_database(
    process: Command, world: LocalMarket, database_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The shell has a real database set; the block of the market selects a separate embedded one."""
    found = exported(process("simulate", "--env", "--port", world.url.rpartition(":")[2]).stdout)
    line = ("backfill", "BTC/USDT", "1h", *JANUARY, "--json")
    with monkeypatch.context() as shell:
        shell.delenv("FKS_DATABASE_URL")
        for name, value in found.items():
            if name.startswith("FKS_"):
                shell.setenv(name, value)
        assert process(*line).json["total_candles"] == 744
        try:
            up = process("up", "--port", str(free_port()), "-v")
            shell.delenv("POLYGON_API_KEY", raising=False)
            document = process("up", "--json").json
            assert process("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 744
        finally:
            process("down")
            EmbeddedPostgres(tmp_path / "home" / "sandbox").remove()
    assert up.stdout.count("is requested at http://127.0.0.1") == 6
    assert "Skipped without a key: coingecko (COINGECKO_API_KEY). Set it, then" in up.stdout
    assert "Automatic for 4 series: refresh of 1h 1d, gap filling, daily checks, audits" in up.stdout
    assert re.search(r"webserver: process \d+, log /.*webserver\.log$", up.stderr, re.MULTILINE)
    assert document["missing_keys"] == {"coingecko": "COINGECKO_API_KEY", "polygon": "POLYGON_API_KEY"}
    assert document["automation"]["refresh"] == ["1m", "5m", "15m", "30m", "1h", "4h", "1d", "1w"]
    assert process("status", "BTC/USDT", "1h", "--json").json["status"] == "not_started"


def test_a_market_that_others_can_reach_logs_a_warning(settings: Path) -> None:
    """It listens on all addresses; the printed settings use the loopback address."""
    with start("simulate", "--host", "0.0.0.0", "--port", "0", "--json") as running:
        assert running.stdout is not None
        document = json.loads("".join(iter(running.stdout.readline, "}\n")) + "}")
        running.send_signal(signal.SIGINT)
        _, stderr = running.communicate(timeout=20)
    assert stderr.startswith("Warning: --host 0.0.0.0 lets other machines use this market")
    assert document["url"].startswith("http://127.0.0.1:")
    assert document["environment"]["POLYGON_API_KEY"] == "any"


def test_no_key_is_printed_for_a_market_of_another_machine(fks: Command) -> None:
    """The settings would refuse it; an unusual notation of a loopback address counts as another machine."""
    document = fks("simulate", "--env", "--host", "127.1", "--port", "1", "--json").json
    assert document["environment"]["FKS_PROVIDERS__POLYGON__BASE_URL"] == "http://127.1:1/polygon"
    assert "POLYGON_API_KEY" not in document["environment"]
    assert {"FKS_DATABASE_URL", "POLYGON_API_KEY", "OANDA_API_TOKEN"} <= set(document["unset"])


def test_a_halt_is_planted_from_the_start(settings: Path) -> None:
    halt = "binance@BTC/USDT=2024-01-05T03:00/2024-01-05T03:40"
    with start("simulate", "--port", "0", "--halt", halt, "--json") as running:
        assert running.stdout is not None
        document = "".join(iter(running.stdout.readline, "}\n")) + "}"
        url = json.loads(document)["url"]
        with urllib.request.urlopen(f"{url}/sim/outages") as answer:
            (planted,) = json.load(answer)
        running.send_signal(signal.SIGINT)
        running.wait(timeout=20)
    assert (planted["kind"], planted["symbol"]) == ("halt", "BTCUSDT")


def test_simulate_replays_with_a_fixed_clock(settings: Path, tmp_path: Path) -> None:
    (tmp_path / "candles" / "binance").mkdir(parents=True)
    file = tmp_path / "candles" / "binance" / "ABCUSDT-1h.csv"
    file.write_text("ts,open,high,low,close,volume\n2024-01-01T00:00:00Z,1,3,1,2.5,7\n")
    line = ("simulate", "--replay", "candles", "--now", "2024-01-02", "--port", "0", "--json")
    with start(*line) as running:
        assert running.stdout is not None
        document = "".join(iter(running.stdout.readline, "}\n"))
        url = document.partition('"url": "')[2].partition('"')[0]
        with urllib.request.urlopen(f"{url}/binance/api/v3/klines?symbol=ABCUSDT&interval=1h") as answer:
            body = answer.read().decode()
        running.send_signal(signal.SIGINT)
        running.wait(timeout=20)
    assert '"2.5' in body


def test_a_port_in_use_is_reported(fks: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = fks("simulate", "--port", str(port))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"port {port}" in result.stderr
    assert "in use" in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_invalid_replay_file_is_reported(fks: Command, tmp_path: Path) -> None:
    (tmp_path / "candles" / "binance").mkdir(parents=True)
    (tmp_path / "candles" / "binance" / "ABCUSDT-1h.csv").write_text("what,ever\n1,2\n")
    result = fks("simulate", "--replay", "candles", "--port", "0")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "ABCUSDT-1h.csv" in result.stderr


# The database


@pytest.fixture
def embedded(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedPostgres]:
    monkeypatch.delenv("FKS_DATABASE_URL")
    server = EmbeddedPostgres(tmp_path / "home")
    yield server
    server.remove()


def test_the_embedded_database_from_init_to_stop(process: Command, embedded: EmbeddedPostgres) -> None:
    assert process("db", "stop", "--json").json == {"embedded": True, "stopped": False}
    made = process("db", "init", "--json")
    assert made.exit_code == 0
    assert made.json["revision"]
    assert embedded.status().running
    url = process("db", "url")
    assert url.exit_code == 0
    assert url.stdout == f"{embedded.status().url}\n"
    assert process("status", "BTC/USDT", "1h", "--json").json["status"] == "not_started"
    assert embedded.status().running
    assert process("db", "stop", "--json").json == {"embedded": True, "stopped": True}
    assert not embedded.status().running
    # A report starts it temporarily.
    assert process("status", "BTC/USDT", "1h", "--json").exit_code == 0


def test_down_says_that_other_commands_use_the_database(process: Command, embedded: EmbeddedPostgres) -> None:
    embedded.start()
    done = process("down")
    assert done.stdout.splitlines() == [
        "Other commands use the embedded database: they end with an error, and can be run again.",
        "Stopped: database.",
    ]
    embedded.release()
    assert process("down").stdout == "Nothing was running.\n"


def test_an_external_database(fks: Command, empty_database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", empty_database_url)
    assert fks("db", "url", "--json").json["url"].startswith("postgresql://")
    made = fks("db", "init", "--json")
    assert made.exit_code == 0
    assert fks("db", "init", "--json").json == made.json
    assert fks("db", "upgrade", "--json").json == made.json
    result = fks("db", "stop")
    assert result.exit_code == 0
    assert "Nothing to stop" in result.stdout


# Dagster's servers


def test_up_reports_a_port_in_use(fks: Command, world: LocalMarket, settings: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = fks("up", "--port", str(port))
    assert (result.exit_code, result.stdout) == (1, "")
    assert f"port {port}" in result.stderr
    assert result.stderr.count("\n") == 1
    down = fks("down", "--json")
    assert (down.exit_code, down.json) == (0, {"stopped": []})
