"""`app`: providers and the database with its schema, built from the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fks_backfill_dagster import app
from fks_backfill_dagster.domain.delivery import Delivery, Origin, Transport
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.known_providers import KNOWN
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.errors import MixedSources
from fks_backfill_dagster.store.ledger import register
from fks_backfill_dagster.store.writer.commit import commit_batch
from fks_backfill_dagster.store.writer.records import BatchWrite
from fks_backfill_dagster_tests.domain.builders import flat

LOCAL = "http://127.0.0.1:1/binance"


@pytest.mark.parametrize(
    ("base_url", "archive_url", "expected"),
    [
        (None, None, "https://data.binance.vision"),
        ("https://api1.binance.com", None, "https://data.binance.vision"),
        ("https://data-api.binance.vision", None, "https://data.binance.vision"),
        (LOCAL, None, None),
        ("https://binance.com.example.org", None, None),
        (LOCAL, "http://127.0.0.1:1/archive", "http://127.0.0.1:1/archive"),
        (None, "null", None),
    ],
)
def test_archives_belong_to_the_base_url_of_their_market(
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    base_url: str | None,
    archive_url: str | None,
    expected: str | None,
) -> None:
    if base_url:
        monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", base_url)
    if archive_url:
        monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", archive_url)
    assert app.provider_options(load_settings(), "binance").archive_url == expected


def test_an_archive_url_that_is_written_out_as_the_default_is_the_default(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in config/backfill.yaml: it must not join the real archives to a local market."""
    settings.write_text("providers: {binance: {archive_url: 'https://data.binance.vision'}}\n")
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", LOCAL)
    assert app.provider_options(load_settings(), "binance").archive_url is None


