"""Retries, waits and errors, over real sockets."""

from __future__ import annotations

import logging
import math
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT
from fks_backfill_dagster.providers.base import (
    Cancelled,
    InvalidResponse,
    NotEntitled,
    PermanentError,
    ProviderError,
    RateLimited,
    TransientError,
    WrongKey,
)
from fks_backfill_dagster.providers.http.errors import (
    Unreachable,
    excerpt,
    retry_after,
    server_time,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally
from fks_backfill_dagster.providers.keys import keep_out_of_logs, redact, usable_key
from fks_backfill_dagster_tests.providers.clients import KEY, client_of, request_to, unused_address
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, serve

pytestmark = pytest.mark.server


class TestRetries:
    def test_waits_as_long_as_demanded(self, pool: RequestPool) -> None:
        answers = [Scripted(b"slow down", 429, {"Retry-After": "0.4"}), Scripted(b"good")]
        with serve(lambda _: answers.pop(0)) as server:
            tally = Tally()
            client = client_of(pool, server.url)
            assert client.run(request_to(client, server.url), tally) == b"good"
            first, second = server.requests
        assert second.at - first.at >= 0.39
        assert tally.count == 2

    def test_a_demanded_wait_beyond_the_budget_raises_immediately(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"banned", 418, {"Retry-After": "3600"})) as server:
            client = client_of(pool, server.url)
            began = time.monotonic()
            with pytest.raises(RateLimited) as caught:
                client.run(request_to(client, server.url), Tally())
            with pytest.raises(RateLimited, match="wait another"):
                client.run(request_to(client, server.url), Tally())
            assert time.monotonic() - began < 30
            assert caught.value.retry_after == 3600
            assert len(server.requests) == 1, "no requests during a ban"

    def test_a_penalty_holds_for_every_thread(self, pool: RequestPool) -> None:
        answers = [Scripted(status=429, headers={"Retry-After": "0.5"})]
        with serve(lambda _: answers.pop() if answers else Scripted(b"good")) as server:
            client = client_of(pool, server.url)
            attempt = request_to(client, server.url)
            thread = threading.Thread(target=client.run, args=(attempt, Tally()))
            thread.start()
            while answers:
                time.sleep(0.01)
            time.sleep(0.1)
            client.run(attempt, Tally())
            thread.join()
            times = [asked.at for asked in server.requests]
        assert len(times) == 3
        assert min(times[1:]) - times[0] >= 0.45

    @pytest.mark.parametrize("status", [429, 503])
    def test_a_retry_after_date_holds_for_every_client(self, pool: RequestPool, status: int) -> None:
        """As edge servers send it. Clients of one limiter correspond to processes of the shared one."""
        until = int(time.time()) + 2
        named = format_datetime(datetime.fromtimestamp(until, UTC), usegmt=True)
        answers = [Scripted(b"slow down", status, {"Retry-After": named})]
        arrived: list[float] = []

        def answer(_: Received) -> Scripted:
            arrived.append(time.time())
            return answers.pop() if answers else Scripted(b"good")

        with serve(answer) as server:
            limiter = ProcessLimiter({})
            clients = [client_of(pool, server.url, longest_wait_seconds=9.0) for _ in range(3)]
            for one in clients:
                one.limiter = limiter
            threads = [
                threading.Thread(target=one.run, args=(request_to(one, server.url), Tally()))
                for one in clients
            ]
            threads[0].start()
            while answers:
                time.sleep(0.005)
            while not limiter.acquire("p", 1).wait:
                time.sleep(0.005)
            for thread in threads[1:]:
                thread.start()
            for thread in threads:
                thread.join(timeout=20)
        assert len(arrived) == 4
        assert min(arrived[1:]) >= until

    def test_a_past_retry_after_date_is_no_wait(self, pool: RequestPool) -> None:
        answers = [Scripted(b"", 429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), Scripted(b"good")]
        with serve(lambda _: answers.pop(0)) as server:
            client = client_of(pool, server.url)
            began = time.monotonic()
            assert client.run(request_to(client, server.url), Tally()) == b"good"
            assert time.monotonic() - began < 1.5

    def test_gives_up_within_the_budget(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"<html>down", 503)) as server:
            client = client_of(pool, server.url)
            began = time.monotonic()
            with pytest.raises(TransientError, match="returned 503: an HTML page"):
                client.run(request_to(client, server.url), Tally())
            assert time.monotonic() - began < 30
            assert len(server.requests) >= 2

    def test_permanent_errors_are_not_retried(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"no", 451)) as server:
            client = client_of(pool, server.url)
            with pytest.raises(PermanentError, match="country"):
                client.run(request_to(client, server.url), Tally())
            assert len(server.requests) == 1

    def test_interruption_ends_a_wait(self) -> None:
        pool = RequestPool(1)
        with serve(lambda _: Scripted(status=429, headers={"Retry-After": "30"})) as server:
            client = client_of(pool, server.url, longest_wait_seconds=60.0)
            threading.Timer(0.2, pool.close).start()
            began = time.monotonic()
            with pytest.raises(Cancelled):
                client.run(request_to(client, server.url), Tally())
            assert time.monotonic() - began < 20


