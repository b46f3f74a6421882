"""Rate limits, retries and errors, over real sockets."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fks_backfill_dagster.domain.rate_limits import LONGEST_WAIT, RateLimits, RateWindow
from fks_backfill_dagster.providers.base import (
    Cancelled,
    InvalidResponse,
    NotEntitled,
    PermanentError,
    ProviderError,
    ProviderOptions,
    RateLimited,
    TransientError,
    WrongKey,
)
from fks_backfill_dagster.providers.http.client import HttpClient
from fks_backfill_dagster.providers.http.errors import (
    Unreachable,
    excerpt,
    retry_after,
    server_time,
    status_error,
)
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.keys import keep_out_of_logs, redact, usable_key
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, serve

pytestmark = pytest.mark.server

KEY = "s3cr3t/+key"


def client_of(pool: RequestPool, url: str, **options: object) -> HttpClient:
    given = {
        "retry_budget_seconds": 2.0,
        "longest_wait_seconds": 2.0,
        "timeout_seconds": 1.0,
        "key": KEY,
        **options,
    }
    return HttpClient("p", ProviderOptions(url, **given), pool, ProcessLimiter({}))  # type: ignore[arg-type]


def unused_address() -> str:
    """The address of a stopped server."""
    with serve(lambda _: Scripted()) as server:
        return server.url


def request_to(client: HttpClient, url: str) -> Callable[[], bytes]:
    def attempt() -> bytes:
        reply = client.exchange(url)
        if reply.status != 200:
            raise client.failure(reply)
        return reply.body

    return attempt


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


def limiter_of(*windows: RateWindow, provider: str = "p") -> ProcessLimiter:
    return ProcessLimiter({provider: RateLimits(windows)})


class TestLimiter:
    def test_a_window_slides(self) -> None:
        limiter = limiter_of(RateWindow(4, 0.4))
        for _ in range(4):
            limiter.release(limiter.acquire("p", 1))
        wait = limiter.acquire("p", 1).wait
        assert 0.3 < wait <= 0.4
        time.sleep(wait)
        assert limiter.acquire("p", 1).wait == 0

    def test_weights(self) -> None:
        limiter = limiter_of(RateWindow(4, 60))
        assert [limiter.acquire("p", 2).wait > 0 for _ in range(3)] == [False, False, True]
        assert limiter_of(RateWindow(4, 60)).acquire("p", 9).wait == 0, "heavier than the limit: sent alone"

    def test_a_request_in_flight_counts_as_the_newest(self) -> None:
        """It may reach the provider only at its end."""
        limiter = limiter_of(RateWindow(1, 0.2))
        permit = limiter.acquire("p", 1)
        time.sleep(0.25)
        assert limiter.acquire("p", 1).wait == 0.2
        limiter.release(permit)
        assert 0.15 < limiter.acquire("p", 1).wait <= 0.2

    def test_several_windows_hold_at_once(self) -> None:
        limiter = limiter_of(RateWindow(1, 0.05), RateWindow(2, 86400))
        for _ in range(2):
            limiter.release(limiter.acquire("p", 1))
            wait = limiter.acquire("p", 1)
            time.sleep(0.06)
        assert wait.reason == "its 2 requests in 24 hours are used up: wait"
        assert 86000 < limiter.acquire("p", 1).wait < 86400

    def test_providers_do_not_wait_for_each_other(self) -> None:
        limiter = limiter_of(RateWindow(1))
        limiter.cool_down("slow", 60)
        assert limiter.acquire("slow", 1).reason == "demanded by the provider: wait"
        assert limiter.acquire("p", 1).wait == 0

    def test_the_rate_limit_holds_on_the_wire_and_uses_no_retry_budget(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"ok")) as server:
            client = client_of(pool, server.url, longest_wait_seconds=0.0)
            client.limiter = limiter_of(RateWindow(5, 0.3))
            pool.map("lane", lambda _: client.run(request_to(client, server.url), Tally()), range(20))
            times = sorted(asked.at for asked in server.requests)
        assert len(times) == 20
        assert all(later - early > 0.3 for early, later in zip(times, times[5:], strict=False))

    def test_a_used_up_budget_is_not_waited_for(self, pool: RequestPool) -> None:
        with serve(lambda _: Scripted(b"ok")) as server:
            client = client_of(pool, server.url)
            client.limiter = limiter_of(RateWindow(1, 86400))
            client.run(request_to(client, server.url), Tally())
            with pytest.raises(
                RateLimited, match="1 requests in 24 hours are used up: wait another 86"
            ) as caught:
                client.run(request_to(client, server.url), Tally())
            assert len(server.requests) == 1
        assert caught.value.retry_after is not None

    def test_a_waiting_request_holds_no_slot(self) -> None:
        pool = RequestPool(1)
        with serve(lambda _: Scripted(b"ok")) as server:
            slow, quick = client_of(pool, server.url, longest_wait_seconds=9.0), client_of(pool, server.url)
            slow.limiter.cool_down("p", 1.5)
            thread = threading.Thread(target=slow.run, args=(request_to(slow, server.url), Tally()))
            thread.start()
            quick.run(request_to(quick, server.url), Tally())
            assert thread.is_alive(), "still waiting"
            thread.join()
        pool.close()


class TestPool:
    def test_closing_ends_waits_for_queued_items(self) -> None:
        """Ctrl-C during a download: queued items never start, and no caller waits for them."""
        pool = RequestPool(1)
        ended: list[BaseException] = []

        def many() -> None:
            try:
                pool.map("lane", lambda _: pool.stop.wait(10), range(20))
            except Cancelled as error:
                ended.append(error)

        threads = [threading.Thread(target=many, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        time.sleep(0.2)
        pool.close()
        for thread in threads:
            thread.join(timeout=5)
        assert len(ended) == 3

    def test_closing_does_not_wait_for_an_unresponsive_server(self) -> None:
        pool = RequestPool(1)
        with serve(lambda _: Scripted(b"late", delay=2.0)) as server:
            client = client_of(pool, server.url, timeout_seconds=10.0)
            thread = threading.Thread(
                target=pool.map, args=("lane", lambda _: client.exchange(server.url), [0]), daemon=True
            )
            thread.start()
            time.sleep(0.2)
            began = time.monotonic()
            pool.stop.set()
            pool.close()
            assert time.monotonic() - began < 1
            thread.join()

    def test_bounds_requests_of_many_callers_in_flight(self) -> None:
        pool = RequestPool(3)
        with serve(lambda _: Scripted(b"ok", delay=0.02)) as server:
            clients = [client_of(pool, server.url) for _ in range(4)]

            def many(index: int) -> list[bytes]:
                client = clients[index]
                attempt = request_to(client, server.url)
                return pool.map(f"lane{index}", lambda _: client.run(attempt, Tally()), range(10))

            threads = [threading.Thread(target=many, args=(i % 4,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=20)
                assert not thread.is_alive()
            assert len(server.requests) == 80
            assert server.most_in_flight == 3
        pool.close()

    def test_keeps_order(self, pool: RequestPool) -> None:
        def late_first(index: int) -> int:
            time.sleep(0.02 if index == 0 else 0)
            return index * index

        assert pool.map("lane", late_first, range(20)) == [index * index for index in range(20)]

    def test_the_first_error_cancels_queued_items(self, pool: RequestPool) -> None:
        begun: list[int] = []

        def fail(index: int) -> None:
            begun.append(index)
            time.sleep(0.01)
            raise NotEntitled("p", "no")

        with pytest.raises(NotEntitled):
            pool.map("lane", fail, range(1000))
        assert len(begun) < 100

    def test_needs_a_slot(self) -> None:
        with pytest.raises(ValueError, match="at least 1"):
            RequestPool(0)


def test_a_failed_fetch_sends_nothing_more(pool: RequestPool) -> None:
    """Its other pages are being retried at that time."""
    with serve(lambda asked: Scripted(b"no", 404 if asked.path == "/0" else 503)) as server:
        client = client_of(pool, server.url, retry_budget_seconds=60.0)

        def request(page: int) -> bytes:
            while page == 0 and len(server.requests) < 6:
                time.sleep(0.005)
            return client.run(request_to(client, f"{server.url}/{page}"), tally)

        with pytest.raises(PermanentError) as caught, counted() as tally:
            pool.map("lane", request, range(4))
        time.sleep(0.5)
        assert caught.value.requests == tally.count == len(server.requests)


def test_requests_are_counted(pool: RequestPool) -> None:
    def answer(asked: Received) -> Scripted:
        return Scripted(b"ok")

    with serve(answer) as server:
        client, tally = client_of(pool, server.url), Tally()
        pool.map("lane", lambda _: client.run(request_to(client, server.url), tally), range(25))
        assert tally.count == len(server.requests) == 25


def test_overlapping_keys_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    """Several keys of a process, one of them part of another, and one too short to be a key."""
    caplog.set_level(logging.DEBUG)
    for key in ("k", "abcdef", "xxabcdefyy"):
        keep_out_of_logs(key)
    logging.getLogger("urllib3.connectionpool").warning("keep %s and %s", "xxabcdefyy", "abcdef")
    assert caplog.messages == ["keep *** and ***"]
