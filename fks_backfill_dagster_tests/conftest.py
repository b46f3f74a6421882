"""Fixtures that every layer's tests may need; a layer's own stand in its folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

from fks_backfill_dagster.embedded import EmbeddedPostgres

_SHARED = (Path(__file__).resolve().parents[1] / "../shared/data").resolve()


# A busy machine is no defect: no test fails for its time.
settings.register_profile("any machine", settings(), deadline=None)
settings.load_profile("any machine")

# Inherited by the workers of a run, which share the server below it (postgres.py).
_HOME = "FKS_TEST_HOME"


def pytest_configure(config: pytest.Config) -> None:
    if _HOME not in os.environ:
        os.environ[_HOME] = tempfile.mkdtemp(prefix="fks-tests-")
        config.add_cleanup(_remove_home)


def _remove_home() -> None:
    home = Path(os.environ.pop(_HOME))
    EmbeddedPostgres(home).remove()
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("binance/BTCUSDT-1h.csv.gz")`: a file of real candles beside the checkout; skips without."""

    def find(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"real candles are not here: {path}")
        return path

    return find
