"""The contract of `providers/base.py` as an executable test class for every provider.

A provider's test module subclasses `ProviderConformance` and simulates the provider's responses;
docs/adding-a-provider.md shows how. pytest does not collect this module itself.

Belongs here: requirements of all providers. Does not belong here: a wire format.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import derive, parts_span
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    PermanentError,
    Provider,
    ProviderError,
    Transport,
)
from fks_backfill_dagster.settings.model import KEY_VARIABLES
from fks_backfill_dagster_tests.providers.conformance_failures import FailureConformance
from fks_backfill_dagster_tests.providers.conformance_keys import KeyConformance
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, us


class ProviderConformance(FailureConformance, KeyConformance):
    """All requirements. Subclasses define what ConformanceBase names."""

    # --- capabilities and estimates ---

    def test_capabilities_are_consistent(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, _, server):
            can = made.capabilities
            assert made.name == self.name
            assert set(can.timeframes) == set(self.symbols)
            assert all(can.timeframes.values()), "an asset class without a timeframe is not declared at all"
            assert can.page_size >= 1
            assert set(can.depth) <= {t for timeframes in can.timeframes.values() for t in timeframes}
            assert all(depth > timeframe.micros for timeframe, depth in can.depth.items())
            assert can.needs_key == KEY_VARIABLES.get(self.name)
            assert 0 <= can.publication_delay < 2 * MICROS_PER_DAY, "microseconds"
            assert server.requests == [], "capabilities need no request"

    def test_parts_of_derived_timeframes(self, provider: Callable[..., Provider]) -> None:
        """Derived timeframes are declared with native parts of the same asset class that cover them completely."""
        with self.connected(provider, self.market) as (made, _, _):
            can, native = made.capabilities, self.series(made)
            assert set(can.derived) <= set(can.timeframes)
            assert all(set(parts) <= can.timeframes[at] for at, parts in can.derived.items())
            for series in self.declared(made):
                parts = replace(series, timeframe=can.parts(series))
                assert parts in native, series
                fine, coarse, window = grid_of(parts), grid_of(series), self.window(series)
                every = fine.opens(parts_span(coarse, window))
                found = derive(Candles(every, *np.ones((5, len(every)))), fine, coarse, window)
                assert np.array_equal(found.candles.ts, coarse.opens(window)), series
                assert len(found.candles), series

    def test_estimates_without_requests(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, _, server):
            for series in self.series(made):
                estimate = made.estimate(series, self.window(series))
                assert estimate.requests > 0, series
                assert estimate.seconds > 0, series
            assert server.requests == []

    def test_the_listing_time(self, provider: Callable[..., Provider]) -> None:
        """An instant, None, or an error of the provider: `market` may not have the response."""
        with self.connected(provider, self.market) as (made, series, _):
            try:
                found = made.listed_at(series)
            except ProviderError:
                return
            assert found is None or 0 <= found <= self.now

    # --- honest responses ---

    def test_declared_timeframes_are_complete(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, _, server):
            for series in self.series(made):
                window, before = self.window(series), len(server.requests)
                answer = made.fetch(series, window)
                verdicts = [
                    verify(delivery.candles, window, grid_of(series), window.end)
                    for delivery in answer.deliveries
                ]
                assert [verdict.rejected for verdict in verdicts] == [()] * len(verdicts), series
                good = Candles.concat([verdict.good for verdict in verdicts]).sorted()
                assert np.array_equal(good.ts, grid_of(series).opens(window)), series
                assert len(good) > 1, series
                # A provider with volumes may have none for a whole asset class, but not for single candles.
                absent = np.isnan(good.volume)
                assert absent.all() if not made.capabilities.has_volume else absent.all() == absent.any(), (
                    series
                )
                assert answer.requests == len(server.requests) - before, series

    def test_undeclared_timeframes_are_declined(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, _, server):
            for asset_class, timeframes in made.capabilities.timeframes.items():
                for timeframe in set(Timeframe) - timeframes:
                    series = Series(self.symbols[asset_class], timeframe, asset_class)
                    with pytest.raises(PermanentError):
                        made.fetch(series, TimeRange(us("2024-05-06"), us("2024-05-13")))
            assert server.requests == []

    def test_derived_timeframes_are_not_fetched(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, _, server):
            for series in self.declared(made):
                parts = made.capabilities.parts(series)
                if parts is not series.timeframe:
                    with pytest.raises(PermanentError, match=f"derived from {parts}"):
                        made.fetch(series, self.window(series))
            assert server.requests == []

    def test_the_origin_is_complete(self, provider: Callable[..., Provider]) -> None:
        """The provider, instrument, host and request time of the candles."""
        with self.connected(provider, self.market) as (made, _, server):
            for series in self.series(made):
                before = len(server.requests)
                deliveries = made.fetch(series, self.window(series)).deliveries
                paths = {asked.path for asked in server.requests[before:]}
                assert deliveries, series
                for origin in (delivery.origin for delivery in deliveries):
                    assert (origin.provider, origin.host) == (self.name, server.url)
                    assert origin.instrument == made.instrument(series)
                    assert origin.requested_at == self.now
                    assert origin.as_of <= self.now
                    assert (origin.transport is Transport.ARCHIVE) == (origin.sha256 is not None)
                    assert unquote(origin.source.partition("?")[0]) in paths, series

    # --- several responses ---

    def test_a_response_of_another_instrument_begins_and_ends_at_seams(
        self, provider: Callable[..., Provider]
    ) -> None:
        """For every response. A provider with overlapping pages detects it, for the others the caller can."""
        if (paged := self.paged()) is None:
            pytest.skip("one response covers any window")
        with self.connected(provider, self.market) as (made, _, server):
            (honest,) = made.fetch(*paged).deliveries
            requested = [(asked.path, asked.query) for asked in server.requests]
        assert len(requested) >= 3
        assert 0 < len(honest.seams) < len(requested)
        assert (np.diff(honest.seams) > 0).all()
        assert np.isin(honest.seams, honest.candles.ts[1:]).all()
        edges = [0, *np.searchsorted(honest.candles.ts, honest.seams).tolist(), len(honest.candles)]
        detected = 0
        for target in requested:

            def one_disguised(asked: Received, target: object = target) -> Scripted:
                matches = (asked.path, asked.query) == target
                return self.disguised(asked) if matches else self.market(asked)

            with self.connected(provider, one_disguised) as (made, _, _):
                try:
                    (result,) = made.fetch(*paged).deliveries
                except InvalidResponse:
                    detected += 1
                    continue
            assert np.array_equal(result.candles.ts, honest.candles.ts)
            assert np.array_equal(result.seams, honest.seams)
            (different,) = np.nonzero(result.candles.close != honest.candles.close)
            assert 0 < len(different) < len(honest.candles), target
            assert len(different) == different[-1] + 1 - different[0]
            assert {int(different[0]), int(different[-1]) + 1} <= set(edges)
        assert detected in (0, len(requested))

    def test_an_empty_window_sends_no_request(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, _, server):
            for series in self.series(made):
                start = self.window(series).start
                assert made.fetch(series, TimeRange(start, start)) == FetchResult(()), series
            assert server.requests == []

    def test_concurrent_fetches_agree(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market) as (made, series, _):
            window = self.window(series)

            def fetched(_: int) -> Candles:
                answer = made.fetch(series, window)
                return Candles.concat([delivery.candles for delivery in answer.deliveries]).sorted()

            alone = fetched(0)
            with ThreadPoolExecutor(8) as threads:
                assert all(alone.equals(candles) for candles in threads.map(fetched, range(8)))
            assert len(alone) > 1