def test_enabled_providers_are_built_with_their_keys(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYGON_API_KEY", "hush")
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__TIMEOUT_SECONDS", "7.5")
    loaded = load_settings()
    options = app.provider_options(loaded, "polygon")
    assert (options.key, options.timeout_seconds) == ("hush", 7.5)
    assert "hush" not in repr(options)
    pool = RequestPool(1)
    built = app.build_providers(loaded, pool)
    assert {"binance", "polygon"} <= set(built)
    assert built["polygon"].missing_key() is None
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__ENABLED", "false")
    assert "polygon" not in app.build_providers(load_settings(), pool)
    pool.close()


def test_a_database_gets_its_schema_on_first_use(
    settings: Path, empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", empty_database_url)
    with app.open_app(load_settings()) as opened:
        opened.database.check()
        assert opened.context.database is opened.database
        assert opened.context.batch_size_days == 30
    before = Database(empty_database_url)
    assert before.revision() is not None
    before.dispose()


@pytest.mark.parametrize(
    ("provider", "url", "documented"),
    [
        ("binance", "https://api.binance.com", True),
        ("binance", "https://API.binance.com:443/", True),
        ("binance", "https://data.binance.vision", True),
        ("binance", "https://api3.binance.com", True),
        ("binance", "https://data-api.binance.vision", True),
        ("binance", "https://testnet.binance.vision", False),
        ("binance", "https://api.binance.us", False),
        ("binance", "https://api.binance.com.example.org", False),
        ("binance", "https://api.polygon.io", False),
        ("polygon", "https://api.polygon.io", True),
        ("polygon", "https://api.massive.com", True),
        ("oanda", "https://api-fxtrade.oanda.com", True),
        ("coingecko", "https://pro-api.coingecko.com", True),
        ("yfinance", "https://query1.finance.yahoo.com", True),
        ("alphavantage", "http://127.0.0.1:8765", False),
        ("other", "https://api.binance.com", False),
    ],
)
def test_documented_hosts(provider: str, url: str, documented: bool) -> None:
    assert app.is_documented_host(provider, url) is documented


def test_the_default_of_every_provider_is_documented() -> None:
    for name, registered in KNOWN.items():
        assert app.is_documented_host(name, registered.base_url)


@pytest.fixture
def refuse(database: Database) -> Iterator[Callable[[], None]]:
    """The check of the settings as they are, against the database."""
    pool = RequestPool(1)

    def run() -> None:
        loaded = load_settings()
        providers = app.build_providers(loaded, pool)
        app.refuse_mixed_sources(loaded, database, providers, app.enabled_options(loaded))

    yield run
    pool.close()


def store(database: Database, host: str) -> None:
    series = Series("BTC/USDT", Timeframe.H1, AssetClass.CRYPTO)
    grid, window = grid_of(series), TimeRange(0, 10 * Timeframe.H1.micros)
    with database.begin() as connection:
        identity = register(connection, series)
    origin = Origin("binance", Transport.REST, "/api/v3/klines", host, "BTCUSDT", window.end)
    write = BatchWrite(window, (Delivery(flat(grid.opens(window)), origin),))
    commit_batch(database, series, identity, write, grid)


def test_a_local_market_is_not_mixed_into_real_candles(
    settings: Path, database: Database, refuse: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment that `simulate` prints, used with a real database: of any provider that has its key."""
    store(database, "https://api.binance.com")
    refuse()
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__BASE_URL", "http://127.0.0.1:1/polygon")
    refuse()  # it is not requested without its key
    monkeypatch.setenv("POLYGON_API_KEY", "any")
    with pytest.raises(MixedSources, match=r"request polygon from http://127.0.0.1:1: "):
        refuse()
    monkeypatch.setenv("FKS_PROVIDERS__POLYGON__ENABLED", "false")
    refuse()
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", LOCAL)
    with pytest.raises(MixedSources, match=r"request binance from http://127.0.0.1:1: "):
        refuse()
    monkeypatch.delenv("FKS_PROVIDERS__BINANCE__BASE_URL")
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__ARCHIVE_URL", "http://127.0.0.1:1/archive")
    with pytest.raises(MixedSources, match=r"request binance from http://127.0.0.1:1: "):
        refuse()


def test_real_candles_are_not_mixed_into_a_local_market(
    settings: Path, database: Database, refuse: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    store(database, "http://127.0.0.1:40001")
    with pytest.raises(MixedSources, match=r"request binance from https://api.binance.com: "):
        refuse()
    monkeypatch.setenv("FKS_PROVIDERS__BINANCE__BASE_URL", LOCAL)
    refuse()


def test_the_url_for_other_clients_has_no_driver(settings: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", "postgresql+psycopg://me:hush@db/fks")
    loaded = load_settings()
    assert app.database_url(loaded) == "postgresql://me:hush@db/fks"
    assert app.embedded(loaded) is None


@pytest.mark.parametrize(
    ("environment", "priority", "hours"),
    [
        ({}, "coingecko, polygon", 0),
        ({"POLYGON_API_KEY": "any"}, "polygon", 29),
        ({"POLYGON_API_KEY": "any", "FKS_PROVIDERS__POLYGON__REQUESTS_PER_MINUTE": "100"}, "polygon", 0),
        ({"POLYGON_API_KEY": "any"}, "polygon, binance", 0),
        ({"POLYGON_API_KEY": "any", "FKS_PROVIDERS__BINANCE__ENABLED": "false"}, "polygon, binance", 29),
        # An invalid key excludes its provider; the others are still evaluated.
        ({"POLYGON_API_KEY": "a key\twith blanks"}, "polygon, binance", 0),
    ],
)
def test_the_publication_delay_of_a_series_by_the_settings(
    settings: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], priority: str, hours: int
) -> None:
    settings.write_text(f"provider_priority: {{crypto: [{priority}]}}\nfreshness: {{warn_candles: 7}}\n")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    loaded = load_settings()
    rule = app.freshness_rule(loaded)
    assert rule.publication_delay(Catalog(loaded).find_series("BTC/USDT", "1h")) == hours * 3_600_000_000
    assert (rule.thresholds.warn, rule.thresholds.error) == (7, 10)
