"""The pool of requests: order, slots, errors, the end of all waits."""

from __future__ import annotations

import threading
import time

import pytest

from fks_backfill_dagster.providers.base import Cancelled, NotEntitled, PermanentError
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster_tests.providers.clients import client_of, request_to
from fks_backfill_dagster_tests.providers.scripted import Received, Scripted, serve

pytestmark = pytest.mark.server


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
