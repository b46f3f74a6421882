"""Backfills OHLCV candles: every candle that should exist is stored, or its absence is explained.

For programs: `from fks_backfill_dagster import read_candles`. Importing the package is cheap: the names of this
module are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fks_backfill_dagster.reading import read_candles

    __version__: str

__all__ = ["__version__", "read_candles"]


def __getattr__(name: str) -> object:
    if name == "read_candles":
        from fks_backfill_dagster.reading import read_candles

        return read_candles
    if name == "__version__":
        from importlib.metadata import version

        return version("fks-backfill")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
