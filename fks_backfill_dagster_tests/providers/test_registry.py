"""Names, defaults, and the rule that keeps a local market apart from the real archives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fks_backfill_dagster.providers.base import ProviderOptions
from fks_backfill_dagster.providers.http import RequestPool
from fks_backfill_dagster.providers.registry import (
    BUILT,
    NAMES,
    NotBuilt,
    UnknownProvider,
    build,
    limiter_for,
    resolve_options,
)


def test_defaults() -> None:
    assert resolve_options("binance") == ProviderOptions(
        "https://api.binance.com", archive_url="https://data.binance.vision"
    )
    assert resolve_options("polygon") == ProviderOptions("https://api.polygon.io", requests_per_minute=5)


def test_a_local_market_never_mixes_with_the_real_archives() -> None:
    assert resolve_options("binance", base_url="http://127.0.0.1:9/x/").archive_url is None
    assert resolve_options("binance", base_url="http://127.0.0.1:9/x/").base_url == "http://127.0.0.1:9/x"
    both = resolve_options("binance", base_url="http://127.0.0.1:9", archive_url="http://127.0.0.1:8")
    assert both.archive_url == "http://127.0.0.1:8"
    assert resolve_options("binance", archive_url="http://127.0.0.1:8").base_url == "https://api.binance.com"


def test_every_built_provider_can_be_made(pool: RequestPool) -> None:
    for name in BUILT:
        options = resolve_options(name)
        provider = build(name, options, pool, limiter_for({name: options}, pool))
        assert provider.name == name
        assert provider.capabilities.timeframes


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(BUILT)))
def test_known_but_not_built(name: str) -> None:
    with pytest.raises(NotBuilt, match=f"{name}: this version cannot ask it yet"):
        resolve_options(name)


def test_unknown_name() -> None:
    with pytest.raises(UnknownProvider, match="there are binance, coingecko"):
        resolve_options("kraken")


def test_a_key_is_not_printed() -> None:
    assert "hidden" not in repr(resolve_options("polygon", key="hidden"))


def test_ccxt_is_imported_by_those_who_ask_only() -> None:
    """It takes longer to import than everything else together."""
    code = "import sys, fks_backfill_dagster.providers.registry; sys.exit('ccxt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
