"""Fixtures of the command tests: a database, a local market, separate settings, real exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fks_backfill_dagster.cli import main
from fks_backfill_dagster.simulator.config import MarketConfig
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.postgres import (
    database,
    database_url,
    empty_database_url,
    server_url,
    template,
)

__all__ = ["database", "database_url", "empty_database_url", "server_url", "template"]

CHECKOUT = Path(__file__).resolve().parents[2]

CONFIG = """
history_start: 2024-01-01
symbols:
  - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1h, 1d]}
  - {symbol: ETH/USDT, asset_class: crypto, timeframes: [1h]}
  - {symbol: SOL/BTC, asset_class: crypto, timeframes: [1h]}
"""


@dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


Command = Callable[..., Outcome]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of the test alone, without the developer's; the database URL has no server."""
    for name in [n for n in os.environ if n.startswith("FKS_") or n.endswith(("_API_KEY", "_API_TOKEN"))]:
        monkeypatch.delenv(name)
    file = tmp_path / "backfill.yaml"
    file.write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FKS_CONFIG", str(file))
    monkeypatch.setenv("FKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FKS_DATABASE_URL", "postgresql://nobody:secret@127.0.0.1:1/nothing")
    return file


@pytest.fixture(scope="module")
def one_market() -> Iterator[LocalMarket]:
    with LocalMarket(MarketConfig(limits=False, polygon_offset_ppm=100)) as running:
        yield running


@pytest.fixture
def market(one_market: LocalMarket) -> Iterator[LocalMarket]:
    yield one_market
    one_market.clear_faults()
    one_market.clear_outages()


@pytest.fixture
def world(
    settings: Path, market: LocalMarket, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> LocalMarket:
    """The settings point to a fresh database and to the local market."""
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", market.binance_url)
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", market.archive_url)
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__BASE_URL", market.polygon_url)
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__REQUESTS_PER_MINUTE", "100000")
    monkeypatch.setenv("POLYGON_API_KEY", "any")
    return market


@pytest.fixture
def fks(settings: Path) -> Command:
    """Runs the command within this process."""

    def run(*arguments: str) -> Outcome:
        result = CliRunner().invoke(main, list(arguments), prog_name="fks-backfill")
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


def start(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """Starts the command in a separate process, with the environment of the test."""
    return subprocess.Popen(
        [sys.executable, "-m", "fks_backfill_dagster", *arguments],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition stays false"
        time.sleep(0.02)


@pytest.fixture
def process(settings: Path) -> Command:
    """Runs the command in a separate process."""

    def run(*arguments: str) -> Outcome:
        with start(*arguments) as running:
            stdout, stderr = running.communicate(timeout=120)
        return Outcome(running.returncode, stdout, stderr)

    return run
