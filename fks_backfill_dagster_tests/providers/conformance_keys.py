"""Requirements of all providers: the key is in no error, origin, log or output."""

from __future__ import annotations

import http.client
import logging
import re
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import orjson
import pytest
import requests

from fks_backfill_dagster.providers.base import Provider, ProviderError
from fks_backfill_dagster_tests.providers.conformance_base import KEY, ConformanceBase
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted


class KeyConformance(ConformanceBase):
    """The key, and its quoted forms, leave the process only in requests to the provider."""

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