class TestWaits:
    """Reports of long waits, and the length of waits."""

    def test_a_long_wait_is_reported_once(self) -> None:
        reported: list[str] = []
        pool = RequestPool(1, on_wait=reported.append)
        with serve(lambda _: Scripted(b"<html>down", 503)) as server:
            client = client_of(pool, server.url, retry_budget_seconds=5.0)
            with pytest.raises(TransientError):
                client.run(request_to(client, server.url), Tally())
        pool.close()
        assert len(reported) == 1
        assert reported[0].startswith(f"p: {server.url} returned 503: an HTML page; retrying in ")

    def test_short_waits_are_not_reported(self) -> None:
        reported: list[str] = []
        pool = RequestPool(1, on_wait=reported.append)
        answers = [Scripted(b"down", 503), Scripted(b"down", 503), Scripted(b"good")]
        with serve(lambda _: answers.pop(0)) as server:
            client = client_of(pool, server.url)
            assert client.run(request_to(client, server.url), Tally()) == b"good"
        pool.close()
        assert reported == []

    def test_a_demanded_wait_is_reported(self) -> None:
        reported: list[str] = []
        pool = RequestPool(1, on_wait=reported.append)
        answers = [Scripted(b"slow down", 429, {"Retry-After": "2.2"}), Scripted(b"good")]
        with serve(lambda _: answers.pop(0)) as server:
            client = client_of(pool, server.url, longest_wait_seconds=9.0)
            client.run(request_to(client, server.url), Tally())
        pool.close()
        assert len(reported) == 1
        assert "returned 429: slow down; retrying in 2 s" in reported[0]

    def test_an_unreachable_server_is_tried_once_until_it_responds(self, pool: RequestPool) -> None:
        url = unused_address()
        client, tally = client_of(pool, url), Tally()
        with pytest.raises(Unreachable):
            client.run(request_to(client, url), tally)
        assert tally.count > 1
        before = tally.count
        for _ in range(3):
            with pytest.raises(Unreachable):
                client.run(request_to(client, url), tally)
        assert tally.count == before + 3
        answers = [Scripted(b"here again"), Scripted(b"oops", 502), Scripted(b"good")]
        with serve(lambda _: answers.pop(0)) as server:
            for expected in (b"here again", b"good"):
                assert client.run(request_to(client, server.url), Tally()) == expected


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://no-such-host.invalid/x", "the host no-such-host.invalid is unknown): check the network"),
        ("", "no connection (refused): start the server"),
    ],
    ids=["unknown host", "refused"],
)
@pytest.mark.parametrize("setting", [None, "providers.q.archive_url"])
def test_an_unreachable_server_is_reported_with_the_remedy(
    pool: RequestPool, url: str, text: str, setting: str | None
) -> None:
    url = url or f"{unused_address()}/x"
    client = client_of(pool, url)
    client.setting = setting
    with pytest.raises(Unreachable) as caught:
        client.exchange(url)
    assert str(caught.value).startswith(f"p: {url}: ")
    assert text in str(caught.value)
    assert str(caught.value).endswith(f", or correct {setting or 'providers.p.base_url'}")


@pytest.mark.parametrize(
    "body",
    [bytes(range(256)) * 4, b"\x00" * 100, "\ud7ff\ue000\U000f0000".encode() * 50, b"\x1b]0;title\x07" * 20],
)
def test_binary_bodies_are_not_quoted(body: bytes) -> None:
    assert excerpt(body) == f"{len(body)} bytes that are not text"


def test_errors_are_printable() -> None:
    """A database rejects NUL, and a terminal executes escape sequences."""
    error = status_error("p", 400, {}, b"a long sentence with \x00 and \x1b[2J in it, and more", "http://h/x")
    assert str(error).isprintable()
    assert "sentence with ? and ?[2J in it" in str(error)


