"""Fixtures that every layer's tests may need; a layer's own stand in its folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

_SHARED = (Path(__file__).resolve().parents[1] / "../shared/data").resolve()


def pytest_configure(config: pytest.Config) -> None:
    # exchange-calendars 4.13 still calls what pandas 3.1 deprecates. Not ours to mend.
    for message in ("Series.values returning an ndarray", "DatetimeIndex.weekday is deprecated"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """`shared_data("binance/BTCUSDT-1h.csv.gz")`: a file of real candles beside the checkout; skips without."""

    def find(name: str) -> Path:
        path = _SHARED / name
        if not path.exists():
            pytest.skip(f"real candles are not here: {path}")
        return path

    return find
