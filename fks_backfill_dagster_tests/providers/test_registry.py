"""Names, defaults, accounts, and the separation of a local market from the real archives."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from fks_backfill_dagster.domain.rate_limits import RateWindow
from fks_backfill_dagster.known_providers import KNOWN
from fks_backfill_dagster.providers.base import ProviderOptions
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import (
    UnknownProvider,
    build,
    limiter_for,
    rate_limits,
    resolve_options,
)


def test_defaults() -> None:
    assert resolve_options("binance") == ProviderOptions(
        "https://api.binance.com", archive_url="https://data.binance.vision", requests_per_minute=3000
    )
    assert resolve_options("polygon") == ProviderOptions("https://api.massive.com", requests_per_minute=5)


def test_a_local_market_never_mixes_with_the_real_archives() -> None:
    assert resolve_options("binance", base_url="http://127.0.0.1:9/x/").archive_url is None
    assert resolve_options("binance", base_url="http://127.0.0.1:9/x/").base_url == "http://127.0.0.1:9/x"
    both = resolve_options("binance", base_url="http://127.0.0.1:9", archive_url="http://127.0.0.1:8")
    assert both.archive_url == "http://127.0.0.1:8"
    assert resolve_options("binance", archive_url="http://127.0.0.1:8").base_url == "https://api.binance.com"


def test_every_built_provider_can_be_made(pool: RequestPool) -> None:
    for name in KNOWN:
        options = resolve_options(name)
        provider = build(name, options, pool, limiter_for({name: options}))
        assert provider.name == name
        assert provider.capabilities.timeframes


def test_unknown_name() -> None:
    with pytest.raises(UnknownProvider, match="there are alphavantage, binance"):
        resolve_options("kraken")


def test_a_key_is_not_printed() -> None:
    assert "hidden" not in repr(resolve_options("polygon", key="hidden"))


@pytest.mark.server
def test_ccxt_is_imported_only_for_requests() -> None:
    """Its import takes longer than all others together."""
    code = "import sys, fks_backfill_dagster.providers.registry; sys.exit('ccxt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestRateLimits:
    def windows(self, name: str, **given: Any) -> tuple[RateWindow, ...]:
        return rate_limits({name: resolve_options(name, **given)})[name].windows

    @pytest.mark.parametrize(
        ("name", "expected"),
        [
            ("binance", (RateWindow(6000, 60),)),
            ("polygon", (RateWindow(5, 60),)),
            ("alphavantage", (RateWindow(1, 1), RateWindow(25, 86_400))),
            ("coingecko", (RateWindow(100, 60),)),
            ("oanda", (RateWindow(100, 1),)),
        ],
    )
    def test_documented_limits(self, name: str, expected: tuple[RateWindow, ...]) -> None:
        assert self.windows(name) == expected

    def test_every_provider_has_a_limit(self) -> None:
        assert all(self.windows(name) for name in KNOWN)

    def test_a_configured_limit_replaces_all_windows(self) -> None:
        assert self.windows("alphavantage", requests_per_minute=75) == (RateWindow(75, 60),)
        assert self.windows("binance", requests_per_minute=100) == (RateWindow(200, 60),)

    def test_an_account_identifies_a_market_and_a_key_and_reveals_neither(self) -> None:
        def account(**given: Any) -> str:
            return rate_limits({"polygon": resolve_options("polygon", **given)})["polygon"].account

        accounts = [account(), account(key="k"), account(key="j"), account(key="k", base_url="http://h")]
        assert len(set(accounts)) == 4
        assert account(key="k") == accounts[1]
        assert all(re.fullmatch("[0-9a-f]{16}", one) for one in accounts)

    def test_archives_have_the_account_of_their_host(self) -> None:
        one = rate_limits({"binance": resolve_options("binance")})["binance-archive"]
        other = rate_limits({"binance": resolve_options("binance", archive_url="http://h")})[
            "binance-archive"
        ]
        assert one.windows == other.windows == ()
        assert one.account != other.account
