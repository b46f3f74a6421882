"""Listing times of symbols: the providers' claims, observations from candles, and their effect on a sync.

A claim limits only its own provider, and can be corrected later. A claim is refuted by earlier candles of its
provider, and then ignored. A provider without a claim is silent: it is requested for the time before the claims of
the others, and if its candles begin after an absence, that time is stored as an observation. Nothing is expected
before the first candle of any provider.

Belongs here: the rules, and requests for claims. Does not belong here: how claims are stored.
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
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain
from fks_backfill_dagster.providers.base import Cancelled, ProviderError, UnknownSymbol
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import Listing, ListingKind


@dataclass(frozen=True, slots=True)
class Listings:
    """The known listing times of a symbol: `claims` by eligible provider. `silent`: providers without a claim that
    have not been requested for the time before the claims, and could have candles there. `refuted`: claims that
    are refuted by candles of their provider."""

    claims: Mapping[str, Listing]
    silent: frozenset[str] = frozenset()
    refuted: Mapping[str, Listing] = field(default_factory=dict)

    @property
    def first(self) -> str | None:
        """The provider with the earliest claim; at the same time a claim comes before an observation."""

        def order(name: str) -> tuple[int, bool, str]:
            claim = self.claims[name]
            return claim.listed_at, claim.kind is ListingKind.OBSERVATION, name

        return min(self.claims, key=order, default=None)

    @property
    def earliest(self) -> int | None:
        """The earliest claim; None if there is none."""
        return None if self.first is None else self.claims[self.first].listed_at

    def since(self, name: str) -> int:
        """The start of requests to a provider: the first of the month a week before its claim.

        So the provider's candles can refute a claim on the first day of a month, the candle that contains the listing
        is requested, and an archive may contain earlier candles than the API. The extra cost is small.
        """
        return _first_requested(self.claims[name].listed_at)

    def shown(self, found: Mapping[str, int]) -> Listings:
        """With the first candles of providers that have none before them, as observations."""
        observed = {name: Listing(ts, ListingKind.OBSERVATION, ts) for name, ts in found.items()}
        return Listings({**self.claims, **observed}, self.silent - observed.keys(), self.refuted)

    def without(self, refuted: Iterable[str]) -> Listings:
        """Without claims that were refuted."""
        gone = {name: self.claims[name] for name in refuted}
        left = {name: claim for name, claim in self.claims.items() if name not in gone}
        return Listings(left, self.silent | gone.keys(), {**self.refuted, **gone})

    def requested_from(self, start: int, grid: Grid, is_covered: Callable[[int], bool]) -> int:
        """The start of the requests of a sync from `start`; `is_covered`: whether an open is synced."""
        if self.earliest is None or self.silent:
            return start
        first, since = first_open(grid, self.earliest), min(self.since(name) for name in self.claims)
        if start >= max(first, since):
            return start
        # Covered: it was requested before, with the candles that might precede it.
        return max(start, first if is_covered(first) else since)

    def beginning(self, grid: Grid) -> int | None:
        """The open before which absent candles are not expected until one is found. An observation from coarse
        candles may be too early for fine ones."""
        if self.first is None or self.earliest is None:
            # A refuted claim is only an upper bound of the beginning.
            return max((first_open(grid, claim.listed_at) for claim in self.refuted.values()), default=None)
        observed = self.claims[self.first].kind == ListingKind.OBSERVATION
        return first_open(grid, self.earliest + (MICROS_PER_WEEK if observed else 0))

    def __str__(self) -> str:
        assert self.first is not None
        claim = self.claims[self.first]
        verb = "lists it since" if claim.kind == ListingKind.CLAIM else "has it since"
        return f"{self.first} {verb} {iso(claim.listed_at)}"


def first_open(grid: Grid, listed_at: int) -> int:
    """The open of the first candle of a symbol: of the one that contains its listing, or otherwise the next."""
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
    refresh: bool,
) -> Listings:
    """The claims of the chain's providers, requested if they are unknown.

    `refresh`: known claims that cut off a part of a range from `start` on are requested again, since a claim can be
    corrected. A claim in the future is ignored. Errors become warnings; the provider then makes no claim. A provider
    that does not offer the symbol is dropped from the chain.
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
        if claim is None or (refresh and start < claim.listed_at):
            requested = _request_claim(database, series, chain, name, now, warn)
            observed = claim is not None and claim.kind is ListingKind.OBSERVATION
            # A withdrawn claim does not invalidate an observation.
            claim = requested if requested is not None or not observed else claim
        if name not in chain.names:
            continue
        # A claim that cuts nothing off does not have to be refuted.
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
    """Whether stored candles of the provider closed before its claim."""
    return any(ts + timeframe.micros <= claim.listed_at for timeframe, ts in oldest.items())


def _request_claim(
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
    except ProviderError as error:  # requested again by the next sync
        warn(f"{error} (requesting the listing time of {series.symbol})")
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
            return known  # an observation takes precedence over a claim that it refutes
        ledger.remember_listing(connection, name, series.symbol, listed_at, ListingKind.CLAIM)
    return Listing(listed_at, ListingKind.CLAIM, now)
