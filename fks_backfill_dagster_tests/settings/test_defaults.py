"""Defaults, the files and folders that are used, and what is derived from the settings."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.settings import load as module
from fks_backfill_dagster.settings.load import home_of, load_settings
from fks_backfill_dagster.settings.model import CHECKOUT, ENVIRONMENT_ONLY, Settings, SettingsError
from fks_backfill_dagster_tests.accounts import as_other, needs_root
from fks_backfill_dagster_tests.settings.conftest import Load


def test_the_file_of_the_checkout_shows_every_default() -> None:
    loaded = load_settings({}, CHECKOUT)
    assert (
        loaded.redacted_dump()
        == Settings(
            home=CHECKOUT / ".fks", root=CHECKOUT, config_file=CHECKOUT / "config" / "backfill.yaml"
        ).redacted_dump()
    )


def test_the_file_of_the_checkout_names_every_key() -> None:
    import yaml

    def keys(section: object) -> object:
        """The names of a section and of those in it; a list or a value has none."""
        return {name: keys(part) for name, part in section.items()} if isinstance(section, dict) else None

    shown = yaml.safe_load((CHECKOUT / "config" / "backfill.yaml").read_text(encoding="utf-8"))
    dumped = {name: part for name, part in Settings().redacted_dump().items() if name not in ENVIRONMENT_ONLY}
    assert keys(shown) == keys(dumped)


def test_defaults_are_those_of_the_contract() -> None:
    made = Settings()
    assert (made.batch_size_days, made.max_concurrent_requests) == (30, 5)
    assert made.provider_priority.crypto == ("binance", "coingecko", "polygon")
    assert made.provider_priority.stocks == ("polygon", "yfinance", "alphavantage")
    assert made.provider_priority.forex == ("oanda", "polygon")
    assert (made.gap_detection.max_gap_minutes, made.gap_detection.check_interval_hours) == (5, 24)
    assert (made.freshness.warn_candles, made.freshness.error_candles) == (3, 10)
    assert (made.validation.enabled, made.validation.tolerance_pct) == (True, 0.01)
    assert made.validation.validation_providers == ("coingecko", "polygon")
    assert iso(made.history_start) == "2017-08-17T00:00:00+00:00"
    assert made.alerts.urls == ()


def test_the_nearest_file_above_is_used(load: Load, tmp_path: Path) -> None:
    load("batch_size_days: 7")
    below = tmp_path / "some" / "where"
    below.mkdir(parents=True)
    loaded = load_settings({}, below)
    assert loaded.batch_size_days == 7
    assert loaded.root == tmp_path.resolve()
    assert loaded.home == tmp_path.resolve() / ".fks"
    assert loaded.config_file == tmp_path.resolve() / "config" / "backfill.yaml"


def test_elsewhere_the_file_of_the_checkout_is_used(tmp_path: Path) -> None:
    assert load_settings({}, tmp_path).config_file == CHECKOUT / "config" / "backfill.yaml"


def test_without_any_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHECKOUT", tmp_path / "no-checkout")
    loaded = load_settings({}, tmp_path)
    assert loaded.config_file is None
    assert loaded.root == tmp_path.resolve()
    assert loaded.home == tmp_path.resolve() / ".fks"
    assert loaded.symbols == Settings().symbols


def test_another_file_moves_neither_home_nor_root(load: Load, tmp_path: Path) -> None:
    load("batch_size_days: 7")
    (tmp_path / "other.yaml").write_text("batch_size_days: 8", encoding="utf-8")
    loaded = load_settings({"FKS_CONFIG": "other.yaml"}, tmp_path)
    assert loaded.batch_size_days == 8
    assert loaded.home == tmp_path.resolve() / ".fks"


def test_a_named_file_has_to_exist(problems: Callable[..., list[str]], tmp_path: Path) -> None:
    assert problems("", {"FKS_CONFIG": "gone.yaml"}) == [
        f"environment FKS_CONFIG: {tmp_path.resolve() / 'gone.yaml'} does not exist or is not a file"
    ]


@pytest.mark.parametrize("inside", ["", "config", "config/backfill.yaml"])
def test_a_file_that_others_can_change_is_reported_and_not_read(
    load: Load, tmp_path: Path, inside: str
) -> None:
    load()
    file, below = tmp_path.resolve() / "config" / "backfill.yaml", tmp_path / "below"
    file.write_text("batch_size_days: [", encoding="utf-8")
    below.mkdir()
    changed = tmp_path.resolve() / inside
    changed.chmod(0o777)
    with pytest.raises(SettingsError) as caught:
        load_settings({}, below)
    assert caught.value.problems == (
        f"{file}: is not used, because {changed} can be changed by other accounts (mode 0777): set FKS_CONFIG to"
        " this file if you trust it, else to your own",
    )


def test_the_project_of_another_account_is_ignored_even_with_an_own_file(load: Load, tmp_path: Path) -> None:
    load("batch_size_days: 7")
    shared = tmp_path / "shared"
    (shared / "config").mkdir(parents=True)
    (shared / "config" / "backfill.yaml").write_text("batch_size_days: 8", encoding="utf-8")
    shared.chmod(0o777)
    assert load_settings({"FKS_CONFIG": "../config/backfill.yaml"}, shared).batch_size_days == 7
    named = load_settings({"FKS_CONFIG": "config/backfill.yaml"}, shared)
    assert named.batch_size_days == 8
    # No other file of it is used either: its dagster.yaml names code.
    assert (named.root, named.home) == (tmp_path.resolve(), tmp_path.resolve() / ".fks")
    assert home_of({}, shared) == tmp_path.resolve() / ".fks"


@pytest.mark.server
@needs_root
def test_an_unreadable_folder_is_not_a_project(tmp_path: Path, load: Load) -> None:
    yard = Path(tempfile.mkdtemp(prefix="fks-")).resolve()
    yard.chmod(0o755)
    (yard / "config").mkdir(mode=0o700)
    (yard / "below").mkdir(mode=0o755)
    code = "from fks_backfill_dagster.settings import load_settings; print(load_settings({}).root)"
    made = subprocess.run(
        [*as_other(), sys.executable, "-P", "-c", code],
        capture_output=True, text=True, cwd=yard / "below",
    )  # fmt: skip
    shutil.rmtree(yard)
    assert (made.stderr, made.stdout) == ("", f"{CHECKOUT}\n")


def test_the_environment_sets_the_home(load: Load, tmp_path: Path) -> None:
    assert load("", {"FKS_HOME": str(tmp_path / "data")}).home == tmp_path / "data"
    assert load("", {"FKS_HOME": "data"}).home == tmp_path.resolve() / "data"
    assert load("", {"FKS_HOME": " "}).home == tmp_path.resolve() / ".fks"


def test_a_file_is_refused_as_home(problems: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "data").write_text("", encoding="utf-8")
    assert problems("", {"FKS_HOME": "data"}) == [
        f"environment FKS_HOME: {tmp_path.resolve() / 'data'} is a file; it must be a folder"
    ]


@pytest.mark.parametrize("given", ["{warn_candles: 11}", "{warn_candles: 3, error_candles: 2}"])
def test_an_error_of_freshness_comes_after_its_warning(
    problems: Callable[..., list[str]], given: str
) -> None:
    (reported,) = problems(f"freshness: {given}")
    assert "freshness: error_candles is" in reported
    assert "less than warn_candles" in reported


def test_settings_are_frozen(load: Load) -> None:
    loaded = load()
    with pytest.raises(ValueError, match="frozen"):
        loaded.batch_size_days = 3
    with pytest.raises(ValueError, match="frozen"):
        loaded.validation.enabled = False


def test_mixed_sources_have_to_be_allowed(load: Load) -> None:
    assert not load().allow_mixed_sources
    assert load("allow_mixed_sources: true").allow_mixed_sources
    assert load("", {"FKS_ALLOW_MIXED_SOURCES": "true"}).allow_mixed_sources


def test_the_home_without_other_settings(tmp_path: Path, load: Load) -> None:
    homes: list[dict[str, str]] = [{}, {"FKS_HOME": ""}, {"FKS_HOME": "elsewhere"}, {"FKS_HOME": "~/there"}]
    for environ in homes:
        found = load("", environ).home
        (tmp_path / "config" / "backfill.yaml").write_text("batch_size_days: wrong")
        assert home_of(environ, tmp_path) == found


def test_a_provider_is_looked_up_by_name() -> None:
    made = Settings()
    assert made.provider("binance") is made.providers.binance
    with pytest.raises(ValueError, match="'binnace' is not a provider; did you mean binance"):
        made.provider("binnace")
