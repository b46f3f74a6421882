"""The package: its version, its exports, the cost of importing it."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest

from fks_backfill_dagster.settings.model import CHECKOUT


@pytest.mark.server
@pytest.mark.parametrize(
    ("statement", "light"),
    [
        ("import fks_backfill_dagster", "numpy pandas pydantic sqlalchemy dagster ccxt exchange_calendars"),
        ("import fks_backfill_dagster.settings as s; s.Settings()", "pandas sqlalchemy dagster ccxt"),
    ],
)
def test_an_import_imports_nothing_heavy(statement: str, light: str) -> None:
    code = f"import sys; {statement}; print(sorted(set('{light}'.split()) & sys.modules.keys()))"
    made = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert made.stdout.strip() == "[]"


def test_the_version_is_that_of_the_project() -> None:
    import fks_backfill_dagster

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert fks_backfill_dagster.__version__ == project["version"]


def test_the_package_exports_nothing_else() -> None:
    import fks_backfill_dagster

    with pytest.raises(AttributeError, match="has no attribute 'read_candle'"):
        fks_backfill_dagster.read_candle  # noqa: B018
