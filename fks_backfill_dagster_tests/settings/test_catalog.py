"""The catalog: series by name, and what the settings say about each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series, identifier
from fks_backfill_dagster.domain.timeframe import Timeframe, iso
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.symbols import infer_asset_class
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.settings.conftest import Load

MakeCatalog = Callable[..., Catalog]


@pytest.fixture
def catalog(load: Load) -> MakeCatalog:
    """The catalog of a file's text and an environment."""

    def from_text(text: str = "", environ: Mapping[str, str] | None = None) -> Catalog:
        return Catalog(load(text, environ))

    return from_text


STOCKS_AND_FOREX = """
    symbols:
      - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1m, 1h], provider_symbols: {polygon: "X:BTCUSD"}}
      - {symbol: ETH/USDT, asset_class: crypto, timeframes: [1h], start: 2019-01-01}
      - {symbol: BRK.B, asset_class: stocks, timeframes: [1d], calendar: NYSE, provider_priority: [yfinance]}
      - {symbol: EUR/USD, asset_class: forex, timeframes: [4h]}
"""


def test_series_are_symbols_times_timeframes(catalog: MakeCatalog) -> None:
    made = catalog(STOCKS_AND_FOREX).series
    assert [str(series) for series in made] == [
        "BTC/USDT 1m", "BTC/USDT 1h", "ETH/USDT 1h", "BRK.B 1d", "EUR/USD 4h",
    ]  # fmt: skip
    assert made[0].provider_symbol("polygon") == "X:BTCUSD"
    assert made[0].provider_symbol("binance") is None
    assert made[3].asset_class is AssetClass.STOCKS
    assert made[3].calendar == "NYSE"
    assert made[4].calendar == "XNYS"


@pytest.mark.parametrize(
    "written", ["BTC/USDT", "BTC_USDT", "btc/usdt", "btc_usdt", "BTC-USDT", " BTC/USDT "]
)
def test_a_configured_symbol_is_found_however_written(written: str, catalog: MakeCatalog) -> None:
    found = catalog(STOCKS_AND_FOREX).find_series(written, "5m")
    assert found == Series("BTC/USDT", Timeframe.M5, AssetClass.CRYPTO)
    assert found.provider_symbol("polygon") == "X:BTCUSD"


@pytest.mark.parametrize(
    ("written", "symbol", "asset_class"),
    [
        ("DOGE/USDT", "DOGE/USDT", AssetClass.CRYPTO),
        ("doge_usdt", "DOGE/USDT", AssetClass.CRYPTO),
        ("GBP_JPY", "GBP/JPY", AssetClass.FOREX),
        ("EUR/USDT", "EUR/USDT", AssetClass.CRYPTO),
        ("aapl", "AAPL", AssetClass.STOCKS),
        ("BF-B", "BF-B", AssetClass.STOCKS),
    ],
)
def test_another_symbol_is_inferred(
    written: str, symbol: str, asset_class: AssetClass, catalog: MakeCatalog
) -> None:
    found = catalog(STOCKS_AND_FOREX).find_series(written, Timeframe.H1)
    assert found == Series(symbol, Timeframe.H1, asset_class)


@pytest.mark.parametrize(
    ("written", "timeframe", "message"),
    [
        ("BTC/USDT", "2m", r"'2m' is not a timeframe \(1m 5m 15m 30m 1h 4h 1d 1w\)"),
        ("BTCUSDT", "1h", r"'BTCUSDT' is not configured; did you mean BTC/USDT\?"),
        ("BTC//USDT", "1h", r"'BTC//USDT' is not BASE/QUOTE .*; did you mean BTC/USDT\?"),
        ("ETH/", "1h", r"'ETH/' is not BASE/QUOTE"),
        ("", "1h", "'' is not a ticker"),
        ("*/USDT", "1h", r"'\*/USDT' is not BASE/QUOTE"),
    ],
)
def test_an_impossible_series_is_reported(
    written: str, timeframe: str, message: str, catalog: MakeCatalog
) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        catalog(STOCKS_AND_FOREX).find_series(written, timeframe)


def test_symbols_match_globs(catalog: MakeCatalog) -> None:
    loaded = catalog(STOCKS_AND_FOREX)
    assert loaded.match_symbols() == ("BTC/USDT", "ETH/USDT", "BRK.B", "EUR/USD")
    assert loaded.match_symbols("*/USDT") == ("BTC/USDT", "ETH/USDT")
    assert loaded.match_symbols("E*_*") == ("ETH/USDT", "EUR/USD")
    assert loaded.match_symbols("*/usdt") == ()
    assert loaded.match_symbols("BRK?B") == ("BRK.B",)


