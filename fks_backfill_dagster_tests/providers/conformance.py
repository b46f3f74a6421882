"""The contract of `providers/base.py` as an executable test class for every provider.

A provider's test module subclasses `ProviderConformance` and simulates the provider's responses;
docs/adding-a-provider.md shows how. pytest does not collect this module itself.

Belongs here: requirements of all providers. Does not belong here: a wire format.
"""

from __future__ import annotations

import functools
import gzip
import http.client
import itertools
import logging
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import ClassVar
from urllib.parse import unquote

import numpy as np
import orjson
import pytest
import requests

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import derive, parts_span
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe
from fks_backfill_dagster.providers.base import (
    FetchResult,
    InvalidResponse,
    PermanentError,
    Provider,
    ProviderError,
    RateLimited,
    TransientError,
    Transport,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster.providers.http.body import MAX_JSON_BYTES
from fks_backfill_dagster.settings.model import KEY_VARIABLES
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    Server,
    always,
    json_said,
    serve,
    us,
)

KEY = "sEcReT+key/with=odd&signs"

# Waiting times and dates as a broken or hostile server may send them.
ABSURD = {
    "a century": "3153600000",
    "digits": "9" * 400,
    "many digits": "9" * 20_000,
    "exponent": "1e300",
    "nan": "nan",
    "inf": "inf",
    "negative": "-1",
    "wide digits": "\uff19\uff19\uff19",
    "underscores": "1_000_000_000",
    "year 9999": "Fri, 31 Dec 9999 23:59:59 GMT",
    "year 1": "Mon, 01 Jan 0001 00:00:00 GMT",
    "year 1, beyond": "Mon, 01 Jan 0001 00:00:00 +2359",
    "a year of digits": f"Fri, 31 Dec {'9' * 400} 23:59:59 GMT",
    "a zone of digits": f"Fri, 31 Dec 2026 23:59:59 +{'9' * 30}",
    "no zone": "Fri, 31 Dec 2126 23:59:59 -0000",
    "nothing": "",
    "a comma": ",",
}


