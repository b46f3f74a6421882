"""Since when a symbol exists: what providers claim, what their candles show, and what follows for a sync.

A claim limits only the provider that makes it, and can be corrected later. Candles of the provider from before
it refute it: then it is none. A provider without a claim is silent: it is requested for what lies before the
claims of others, and where its candles begin behind an absence that is kept as an observation. Nothing is
expected before the first candle of any provider.

Belongs here: the rules, and asking providers for claims. Does not belong here: how claims are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_WEEK, Timeframe, iso, to_datetime, to_micros
from fks_backfill_dagster.pipeline.fallback import ProviderChain
from fks_backfill_dagster.providers.base import Cancelled, ProviderError, UnknownSymbol
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import Listing, ListingKind


@dataclass(frozen=True, slots=True)
class Listings:
    """What is known of a symbol's beginning: `claims` by eligible provider. `silent`: providers that make no
    claim, have not been requested for what lies before the claims, and could have it. `refuted`: claims that
    candles of their provider refute."""

    claims: Mapping[str, Listing]
    silent: frozenset[str] = frozenset()
    refuted: Mapping[str, Listing] = field(default_factory=dict)

    @property
    def first(self) -> str | None:
        """The provider with the earliest claim; of several one that makes it rather than one that shows it."""

        def order(name: str) -> tuple[int, bool, str]:
            claim = self.claims[name]
            return claim.listed_at, claim.kind is ListingKind.OBSERVATION, name

        return min(self.claims, key=order, default=None)

    @property
    def earliest(self) -> int | None:
        """The earliest claim; None where no provider makes one."""
        return None if self.first is None else self.claims[self.first].listed_at

    def since(self, name: str) -> int:
        """From when on a provider is requested: the month of a week before its claim.

        So it can refute a claim of the first day of a month, a candle that opens before the listing is
        requested, and an archive may hold earlier candles than the API; all that at hardly any cost.
        """
        return _first_requested(self.claims[name].listed_at)

    def shown(self, found: Mapping[str, int]) -> Listings:
        """With the first candles of providers that lack what lies before them."""
        observed = {name: Listing(ts, ListingKind.OBSERVATION, ts) for name, ts in found.items()}
        return Listings({**self.claims, **observed}, self.silent - observed.keys(), self.refuted)

    def without(self, refuted: Iterable[str]) -> Listings:
        """Without claims that were found to be wrong."""
        gone = {name: self.claims[name] for name in refuted}
        left = {name: claim for name, claim in self.claims.items() if name not in gone}
        return Listings(left, self.silent | gone.keys(), {**self.refuted, **gone})

    def requested_from(self, start: int, grid: Grid, is_covered: Callable[[int], bool]) -> int:
        """Where a sync that is asked from `start` begins to request; `is_covered`: whether an open is synced."""
        if self.earliest is None or self.silent:
            return start
        first, since = first_open(grid, self.earliest), min(self.since(name) for name in self.claims)
        if start >= max(first, since):
            return start
        # Covered: it was requested before, with what might lie before it.
        return max(start, first if is_covered(first) else since)

    def beginning(self, grid: Grid) -> int | None:
        """The open before which absent candles are not expected until one is found. What was observed in
        coarse candles may begin later in fine ones."""
        if self.first is None or self.earliest is None:
            # A refuted claim shows that there is a beginning, not where.
            return max((first_open(grid, claim.listed_at) for claim in self.refuted.values()), default=None)
        observed = self.claims[self.first].kind == ListingKind.OBSERVATION
        return first_open(grid, self.earliest + (MICROS_PER_WEEK if observed else 0))

    def __str__(self) -> str:
        assert self.first is not None
        claim = self.claims[self.first]
        verb = "lists it since" if claim.kind == ListingKind.CLAIM else "has it since"
        return f"{self.first} {verb} {iso(claim.listed_at)}"


def first_open(grid: Grid, listed_at: int) -> int:
    """The open of the first candle of a symbol: of the one that contains its listing, or else the next."""
    before = grid.previous_open(listed_at + 1)
    if before is not None and int(grid.closes(np.array([before]))[0]) > listed_at:
        return before
    following = grid.next_open(listed_at)
    return listed_at if following is None else following


def _first_requested(listed_at: int) -> int:
    day = to_datetime(listed_at - MICROS_PER_WEEK)
    return to_micros(datetime(day.year, day.month, 1, tzinfo=UTC))


def find_listings(
    database: Database,
    series: Series,
    chain: ProviderChain,
    start: int,
    now: int,
    warn: Callable[[str], None],
    *,
    ask_again: bool,
) -> Listings:
    """The claims of the chain's providers, asked for where they are not known.

    `ask_again`: known ones are asked for again where they cut off a part of a range that begins at `start`: a
    claim can be corrected. One that lies in the future is none. Problems are warned of; the provider then makes
    no claim. One that does not know the symbol is dropped from the chain.
    """
    with database.begin() as connection:
        known = ledger.listings(connection, series.symbol)

    @cache
    def oldest() -> dict[str, dict[Timeframe, int]]:
        with database.begin() as connection:
            return ledger.oldest_by_provider(connection, series.symbol)

    claims: dict[str, Listing] = {}
    refuted: dict[str, Listing] = {}
    silent = set()
    for name in chain.names:
        claim = known.get(name)
        if claim is not None and claim.listed_at > now:
            claim = None
        if claim is None or (ask_again and start < claim.listed_at):
            answer = _ask(database, series, chain, name, now, warn)
            # What it does not claim any more may still be what its candles show.
            claim = (
                answer
                if answer is not None
                else claim
                if claim and claim.kind == ListingKind.OBSERVATION
                else None
            )
        if name not in chain.names:
            continue
        # A claim that cuts nothing off need not be refuted.
        if claim is not None and (claim.listed_at <= start or not _is_refuted(claim, oldest().get(name, {}))):
            claims[name] = claim
            continue
        silent.add(name)
        if claim is not None:
            refuted[name] = claim
    found = Listings(claims)
    reaching = frozenset(name for name in silent if chain.reaches(name, found.earliest))
    return Listings(claims, reaching, refuted)


def _is_refuted(claim: Listing, oldest: Mapping[Timeframe, int]) -> bool:
    """Whether stored candles of its provider closed before it."""
    return any(ts + timeframe.micros <= claim.listed_at for timeframe, ts in oldest.items())


def _ask(
    database: Database,
    series: Series,
    chain: ProviderChain,
    name: str,
    now: int,
    warn: Callable[[str], None],
) -> Listing | None:
    try:
        listed_at = chain.listed_at(name)
    except UnknownSymbol as error:
        chain.drop(name, error)
        warn(str(error))
        return None
    except Cancelled:
        raise
    except ProviderError as error:  # asked again at the next sync
        warn(f"{error} (asked since when it has {series.symbol})")
        for message in chain.remember_failure(name, error):
            warn(message)
        return None
    if listed_at is None:
        return None
    if listed_at > now:
        warn(f"{name}: its claim that {series.symbol} will be listed at {iso(listed_at)} lies in the future")
        return None
    with database.begin() as connection:
        known = ledger.listings(connection, series.symbol).get(name)
        if known is not None and (
            known.listed_at == listed_at
            or (known.kind is ListingKind.OBSERVATION and known.listed_at < listed_at <= now)
        ):
            return known  # what its candles show is better than a claim that they refute
        ledger.remember_listing(connection, name, series.symbol, listed_at, ListingKind.CLAIM)
    return Listing(listed_at, ListingKind.CLAIM, now)


@dataclass(slots=True)
class Beginning:
    """Where the history of a series begins, as a sync finds out while it commits in ascending order.

    claimed: the open before which absent candles are not expected until one is found; None: there is no
    claim to go by. found: where what is expected begins.
    """

    claimed: int | None
    found: int | None = None

    def cut(self, start: int, end: int, first: int | None) -> int:
        """Where what is expected of `[start, end)` begins; `first` is its first candle that a provider gave."""
        if self.claimed is None or self.found is not None:
            return start
        if first is None and end <= self.claimed:
            return end
        self.found = max(start, self.claimed if first is None else min(first, self.claimed))
        return self.found