def test_priority_follows_symbol_then_class_without_the_disabled(catalog: MakeCatalog) -> None:
    loaded = catalog(STOCKS_AND_FOREX, {"FKS_PROVIDERS__COINGECKO__ENABLED": "false"})
    assert loaded.priority(loaded.find_series("BTC/USDT", "1h")) == ("binance", "polygon")
    assert loaded.priority(loaded.find_series("BRK.B", "1d")) == ("yfinance",)
    assert loaded.priority(loaded.find_series("MSFT", "1d")) == ("polygon", "yfinance", "alphavantage")
    assert loaded.priority(loaded.find_series("EUR/USD", "1h")) == ("oanda", "polygon")


BY_TIMEFRAME = """
    provider_priority: {stocks: [polygon, alphavantage]}
    symbols:
      - symbol: AAPL
        asset_class: stocks
        timeframes: [1h, 1d, 1w]
        provider_priority:
          1d: [yfinance, polygon]
          1w: [alphavantage]
"""


def test_a_symbols_priority_may_differ_by_timeframe(catalog: MakeCatalog) -> None:
    loaded = catalog(BY_TIMEFRAME, {"FKS_PROVIDERS__ALPHAVANTAGE__ENABLED": "false"})
    priority = {
        frame: loaded.priority(loaded.find_series("AAPL", frame)) for frame in ("1d", "1w", "1h", "5m")
    }
    assert priority == {"1d": ("yfinance", "polygon"), "1w": (), "1h": ("polygon",), "5m": ("polygon",)}


CLOSED = """
    calendars:
      XHKG: {closed: [2023-09-08, {start: 2024-11-14, end: 2024-11-15}]}
      NYSE:
        closed: [2012-10-29, 2012-10-30]
      forex: {closed: [2024-12-25]}
      crypto:
    symbols:
      - {symbol: "0700", asset_class: stocks, timeframes: [1d], calendar: XHKG, closed: [2023-09-09, 2023-09-01]}
      - {symbol: "0005", asset_class: stocks, timeframes: [1d], calendar: HKEX}
      - {symbol: AAPL, asset_class: stocks, timeframes: [1d], closed: [{start: 2012-10-25, end: 2012-10-29}]}
      - {symbol: EUR/USD, asset_class: forex, timeframes: [1d]}
      - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1d], closed: ["2024-01-01"]}
"""


def dates(*texts: str) -> tuple[tuple[date, date], ...]:
    """`2023-09-08` or `2023-09-08/2023-09-09`."""
    edges = [[date.fromisoformat(part) for part in text.split("/")] for text in texts]
    return tuple((edge[0], edge[-1]) for edge in edges)


def test_dates_of_a_symbol_and_of_its_calendar(catalog: MakeCatalog) -> None:
    loaded = catalog(CLOSED)
    found = {one.symbol: loaded.closed(one) for one in loaded.series}
    assert found == {
        "0700": dates("2023-09-01", "2023-09-08/2023-09-09", "2024-11-14/2024-11-15"),
        "0005": dates("2023-09-08", "2024-11-14/2024-11-15"),  # by an alias
        "AAPL": dates("2012-10-25/2012-10-30"),  # XNYS is NYSE; adjacent dates are one range
        "EUR/USD": dates("2024-12-25"),
        "BTC/USDT": dates("2024-01-01"),
    }
    # Another timeframe, and a series that is not configured: the dates of the calendar hold as well.
    assert loaded.closed(loaded.find_series("GBP/USD", "5m")) == dates("2024-12-25")
    assert loaded.closed(loaded.find_series("MSFT", "1h")) == dates("2012-10-29/2012-10-30")
    assert loaded.closed(loaded.find_series("ETH/USDT", "1h")) == ()


def test_without_closed_dates_there_are_none(catalog: MakeCatalog) -> None:
    loaded = catalog("calendars:")
    assert all(loaded.closed(series) == () for series in loaded.series)


def test_closed_dates_by_the_environment(catalog: MakeCatalog) -> None:
    environ = {
        "FKS_CALENDARS__XHKG__CLOSED": '["2023-09-01"]',
        "FKS_CALENDARS__FOREX__CLOSED": '[{"start": "2025-01-01", "end": "2025-01-02"}]',
    }
    loaded = catalog(CLOSED, environ)
    assert loaded.closed(loaded.find_series("0005", "1d")) == dates("2023-09-01")
    assert loaded.closed(loaded.find_series("EUR/USD", "1d")) == dates("2025-01-01/2025-01-02")
    whole = catalog("", {"FKS_CALENDARS": '{"crypto": {"closed": ["2024-05-05"]}}'})
    assert whole.closed(whole.find_series("BTC/USDT", "1h")) == dates("2024-05-05")


