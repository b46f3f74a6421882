"""Since when a symbol exists: what providers claim, what their candles show, and what follows for a sync.

A claim limits only the provider that makes it, candles from before it refute it, and it can be corrected
later. Nothing is expected before the first candle of any provider; that is known once every eligible provider
has made a claim that its own candles bear out (an observation), or was requested for what lies before.

Belongs here: the rules, and asking providers for claims. Does not belong here: how claims are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import iso, to_datetime, to_micros
from fks_backfill_dagster.pipeline.fallback import ProviderChain
from fks_backfill_dagster.providers.base import Cancelled, ProviderError, UnknownSymbol
from fks_backfill_dagster.store import ledger
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import CLAIM, OBSERVATION, Listing


@dataclass(frozen=True, slots=True)
class Listings:
    """What is known of a symbol's beginning, by eligible provider. `claims` by name; `silent` make none."""

    claims: Mapping[str, Listing]
    silent: frozenset[str] = frozenset()

    @property
    def first(self) -> str | None:
        """The provider with the earliest claim."""
        return min(self.claims, key=lambda name: (self.claims[name].listed_at, name), default=None)

    @property
    def earliest(self) -> int | None:
        """The earliest claim; None where no provider makes one."""
        return None if self.first is None else self.claims[self.first].listed_at

    @property
    def settled(self) -> bool:
        """Whether nothing can lie before the earliest claim: every provider's candles have borne theirs out."""
        return not self.silent and all(one.kind == OBSERVATION for one in self.claims.values())

    def since(self, name: str) -> int | None:
        """From when on a provider is requested: the month of its claim, whose archive may hold earlier
        candles than its API, at no further cost."""
        claim = self.claims.get(name)
        return None if claim is None else month_start(claim.listed_at)

    def requested_from(self, start: int) -> int:
        """Where a sync that is asked from `start` begins to request."""
        if self.earliest is None or self.silent:
            return start
        if self.settled:
            return max(start, self.earliest)
        return max(start, min(month_start(one.listed_at) for one in self.claims.values()))

    def __str__(self) -> str:
        assert self.first is not None
        claim = self.claims[self.first]
        verb = "lists it since" if claim.kind == CLAIM else "has it since"
        return f"{self.first} {verb} {iso(claim.listed_at)}"


def month_start(instant: int) -> int:
    day = to_datetime(instant)
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

    `ask_again`: known ones are asked for again where they cut off more than their own month of a range that
    begins at `start`: a claim can be corrected. Problems are warned of; the provider then makes no claim. One
    that does not know the symbol is dropped from the chain.
    """
    with database.begin() as connection:
        known = ledger.listings(connection, series.symbol)
        oldest = ledger.oldest_by_provider(connection, series.symbol)
    claims: dict[str, Listing] = {}
    silent = set()
    for name in chain.names:
        claim = known.get(name)
        if claim is None or (ask_again and start < month_start(claim.listed_at)):
            answer = _ask(database, series, chain, name, now, warn)
            # What it does not claim any more may still be what its candles show.
            claim = answer if answer is not None else claim if claim and claim.kind == OBSERVATION else None
        if claim is not None and name in oldest and oldest[name] < claim.listed_at:
            claim = Listing(oldest[name], CLAIM)
        if name not in chain.names:
            continue
        if claim is None:
            silent.add(name)
        else:
            claims[name] = claim
    return Listings(claims, frozenset(silent))


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
        if known is not None and known.listed_at == listed_at:
            return known
        ledger.remember_listing(connection, name, series.symbol, listed_at, CLAIM)
    return Listing(listed_at, CLAIM)


@dataclass(slots=True)
class Beginning:
    """Where the history of a series begins, as a sync finds out while it commits in ascending order.

    `claimed`: the earliest claim, None: there is none to go by. Until a candle is found, absent candles before
    it are not expected.
    """

    claimed: int | None
    found: int | None = None
    doubtful: bool = field(default=False)

    def cut(self, start: int, end: int, first: int | None) -> int:
        """Where what is expected of `[start, end)` begins; `first` is its first candle that a provider gave."""
        if self.claimed is None or self.found is not None or start >= self.claimed:
            return start
        if first is None or first >= self.claimed:
            return min(self.claimed, end)
        self.found = first
        return first
