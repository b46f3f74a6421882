"""The rate limiter of one process, alone and on the wire."""

from __future__ import annotations

import threading
import time

import pytest

from fks_backfill_dagster.domain.rate_limits import RateLimits, RateWindow
from fks_backfill_dagster.providers.base import RateLimited
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally
from fks_backfill_dagster_tests.providers.clients import client_of, request_to
from fks_backfill_dagster_tests.providers.scripted import Scripted, serve

pytestmark = pytest.mark.server


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