def test_a_symbol_may_start_later(catalog: MakeCatalog) -> None:
    loaded = catalog(STOCKS_AND_FOREX)
    assert iso(loaded.start_of(loaded.find_series("ETH/USDT", "1h"))) == "2019-01-01T00:00:00+00:00"
    assert loaded.start_of(loaded.find_series("BTC/USDT", "1h")) == instant("2017-08-17")
    assert loaded.start_of(loaded.find_series("DOGE/USDT", "1h")) == instant("2017-08-17")


ENDED = """
    history_start: 2018-01-01
    symbols:
      - {symbol: LUNA/USDT, asset_class: crypto, timeframes: [1h], start: 2020-08-21, end: 2022-05-13T01:00}
      - {symbol: GOLD/USDT, asset_class: crypto, timeframes: [1h], end: 2090-01-01}
      - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1h]}
"""


def test_a_symbol_may_end(catalog: MakeCatalog) -> None:
    loaded = catalog(ENDED)
    luna, gold, btc = (loaded.find_series(f"{name}/USDT", "1h") for name in ("LUNA", "GOLD", "BTC"))
    assert [loaded.end_of(one) for one in (luna, btc, loaded.find_series("DOGE/USDT", "1h"))] == [
        instant("2022-05-13T01:00"),
        None,
        None,
    ]
    assert loaded.end_of(gold) == instant("2090-01-01"), "it may be announced"
    whole = TimeRange(instant("2015-01-01"), instant("2024-01-01"))
    assert loaded.kept(luna, whole) == TimeRange(instant("2020-08-21"), instant("2022-05-13T01:00"))
    assert loaded.kept(btc, whole) == TimeRange(instant("2018-01-01"), instant("2024-01-01"))
    assert not loaded.kept(luna, TimeRange(instant("2023-01-01"), instant("2024-01-01")))
    assert not loaded.kept(luna, TimeRange(instant("2019-01-01"), instant("2020-01-01")))


@given(st.from_regex(r"[A-Z0-9]{1,8}/[A-Z0-9]{1,8}", fullmatch=True), st.sampled_from(Timeframe))
def test_a_pair_is_the_same_series_by_symbol_and_by_asset_key(symbol: str, timeframe: Timeframe) -> None:
    made = Catalog(Settings(symbols=()))
    found = made.find_series(symbol, timeframe)
    assert found == made.find_series(identifier(symbol), timeframe.value)
    assert found.symbol == symbol
    assert found.asset_class is infer_asset_class(symbol)


@pytest.mark.parametrize(
    ("symbol", "meant"),
    [
        ("BTC/USD", "BTC/USDT"),
        ("BTC/USTD", "BTC/USDT"),
        ("BTCC/USDT", "BTC/USDT"),
        ("APPL", "AAPL"),
        ("EUR/USDD", "EUR/USD"),
        ("BTC/USDT", None),  # configured itself
        ("DOGE/USDT", None),  # only the quote is the same
        ("BTC/EUR", None),
        ("XYZ", None),
    ],
)
def test_the_symbol_that_was_probably_meant(catalog: MakeCatalog, symbol: str, meant: str | None) -> None:
    loaded = catalog("""
        symbols:
          - {symbol: BTC/USDT, asset_class: crypto, timeframes: [1h]}
          - {symbol: ETH/USDT, asset_class: crypto, timeframes: [1h]}
          - {symbol: AAPL, asset_class: stocks, timeframes: [1h]}
          - {symbol: EUR/USD, asset_class: forex, timeframes: [1h]}
    """)
    assert loaded.nearest_symbol(symbol) == meant


def test_stored_series_that_are_not_configured_follow_the_configured_ones(catalog: MakeCatalog) -> None:
    """A stored series that is configured is the configured one: the settings may have changed its calendar."""
    loaded = catalog(STOCKS_AND_FOREX)
    removed = Series("DOGE/USDT", Timeframe.H1, AssetClass.CRYPTO)
    other_calendar = Series("BRK.B", Timeframe.D1, AssetClass.STOCKS, "XLON")
    other_timeframe = Series("BTC/USDT", Timeframe.D1, AssetClass.CRYPTO)
    known = loaded.known([removed, other_calendar, other_timeframe])
    assert list(known.values()) == [*loaded.series, removed, other_timeframe]
    assert known["BRK.B", "1d"].calendar == "NYSE"
    assert [one in loaded for one in (removed, other_calendar, other_timeframe)] == [False, True, False]


def test_the_earliest_start_is_that_of_any_symbol_or_of_history(catalog: MakeCatalog) -> None:
    text = "symbols: [{{symbol: A/USDT, asset_class: crypto, timeframes: [1h], start: {}}}]"
    assert catalog(text.format("2016-03-04")).earliest_start == instant("2016-03-04")
    assert catalog(text.format("2020-01-01")).earliest_start == instant("2017-08-17")
