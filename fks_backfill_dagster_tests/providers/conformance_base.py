"""What a provider's conformance class defines, and what its tests share.

Does not belong here: requirements (conformance.py, conformance_failures.py, conformance_keys.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.providers.base import Provider, ProviderError, TransientError
from fks_backfill_dagster.settings.model import KEY_VARIABLES
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, Server, serve, us

KEY = "sEcReT+key/with=odd&signs"


class ConformanceBase:
    """Subclasses define the tested provider and its honest market; `make` is the fixture of conftest.py.

    name: as in the registry.
    symbols: one available symbol for each asset class of the capabilities.
    now: the provider's clock, in microseconds. Windows must lie before it.
    quick: further options of `make`; the rate limit is already off.
    reports_unknown: False for a provider whose response for an unknown symbol looks like an empty window.
    """

    name: ClassVar[str]
    symbols: ClassVar[Mapping[AssetClass, str]]
    now: ClassVar[int] = us("2024-06-05T12:07")
    quick: ClassVar[Mapping[str, object]] = {}
    reports_unknown: ClassVar[bool] = True

    def market(self, asked: Received) -> Scripted:
        """The honest response, with every candle of every window of `window`."""
        raise NotImplementedError

    def unknown(self, asked: Received) -> Scripted:
        """The response for an unknown symbol."""
        raise NotImplementedError

    def window(self, series: Series) -> TimeRange:
        """A window of whole, closed candles, more than one, within the provider's depth."""
        raise NotImplementedError

    # --- helpers ---

    @pytest.fixture
    def provider(self, make: Make) -> Callable[..., Provider]:
        def at(url: str, **given: object) -> Provider:
            own = {"clock": lambda: self.now, "key": KEY if self.needs_key else None, **self.quick}
            quick = {"requests_per_minute": 10**6, "retry_budget_seconds": 0.0, "timeout_seconds": 5.0}
            return make(self.name, url, **{**quick, **own, **given})

        return at

    @property
    def needs_key(self) -> bool:
        return self.name in KEY_VARIABLES

    def paged(self) -> tuple[Series, TimeRange] | None:
        """A native series, and a window of whole candles that takes three responses or more.

        None if one response covers any window. Otherwise `disguised` is required too.
        """
        raise NotImplementedError

    def disguised(self, asked: Received) -> Scripted:
        """The response of `market` for another symbol, modified to look like the one for this symbol."""
        raise NotImplementedError

    def series(self, provider: Provider) -> list[Series]:
        """One series for each native asset class and timeframe, which `fetch` serves."""
        can = provider.capabilities
        return [series for series in self.declared(provider) if can.parts(series) is series.timeframe]

    def declared(self, provider: Provider) -> list[Series]:
        """One series for each declared asset class and timeframe, native or derived."""
        return [
            Series(self.symbols[asset_class], timeframe, asset_class)
            for asset_class, timeframes in provider.capabilities.timeframes.items()
            for timeframe in sorted(timeframes, key=lambda timeframe: timeframe.micros)
        ]

    @contextmanager
    def connected(
        self, provider: Callable[..., Provider], answer: Callable[[Received], Scripted], **given: object
    ) -> Iterator[tuple[Provider, Series, Server]]:
        """A provider connected to a server with these responses, and a series to request."""
        with serve(answer) as server:
            made = provider(server.url, **given)
            yield made, self.series(made)[0], server

    def fails(
        self,
        provider: Callable[..., Provider],
        answer: Callable[[Received], Scripted],
        kind: type[TransientError],
        **given: object,
    ) -> ProviderError:
        """The error of a fetch with this response, after checking its type."""
        with (
            self.connected(provider, answer, **given) as (made, series, _),
            pytest.raises(kind) as caught,
        ):
            made.fetch(series, self.window(series))
        return caught.value
