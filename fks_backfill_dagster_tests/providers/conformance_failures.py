"""Requirements of all providers: invalid responses, refusals, broken connections, odd headers."""

from __future__ import annotations

import functools
import gzip
import itertools
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT
from fks_backfill_dagster.providers.base import (
    InvalidResponse,
    PermanentError,
    Provider,
    ProviderError,
    RateLimited,
    TransientError,
    UnknownSymbol,
    WrongKey,
)
from fks_backfill_dagster.providers.http.body import MAX_JSON_BYTES
from fks_backfill_dagster_tests.providers.conformance_base import ConformanceBase
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, always, json_said

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


class FailureConformance(ConformanceBase):
    """Every failure ends in the right error, after the right number of requests; odd values do no harm."""

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


def _on_the_wire(text: str) -> str:
    """A header value that http.server, which encodes Latin-1, sends as UTF-8."""
    return text.encode().decode("latin-1")
