"""Settings: defaults, the file, the environment, and all errors at once with their places."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import SecretStr

from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.settings import load as module
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import home_of, load_settings
from fks_backfill_dagster.settings.model import (
    CHECKOUT,
    ENVIRONMENT_ONLY,
    KEY_VARIABLES,
    Settings,
    SettingsError,
)
from fks_backfill_dagster.settings.sections import PROVIDER_NAMES
from fks_backfill_dagster_tests.accounts import as_other, needs_root

Load = Callable[..., Settings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Loads a file's text with an environment, in a separate folder."""

    def from_text(text: str = "", environ: Mapping[str, str] | None = None) -> Settings:
        file = tmp_path / "config" / "backfill.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(dedent(text), encoding="utf-8")
        return load_settings(environ or {}, tmp_path)

    return from_text


@pytest.fixture
def problems(load: Load) -> Callable[..., list[str]]:
    def of(text: str = "", environ: Mapping[str, str] | None = None) -> list[str]:
        with pytest.raises(SettingsError) as caught:
            load(text, environ)
        assert str(caught.value) == "\n".join(caught.value.problems)
        return list(caught.value.problems)

    return of


# --- defaults and paths ---


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


# --- the file ---


def test_keys_missing_from_the_file_keep_their_defaults(load: Load) -> None:
    loaded = load("""
        providers:
          polygon: {timeout_seconds: 5}
        validation:
        history_start: 2020-01-02T03:04:05+01:00
        symbols: []
    """)
    assert loaded.providers.polygon.timeout_seconds == 5
    assert loaded.providers.polygon.base_url == Settings().providers.polygon.base_url
    assert loaded.validation == Settings().validation
    assert iso(loaded.history_start) == "2020-01-02T02:04:05+00:00"
    assert loaded.symbols == ()


def test_symbols_that_yaml_parses_as_booleans(load: Load) -> None:
    loaded = load("symbols: [{symbol: ON, asset_class: stocks, timeframes: [1d]}]")
    assert loaded.symbols[0].symbol == "ON"


def test_anchors_and_merges_work(load: Load) -> None:
    loaded = load("""
        symbols:
          - &first {symbol: BTC/USDT, asset_class: crypto, timeframes: &all [1m, 1h]}
          - {<<: *first, symbol: ETH/USDT}
          - {symbol: SOL/USDT, asset_class: crypto, timeframes: *all}
          - {<<: *first, symbol: XRP/USDT}
    """)
    assert [str(series) for series in Catalog(loaded).series] == [
        f"{symbol}/USDT {frame}" for symbol in ("BTC", "ETH", "SOL", "XRP") for frame in ("1m", "1h")
    ]


def archive_url(loaded: Settings) -> object:
    """Binance's; the field is made from the known providers."""
    return loaded.providers.binance.model_dump()["archive_url"]


def test_a_trailing_slash_of_an_address_is_removed(load: Load) -> None:
    loaded = load("providers: {binance: {base_url: 'http://127.0.0.1:8090/binance/', archive_url: null}}")
    assert loaded.providers.binance.base_url == "http://127.0.0.1:8090/binance"
    assert archive_url(loaded) is None


