"""Addresses of providers and of the database: form, encryption, keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fks_backfill_dagster.settings.model import KEY_VARIABLES
from fks_backfill_dagster_tests.settings.conftest import Load, archive_url


def test_a_trailing_slash_of_an_address_is_removed(load: Load) -> None:
    loaded = load("providers: {binance: {base_url: 'http://127.0.0.1:8090/binance/', archive_url: null}}")
    assert loaded.providers.binance.base_url == "http://127.0.0.1:8090/binance"
    assert archive_url(loaded) is None


@pytest.mark.parametrize(
    "address",
    [
        "example.com",
        "https://",
        "https://h:99999",
        "https://h/x?y=1",
        "https://h/#x",
        "https://a b",
        "https://h:0",
    ],
)
def test_an_address_is_scheme_host_and_prefix(address: str, problems: Callable[..., list[str]]) -> None:
    (problem,) = problems("", {"FKS_PROVIDERS__OANDA__BASE_URL": address})
    assert problem.startswith("environment FKS_PROVIDERS__OANDA__BASE_URL: is ")


def with_key(provider: str, address: str) -> dict[str, str]:
    return {f"FKS_PROVIDERS__{provider.upper()}__BASE_URL": address, KEY_VARIABLES[provider]: "hidden-key"}


@pytest.mark.parametrize("provider", KEY_VARIABLES)
@pytest.mark.parametrize(
    "address",
    [
        "http://api.example.com",
        "HTTP://API.EXAMPLE.COM/prefix",
        "http://localhost.example.com",
        "http://127.0.0.1.example.com",
        "http://127.1",
        "http://0.0.0.0:8899",
        "http://192.168.1.5:8899",
        "http://[2001:db8::1]",
        "http://[::]:8899",
        "http://[::ffff:10.0.0.1]",
    ],
)
def test_a_key_does_not_leave_the_machine_unencrypted(
    provider: str, address: str, problems: Callable[..., list[str]]
) -> None:
    (reported,) = problems("", with_key(provider, address))
    assert reported == (
        f"environment FKS_PROVIDERS__{provider.upper()}__BASE_URL: would send {KEY_VARIABLES[provider]} unencrypted to"
        " another host: use https://, unset that key, or use a proxy on this machine"
        " (http://127.0.0.1, http://[::1] and http://localhost are accepted)"
    )


def test_an_unencrypted_address_is_reported_with_its_line_and_all_other_errors(
    problems: Callable[..., list[str]],
) -> None:
    reported = problems(
        """
        batch_size_days: 0
        providers:
          oanda: {base_url: http://fx.example.com}
          polygon:
            base_url: http://stocks.example.com
        """,
        {"OANDA_API_TOKEN": "hidden-token", "POLYGON_API_KEY": "hidden-key"},
    )
    assert [text.partition(" would")[0] for text in reported[1:]] == [
        "config/backfill.yaml:4: providers.oanda.base_url:",
        "config/backfill.yaml:6: providers.polygon.base_url:",
    ]
    assert reported[0].startswith("config/backfill.yaml:2: batch_size_days: ")
    assert "hidden" not in "\n".join(reported)


@pytest.mark.parametrize("provider", KEY_VARIABLES)
@pytest.mark.parametrize(
    "address",
    [
        "https://api.example.com",
        "HTTPS://api.example.com",
        "http://localhost:8899/x",
        "http://LocalHost",
        "http://127.0.0.1:8899",
        "http://127.8.8.8",
        "http://[::1]:8899/x",
        "http://[0:0:0:0:0:0:0:1]",
        "http://[::ffff:127.0.0.1]",
    ],
)
def test_a_key_is_sent_encrypted_or_stays_on_the_machine(provider: str, address: str, load: Load) -> None:
    assert load("", with_key(provider, address)).provider(provider).base_url == address


def test_without_a_key_an_address_may_be_unencrypted(load: Load) -> None:
    loaded = load(
        """
        providers:
          binance: {base_url: "http://mirror.example.com", archive_url: "http://files.example.com"}
          polygon: {base_url: "http://stocks.example.com"}
        """,
        {"OANDA_API_TOKEN": "hidden-token"},
    )
    assert archive_url(loaded) == "http://files.example.com"
    assert loaded.providers.polygon.base_url == "http://stocks.example.com"


@pytest.mark.parametrize(
    "url",
    ["postgresql://h/d", "postgres://u@h:5/d", "postgresql+psycopg://u:p@h/d", "postgresql:///d?host=/run"],
)
def test_a_postgresql_address_is_accepted(url: str, load: Load) -> None:
    database = load("", {"FKS_DATABASE_URL": url}).database_url
    assert database is not None
    assert database.get_secret_value() == url


@pytest.mark.parametrize(
    "url",
    [
        "sqlite:///x",
        "localhost/d",
        "postgresql+psycopg2://h/d",
        "postgresql://u:pa/ss@h/d",
        "postgresql://u:p@ss@h/d",
        "postgres:h",
    ],
)
def test_another_address_is_refused(url: str, problems: Callable[..., list[str]]) -> None:
    (reported,) = problems("", {"FKS_DATABASE_URL": url})
    assert reported.startswith("environment FKS_DATABASE_URL: is not a PostgreSQL address")
    assert url not in reported


def test_custom_addresses(load: Load) -> None:
    assert load().custom_addresses() == {}
    text = """
        providers:
          binance: {archive_url: "http://127.0.0.1:1/archive/"}
          oanda: {base_url: https://api-fxtrade.oanda.com}
          polygon: {base_url: http://127.0.0.1:1/polygon, enabled: false}
    """
    assert load(text).custom_addresses() == {
        "binance": "https://api.binance.com (archives: http://127.0.0.1:1/archive)",
        "oanda": "https://api-fxtrade.oanda.com",
    }
    assert load("providers: {binance: {archive_url: null}}").custom_addresses() == {}
