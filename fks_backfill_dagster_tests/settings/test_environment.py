"""Variables of the environment, and secrets, which come from there only."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from pydantic import SecretStr

from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import SettingsError
from fks_backfill_dagster.settings.sections import PROVIDER_NAMES
from fks_backfill_dagster_tests.settings.conftest import Load, archive_url


def test_the_environment_wins_over_the_file(load: Load) -> None:
    loaded = load(
        "batch_size_days: 7\nproviders: {binance: {timeout_seconds: 3, enabled: true}}",
        {
            "FKS_BATCH_SIZE_DAYS": "9",
            "FKS_PROVIDERS__BINANCE__BASE_URL": "http://127.0.0.1:1234",
            "FKS_PROVIDERS__BINANCE__ENABLED": "False",
            "FKS_PROVIDERS__BINANCE__ARCHIVE_URL": "null",
            "FKS_PROVIDER_PRIORITY__CRYPTO": '["polygon", "binance"]',
            "FKS_VALIDATION": '{"tolerance_pct": 0.5, "enabled": true}',
            "FKS_VALIDATION__ENABLED": "false",
            "FKS_HISTORY_START": "2021-05-06",
            "FKS_SYMBOLS": '[{"symbol": "XRP/USDT", "asset_class": "crypto", "timeframes": ["1w"]}]',
            "FKS_GAP_DETECTION__MAX_GAP_MINUTES": "",
            "FKS_TEST_ANYTHING": "goes",
            "PATH": "/bin",
        },
    )
    assert loaded.batch_size_days == 9
    binance = loaded.providers.binance
    assert (binance.base_url, binance.enabled, archive_url(loaded)) == ("http://127.0.0.1:1234", False, None)
    assert binance.timeout_seconds == 3
    assert loaded.provider_priority.crypto == ("polygon", "binance")
    assert (loaded.validation.tolerance_pct, loaded.validation.enabled) == (0.5, False)
    assert iso(loaded.history_start) == "2021-05-06T00:00:00+00:00"
    assert [str(series) for series in Catalog(loaded).series] == ["XRP/USDT 1w"]
    assert loaded.gap_detection.max_gap_minutes == 5


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("FKS_PROVIDERS__BINANCE__TIMEOUT_SECONDS", "soon", "'soon' is not a number"),
        ("FKS_BATCH_SIZE_DAYS", "many", "'many' is not a whole number"),
        ("FKS_PROVIDER_PRIORITY__CRYPTO", "binance", 'is not a list such as ["a", "b"]'),
        (
            "FKS_PROVIDER_PRIORITY__CRYPTO",
            '["binanc"]',
            "provider_priority.crypto[0]: 'binanc' is not a provider;",
        ),
        ("FKS_SYMBOLS", '[{"symbol"]', "is not JSON: "),
        ("FKS_SYMBOLS", '[{"symbol": "A/B"}]', "symbols[0].asset_class: is missing"),
        ("FKS_SYMBOLS__0__START", "2020-01-01", "the list is set as a whole, as JSON in FKS_SYMBOLS"),
        ("FKS_BATCH_SIZE_DAYS__X", "1", "FKS_BATCH_SIZE_DAYS has no keys below it"),
        ("FKS_SYMBOL", "[]", "is not a setting; did you mean FKS_SYMBOLS?"),
        ("FKS_DATABASE_URI", "x", "is not a setting; did you mean FKS_DATABASE_URL?"),
        (
            "FKS_PROVIDERS__BINANCE__BASEURL",
            "x",
            "is not a setting; did you mean FKS_PROVIDERS__BINANCE__BASE_URL?",
        ),
        ("FKS_Batch_Size_Days", "1", "is not a setting; "),
        ("FKS_KEYS", "{}", "is not a setting; "),
        ("FKS_ZZZZZZZZZZZZZZZZ", "x", "is not a setting; docs/settings.md lists them all"),
        ("FKS_VALIDATION", "5", "is not a section of `key: value` settings"),
    ],
)
def test_an_invalid_variable_is_reported_by_name(
    name: str, value: str, expected: str, problems: Callable[..., list[str]]
) -> None:
    reported = problems("", {name: value})
    assert reported[0].startswith(f"environment {name}: {expected}")


def test_a_variable_below_a_wrong_section_hides_nothing(problems: Callable[..., list[str]]) -> None:
    assert problems("", {"FKS_VALIDATION": "5", "FKS_VALIDATION__ENABLED": "true"}) == [
        "environment FKS_VALIDATION: is not a section of `key: value` settings"
    ]


def test_errors_of_file_and_environment_are_reported_together(problems: Callable[..., list[str]]) -> None:
    assert problems("batch_size_days: 0", {"FKS_MAX_CONCURRENT_REQUESTS": "0", "FKS_X": "1"}) == [
        "config/backfill.yaml:1: batch_size_days: 0 is not between 1 and 3660",
        "environment FKS_X: is not a setting; docs/settings.md lists them all",
        "environment FKS_MAX_CONCURRENT_REQUESTS: 0 is not between 1 and 100",
    ]


# --- secrets ---

SECRETS = {
    "POLYGON_API_KEY": "hidden-polygon",
    "COINGECKO_API_KEY": "hidden-coingecko",
    "ALPHAVANTAGE_API_KEY": " hidden-alphavantage\n",
    "OANDA_API_TOKEN": "",
    "FKS_API_TOKEN": "hidden-token-of-thirty-two-characters",
    "FKS_DATABASE_URL": "postgresql://user:hidden-password@127.0.0.1:5432/fks",
    "FKS_ALERTS__URLS": '["https://hooks.example.com/hidden-hook"]',
}


def test_keys_come_from_the_environment(load: Load) -> None:
    loaded = load("", SECRETS)
    assert {name: key for name in PROVIDER_NAMES if (key := loaded.key_of(name))} == {
        "coingecko": "hidden-coingecko",
        "polygon": "hidden-polygon",
        "alphavantage": "hidden-alphavantage",
    }
    assert loaded.api_token == SecretStr(SECRETS["FKS_API_TOKEN"])
    assert loaded.database_url is not None
    assert loaded.database_url.get_secret_value() == SECRETS["FKS_DATABASE_URL"]


def test_no_secret_is_shown(load: Load) -> None:
    loaded = load("", SECRETS)
    for shown in (repr(loaded), str(loaded), json.dumps(loaded.redacted_dump()), loaded.model_dump_json()):
        assert "hidden" not in shown


def test_no_secret_is_in_an_error(problems: Callable[..., list[str]]) -> None:
    reported = problems(
        "providers: {polygon: {api_key: hidden, base_url: 'https://user:hidden@h/'}}\nalerts: {urls: [hidden, 5]}",
        {
            **SECRETS,
            "FKS_DATABASE_URL": "mysql://u:hidden@h/d",
            "FKS_ALERTS__URLS": "",
            "FKS_TOKEN": "hidden",
        },
    )
    assert len(reported) == 6
    assert "hidden" not in "\n".join(reported)


def test_the_exception_holds_no_secret(load: Load) -> None:
    with pytest.raises(SettingsError) as caught:
        load("batch_size_days: 0", SECRETS)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