def test_every_error_is_reported_at_once_with_its_line(problems: Callable[..., list[str]]) -> None:
    text = """\
        batch_size_dayz: 3
        batch_size_days: "30"
        max_concurrent_requests: 0
        history_start: 2017-13-17
        validation: {tolerance_pct: 1.5, validation_providers: [polygn], enabled: no}
        providers:
          binance: {base_url: "ftp://x", timeout_seconds: 0}
          polygon: {api_key: hidden-value}
        symbols:
          - symbol: BTC/USDT
            asset_class: crypto
            timeframes: [2m, 1h]
          - {symbol: btc/usdt, asset_class: crypto, timeframes: [1h, 1h], calendar: XNYS}
          - {symbol: BRK.B, asset_class: stocks, timeframes: [], provider_symbols: {polyg: x}}
          - {symbol: BRK_B, asset_class: stock, calendar: XNYSS}
        home: /data
        gap_detection: 5
        webserver: {login: "yes"}
    """
    place = "config/backfill.yaml"
    variables = "COINGECKO_API_KEY, POLYGON_API_KEY, ALPHAVANTAGE_API_KEY, OANDA_API_TOKEN"
    assert problems(text) == [
        f"{place}:1: batch_size_dayz: is not a setting here; did you mean batch_size_days?",
        f"{place}:2: batch_size_days: '30' is not a whole number",
        f"{place}:3: max_concurrent_requests: 0 is not between 1 and 100",
        f"{place}:4: history_start: '2017-13-17' is not a time such as 2017-08-17 or 2017-08-17T04:00:00Z",
        f"{place}:5: validation.enabled: 'no' is not true or false",
        f"{place}:5: validation.tolerance_pct: 1.5 is not between 0 and 1",
        f"{place}:5: validation.validation_providers[0]: 'polygn' is not a provider; did you mean polygon?",
        f"{place}:7: providers.binance.base_url: is not an address such as https://api.example.com",
        f"{place}:7: providers.binance.timeout_seconds: 0 is not a time above 0 and up to 600 seconds",
        f"{place}:8: providers.polygon.api_key: is not a setting; "
        f"keys come from the environment only: {variables}",
        f"{place}:12: symbols[0].timeframes[0]: '2m' is not a timeframe (1m 5m 15m 30m 1h 4h 1d 1w)",
        f"{place}:13: symbols[1].symbol: 'btc/usdt' is not BASE/QUOTE in capitals, such as BTC/USDT",
        f"{place}:13: symbols[1].timeframes: names 1h twice",
        f"{place}:13: symbols[1].calendar: only stocks have a calendar",
        f"{place}:14: symbols[2].timeframes: is empty; it needs at least one entry",
        f"{place}:14: symbols[2].provider_symbols.polyg: 'polyg' is not a provider; did you mean polygon?",
        f"{place}:15: symbols[3].symbol: 'BRK_B' and 'BRK.B' (symbols[2]) become the same asset key BRK_B",
        f"{place}:15: symbols[3].asset_class: 'stock' is not an asset class (crypto stocks forex)",
        f"{place}:15: symbols[3].timeframes: is missing",
        f"{place}:15: symbols[3].calendar: 'XNYSS' is not an exchange calendar; did you mean XNYS?",
        f"{place}:16: home: comes from the environment only (FKS_HOME)",
        f"{place}:17: gap_detection: is not a section of `key: value` settings",
        f"{place}:18: webserver.login: 'yes' is not one of: true, false, others",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "config/backfill.yaml:2: a: is a duplicate, first in line 1"),
        ("symbols: [a\nb: c", "config/backfill.yaml:2: not YAML: did not find expected ',' or ']'"),
        ("- a\n- b\n", "config/backfill.yaml:1: the file must consist of `key: value` settings"),
        ("a:\n\tx: 1", "config/backfill.yaml:2: not YAML: found character"),
        ("alerts: &x {urls: [*x]}", "config/backfill.yaml:1: alerts.urls[0]: refers to itself"),
        ("alerts: !!python/name:os.system x", "config/backfill.yaml:1: not YAML: could not determine"),
        (
            "alerts: {urls: [https://ok.example, 'file:///x']}",
            "config/backfill.yaml:1: alerts.urls[1]: is not",
        ),
        ("batch_size_days: true", "config/backfill.yaml:1: batch_size_days: true is not a whole number"),
        ("batch_size_days: 2.5", "config/backfill.yaml:1: batch_size_days: 2.5 is not a whole number"),
        ("batch_size_days: 3661", "config/backfill.yaml:1: batch_size_days: 3661 is not between 1 and 3660"),
        ("validation: {tolerance_pct: .nan}", "config/backfill.yaml:1: validation.tolerance_pct: nan is not"),
        ("history_start: 2017", "config/backfill.yaml:1: history_start: 2017 is not a time such as"),
        (
            "history_start: 2999-01-01",
            "config/backfill.yaml:1: history_start: 2999-01-01 is not between 1970",
        ),
        (
            "history_start: 0001-01-01",
            "config/backfill.yaml:1: history_start: 0001-01-01 lies before 1970",
        ),
        ("symbols:", "config/backfill.yaml:1: symbols: is not a list"),
        (
            "symbols: [{symbol: 5, asset_class: stocks, timeframes: [1d]}]",
            "symbols[0].symbol: 5 is not text; put",
        ),
        ("symbols: [{symbol: A B, asset_class: stocks, timeframes: [1d]}]", "'A B' is not a ticker"),
        (
            "symbols: [{symbol: BTCUSDT, asset_class: crypto, timeframes: [1d]}]",
            "'BTCUSDT' is not BASE/QUOTE",
        ),
        (
            "provider_priority: {crypto: []}",
            "provider_priority.crypto: is empty; it needs at least one entry",
        ),
        ("provider_priority: {crypto: [oanda, oanda]}", "provider_priority.crypto: names oanda twice"),
        ("keys: {polygon: x}", "config/backfill.yaml:1: keys: comes from the environment only ("),
        ("zzzzzzzz: 1", "zzzzzzzz: is not a setting here; known: batch_size_days max_concurrent_requests"),
    ],
)
def test_an_invalid_file_is_reported_with_its_line(
    text: str, expected: str, problems: Callable[..., list[str]]
) -> None:
    assert expected in "\n".join(problems(text))


