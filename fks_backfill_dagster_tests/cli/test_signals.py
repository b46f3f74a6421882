"""SIGINT, SIGTERM and SIGHUP end a command alike: one sentence, committed batches stay, exit code 128 + n."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path

import click
import psutil
import pytest

from fks_backfill_dagster.cli import launch
from fks_backfill_dagster.cli.signals import Signals
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster_tests.cli.conftest import CHECKOUT, Command, start, until
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY
from fks_backfill_dagster_tests.store.builders import fetch

ENDING = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
BACKFILL = ("backfill", "BTC/USDT", "1h", *JANUARY, "--provider", "binance", "--json")
COMMAND = [sys.executable, "-m", "fks_backfill_dagster"]


@pytest.fixture
def hanging(world: LocalMarket, monkeypatch: pytest.MonkeyPatch) -> LocalMarket:
    """A market whose Binance accepts requests and never responds."""
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", "null")
    world.plant_fault("binance", "hang", count=None, seconds=60)
    world.reset_requests()
    return world


def wait_for_request(market: LocalMarket) -> None:
    """Waits for the first request."""
    until(lambda: market.requests("binance") > 0)


@ENDING
def test_a_backfill(hanging: LocalMarket, number: int) -> None:
    with start(*BACKFILL) as running:
        wait_for_request(hanging)
        began = time.monotonic()
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=30)
    assert time.monotonic() - began < 20, "it does not wait for the response"
    assert (running.returncode, stdout) == (128 + number, "")
    assert stderr.splitlines()[-1].startswith("Interrupted: committed batches stay")
    assert "Traceback" not in stderr


@ENDING
def test_the_filling_of_gaps(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", "null")
    world.plant_outage("binance", TimeRange(instant("2024-01-10T05:00"), instant("2024-01-10T09:00")))
    assert fks(*BACKFILL).json["missing"] == 4
    world.plant_fault("binance", "hang", count=None, seconds=60)
    world.reset_requests()
    with start("fill-gaps", "BTC/USDT", "1h", "--json") as running:
        wait_for_request(world)
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout) == (128 + number, "")
    assert stderr.splitlines()[-1].startswith("Interrupted: committed batches stay")
    assert "Traceback" not in stderr


@ENDING
def test_a_validation(fks: Command, world: LocalMarket, database: Database, number: int) -> None:
    """Nothing is recorded of what was compared so far."""
    assert fks(*BACKFILL).exit_code == 0
    world.plant_fault("polygon", "hang", count=None, seconds=60)
    world.reset_requests()
    with start("validate", "BTC/USDT", "1h", *JANUARY, "--json") as running:
        until(lambda: world.requests("polygon") > 0)
        began = time.monotonic()
        running.send_signal(number)
        stdout, stderr = running.communicate(timeout=30)
    assert time.monotonic() - began < 20, "it does not wait for the response"
    assert (running.returncode, stdout) == (128 + number, "")
    assert stderr.splitlines()[-1].startswith("Interrupted: nothing was recorded")
    assert "Traceback" not in stderr
    assert fetch(database, "SELECT count(*) FROM fks.validation") == [(0,)]


@ENDING
def test_an_audit(fks: Command, world: LocalMarket, database: Database, number: int) -> None:
    assert fks(*BACKFILL).exit_code == 0
    with database.begin() as connection:
        connection.exec_driver_sql("LOCK TABLE fks.candles_1h IN ACCESS EXCLUSIVE MODE")
        with start("audit", "--json") as running:
            query = (
                "SELECT count(*) FROM pg_locks WHERE NOT granted AND database = (SELECT oid FROM pg_database"
            )
            waiting = f"{query} WHERE datname = current_database())"
            until(lambda: bool(connection.exec_driver_sql(waiting).scalar_one()))
            running.send_signal(number)
            stdout, stderr = running.communicate(timeout=30)
    assert (running.returncode, stdout, stderr.strip()) == (128 + number, "", "Interrupted.")


@pytest.mark.server
@ENDING
def test_a_market_ends_normally(settings: Path, number: int) -> None:
    with start("simulate", "--port", "0", "--json") as running:
        assert running.stdout is not None
        assert "".join(iter(running.stdout.readline, "}\n"))
        running.send_signal(number)
        _, stderr = running.communicate(timeout=30)
    assert running.returncode == 0
    assert "Traceback" not in stderr
    assert "exception" not in stderr


@ENDING
def test_a_waiting_launch(capsys: pytest.CaptureFixture[str], number: int) -> None:
    ending = Signals()
    with (
        click.Context(launch.launch, obj=ending),
        ending.handled(),
        pytest.raises(click.exceptions.Exit) as caught,
        launch._stop_waiting_on_interrupt("http://127.0.0.1:3000/runs/b/abc"),
    ):
        signal.raise_signal(number)
    assert caught.value.exit_code == 128 + number
    assert capsys.readouterr().err == (
        "Stopped waiting. The backfill goes on; view or cancel it at http://127.0.0.1:3000/runs/b/abc\n"
    )


_DEMO = """
import sys
from pathlib import Path
from fks_backfill_dagster.demo import demo
from fks_backfill_dagster.cli import main

