"""`dg` in the top folder finds the definitions without warnings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fks_backfill_dagster.settings.model import CHECKOUT

pytestmark = pytest.mark.server


def test_dg_checks_the_definitions(tmp_path: Path, empty_database_url: str) -> None:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FKS_", "DAGSTER_"))}
    done = subprocess.run(
        [Path(sys.executable).parent / "dg", "check", "defs", "--use-active-venv"],
        cwd=CHECKOUT,
        env=kept | {"FKS_HOME": str(tmp_path), "FKS_DATABASE_URL": empty_database_url},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "All definitions loaded successfully."
    assert "warning" not in (done.stdout + done.stderr).lower()
