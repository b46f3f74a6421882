"""The providers of this version: addresses, keys and rate limits, one entry each.

The settings are checked against these entries, and the registry builds the providers from them; neither imports the
other. Importing this module is cheap. Does not belong here: requests and responses (`providers/`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fks_backfill_dagster.domain.rate_limits import RateWindow


@dataclass(frozen=True, slots=True)
class KnownProvider:
    """What is known of a provider without importing it.

    implementation: its class in `providers/`, as `module:Class`.
    base_url, archive_url: the default addresses; archive_url None: it has no archives.
    hosts: further documented hosts that serve the same candles.
    archive_domains: the domains of base_url whose candles are those of the default archives.
    key_variable: the environment variable with its key, empty if it needs none.
    requests_per_minute: the default rate for estimates, and the rate limit if there are no `windows`.
    windows: the default rate limits, used unless a rate is configured.
    request_weight: the weight of one request in them.
    """

    name: str
    implementation: str
    base_url: str
    requests_per_minute: int
    key_variable: str = ""
    archive_url: str | None = None
    archive_domains: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()
    windows: tuple[RateWindow, ...] = ()
    request_weight: int = 1

    def documents(self, url: str) -> bool:
        """Whether the provider documents the host of `url` as its own."""
        defaults = {urlsplit(one).hostname for one in (self.base_url, self.archive_url) if one}
        return urlsplit(url).hostname in defaults | self.hosts

    def custom_address(self, base_url: str, archive_url: str | None = None) -> str | None:
        """The address as text if it is not the default one, else None. Without archives it is the default one."""
        archives = archive_url not in (None, self.archive_url)
        if base_url == self.base_url and not archives:
            return None
        return f"{base_url} (archives: {archive_url})" if archives else base_url

    def archives_for(self, base_url: str, archive_url: str | None) -> str | None:
        """The archives to use with `base_url`: the default ones go with the provider's own domains only.

        Elsewhere (a local market) they are off: candles of two markets must not be mixed.
        """
        own = f".{urlsplit(base_url).hostname or ''}".endswith(self.archive_domains)
        return archive_url if own or archive_url != self.archive_url else None


BINANCE = KnownProvider(
    "binance",
    "binance:Binance",
    "https://api.binance.com",
    requests_per_minute=3000,
    windows=(RateWindow(6000),),  # weight per address
    request_weight=2,
    archive_url="https://data.binance.vision",
    archive_domains=(".binance.com", ".binance.vision"),
    # Without api.binance.us, which is another exchange, and testnet.binance.vision.
    hosts=frozenset(
        (
            "api1.binance.com",
            "api2.binance.com",
            "api3.binance.com",
            "api4.binance.com",
            "api-gcp.binance.com",
            "data-api.binance.vision",
        )
    ),
)
COINGECKO = KnownProvider(
    "coingecko",
    "coingecko:CoinGecko",
    "https://api.coingecko.com",
    requests_per_minute=100,  # of a demo key
    key_variable="COINGECKO_API_KEY",
    hosts=frozenset(("pro-api.coingecko.com",)),
)
POLYGON = KnownProvider(
    "polygon",
    "polygon:Polygon",
    "https://api.massive.com",
    requests_per_minute=5,  # of the free plan
    key_variable="POLYGON_API_KEY",
    hosts=frozenset(("api.polygon.io",)),
)
YFINANCE = KnownProvider(
    "yfinance",
    "yfinance:YFinance",
    "https://query2.finance.yahoo.com",
    requests_per_minute=60,  # our choice: Yahoo publishes no limit
    hosts=frozenset(("query1.finance.yahoo.com",)),
)
ALPHAVANTAGE = KnownProvider(
    "alphavantage",
    "alphavantage:AlphaVantage",
    "https://www.alphavantage.co",
    requests_per_minute=60,
    windows=(RateWindow(1, 1.0), RateWindow(25, 86_400.0)),  # of a free key
    key_variable="ALPHAVANTAGE_API_KEY",
    hosts=frozenset(("alphavantage.co",)),
)
OANDA = KnownProvider(
    "oanda",
    "oanda:Oanda",
    "https://api-fxpractice.oanda.com",
    requests_per_minute=6000,
    windows=(RateWindow(100, 1.0),),
    key_variable="OANDA_API_TOKEN",
    hosts=frozenset(("api-fxtrade.oanda.com",)),
)

KNOWN: Mapping[str, KnownProvider] = {
    one.name: one for one in (BINANCE, COINGECKO, POLYGON, YFINANCE, ALPHAVANTAGE, OANDA)
}
"""By name, in the order in which they are listed."""
