"""A provider that counts its requests, and processes that send as many as the limiter permits.

Belongs here: the counting server (a separate process, so that it measures only its clients), the client processes,
and the figures of the arrivals. The bench runs it at full length, the tests shortened.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np

from fks_backfill_dagster.domain.rate_limits import RateLimits, RateWindow
from fks_backfill_dagster.providers.base import Cancelled, ProviderOptions, RateLimited
from fks_backfill_dagster.providers.http.client import HttpClient
from fks_backfill_dagster.providers.http.limiter import Limiter
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.rate_limits import SharedLimiter

PROVIDER = "counted"
_SPAWN = multiprocessing.get_context("spawn")


# The server ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arrivals:
    """The requests in the order of arrival: seconds since the first one, and the client.

    `refused_at`: when the refusal was sent, None if there was none.
    """

    at: np.ndarray[Any, np.dtype[np.float64]]
    who: Sequence[str]
    refused_at: float | None

    def most_within(self, seconds: float) -> int:
        """The largest number of requests in any window of that length."""
        ends = np.searchsorted(self.at, self.at + seconds, side="left")
        return int((ends - np.arange(len(self.at))).max())

    def least_share(self) -> float:
        """The requests of the least served client, as a share of the mean."""
        counts = [self.who.count(one) for one in set(self.who)]
        return min(counts) / (sum(counts) / len(counts))


@dataclass(frozen=True)
class CountingServer:
    url: str

    def arrivals(self) -> Arrivals:
        with urllib.request.urlopen(f"{self.url}/report", timeout=30) as response:
            document = json.load(response)
        at = np.array([at for at, _ in document["seen"]])
        began = at[0] if len(at) else 0.0
        refused = document["refused_at"]
        return Arrivals(at - began, [who for _, who in document["seen"]], refused and refused - began)

    def refuse_next(self, status: int, seconds: float) -> None:
        """The next request is refused with `Retry-After: seconds`; later ones succeed."""
        with urllib.request.urlopen(f"{self.url}/refuse?status={status}&seconds={seconds}", timeout=30):
            pass


@contextmanager
def counting_server(delay: float = 0.0) -> Iterator[CountingServer]:
    """A server that responds after `delay` seconds."""
    ours, theirs = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_serve, args=(theirs, delay), daemon=True)
    process.start()
    theirs.close()
    try:
        yield CountingServer(f"http://127.0.0.1:{ours.recv()}")
    finally:
        process.terminate()
        process.join()


def _serve(parent: Connection, delay: float) -> None:
    signal.signal(
        signal.SIGTERM, signal.SIG_DFL
    )  # the parent may ignore SIGTERM, and ends this process by it
    asyncio.run(_serve_requests(parent, delay))


async def _serve_requests(parent: Connection, delay: float) -> None:
    seen: list[tuple[float, str]] = []
    refusals: list[tuple[str, str]] = []
    refused_at: float | None = None

    def control(path: str, query: dict[str, str]) -> bytes | None:
        if path == "/refuse":
            refusals.append((query["status"], query["seconds"]))
            return b"{}"
        if path == "/report":
            return json.dumps({"seen": seen, "refused_at": refused_at}).encode()
        return None

    async def respond(target: str) -> tuple[str, bytes]:
        nonlocal refused_at
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        if (body := control(parts.path, query)) is not None:
            return "200 OK", body
        at = time.monotonic()
        seen.append((at, query["who"]))
        if refusals:
            refused_at = at
            status, seconds = refusals.pop()
            return f"{status} No\r\nRetry-After: {seconds}", b"{}"
        await asyncio.sleep(delay)
        return "200 OK", b"{}"

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                status, body = await respond(head.split(b" ", 2)[1].decode())
                writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, backlog=512)
    parent.send(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


# Clients -------------------------------------------------------------------------------------------

MakeLimiter = Callable[[str, tuple[RateWindow, ...]], Limiter]


def shared(database_url: str, windows: tuple[RateWindow, ...]) -> Limiter:
    """Our limiter. Its database lives as long as the client process."""
    return SharedLimiter(Database(database_url), {PROVIDER: RateLimits(windows, "account")})


@dataclass(frozen=True)
class Crowd:
    """`threads`: one process per entry, with that many threads. `late`: the longest time in seconds between a permit
    and its request."""

    database_url: str
    server: CountingServer
    windows: tuple[RateWindow, ...]
    threads: Sequence[int]
    weight: int = 1
    late: float = 0.0
    limiter: MakeLimiter = shared

    def ask_for(self, seconds: float, meanwhile: Callable[[], None] | None = None) -> Arrivals:
        """All clients send requests as fast as the limiter permits; returns the arrivals."""
        barrier = _SPAWN.Barrier(len(self.threads) + 1)
        processes = [
            _SPAWN.Process(target=_send_requests, args=(self, str(n), count, seconds, barrier), daemon=True)
            for n, count in enumerate(self.threads)
        ]
        for process in processes:
            process.start()
        barrier.wait(120)
        if meanwhile:
            meanwhile()
        for process in processes:
            process.join(seconds + 60)
            assert process.exitcode == 0, f"a client process ended with {process.exitcode}"
        return self.server.arrivals()


def _send_requests(crowd: Crowd, who: str, threads: int, seconds: float, barrier: Any) -> None:
    pool = RequestPool(threads)
    options = ProviderOptions(crowd.server.url)
    client = HttpClient(PROVIDER, options, pool, crowd.limiter(crowd.database_url, crowd.windows))

    def attempt() -> None:
        time.sleep(random.uniform(0.0, crowd.late))
        reply = client.exchange(f"{crowd.server.url}/ask?who={who}")
        if reply.status != 200:
            raise client.failure(reply)

    def work() -> None:
        while not pool.stop.is_set():
            try:
                client.run(attempt, Tally(), weight=crowd.weight)
            except (Cancelled, RateLimited):
                return

    workers = [threading.Thread(target=work) for _ in range(threads)]
    barrier.wait(120)
    for worker in workers:
        worker.start()
    time.sleep(seconds)
    pool.stop.set()
    for worker in workers:
        worker.join()