class ProviderConformance:
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

    # --- refusals ---

    def test_an_unknown_symbol(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.unknown) as (made, _, _):
            for series in self.series(made):
                if self.reports_unknown:
                    with pytest.raises(UnknownSymbol):
                        made.fetch(series, self.window(series))
                else:
                    assert made.fetch(series, self.window(series)).deliveries == ()

    def test_a_missing_key(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, self.market, key=None) as (made, series, server):
            variable = made.capabilities.needs_key
            assert made.missing_key() == variable
            if variable is not None:
                with pytest.raises(WrongKey, match=variable):
                    made.fetch(series, self.window(series))
                assert server.requests == []
        assert provider("http://127.0.0.1:1").missing_key() is None

    # --- failures ---

    @pytest.mark.parametrize(
        "garbage",
        [
            Scripted(b"<!DOCTYPE html><html>Scheduled maintenance</html>"),
            Scripted(b""),
            json_said(42),
            json_said("Throttled"),
            json_said(None),
        ],
        ids=["html", "nothing", "number", "text", "null"],
    )
    def test_garbage_with_status_200(self, provider: Callable[..., Provider], garbage: Scripted) -> None:
        self.fails(provider, lambda _: garbage, InvalidResponse)

    def test_undecodable_bytes(self, provider: Callable[..., Provider]) -> None:
        self.fails(provider, lambda _: Scripted(b"\x00\xff\xfe"), InvalidResponse)

    def test_truncated_json(self, provider: Callable[..., Provider]) -> None:
        def half(asked: Received) -> Scripted:
            body = self.market(asked).body
            return Scripted(body[: len(body) // 2])

        self.fails(provider, half, InvalidResponse)

    @pytest.mark.parametrize("status", [500, 502, 503, 504])
    def test_server_errors_are_transient(self, provider: Callable[..., Provider], status: int) -> None:
        error = self.fails(provider, lambda _: Scripted(b"<html>Bad gateway</html>", status), TransientError)
        assert not isinstance(error, RateLimited | InvalidResponse)

    @pytest.mark.parametrize("failure", [Scripted(b"", 502), Scripted(b"<html>")], ids=["502", "html"])
    def test_transient_errors_are_retried(self, provider: Callable[..., Provider], failure: Scripted) -> None:
        with self.connected(provider, lambda _: failure, retry_budget_seconds=0.8) as (made, series, server):
            with pytest.raises(TransientError):
                made.fetch(series, self.window(series))
            requested = [(asked.path, tuple(asked.query.items())) for asked in server.requests]
            assert len(set(requested)) < len(requested)

    def test_a_rate_limit_has_a_wait_in_seconds(self, provider: Callable[..., Provider]) -> None:
        limited = json_said({"error": "slow down"}, 429, {"Retry-After": "3600"})
        with self.connected(provider, lambda _: limited) as (made, series, _):
            began = time.monotonic()
            with pytest.raises(RateLimited) as caught:
                made.fetch(series, self.window(series))
            assert time.monotonic() - began < 5, "it does not wait for an hour"
        assert caught.value.retry_after == pytest.approx(3600, abs=10)

    @pytest.mark.parametrize("named", ABSURD.values(), ids=ABSURD.keys())
    @pytest.mark.parametrize("status", [418, 429, 503])
    def test_no_wait_is_longer_than_a_day(
        self, provider: Callable[..., Provider], named: str, status: int
    ) -> None:
        limited = json_said({"error": "slow down"}, status, {"Retry-After": _on_the_wire(named)})
        error = self.fails(provider, lambda _: limited, TransientError, longest_wait_seconds=0.0)
        assert isinstance(error, TransientError)
        assert error.retry_after is None or 0 <= error.retry_after <= LONGEST_WAIT

    @pytest.mark.parametrize("named", ABSURD.values(), ids=ABSURD.keys())
    def test_an_odd_clock_of_the_server(self, provider: Callable[..., Provider], named: str) -> None:
        def dated(asked: Received) -> Scripted:
            honest = self.market(asked)
            return replace(honest, headers={**honest.headers, "Date": _on_the_wire(named)})

        with self.connected(provider, dated) as (made, series, _):
            window = self.window(series)
            rows = Candles.concat([d.candles for d in made.fetch(series, window).deliveries])
            good = verify(rows, window, grid_of(series), window.end).good.ts
            # An invalid date is ignored. The standard library reads "0001" as 2001: nothing has closed yet.
            assert np.array_equal(good, grid_of(series).opens(window)) or (len(good) == 0 and "0001" in named)

    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
    def test_a_too_large_response_is_rejected(self, provider: Callable[..., Provider], packed: bool) -> None:
        """63 MB of empty lists take 2 GB when parsed."""
        body = b"[" + b"[]," * (MAX_JSON_BYTES // 3) + b"[]]"
        headers = {"Content-Type": "application/json"} | ({"Content-Encoding": "gzip"} if packed else {})
        response = Scripted(gzip.compress(body, 1) if packed else body, headers=headers)
        error = self.fails(provider, lambda _: response, InvalidResponse)
        assert str(error).endswith(
            "returned more than 16,777,216 bytes, which is too large for a valid response"
        )

    def test_a_refusal_is_not_retried(self, provider: Callable[..., Provider]) -> None:
        for status in (401, 403):
            with self.connected(provider, always(json_said({}, status))) as (made, series, server):
                with pytest.raises(PermanentError):
                    made.fetch(series, self.window(series))
                requested = [(asked.path, tuple(asked.query.items())) for asked in server.requests]
                assert len(set(requested)) == len(requested) > 0

    def test_a_response_timeout(self, provider: Callable[..., Provider]) -> None:
        slow = Scripted(b"[]", delay=0.6)
        self.fails(provider, lambda _: slow, TransientError, timeout_seconds=0.2)

    def test_a_cut_connection(self, provider: Callable[..., Provider]) -> None:
        def cut(asked: Received) -> Scripted:
            honest = self.market(asked)
            return Scripted(honest.body, honest.status, honest.headers, cut=len(honest.body) // 2)

        self.fails(provider, cut, TransientError)

    def test_connection_refused(self, provider: Callable[..., Provider]) -> None:
        made = provider("http://127.0.0.1:1")
        series = self.series(made)[0]
        with pytest.raises(TransientError):
            made.fetch(series, self.window(series))

    def test_an_error_carries_its_request_count(self, provider: Callable[..., Provider]) -> None:
        with self.connected(provider, lambda _: Scripted(b"", 502), retry_budget_seconds=0.4) as (
            made,
            series,
            server,
        ):
            with pytest.raises(TransientError) as caught:
                made.fetch(series, self.window(series))
            time.sleep(0.1)  # for requests in flight
            assert caught.value.requests == len(server.requests) > 1

    def test_repeated_responses_end(self, provider: Callable[..., Provider]) -> None:
        """The same response to every request: paging without progress."""
        first: list[Scripted] = []

        def stuck(asked: Received) -> Scripted:
            if not first:
                first.append(self.market(asked))
            return first[0]

        with self.connected(provider, stuck) as (made, series, server):
            asked, window = self.paged() or (series, self.window(series))
            with suppress(ProviderError):
                made.fetch(asked, window)
            assert len(server.requests) <= 10 + 10 * made.estimate(asked, window).requests

    def test_numbers_of_any_size(self, provider: Callable[..., Provider]) -> None:
        """Replaces some numbers of an honest response by ones that fit neither a double nor 64 bits."""

        def changed(asked: Received, written: bytes, place: int) -> Scripted:
            honest = self.market(asked)
            numbers = list(re.finditer(rb"(?<=[:,\[])-?[0-9]+(\.[0-9]+)?(?=[,\]}])", honest.body))
            if not numbers:
                return honest
            chosen = numbers[place % len(numbers)]
            return replace(honest, body=honest.body[: chosen.start()] + written + honest.body[chosen.end() :])

        huge = (b"9007199254740993", b"18446744073709551616", b"-9223372036854775809", b"1" * 400, b"1e400")
        for written, place in itertools.product(huge, range(4)):
            answer = functools.partial(changed, written=written, place=place)
            with self.connected(provider, answer) as (made, series, _), suppress(ProviderError):
                window = self.window(series)
                rows = Candles.concat([d.candles for d in made.fetch(series, window).deliveries])
                good = verify(rows, window, grid_of(series), window.end).good
                assert np.isin(good.ts, grid_of(series).opens(window)).all()
                assert not any((np.abs(column) == 2.0**53).any() for column in good.columns()[1:])

    def test_one_failure_is_repaired(self, provider: Callable[..., Provider]) -> None:
        failures = [Scripted(b"<html>", 502)]

        def once(asked: Received) -> Scripted:
            return failures.pop() if failures else self.market(asked)

        with self.connected(provider, once, retry_budget_seconds=5.0) as (made, series, _):
            window = self.window(series)
            answer = made.fetch(series, window)
            rows = Candles.concat([delivery.candles for delivery in answer.deliveries])
            assert np.array_equal(
                verify(rows, window, grid_of(series), window.end).good.ts, grid_of(series).opens(window)
            )

    # --- the key ---

    @pytest.mark.parametrize("status", [200, 400, 401, 403, 404, 429, 500])
    @pytest.mark.parametrize("shape", ["error", "page"])
    def test_an_echoed_key_is_redacted(
        self, provider: Callable[..., Provider], status: int, shape: str
    ) -> None:
        fields = ("error", "message", "msg", "errorMessage", "Information", "Error Message", "status")
        text = f"we have detected your API key as {KEY}"
        echo = orjson.dumps(dict.fromkeys(fields, text)) if shape == "error" else text.encode()
        if not self.needs_key:
            pytest.skip("a keyless provider has nothing to redact")
        with (
            self.connected(provider, lambda _: Scripted(echo, status)) as (made, series, _),
            pytest.raises(ProviderError) as caught,
        ):
            made.fetch(series, self.window(series))
        texts = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
        assert KEY not in texts

    def test_the_origin_holds_no_key(self, provider: Callable[..., Provider]) -> None:
        if not self.needs_key:
            pytest.skip("a keyless provider has nothing to hide")
        with self.connected(provider, self.market) as (made, _, _):
            for series in self.series(made):
                answer = made.fetch(series, self.window(series))
                assert answer.deliveries, series
                assert KEY not in repr(answer.warnings)
                for delivery in answer.deliveries:
                    assert "sEcReT" not in repr(delivery.origin), "nor in a quoted form"

    @pytest.mark.parametrize("malformed", [False, True], ids=["every request", "malformed header"])
    def test_no_log_holds_the_key(
        self, provider: Callable[..., Provider], malformed: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Of a program that logs everything. The server echoes the request where urllib3 quotes the response."""
        if not self.needs_key:
            pytest.skip("a keyless provider has nothing to hide")

        def echoing(asked: Received) -> Scripted:
            value = f"1\r\nno header: {asked.query} {asked.headers}" if malformed else "1"
            honest = self.market(asked)
            return replace(honest, headers={**honest.headers, "X": value})

        caplog.set_level(logging.DEBUG)
        with self.connected(provider, echoing) as (made, series, _):
            made.fetch(series, self.window(series))
        assert '"GET /' in caplog.text
        assert not malformed or "Failed to parse headers" in caplog.text
        assert "sEcReT" not in caplog.text, "nor in a quoted form"
        assert "***" in caplog.text or not malformed
        assert all(record.exc_info is None for record in caplog.records), "a handler may format it itself"

    def test_each_response_is_logged_without_its_query(
        self, provider: Callable[..., Provider], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG, logger="fks_backfill_dagster")
        with self.connected(provider, self.market) as (made, series, server):
            made.fetch(series, self.window(series))
        logged = [one.getMessage() for one in caplog.records if one.name.endswith("http.client")]
        assert len(logged) == len(server.requests) > 0
        for message in logged:
            assert re.fullmatch(rf"{re.escape(server.url)}/[^?]*: \d+ after \d+\.\d+ s, \d+ bytes", message)

    def test_no_output_holds_the_key(
        self,
        provider: Callable[..., Provider],
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        """The application makes http.client print all requests, as the documentation of requests advises."""
        if not self.needs_key:
            pytest.skip("a keyless provider has nothing to hide")
        monkeypatch.setattr(http.client.HTTPConnection, "debuglevel", 1)
        with self.connected(provider, self.market) as (made, series, server):
            made.fetch(series, self.window(series))
            assert "sEcReT" not in capsys.readouterr().out
            with suppress(requests.RequestException):  # the market has no such path
                requests.get(f"{server.url}/other", timeout=5)
            assert "/other" in capsys.readouterr().out, "requests of other connections are printed"

    # --- shared by the tests above ---

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


def _on_the_wire(text: str) -> str:
    """A header value that http.server, which encodes Latin-1, sends as UTF-8."""
    return text.encode().decode("latin-1")
