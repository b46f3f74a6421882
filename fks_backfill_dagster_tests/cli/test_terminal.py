"""What only a person at a terminal sees: questions, tables of its width, psql, completion."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from fks_backfill_dagster.cli import output
from fks_backfill_dagster.embedded import EmbeddedPostgres
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import CHECKOUT, Command
from fks_backfill_dagster_tests.cli.test_backfill import JANUARY

pytestmark = pytest.mark.server

COMMAND = [sys.executable, "-m", "fks_backfill_dagster"]
ENVIRONMENT = {"PYTHONPATH": str(CHECKOUT)}
ONLY = ("--provider", "binance")


def at_terminal(*arguments: str, typed: str = "", columns: int = 80) -> tuple[int, str]:
    """Exit code and screen of a command with all streams on a terminal of this width."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with subprocess.Popen(
        [*COMMAND, *arguments], env=os.environ | ENVIRONMENT, stdin=theirs, stdout=theirs, stderr=theirs
    ) as running:
        os.close(theirs)
        os.write(ours, typed.encode())
        shown = b""
        with suppress(OSError):  # Linux reports the closed end as an error
            while more := os.read(ours, 65_536):
                shown += more
    os.close(ours)
    return running.returncode, shown.decode().replace("\r\n", "\n")


# Questions


