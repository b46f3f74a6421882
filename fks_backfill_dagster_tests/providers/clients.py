"""HTTP clients for the tests of requests: their options, a request, an address without a server."""

from __future__ import annotations

from collections.abc import Callable

from fks_backfill_dagster.providers.base import ProviderOptions
from fks_backfill_dagster.providers.http.client import HttpClient
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster_tests.providers.scripted import Scripted, serve

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
