"""Unit tests of the demo; `make demo` itself is the integration test."""

from __future__ import annotations

from pathlib import Path

import pytest

from fks_backfill_dagster.demo import demo
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import CHECKOUT
from fks_backfill_dagster.simulator.config import Outage
from fks_backfill_dagster.tables import percent


def test_the_settings_of_the_first_run_are_kept(tmp_path: Path) -> None:
    path = demo._write_settings(tmp_path)
    changed = path.read_text().replace("history_start: 2", "history_start: 1")
    path.write_text(changed)
    assert demo._write_settings(tmp_path) == path
    assert path.read_text() == changed


def test_its_home_is_below_the_default_one_and_not_nested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FKS_HOME", raising=False)
    assert demo._default_home() == CHECKOUT / ".fks" / "demo"
    monkeypatch.setenv("FKS_HOME", str(tmp_path))
    assert demo._default_home() == tmp_path / "demo"
    monkeypatch.setenv("FKS_HOME", str(tmp_path / "demo"))
    assert demo._default_home() == tmp_path / "demo"


def test_its_environment_has_no_foreign_settings_and_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", "postgresql://real")
    monkeypatch.setenv("DAGSTER_HOME", "/real")
    monkeypatch.setenv("POLYGON_API_KEY", "a-real-key")
    config = demo._write_settings(tmp_path)
    environment = demo._clean_environment(tmp_path, config)
    assert not {"FKS_DATABASE_URL", "DAGSTER_HOME", "POLYGON_API_KEY"} & environment.keys()
    settings = load_settings(environment, CHECKOUT)
    assert (settings.home, settings.database_url, settings.keys) == (tmp_path, None, {})
    assert len(Catalog(settings).series) == 9


def test_the_market_parses_the_outage_options(tmp_path: Path) -> None:
    made = demo.Demo(tmp_path, demo._write_settings(tmp_path), lambda text: None)
    for outage in made._outages():
        assert Outage.parse(outage.option).window == outage.window


def test_the_last_lines_name_commands_that_work_and_no_address_of_a_stopped_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FKS_DATABASE_URL", raising=False)
    config = tmp_path / "backfill.yaml"
    command = f"FKS_HOME={tmp_path} FKS_CONFIG={config} fks-backfill"
    stopped = demo._closing(tmp_path, config, None)
    assert stopped[-1] == f"Its data: `{command} status`, in SQL `{command} db shell`."
    assert "http" not in " ".join(stopped)
    kept = demo._closing(tmp_path, config, "http://127.0.0.1:3000/?token=x")
    assert kept[:2] == [
        "The servers are still up: http://127.0.0.1:3000/?token=x",
        f"Stop them with `{command} down`.",
    ]
    monkeypatch.setenv("FKS_DATABASE_URL", "postgresql://real")  # would take precedence over the home
    assert "`env -u FKS_DATABASE_URL FKS_HOME=" in demo._closing(tmp_path, config, None)[-1]


@pytest.mark.parametrize(
    ("share", "shown"), [(1.0, "100 %"), (0.999999, "99.99 %"), (0.5, "50.00 %"), (0.0, "0.00 %")]
)
def test_shares_are_not_rounded_up_to_100_percent(share: float, shown: str) -> None:
    assert percent(share) == shown
