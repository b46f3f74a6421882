"""The settings file: what is read from it, and every error with its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings, SettingsError
from fks_backfill_dagster_tests.settings.conftest import Load


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


def test_an_end_lies_after_the_start(problems: Callable[..., list[str]]) -> None:
    assert problems("""
        symbols:
          - {symbol: A/B, asset_class: crypto, timeframes: [1h], start: 2020-08-21, end: 2020-08-21}
    """) == [
        "config/backfill.yaml:3: symbols[0].end: 2020-08-21T00:00:00+00:00 does not lie after start,"
        " 2020-08-21T00:00:00+00:00"
    ]
