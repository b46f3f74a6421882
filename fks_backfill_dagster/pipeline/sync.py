"""sync(series, range): plan -> fetch -> verify -> commit. Every backfill, refresh and refill is this.

    spans ──> fetcher threads ──> verified batches ──> this thread commits, in order
              (at most a few spans ahead: memory does not grow with the range)

Fetching, parsing and writing overlap: the fetchers wait for the network and parse while this
thread waits for the database. Fallback is per candle: what the first provider leaves missing, the
next one is asked for, and so on down the priority.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso
from fks_backfill_dagster.ledger.settle import Findings
from fks_backfill_dagster.pipeline.events import BatchDone, Listener, Planned, SyncEvent, Warned, silent
from fks_backfill_dagster.pipeline.fetch import Chain, Fetched, Tally
from fks_backfill_dagster.pipeline.plan import Batch, Plan, Scope, closed_window, make_plan
from fks_backfill_dagster.providers.base import (
    Cancelled,
    Circuit,
    Estimate,
    Provider,
    ProviderError,
    UnknownSymbol,
)
from fks_backfill_dagster.store import ledger, reading
from fks_backfill_dagster.store.commit import BatchWrite, Brought, Refused, commit_batch
from fks_backfill_dagster.store.database import Database

# A lease outlives a missed heartbeat or two, and is over soon after a kill -9.
LEASE_SECONDS = 30.0
_HEARTBEAT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Context:
    """What a sync works with; the faces make it once and hand it to every verb.

    `providers` by name; `clock` gives the present in microseconds; `priority` tells who is to be asked
    for a series by the settings, whoever one call may be limited to.
    """

    database: Database
    providers: Mapping[str, Provider]
    clock: Callable[[], int]
    batch_size_days: int = 30
    max_concurrent_requests: int = 5
    tolerance: float = 0.01
    max_gap_minutes: int = 5
    circuit: Circuit | None = None
    priority: Callable[[Series], Sequence[str]] = lambda series: ()


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one sync did.

    `missing` is what the range still lacks, explained or not; an interval in which nothing traded
    lacks nothing, and is `quiet`. `total_candles` were inserted or changed by this call.
    """

    series: Series
    window: TimeRange
    total_batches: int = 0
    successful_batches: int = 0
    failed_batches: int = 0
    total_candles: int = 0
    expected: int = 0
    missing: int = 0
    quiet: int = 0
    requests: int = 0
    seconds: float = 0.0
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    providers: Mapping[str, Tally] = field(default_factory=dict)

    @property
    def stored(self) -> int:
        """What the range holds now."""
        return self.expected - self.missing - self.quiet

    @property
    def complete(self) -> bool:
        """Nothing failed, and every candle of the range that traded is there."""
        return not self.errors and self.missing == 0


@dataclass(frozen=True, slots=True)
class DryRun:
    """What a sync would do, per provider in the order in which they would be asked."""

    plan: Plan
    estimates: tuple[tuple[str, Estimate], ...]
    warnings: tuple[str, ...]


def sync(
    context: Context,
    series: Series,
    window: TimeRange,
    priority: Sequence[str],
    *,
    scope: Scope = Scope.MISSING,
    recheck: bool = False,
    run_id: str | None = None,
    listen: Listener = silent,
) -> SyncReport:
    """Brings every candle of `window` that should exist and is not stored, from `priority` in order.

    `scope` tells what of it is asked for. `recheck` asks for its gaps though their time has not come,
    and providers that are being left alone: what a person wants, and no schedule. Provider errors end
    up in the report; a StoreError (the database is gone or full) is raised, and what was committed
    stays. So is SeriesChanged, before anything is asked.
    """
    began = time.monotonic()
    chain = _chain(context, series, priority, heed_circuit=not recheck)
    for message in chain.warnings:
        listen(Warned(series, message))
    plan, grid = _plan(context, series, window, chain, scope, recheck, listen)
    listen(Planned(series, plan, chain.names))
    work = _Work(context, series, grid, chain, run_id, listen)
    if chain.names or not plan.batches or work.is_kept:
        work.run(plan)
    return work.report(plan, time.monotonic() - began)