def test_an_undo_asks_on_a_terminal(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    (batch,) = (str(one["id"]) for one in fks("batches", "list", "--json").json)
    for answer in ("n\n", "\n", "\x04"):
        code, shown = at_terminal("batches", "undo", batch, typed=answer)
        assert code == 1
        assert f"Batch {batch} of BTC/USDT 1h, from binance rest, committed 2" in shown
        assert "744 candles inserted, 0 updated in 2024-01-01 .. 2024-02-01." in shown
        assert "Nothing was undone; --yes undoes without a question." in shown
        assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 744
    code, shown = at_terminal("batches", "undo", batch, typed="y\n")
    assert (code, "744 candles of batch" in shown) == (0, True)
    assert fks("status", "BTC/USDT", "1h", "--json").json["total_candles"] == 0


def test_with_yes_an_undo_asks_nothing(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    (batch,) = (str(one["id"]) for one in fks("batches", "list", "--json").json)
    code, shown = at_terminal("batches", "undo", batch, "--yes")
    assert (code, shown) == (0, f"BTC/USDT 1h: 744 candles of batch {batch} taken back.\n")


# Tables


def test_tables_fit_the_terminal_and_wide_prints_them_in_full(fks: Command, world: LocalMarket) -> None:
    fks("backfill", "*/USDT", "1h", *JANUARY, *ONLY)
    full = fks("batches", "list").stdout
    assert max(map(len, full.splitlines())) > 120
    _, shown = at_terminal("batches", "list", columns=120)
    assert max(map(len, shown.splitlines())) <= 120
    assert "…" in shown
    assert "BTC/USDT 1h" in shown
    assert at_terminal("batches", "list", "--wide", columns=120) == (0, full)
    _, shown = at_terminal("status", columns=80)
    table = shown.splitlines()[:-1]
    assert max(map(len, table)) <= 80
    assert "2024-01-31 23:00" in table[1], "times stay whole, headings do not"


def test_exported_columns_do_not_shorten_a_pipe(
    fks: Command, world: LocalMarket, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = fks("series", "providers").stdout
    monkeypatch.setenv("COLUMNS", "40")
    assert fks("series", "providers").stdout == full
    assert "…" not in full


def test_a_locale_without_an_ellipsis(monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    monkeypatch.setattr(output, "_width", lambda: 24)
    monkeypatch.setattr(output, "print_line", printed.append)
    monkeypatch.setattr(output, "_is_encodable", lambda text: False)
    output.print_table(("series", "evidence"), [("BTC/USDT 1h", "binance: absent")])
    assert printed[-1] == "BTC/USDT 1h  binance: a~"


# psql


def psql_that_shows_its_connection(folder: Path) -> str:
    """A program `psql` on a new PATH that prints what it was given and exits with 7."""
    folder.mkdir()
    program = folder / "psql"
    program.write_text(
        '#!/bin/sh\necho "$@"; echo "$PGUSER $PGPASSWORD $PGHOST $PGPORT $PGDATABASE $PGSSLMODE"; exit 7\n'
    )
    program.chmod(0o755)
    return str(folder)


def test_the_shell_passes_the_connection_in_the_environment(
    settings: Path, tmp_path: Path, process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = psql_that_shows_its_connection(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv(
        "FKS_DATABASE_URL", "postgresql://me:p%40ss@db.example.com:5433/candles?sslmode=require"
    )
    done = process("db", "shell", "--", "-c", "SELECT 1")
    assert done.exit_code == 7
    assert done.stdout.splitlines() == ["-c SELECT 1", "me p@ss db.example.com 5433 candles require"]


def test_without_psql_the_error_says_what_to_install_and_how_to_connect(
    settings: Path, process: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    done = process("db", "shell")
    assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "postgresql-client" in done.stderr
    assert "postgresql://nobody:***@127.0.0.1:1/nothing" in done.stderr
    assert "secret" not in done.stderr


@pytest.mark.skipif(not os.access("/usr/bin/psql", os.X_OK), reason="psql is not installed")
def test_psql_itself(fks: Command, world: LocalMarket, process: Command) -> None:
    fks("backfill", "BTC/USDT", "1h", *JANUARY, *ONLY)
    done = process("db", "shell", "--", "-AtXc", "SELECT total_candles FROM fks.sync_status")
    assert (done.exit_code, done.stdout) == (0, "744\n")


def test_the_shell_starts_the_embedded_server(
    process: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client in Python stands for psql: libpq gets its whole connection from the environment."""
    monkeypatch.delenv("FKS_DATABASE_URL")
    folder = tmp_path / "bin"
    psql_that_shows_its_connection(folder)
    query = "print(psycopg.connect().execute('SELECT count(*) FROM fks.ohlcv').fetchone())"
    (folder / "psql").write_text(f"#!{sys.executable}\nimport psycopg\n{query}\n")
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    try:
        done = process("db", "shell")
    finally:
        EmbeddedPostgres(tmp_path / "home").remove()
    assert (done.exit_code, done.stdout) == (0, "(0,)\n"), done.stderr


# Completion


@pytest.fixture
def complete(settings: Path) -> Callable[..., list[str]]:
    """The completions of a line in bash; the last word is incomplete."""

    def run(*words: str) -> list[str]:
        line = ("fks-backfill", *words)
        variables = {
            "_FKS_BACKFILL_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(line),
            "COMP_CWORD": str(len(words)),
        }
        code = "from fks_backfill_dagster.cli import main; main(prog_name='fks-backfill')"
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | ENVIRONMENT | variables,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [one.partition(",")[2] for one in done.stdout.splitlines() if one]

    return run


def test_symbols_timeframes_and_providers_are_completed(complete: Callable[..., list[str]]) -> None:
    """From the settings: the database of these settings does not exist."""
    assert complete("backfill", "") == ["BTC/USDT", "ETH/USDT", "SOL/BTC"]
    assert complete("gaps", "btc") == ["BTC/USDT"]
    assert complete("status", "ETH_") == ["ETH_USDT"]
    assert complete("backfill", "BTC/USDT", "") == ["1h", "1d"]
    assert complete("backfill", "eth_usdt", "") == ["1h"]
    assert complete("fill-gaps", "--all", "") == ["1h", "1d"]
    assert complete("launch", "BTC/USDT", "--timeframe", "1") == ["1h", "1d"]
    assert complete("export", "S") == ["SOL/BTC"]
    assert complete("export", "SOL/BTC", "") == ["1h"]
    assert complete("export", "DOGE/USDT", "1") == ["1m", "15m", "1h", "1d", "1w"]
    assert complete("backfill", "BTC/USDT", "1h", "--provider", "y") == ["yfinance"]
    assert complete("batches", "u") == ["undo"]


def test_invalid_settings_complete_nothing_and_print_nothing(
    complete: Callable[..., list[str]], settings: Path
) -> None:
    settings.write_text("symbols: [nonsense\n")
    assert complete("backfill", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(
    settings: Path, process: Command, shell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_FKS_BACKFILL_COMPLETE", f"{shell}_source")
    done = process()
    assert (done.exit_code, done.stderr) == (0, "")
    assert f"_FKS_BACKFILL_COMPLETE={shell}_complete" in done.stdout