run = demo.run_demo
demo.run_demo = lambda keep: run(keep, home=Path(sys.argv[1]))
main(["demo"], prog_name="fks-backfill")
"""


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_demo_leaves_no_process_behind(settings: Path, tmp_path: Path, number: int) -> None:
    home = tmp_path / "demo"
    with subprocess.Popen(
        [sys.executable, "-c", _DEMO, str(home)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    ) as running:
        until((home / "run" / "market.json").exists)
        running.send_signal(number)
        _, stderr = running.communicate(timeout=120)
    assert running.returncode == 128 + number
    assert stderr.strip() == "Interrupted."
    until(lambda: not alive(home))
    EmbeddedPostgres(home).remove()


def alive(home: Path) -> list[int]:
    """The processes of a home."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("FKS_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def test_nohup(hanging: LocalMarket) -> None:
    with subprocess.Popen(
        ["nohup", *COMMAND, *BACKFILL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
    ) as running:
        wait_for_request(hanging)
        running.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(1)
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=30)
    assert running.returncode == 128 + signal.SIGTERM


def test_a_job_in_the_background_ignores_ctrl_c(hanging: LocalMarket) -> None:
    """A shell without job control starts it this way: Ctrl-C is for the foreground process."""
    script = '"$@" & echo $!; wait'
    with subprocess.Popen(
        ["/bin/sh", "-c", script, "sh", *COMMAND, *BACKFILL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        text=True,
    ) as shell:
        assert shell.stdout is not None
        job = int(shell.stdout.readline())
        wait_for_request(hanging)
        os.kill(job, signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            shell.wait(1)
        os.kill(job, signal.SIGTERM)
        _, stderr = shell.communicate(timeout=30)
    assert "Interrupted: committed batches stay" in stderr


@pytest.mark.server
def test_a_market_in_the_background_ends(settings: Path) -> None:
    with subprocess.Popen(
        ["/bin/sh", "-c", '"$@" & echo $!; wait $!', "sh", *COMMAND, "simulate", "--port", "0", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        text=True,
    ) as shell:
        assert shell.stdout is not None
        job = int(shell.stdout.readline())
        assert "".join(iter(shell.stdout.readline, "}\n"))
        os.kill(job, signal.SIGTERM)
        _, stderr = shell.communicate(timeout=30)
    assert shell.returncode == 0
    assert "Traceback" not in stderr


@pytest.mark.parametrize("market_state", ["hangs", "is unreachable"])
def test_a_terminal_that_is_closed(
    hanging: LocalMarket, monkeypatch: pytest.MonkeyPatch, market_state: str
) -> None:
    """The kernel sends SIGHUP, and all later output fails."""
    if market_state == "is unreachable":
        monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", "http://127.0.0.1:1")
    ours, theirs = os.openpty()

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    with subprocess.Popen(
        [*COMMAND, *BACKFILL],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        preexec_fn=take_terminal,
        env=os.environ | {"PYTHONPATH": str(CHECKOUT), "TERM": "xterm"},
    ) as running:
        os.close(theirs)
        if market_state == "hangs":
            wait_for_request(hanging)
        else:
            os.read(ours, 1)  # the bar is shown
        os.close(ours)
        assert running.wait(60) == 128 + signal.SIGHUP


# Which signals interrupt


def test_the_first_signal_interrupts_and_so_does_every_ctrl_c() -> None:
    """A terminal that is closed sends two of them; the cleanup after the first must finish."""
    ending, calls = Signals(), list[int]()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with ending.handled(), ending.first(lambda: calls.append(1)):
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGHUP)
        assert (ending.received, ending.exit_code, calls) == (signal.SIGHUP, 129, [1])
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert ending.exit_code == 129
    assert {number: signal.getsignal(number) for number in before} == before


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals().handled():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
