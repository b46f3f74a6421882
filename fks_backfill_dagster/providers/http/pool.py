"""The requests in flight of this process: their limit, and the counts per fetch."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND
from fks_backfill_dagster.providers.base import (
    Cancelled,
    Clocks,
    ProviderError,
)
from fks_backfill_dagster.providers.http.errors import server_time

T = TypeVar("T")
Item = TypeVar("Item")
# Longer waits are reported, but not more often than every _REPORT_EVERY_SECONDS.
UNREPORTED_SECONDS = 2.0
_REPORT_EVERY_SECONDS = 30.0
# A longer wait queries the limiter in between: an operator may have ended the wait.
RECHECK_SECONDS = 10.0


class RequestPool:
    """Limits the HTTP requests in flight of this process, and runs requests concurrently.

    Every provider has its own lane of threads; the limit is enforced by slots that all lanes share. A slot is held
    for one exchange, without waiting inside it, and lane threads never submit to a lane: so any number of threads may
    call `map` at once without a deadlock.

    stop: ends every wait for a retry or a permit with Cancelled; the pool is unusable afterwards.
    on_wait: receives a sentence for the user, from any thread, when requests of a provider have to wait.
    """

    def __init__(
        self,
        max_concurrent_requests: int,
        *,
        stop: threading.Event | None = None,
        on_wait: Callable[[str], None] = lambda _: None,
    ) -> None:
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, not {max_concurrent_requests}")
        self.max_concurrent_requests = max_concurrent_requests
        self.stop = stop or threading.Event()
        self._on_wait = on_wait
        self._next_report: dict[str, float] = {}
        self._slots = threading.BoundedSemaphore(max_concurrent_requests)
        self._lock = threading.Lock()
        self._lanes: dict[str, ThreadPoolExecutor] = {}

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Holds a slot for one exchange; waits until one is free."""
        with self._slots:
            yield

    def sleep(self, seconds: float) -> None:
        """Waits. Raises Cancelled as soon as `stop` is set."""
        if self.stop.wait(seconds):
            raise Cancelled("requests", "interrupted while waiting for a retry")

    def report_wait(self, provider: str, text: str) -> None:
        """Reports why requests of `provider` are waiting, at most every _REPORT_EVERY_SECONDS for all threads."""
        with self._lock:
            now = time.monotonic()
            if now < self._next_report.get(provider, now):
                return
            self._next_report[provider] = now + _REPORT_EVERY_SECONDS
        self._on_wait(text)

    def map(self, lane: str, function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """The results of `function` for every item, in order, computed by the threads of `lane`.

        The first error is raised as soon as it occurs; items not started by then are not processed. Raises Cancelled
        after `stop`.
        """

        def unless_stopped(item: Item) -> T:
            if self.stop.is_set():
                raise Cancelled(lane, "the run is being interrupted")
            return function(item)

        executor = self._lane(lane)
        try:
            futures = [executor.submit(unless_stopped, item) for item in items]
        except RuntimeError:  # closed in the meantime
            raise Cancelled(lane, "the run is being interrupted") from None
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            self.stop.set()
            raise
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Interrupts waiting requests and ends the threads.

        After `stop` it does not wait for exchanges in flight: a provider may never respond.
        """
        interrupted = self.stop.is_set()
        self.stop.set()
        with self._lock:
            lanes, self._lanes = list(self._lanes.values()), {}
        for executor in lanes:
            # Not cancel_futures: `wait` is not notified of such futures and would block permanently.
            executor.shutdown(wait=not interrupted)

    def _lane(self, name: str) -> ThreadPoolExecutor:
        with self._lock:
            if self.stop.is_set():
                raise Cancelled(name, "the run is being interrupted")
            if name not in self._lanes:
                self._lanes[name] = ThreadPoolExecutor(
                    self.max_concurrent_requests, thread_name_prefix=f"requests-{name}"
                )
            return self._lanes[name]


@dataclass(slots=True)
class Tally:
    """The request count and the clocks of one fetch, across all its threads.

    count: requests, retries included. clocks: as in `FetchResult`.
    """

    count: int = 0
    clocks: Clocks | None = None
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self) -> None:
        """Counts a request. Raises Cancelled if the fetch has already failed: its other pages are useless then."""
        with self._lock:
            if self._over:
                raise Cancelled("requests", "another request of the same fetch has failed")
            self.count += 1

    def end(self) -> int:
        """Ends the fetch and returns its final count."""
        with self._lock:
            self._over = True
            return self.count

    def closed_by(self, headers: Mapping[str, str], ours: int) -> int:
        """The instant by which a candle must have closed to be final: the earlier one of the server's clock (its
        Date header) and ours."""
        theirs = server_time(headers)
        if theirs is None:
            return ours
        age = headers.get("Age", "").strip()
        in_cache = int(age) * MICROS_PER_SECOND if re.fullmatch("[0-9]{1,9}", age) else 0
        clocks = Clocks(theirs, ours, in_cache)
        with self._lock:
            if self.clocks is None or ours - theirs > self.clocks.ours - self.clocks.theirs:
                self.clocks = clocks
        return min(theirs, ours)


@contextmanager
def counted() -> Iterator[Tally]:
    """The tally of one fetch; an error that ends the fetch carries its count."""
    tally = Tally()
    try:
        yield tally
    except ProviderError as error:
        error.requests = tally.end()
        raise
