"""The pool: how many requests are in flight in this process, and what a sync counts of them."""

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
# A wait that is longer than the first is told, but not more often than the second.
SILENT_SECONDS = 2.0
_TOLD_AGAIN_SECONDS = 30.0
# Who waits longer asks the limiter again in between: the wait may have been ended by hand.
LOOK_AGAIN_SECONDS = 10.0


class RequestPool:
    """Bounds the HTTP requests in flight of this process, and runs many requests side by side.

    Every provider has a lane of threads of its own; the bound lies in the slots all lanes share. A
    slot is held for one exchange and nothing is waited for inside it, and lane threads never submit
    to a lane: so any number of threads may call `map` at once without a deadlock.

    `stop` ends every wait of a retry or a limiter with Cancelled; the pool is of no use afterwards.
    `tell` gets a sentence for the user when a provider keeps everybody waiting, from any thread.
    """

    def __init__(
        self,
        max_concurrent_requests: int,
        *,
        stop: threading.Event | None = None,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        if max_concurrent_requests < 1:
            raise ValueError(f"max_concurrent_requests must be at least 1, not {max_concurrent_requests}")
        self.max_concurrent_requests = max_concurrent_requests
        self.stop = stop or threading.Event()
        self._tell = tell
        self._tell_again: dict[str, float] = {}
        self._slots = threading.BoundedSemaphore(max_concurrent_requests)
        self._lock = threading.Lock()
        self._lanes: dict[str, ThreadPoolExecutor] = {}

    @contextmanager
    def slot(self) -> Iterator[None]:
        with self._slots:
            yield

    def sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Cancelled("requests", "interrupted while waiting for a retry")

    def told(self, provider: str, text: str) -> None:
        """Tells why `provider` is being waited for, once in a while, whoever waits."""
        with self._lock:
            now = time.monotonic()
            if now < self._tell_again.get(provider, now):
                return
            self._tell_again[provider] = now + _TOLD_AGAIN_SECONDS
        self._tell(text)

    def map(self, lane: str, function: Callable[[Item], T], items: Sequence[Item]) -> list[T]:
        """`function` of every item, in their order, run by the threads of `lane`.

        The first error is raised as soon as it happens; what has not started by then never does.
        """

        def unless_stopped(item: Item) -> T:
            if self.stop.is_set():
                raise Cancelled(lane, "the run is being interrupted")
            return function(item)

        executor = self._lane(lane)
        try:
            futures = [executor.submit(unless_stopped, item) for item in items]
        except RuntimeError:  # closed since
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
        """Interrupts what is waiting and ends the threads.

        After `stop` nobody waits for an exchange that is under way: a market may never answer.
        """
        interrupted = self.stop.is_set()
        self.stop.set()
        with self._lock:
            lanes, self._lanes = list(self._lanes.values()), {}
        for executor in lanes:
            # Not cancel_futures: `wait` is not told of futures that end that way, and waits for ever.
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
    """Counts the requests of one fetch over all threads that work for it, and keeps what clocks they showed.

    count: requests, retries included. clocks: as in `Answer`.
    """

    count: int = 0
    clocks: Clocks | None = None
    _over: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self) -> None:
        """Raises Cancelled where the fetch has failed already: another page of it is of no use any more."""
        with self._lock:
            if self._over:
                raise Cancelled("requests", "another request of the same fetch has failed")
            self.count += 1

    def end(self) -> int:
        """The count, which does not change any more."""
        with self._lock:
            self._over = True
            return self.count

    def closed_by(self, headers: Mapping[str, str], ours: int) -> int:
        """The instant by which a candle must have closed to be final: the earlier one of the server's clock, by
        its Date header, and ours."""
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
    """The tally of one fetch; an error that ends the fetch has its count."""
    tally = Tally()
    try:
        yield tally
    except ProviderError as error:
        error.requests = tally.end()
        raise