def dry_run(
    context: Context,
    series: Series,
    window: TimeRange,
    priority: Sequence[str],
    *,
    scope: Scope = Scope.MISSING,
    recheck: bool = False,
) -> DryRun:
    """Plans without fetching a candle. May ask once for a listing time that is not known yet."""
    chain = _chain(context, series, priority)
    heard: dict[str, None] = dict.fromkeys(chain.warnings)

    def hear(event: SyncEvent) -> None:
        if isinstance(event, Warned):
            heard[event.message] = None

    plan, _ = _plan(context, series, window, chain, scope, recheck, hear)
    estimates = tuple((name, chain.estimate(name, plan)) for name in chain.names)
    return DryRun(plan, estimates, tuple(dict.fromkeys((*heard, *chain.dropped))))


def able(context: Context, series: Series) -> frozenset[str]:
    """Who can be asked for a series by the settings: who serves it and, where one is needed, has a key."""
    return frozenset(_chain(context, series, context.priority(series)).names)


def _chain(context: Context, series: Series, priority: Sequence[str], *, heed_circuit: bool = True) -> Chain:
    def stored(opens: Instants) -> Candles:
        hulls = (TimeRange(ts, ts + 1) for ts in opens.tolist())  # neighbours: two at most
        return Candles.concat([reading.read_candles(context.database, series, hull) for hull in hulls])

    return Chain(
        context.providers,
        series,
        priority,
        context.clock,
        stored,
        context.tolerance,
        context.circuit,
        heed_circuit=heed_circuit,
    )


def _plan(
    context: Context,
    series: Series,
    window: TimeRange,
    chain: Chain,
    scope: Scope,
    recheck: bool,
    listen: Listener,
) -> tuple[Plan, Grid]:
    with context.database.begin() as connection:
        ledger.refuse_changed(connection, series)
    grid = grid_of(series)
    listed_at = _listing(context, series, chain, listen)
    possible = closed_window(window, grid, context.clock(), listed_at)
    if window and not possible:
        chain.warnings.append(_nothing_possible(series, window, listed_at))
        listen(Warned(series, chain.warnings[-1]))
    with context.database.begin() as connection:
        known = ledger.known(connection, ledger.series_id(connection, series), possible)
    plan = make_plan(
        series,
        possible,
        known,
        grid,
        batch_size_days=context.batch_size_days,
        able=frozenset(chain.names),
        now=None if recheck else context.clock(),
        scope=scope,
    )
    return plan, grid


def _nothing_possible(series: Series, window: TimeRange, listed_at: int | None) -> str:
    if listed_at is not None and window.end <= listed_at:
        return f"nothing is expected of {series} in {window}: it was listed at {iso(listed_at)}"
    return f"nothing is expected of {series} in {window}: no candle of it is closed yet"


def _listing(context: Context, series: Series, chain: Chain, listen: Listener) -> int | None:
    """Since when the symbol exists: the earliest word of the providers asked; found once and kept."""
    with context.database.begin() as connection:
        found = ledger.listings(connection, series.symbol)
    for name in chain.names:
        if name in found:
            continue
        try:
            listed_at = context.providers[name].listed_at(series)
        except UnknownSymbol as error:
            chain.drop(name, error)
            listen(Warned(series, str(error)))
            continue
        except Cancelled:
            raise
        except ProviderError as error:  # asked again at the next sync
            listen(Warned(series, f"{error} (asked since when it has {series.symbol})"))
            for message in chain.remember_failure(name, error):
                listen(Warned(series, message))
            continue
        if listed_at is not None:
            found[name] = listed_at
            with context.database.begin() as connection:
                ledger.remember_listing(connection, name, series.symbol, listed_at)
    return min((found[name] for name in chain.names if name in found), default=None)


