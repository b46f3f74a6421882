"""sync(series, range): plan -> fetch -> verify -> commit. Every backfill, refresh and gap fill is a sync.

    spans ──> fetcher threads ──> verified spans, compared ──> this thread commits, in order
              (at most a few spans ahead: memory does not grow with the range)

Fetching, parsing and writing overlap: the fetchers wait for the network and parse while this
thread waits for the database. Fallback is per candle: candles that the first provider does not have
are requested from the next one, and so on in order of priority.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from fks_backfill_dagster.domain.closures import format_dates
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, iso
from fks_backfill_dagster.ledger.records import Outcome
from fks_backfill_dagster.ledger.settle import Rules, surroundings
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.events import BatchDone, Listener, Planned, SyncEvent, Warned, silent
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched
from fks_backfill_dagster.pipeline.fetch.spans import fetch_spans
from fks_backfill_dagster.pipeline.freshness import is_quiet_end
from fks_backfill_dagster.pipeline.history_start import HistoryStart
from fks_backfill_dagster.pipeline.ingest import Ingest, ingest
from fks_backfill_dagster.pipeline.lease import hold_lease, is_interruption
from fks_backfill_dagster.pipeline.listing import Listings, find_listings
from fks_backfill_dagster.pipeline.plan import Batch, Plan, Scope, closed_window, make_plan
from fks_backfill_dagster.pipeline.provider_chain import make_chain
from fks_backfill_dagster.pipeline.report import DryRun, SyncReport
from fks_backfill_dagster.pipeline.settings_changes import current_identity
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.errors import repeated

_NONE = np.empty(0, dtype=np.int64)


def sync(
    context: Context,
    series: Series,
    window: TimeRange,
    priority: Sequence[str],
    *,
    scope: Scope = Scope.MISSING,
    recheck: bool = False,
    force: bool = False,
    run_id: str | None = None,
    listen: Listener = silent,
) -> SyncReport:
    """Fetches every candle of `window` that should exist and is not stored, from the providers of `priority` in order.

    `scope` selects what is requested. `recheck` also requests gaps that are not due and providers in cool-down: for
    manual requests, not for schedules. `force` writes candles that a refetch would refuse as another symbol's.
    Provider errors are part of the report; a StoreError (the database is unreachable or full) is raised, and committed
    batches are kept. SeriesChanged is raised before the first request.
    """
    began = time.monotonic()
    chain = make_chain(context, series, priority, heed_circuit=not recheck, force=force)
    identity = current_identity(context, series, chain.warnings.append)
    change = context.calendars.change_for(context.database, series, context.clock)
    if change is not None:
        chain.warnings.append(str(change))
    for message in chain.warnings:
        listen(Warned(series, message))
    plan, listings = _plan(context, series, identity, window, chain, scope, recheck, listen)
    work = _Work(context, series, chain, run_id, listen)
    listen(Planned(series, plan, chain.names))
    shown = work.run(plan, listings)
    if window.start < plan.window.start and (refuted := work.history.refuted(listings)):
        earlier = TimeRange(window.start, plan.window.start)
        more = _planned(context, series, work.identity, earlier, chain, scope, recheck)
        for name in refuted:
            chain.listed.pop(name, None)
        listen(Planned(series, more, chain.names))
        shown = work.run(more, shown)
        plan = _joined(more, plan)
    return work.report(plan, shown, window, time.monotonic() - began)


def dry_run(
    context: Context,
    series: Series,
    window: TimeRange,
    priority: Sequence[str],
    *,
    scope: Scope = Scope.MISSING,
    recheck: bool = False,
) -> DryRun:
    """Plans without fetching candles. May request a listing time that is not known yet."""
    chain = make_chain(context, series, priority)
    warnings: dict[str, None] = dict.fromkeys(chain.warnings)

    def collect(event: SyncEvent) -> None:
        if isinstance(event, Warned):
            warnings[event.message] = None

    with context.database.begin() as connection:
        found = ledger.registered(connection, series)
    identity = None if found is None else found.identity
    plan, _ = _plan(context, series, identity, window, chain, scope, recheck, collect)
    estimates = tuple((name, chain.estimate(name, plan)) for name in chain.names)
    return DryRun(plan, estimates, tuple(dict.fromkeys((*warnings, *chain.dropped.values()))))


def _plan(
    context: Context,
    series: Series,
    identity: int | None,
    window: TimeRange,
    chain: ProviderChain,
    scope: Scope,
    recheck: bool,
    listen: Listener,
) -> tuple[Plan, Listings]:
    def warn(message: str) -> None:
        chain.warnings.append(message)
        listen(Warned(series, message))

    listings = find_listings(
        context.database, series, chain, window.start, context.clock(), warn, refresh=recheck
    )
    for name in listings.claims:
        chain.listed[name] = listings.since(name)

    @repeated
    def is_covered(ts: int) -> bool:
        with context.database.begin() as connection:
            return bool(ledger.known(connection, identity, TimeRange(ts, ts + 1)).synced)

    start = min(window.end, listings.requested_from(window.start, grid_of(series), is_covered))
    plan = _planned(context, series, identity, TimeRange(start, window.end), chain, scope, recheck)
    if window and not plan.window:
        warn(_nothing_possible(series, window, listings, context.clock()))
    return plan, listings


@repeated
def _planned(
    context: Context,
    series: Series,
    identity: int | None,
    window: TimeRange,
    chain: ProviderChain,
    scope: Scope,
    recheck: bool,
) -> Plan:
    grid, now = grid_of(series), context.clock()
    possible = closed_window(window, grid, now, None)
    with context.database.begin() as connection:
        known = ledger.known(connection, identity, possible)
    return make_plan(
        series,
        possible,
        known,
        grid,
        batch_size_days=context.batch_size_days,
        eligible=frozenset(chain.names),
        now=None if recheck else now,
        scope=scope,
    )


def _joined(earlier: Plan, later: Plan) -> Plan:
    """Two plans of neighbouring windows as one, for the report."""
    return replace(
        later,
        window=TimeRange(earlier.window.start, later.window.end),
        expected=earlier.expected + later.expected,
        missing=earlier.missing + later.missing,
        missing_ranges=earlier.missing_ranges | later.missing_ranges,
        batches=(*earlier.batches, *later.batches),
    )


def _nothing_possible(series: Series, window: TimeRange, listings: Listings, now: int) -> str:
    if listings.earliest is not None and window.end <= listings.earliest:
        return f"nothing is expected of {series} in {window}: it was listed at {iso(listings.earliest)} ({listings})"
    return (
        f"nothing is expected of {series} in {window}: no candle of it is closed yet by this machine's clock, which"
        f" shows {iso(now - now % MICROS_PER_SECOND)}"
    )


class _Work:
    """One running sync: the lease, the commits, the totals."""

    def __init__(
        self,
        context: Context,
        series: Series,
        chain: ProviderChain,
        run_id: str | None,
        listen: Listener,
    ) -> None:
        self.context, self.series, self.grid, self.chain = context, series, grid_of(series), chain
        self.run_id, self.listen = run_id, listen
        # A gap is explained when every eligible provider has responded, not only those of this call.
        self.eligible = frozenset((*chain.names, *chain.dropped)) | context.eligible(series)
        self.identity: int | None = None
        self.history = HistoryStart(context.database, series, self._warn)
        self.declared = context.declared(series)
        self.succeeded = self.failed = self.candles = self.requests = self.outdated = self.withdrawn = 0
        self.pinned = 0
        self.while_closed = 0
        # Ordered sets.
        self.errors: dict[str, None] = {}
        self.warnings: dict[str, None] = dict.fromkeys(chain.warnings)
        self.reported: set[str] = set()

    @property
    def is_kept(self) -> bool:
        """Whether the series has candles: then "unknown symbol" from all providers is a response to record, not a
        mistyped symbol."""
        return self.history.oldest is not None

    def run(self, plan: Plan, listings: Listings) -> Listings:
        """Commits the batches of the plan. A plan without batches clears the last error of the series.

        Returns the listings, updated by the candles.
        """
        if not (self.chain.names or not plan.batches or self.is_kept):
            return listings
        identity = self._registered(plan)
        if identity is None:
            return listings
        self.identity = identity
        self.history.begin(plan, listings)
        with hold_lease(self.context.database, identity) as owner:
            error: str | None = None
            interrupted = False
            try:
                spans = plan.spans(self.chain.page_size)
                for batches, fetched in fetch_spans(
                    self.chain, plan, spans, self.context.max_concurrent_requests
                ):
                    self.history.note(fetched)
                    self._commit(identity, plan, batches, fetched)
                error = "; ".join(self.errors) if self.failed else self._found_nothing(plan)
            except BaseException as failure:
                interrupted, error = is_interruption(failure), str(failure) or type(failure).__name__
                raise
            finally:
                self._end(identity, owner, error, interrupted=interrupted)
        return self.history.remember(plan, listings)

    @repeated
    def _registered(self, plan: Plan) -> int | None:
        """The id of the series; None for a new one without batches, which is not registered."""
        with self.context.database.begin() as connection:
            found = ledger.registered(connection, self.series)
            if found is not None:
                return found.identity
            closed = format_dates(self.context.closed_dates(self.series))
            return ledger.register(connection, self.series, closed) if plan.batches else None

    @repeated
    def _end(self, identity: int, owner: str, error: str | None, *, interrupted: bool) -> None:
        """Ends the lease; an interruption does not change the status."""
        with self.context.database.begin() as connection:
            if interrupted:
                ledger.release_lease(connection, identity, owner)
            else:
                ledger.end_sync(connection, identity, owner, error)

    def _found_nothing(self, plan: Plan) -> str | None:
        """The error of a sync after which its whole range has no candle, whatever the responses; else None."""
        if self.candles or plan.scope is Scope.GAPS:  # a range of gaps may stay empty in a complete series
            return None
        window = self.history.expected(plan.window)
        missing, quiet = self._counted(window)
        if not missing or missing + quiet < self.grid.count(window):
            return None
        if is_quiet_end(self.context.database, self.series, window, self.context.closed):
            return None
        return f"no provider has any of {missing:,} {'candle' if missing == 1 else 'candles'}"

    @repeated
    def _counted(self, window: TimeRange) -> tuple[int, int]:
        """How many candles of the window are missing, and how many are no-trade intervals."""
        with self.context.database.begin() as connection:
            identity = self.identity or ledger.series_id(connection, self.series)
            known = ledger.known(connection, identity, window)
        missing, quiet = (
            sum(self.grid.count(part) for part in ranges)
            for ranges in (known.lacking(window), known.no_trade(window))
        )
        return missing, quiet

    def _commit(self, identity: int, plan: Plan, batches: Sequence[Batch], fetched: Fetched) -> None:
        self.requests += fetched.requests
        for message in (*fetched.warnings, *fetched.errors):
            if message not in self.reported:
                self.reported.add(message)
                self.listen(Warned(self.series, message))
        self.warnings.update(dict.fromkeys(fetched.warnings))
        self.errors.update(dict.fromkeys(fetched.errors))
        used = self.context.action_priority(self.series.instrument) if fetched.actions else ()
        given = Ingest.of(fetched, used)
        for batch in batches:
            if not fetched.recordable and not self.is_kept:
                self._count(batch, 0, batch.candles, (), fetched)
                continue
            if self._commit_batch(identity, plan, batch, fetched, given):
                given = replace(given, actions=())  # written with the first batch

    def _commit_batch(self, identity: int, plan: Plan, batch: Batch, fetched: Fetched, given: Ingest) -> bool:
        opens = np.concatenate([d.within(batch.window).candles.ts for d in given.deliveries] or [_NONE])
        window = self.history.cut(batch.window, int(opens.min()) if len(opens) else None)
        if not window:  # before the first candle of the symbol, unless a provider did not respond
            failed = any(response.evidence.outcome is Outcome.ERROR for response in fetched.responses)
            self._count(batch, 0, 0, (), replace(fetched, failed=failed))
            return False
        rules = Rules(
            eligible=self.eligible,
            strict=self.context.strict,
            tolerated=self.context.max_gap_minutes // self.series.timeframe.minutes,
            closed=self.context.closed(self.series, surroundings(window, self.grid)),
            declared=self.declared,
        )
        done = ingest(self.context.database, self.series, identity, window, given, rules, run_id=self.run_id)
        changed = done.inserted + done.updated
        self.while_closed += int(self.declared.contains(opens).sum())
        self.candles += changed
        self.outdated += done.outdated
        self.withdrawn += done.withdrawn
        self.pinned += done.pinned
        mine = (d for d in given.deliveries if len(d.within(window).candles))
        self._count(
            batch, changed, done.missing, tuple(dict.fromkeys(d.origin.provider for d in mine)), fetched
        )
        return True

    def _count(
        self, batch: Batch, candles: int, missing: int, names: tuple[str, ...], fetched: Fetched
    ) -> None:
        error = "; ".join(fetched.errors or self.chain.dropped.values()) if fetched.failed else None
        if fetched.failed:
            self.failed += 1
        else:
            self.succeeded += 1
        self.listen(BatchDone(self.series, batch.window, candles, missing, names, error))

    def _warn(self, message: str) -> None:
        self.warnings[message] = None
        self.listen(Warned(self.series, message))

    # --- the report

    def report(self, plan: Plan, listings: Listings, requested: TimeRange, seconds: float) -> SyncReport:
        """The report; an error after which another provider delivered the candles is a warning."""
        failed = self.failed
        if plan.batches and self.identity is None:  # no provider to request
            failed = len(plan.batches)
            self.errors.update(
                dict.fromkeys([*self.chain.dropped.values()] or self.chain.warnings or [self._no_provider()])
            )
        window = self.history.expected(plan.window)
        missing, quiet = self._counted(window)
        errors = tuple(self.errors)
        if not failed:
            nothing = self._found_nothing(plan) if plan.batches else None
            errors = (*errors, nothing) if nothing else errors
        cut = TimeRange(requested.start, max(requested.start, window.start))
        listing = str(listings) if listings.first and self.grid.count(cut) else None
        notes = [*self._notes(window, listing)]
        for note in notes:
            self.listen(Warned(self.series, note))
        warnings = (*self.warnings, *notes)
        if not failed:
            warnings = (*warnings, *self.chain.dropped.values(), *self.errors)
        return SyncReport(
            series=self.series,
            window=window,
            total_batches=len(plan.batches),
            successful_batches=self.succeeded,
            failed_batches=failed,
            total_candles=self.candles,
            expected=self.grid.count(window),
            missing=missing,
            no_trade=quiet,
            requests=self.requests,
            seconds=seconds,
            errors=errors if failed else tuple(e for e in errors if e not in self.errors),
            warnings=tuple(dict.fromkeys(warnings)),
            providers=self.chain.tallies(),
            outdated=self.outdated,
            withdrawn=self.withdrawn,
            listing=listing,
            pinned=self.pinned,
        )

    def _notes(self, window: TimeRange, listing: str | None) -> Iterator[str]:
        """The notes of the report, besides the warnings of the providers; `listing`: see `SyncReport`."""
        if listing is not None and window:
            yield f"history begins at {iso(window.start)}: {listing}"
        if self.outdated:
            yield (
                f"{self.outdated:,} stored candles differ from an older publication of the same provider, and are"
                " kept"
            )
        if self.pinned:
            yield (
                f"{self.pinned:,} stored candles that a person corrected differ from those of the provider, and are"
                f" kept: `fks-backfill corrections release {self.series}` releases them"
            )
        if self.while_closed:
            yield (
                f"{self.while_closed:,} candles were delivered for dates that the settings close, and are stored:"
                " remove the dates from `closed` if the market was open"
            )
        if self.withdrawn:
            yield f"{self.withdrawn:,} stored candles are no longer returned by any provider, and were removed"

    def _no_provider(self) -> str:
        return (
            f"no provider can serve {self.series}; see `fks-backfill series providers`"
            " and provider_priority in the settings"
        )