class TestExchange:
    def test_a_truncated_body_is_retried(self, pool: RequestPool) -> None:
        answers = [Scripted(b"x" * 1000, cut=500), Scripted(b"whole")]
        with serve(lambda _: answers.pop(0)) as server:
            client = client_of(pool, server.url)
            assert client.run(request_to(client, server.url), Tally()) == b"whole"

    def test_too_large(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"x" * 5000)) as server:
            client = client_of(pool, server.url)
            with pytest.raises(InvalidResponse, match="returned more than 1,000 bytes, which is too large"):
                client.exchange(server.url, max_bytes=1000)

    def test_response_timeout(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"late", delay=0.8)) as server:
            client = client_of(pool, server.url, timeout_seconds=0.2)
            with pytest.raises(Unreachable, match="did not respond in time"):
                client.exchange(server.url)

    def test_connection_refused_and_no_key_in_the_text(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted()) as server:
            url = server.url
        client = client_of(pool, url)
        with pytest.raises(Unreachable, match="refused") as caught:
            client.exchange(f"{url}/query", {"apikey": KEY})
        assert KEY not in str(caught.value)
        assert caught.value.__cause__ is None

    def test_an_echoed_key_is_redacted(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(f"your key {KEY} is wrong".encode(), 401)) as server:
            client = client_of(pool, server.url)
            error = client.failure(client.exchange(server.url))
            assert isinstance(error, WrongKey)
            assert KEY not in str(error)
            assert "your key *** is wrong" in str(error)

    def test_connections_are_reused(self, pool: RequestPool) -> None:
        ports: set[str] = set()
        with serve(lambda asked: Scripted(b"ok")) as server:
            client = client_of(pool, server.url)
            session = client.session()
            for _ in range(3):
                client.exchange(server.url)
            assert client.session() is session
            ports |= {asked.headers.get("Connection", "") for asked in server.requests}
        assert ports == {"keep-alive"}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, RateLimited),
        (418, RateLimited),
        (401, WrongKey),
        (403, NotEntitled),
        (408, TransientError),
        (425, TransientError),
        (500, TransientError),
        (503, TransientError),
        (451, PermanentError),
        (404, PermanentError),
        (302, PermanentError),
    ],
)
def test_statuses(status: int, kind: type[ProviderError]) -> None:
    error = status_error("p", status, {"Retry-After": "7"}, b"", "http://host/path")
    assert type(error) is kind
    assert "http://host/path" in str(error)
    if isinstance(error, TransientError):
        assert error.retry_after == 7


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("3", 3.0),
        (" 0.5 ", 0.5),
        ("nan", None),
        ("-1", None),
        ("soon", None),
        ("inf", None),
        ("1e300", None),
        ("1_000", None),
        ("\u0663", None),
        ("", None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2026 07:28:30 -0000", 30.0),
        ("Wed, 21 Oct 2026 09:28:30 +0200", 30.0),
        ("Wed, 21 Oct 2026 07:27:00 GMT", 0.0),
        ("Wed, 32 Oct 2026 07:28:00 GMT", None),
    ],
)
def test_retry_after(value: str, seconds: float | None) -> None:
    assert retry_after({"Retry-After": value, "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}) == seconds


def test_a_retry_after_date_is_relative_to_our_clock_without_a_server_date() -> None:
    until = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    assert retry_after({"Retry-After": until}) == pytest.approx(60, abs=5)


@given(st.text() | st.text("0123456789 ,:+-.eGMTFriDec"))
def test_no_header_is_an_error(text: str) -> None:
    for headers in ({"Retry-After": text}, {"Date": text}, {"Retry-After": text, "Date": text}):
        seconds, _ = retry_after(headers), server_time(headers)
        assert seconds is None or seconds >= 0
        error = TransientError("p", "no", seconds)
        assert error.retry_after is None or 0 <= error.retry_after <= LONGEST_WAIT


@pytest.mark.parametrize(
    ("named", "bounded"),
    [(3.0, 3.0), (1e300, LONGEST_WAIT), (math.inf, LONGEST_WAIT), (math.nan, 0.0), (-5.0, 0.0)],
)
def test_a_wait_is_a_day_at_most(named: float, bounded: float) -> None:
    assert TransientError("p", "slow down", named).retry_after == bounded
    limiter = ProcessLimiter({})
    limiter.cool_down("p", named)
    assert limiter.acquire("p", 1).wait == pytest.approx(bounded, abs=1)


@given(st.text(min_size=4), st.text(), st.text())
def test_redact_leaves_no_key(key: str, before: str, after: str) -> None:
    text = redact(before + key + after, key)
    assert text == (before + key + after).replace(key, "***") or key not in text


@pytest.mark.parametrize("key", ["", "  ", "with blank", "line\nbreak", "naïve"])
def test_keys_that_cannot_be_sent_are_refused_without_being_quoted(key: str) -> None:
    with pytest.raises(WrongKey, match="THE_KEY is not a valid key") as caught:
        usable_key("p", key, "THE_KEY")
    assert not key.strip() or key not in str(caught.value)


def test_overlapping_keys_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    """Several keys of a process, one of them part of another, and one too short to be a key."""
    caplog.set_level(logging.DEBUG)
    for key in ("k", "abcdef", "xxabcdefyy"):
        keep_out_of_logs(key)
    logging.getLogger("urllib3.connectionpool").warning("keep %s and %s", "xxabcdefyy", "abcdef")
    assert caplog.messages == ["keep *** and ***"]