class _Work:
    """One running sync: the threads, the lease, the sums. Lives as long as `run`."""

    def __init__(
        self,
        context: Context,
        series: Series,
        grid: Grid,
        chain: Chain,
        run_id: str | None,
        listen: Listener,
    ) -> None:
        self.context, self.series, self.grid, self.chain = context, series, grid, chain
        self.run_id, self.listen = run_id, listen
        self.strict = frozenset(
            name for name, provider in context.providers.items() if not provider.capabilities.omits_quiet
        )
        # A gap is explained when everybody was heard, not only those of this call.
        self.able = frozenset((*chain.names, *chain.unfit)) | able(context, series)
        self.identity: int | None = None
        self.succeeded = self.failed = self.candles = self.requests = 0
        # Sets that keep the order in which they came.
        self.errors: dict[str, None] = {}
        self.warnings: dict[str, None] = dict.fromkeys(chain.warnings)
        self.told: set[str] = set()

    @cached_property
    def is_kept(self) -> bool:
        """Whether it has candles: then a symbol that nobody knows any more is an answer, and a mistyped
        one no more."""
        return any(state.total_candles for state in reading.sync_status(self.context.database, self.series))

    def run(self, plan: Plan) -> None:
        """Commits the batches of the plan. Where there are none, the last error of the series is over."""
        with self.context.database.begin() as connection:
            known = ledger.series_id(connection, self.series)
            if known is None and not plan.batches:
                return  # asking for nothing makes no series
            self.identity = identity = ledger.register(connection, self.series)
        with _lease(self.context.database, identity) as owner:
            error: str | None = None
            interrupted = False
            try:
                for batches, fetched in self._fetched(plan, plan.spans(self.chain.page_size)):
                    self._commit(identity, batches, fetched)
                error = "; ".join(self.errors) if self.failed else self._found_nothing(plan)
            except BaseException as failure:
                interrupted, error = is_interruption(failure), str(failure) or type(failure).__name__
                raise
            finally:
                with self.context.database.begin() as connection:
                    if interrupted:
                        ledger.release_lease(connection, identity, owner)
                    else:
                        ledger.end_sync(connection, identity, owner, error)

    def _found_nothing(self, plan: Plan) -> str | None:
        """The error of a sync after which its whole range holds no candle, whoever responded; else None."""
        if self.candles or plan.scope is Scope.GAPS:  # a gap alone holds no candle: its series may be whole
            return None
        with self.context.database.begin() as connection:
            known = ledger.known(connection, self.identity, plan.window)
        missing, quiet = (
            sum(self.grid.count(part) for part in ranges)
            for ranges in (known.lacking(plan.window), known.quiet(plan.window))
        )
        if not missing or missing + quiet < plan.expected:
            return None
        return f"no provider has any of {missing:,} {'candle' if missing == 1 else 'candles'}"

    def _fetched(
        self, plan: Plan, spans: Sequence[tuple[Batch, ...]]
    ) -> Iterator[tuple[tuple[Batch, ...], Fetched]]:
        """The spans' answers in order, a few of them fetched ahead."""
        ahead = self.context.max_concurrent_requests
        waiting: deque[tuple[tuple[Batch, ...], Future[Fetched]]] = deque()
        rest = iter(spans)
        pool = ThreadPoolExecutor(ahead, thread_name_prefix="fetch")
        try:
            for batches in rest:
                waiting.append((batches, pool.submit(self.chain.fetch, batches, plan)))
                if len(waiting) > ahead:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            self.chain.stop()
            # A fetcher may be in the middle of a retry: nobody waits for it after an interruption.
            pool.shutdown(wait=False, cancel_futures=True)

    def _commit(self, identity: int, batches: Sequence[Batch], fetched: Fetched) -> None:
        self.requests += fetched.requests
        for message in (*fetched.warnings, *fetched.errors):
            if message not in self.told:
                self.told.add(message)
                self.listen(Warned(self.series, message))
        self.warnings.update(dict.fromkeys(fetched.warnings))
        self.errors.update(dict.fromkeys(fetched.errors))
        for batch in batches:
            if not fetched.recordable and not self.is_kept:
                self._count(batch, 0, batch.candles, (), fetched)
                continue
            write = self._batch_write(batch, fetched)
            done = commit_batch(self.context.database, self.series, identity, write, self.grid)
            self.candles += done.inserted + done.updated
            names = tuple(dict.fromkeys(b.provider for b in write.brought if len(b.candles)))
            self._count(batch, done.inserted + done.updated, done.missing, names, fetched)

    def _batch_write(self, batch: Batch, fetched: Fetched) -> BatchWrite:
        """The part of a span's answer that belongs to one batch."""

        def part(candles: Candles) -> Candles:
            return candles.within(batch.window)

        return BatchWrite(
            window=batch.window,
            brought=tuple(
                Brought(b.provider, b.transport, b.source, b.sha256, b.fetched_at, part(b.candles))
                for b in fetched.brought
            ),
            refused=tuple(
                Refused(r.provider, r.source, r.reason, part(r.candles))
                for r in fetched.refused
                if len(part(r.candles))
            ),
            evidence=fetched.evidence,
            findings=Findings(
                asked=batch.wanted,
                quiet=fetched.quiet,
                strict=self.strict,
                able=self.able,
                tolerated=self.context.max_gap_minutes // self.series.timeframe.minutes,
            ),
            run_id=self.run_id,
        )

    def _count(
        self, batch: Batch, candles: int, missing: int, names: tuple[str, ...], fetched: Fetched
    ) -> None:
        error = "; ".join(fetched.errors or self.chain.dropped) if fetched.failed else None
        if fetched.failed:
            self.failed += 1
        else:
            self.succeeded += 1
        self.listen(BatchDone(self.series, batch.window, candles, missing, names, error))

    def report(self, plan: Plan, seconds: float) -> SyncReport:
        """An error after which another provider filled in is a warning: nothing failed by it."""
        failed = self.failed
        if plan.batches and self.identity is None:  # nobody to ask
            failed = len(plan.batches)
            self.errors.update(dict.fromkeys(self.chain.dropped or self.chain.warnings or [self._nobody()]))
        with self.context.database.begin() as connection:
            identity = ledger.series_id(connection, self.series)
            known = ledger.known(connection, identity, plan.window)
        errors = tuple(self.errors)
        return SyncReport(
            series=self.series,
            window=plan.window,
            total_batches=len(plan.batches),
            successful_batches=self.succeeded,
            failed_batches=failed,
            total_candles=self.candles,
            expected=plan.expected,
            missing=sum(self.grid.count(part) for part in known.lacking(plan.window)),
            quiet=sum(self.grid.count(part) for part in known.quiet(plan.window)),
            requests=self.requests,
            seconds=seconds,
            errors=errors if failed else (),
            warnings=tuple(
                dict.fromkeys((*self.warnings, *(() if failed else (*self.chain.dropped, *errors))))
            ),
            providers=self.chain.tallies(),
        )

    def _nobody(self) -> str:
        return (
            f"no provider can serve {self.series}; see `fks-backfill series providers`"
            " and provider_priority in the settings"
        )


def is_interruption(failure: BaseException) -> bool:
    """Whether a sync was broken off from outside (Ctrl-C, a signal), which says nothing about its series.

    A statement or a request that is torn off in the middle fails in ways of its own: what it was torn off by
    is found among the exceptions that it was raised from.
    """
    seen: BaseException | None = failure
    while seen is not None:
        if isinstance(seen, Cancelled) or not isinstance(seen, Exception):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def _lease(database: Database, identity: int) -> Iterator[str]:
    """Shows the series as syncing for as long as the block runs, and not much longer if it is killed."""
    owner = uuid.uuid4().hex
    over = threading.Event()

    def renew() -> None:
        with database.begin() as connection:
            ledger.hold_lease(connection, identity, owner, LEASE_SECONDS)

    def beat() -> None:
        while not over.wait(_HEARTBEAT_SECONDS):
            try:
                renew()
            except Exception:  # the commit will meet the same database and tell what is wrong
                continue

    renew()
    heart = threading.Thread(target=beat, name="lease", daemon=True)
    heart.start()
    try:
        yield owner
    finally:
        over.set()
        heart.join()