def test_a_duplicate_symbol_is_reported(problems: Callable[..., list[str]]) -> None:
    entry = "{symbol: BTC/USDT, asset_class: crypto, timeframes: [1h]}"
    assert problems(f"symbols:\n  - {entry}\n  - {entry}\n") == [
        "config/backfill.yaml:3: symbols[1].symbol: 'BTC/USDT' is configured twice (also symbols[0])"
    ]


def test_bytes_that_are_not_text_are_reported(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(SettingsError, match=r"^x\.yaml: cannot be read: "):
        load_settings({"FKS_CONFIG": "x.yaml"}, tmp_path)


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


# --- the environment ---


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


# --- providers, calendars, the package ---


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("{2m: [polygon]}", ":5: symbols[0].provider_priority.2m: '2m' is not a timeframe (1m 5m"),
        (
            "{1d: [poligon]}",
            ":5: symbols[0].provider_priority.1d[0]: 'poligon' is not a provider; did you mean",
        ),
        ("{1d: []}", "provider_priority.1d: is empty; it needs at least one entry"),
        ("{1d: polygon}", 'provider_priority.1d: is not a list such as ["a", "b"]'),
        ("{1d: [polygon, polygon]}", "provider_priority.1d: names polygon twice"),
        ("{}", "provider_priority: is empty; it needs at least one entry"),
        ("polygon", 'symbols[0].provider_priority: is not a list such as ["a", "b"]'),
        (
            "[poligon]",
            ":5: symbols[0].provider_priority[0]: 'poligon' is not a provider; did you mean polygon?",
        ),
        ("{1d: [polygon], 1d: [oanda]}", "symbols[0].provider_priority.1d: is a duplicate"),
    ],
)
def test_an_invalid_priority_is_reported_with_its_place(
    problems: Callable[..., list[str]], written: str, expected: str
) -> None:
    text = f"""\
        symbols:
          - symbol: AAPL
            asset_class: stocks
            timeframes: [1d]
            provider_priority: {written}
        """
    (problem,) = problems(text)
    assert problem.startswith("config/backfill.yaml:5: ")
    assert expected in problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "{XHKG: {closed: [2023-9-8]}}",
            "calendars.XHKG.closed[0]: '2023-9-8' is not a date such as 2023-09-08",
        ),
        ("{XHKG: {closed: [2023-02-30]}}", "XHKG.closed[0]: '2023-02-30' is not a date"),
        (
            "{XHKG: {closed: [2023-09-08T12:00]}}",
            "is not a date such as 2023-09-08, nor dates from {start: ...}",
        ),
        ("{XHKG: {closed: [20]}}", "calendars.XHKG.closed[0]: 20 is not a date"),
        ("{XHKG: {closed: [null]}}", "calendars.XHKG.closed[0]: nothing is not a date"),
        ("{XHKG: {closed: [{start: 2023-09-08}]}}", "calendars.XHKG.closed[0].end: is missing"),
        ("{XHKG: {closed: [{start: soon, end: 2023-09-08}]}}", "closed[0].start: 'soon' is not a date"),
        (
            "{forex: {closed: [{start: 2023-09-08, end: 2023-09-07}]}}",
            "calendars.forex.closed[0].end: 2023-09-07 lies before start, 2023-09-08: exchange them",
        ),
        ("{XHKG: {closed: 2023-09-08}}", 'calendars.XHKG.closed: is not a list such as ["a", "b"]'),
        ("{XHKG: {colsed: []}}", "calendars.XHKG.colsed: is not a setting here; did you mean closed?"),
        ("{XHKK: {closed: []}}", "calendars.XHKK: 'XHKK' is not an exchange calendar; did you mean XHKG?"),
        ("{forx: {closed: []}}", "calendars.forx: 'forx' is not an exchange calendar; did you mean forex?"),
        ("{XHKG: [2023-09-08]}", "calendars.XHKG: is not a section of"),
    ],
)
def test_invalid_dates_are_reported_with_their_place(
    problems: Callable[..., list[str]], text: str, expected: str
) -> None:
    (problem,) = problems(f"calendars: {text}")
    assert problem.startswith("config/backfill.yaml:1: calendars.")
    assert expected in problem


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("FKS_CALENDARS__XHKG__CLOSED", '["soon"]', "calendars.XHKG.closed[0]: 'soon' is not a date"),
        ("FKS_CALENDARS__XHKG__COLSED", "[]", "dates go to FKS_CALENDARS__NAME__CLOSED"),
        ("FKS_CALENDARS__XHKG", "[]", "dates go to FKS_CALENDARS__NAME__CLOSED"),
        ("FKS_CALENDARS__XHKK__CLOSED", "[]", "'XHKK' is not an exchange calendar"),
    ],
)
def test_invalid_dates_of_a_variable_are_reported_by_its_name(
    problems: Callable[..., list[str]], variable: str, value: str, expected: str
) -> None:
    (problem,) = problems("calendars: {XNYS: {closed: []}}", {variable: value})
    assert problem.startswith(f"environment {variable}: ")
    assert expected in problem


def test_a_stock_has_the_calendar_of_an_exchange(problems: Callable[..., list[str]]) -> None:
    (problem,) = problems("symbols: [{symbol: AAPL, asset_class: stocks, timeframes: [1d], calendar: forex}]")
    assert "'forex' is the calendar of an asset class; stocks have an exchange's" in problem


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


def test_an_end_lies_after_the_start(problems: Callable[..., list[str]]) -> None:
    assert problems("""
        symbols:
          - {symbol: A/B, asset_class: crypto, timeframes: [1h], start: 2020-08-21, end: 2020-08-21}
    """) == [
        "config/backfill.yaml:3: symbols[0].end: 2020-08-21T00:00:00+00:00 does not lie after start,"
        " 2020-08-21T00:00:00+00:00"
    ]


def test_a_provider_is_looked_up_by_name() -> None:
    made = Settings()
    assert made.provider("binance") is made.providers.binance
    with pytest.raises(ValueError, match="'binnace' is not a provider; did you mean binance"):
        made.provider("binnace")


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
