"""Whether a refetch would overwrite stored candles with those of another symbol.

A refetch overwrites, so it is the only operation in which a wrong response destroys correct candles. If too many
of the compared candles differ, a sample of them is requested from another provider, which decides.

Belongs here: the evaluation, by arrays. Does not belong here: requests (`refetch`), writing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import difference
from fks_backfill_dagster.domain.delivery import Delivery, Transport
from fks_backfill_dagster.domain.ranges import Instants
from fks_backfill_dagster.pipeline.fetch.splice import only

SUSPICIOUS_SHARE = 0.05
SUSPICIOUS_CANDLES = 20
SAMPLE = 20


@dataclass(frozen=True, slots=True, eq=False)
class StoredRows:
    """Stored candles of a window with their lineage, one element each, ascending.

    instrument: the provider's symbol, "" if an older version did not record it. as_of: the instant of each
    value, in microseconds; see `Origin.as_of`.
    """

    candles: Candles
    provider: NDArray[np.object_]
    instrument: NDArray[np.object_]
    as_of: Instants

    def take(self, rows: NDArray[np.bool_]) -> StoredRows:
        """The rows of a mask."""
        return StoredRows(
            self.candles.take(rows), self.provider[rows], self.instrument[rows], self.as_of[rows]
        )

    def delivered_by(self, provider: str, instrument: str) -> Instants:
        """The opens of the candles that a provider gave for an instrument."""
        mine = (self.provider == provider) & (self.instrument == instrument)
        opens: Instants = self.candles.ts[mine.astype(bool)]
        return opens


@dataclass(frozen=True, slots=True, eq=False)
class Suspicion:
    """Too many compared candles differ: their number, the number compared, and the sample by which another provider
    decides, as stored and as given now."""

    differ: int
    compared: int
    stored: Candles
    given: Candles


def suspicion(
    stored: StoredRows, given: Delivery, tolerance: float, *, certain: bool = False
) -> Suspicion | None:
    """Whether the given candles differ from the stored ones as those of another symbol would.

    More than SUSPICIOUS_SHARE of the compared candles, and at least SUSPICIOUS_CANDLES, differ in a price by
    more than `tolerance`; `certain`: one is enough, since the stored candles beside the range contradict them.
    Candles from an older archive would not be written and are not compared.
    """
    if not len(stored.candles):
        return None
    written = stored.candles
    if given.origin.transport is Transport.ARCHIVE:
        newer = (stored.provider == given.origin.provider) & (stored.as_of > given.origin.as_of)
        written = written.take(~newer.astype(bool))
    mine, its = only(written, given.candles.ts), only(given.candles, written.ts)
    if not len(mine):
        return None
    differ = np.flatnonzero(difference(mine, its).max(axis=0) > tolerance)
    if not len(differ):
        return None
    few = len(differ) < SUSPICIOUS_CANDLES or len(differ) <= SUSPICIOUS_SHARE * len(mine)
    if few and not certain:
        return None
    # Neighbours from the middle: one request returns them all.
    first = max(0, len(differ) // 2 - SAMPLE // 2)
    sample = differ[first : first + SAMPLE]
    return Suspicion(len(differ), len(mine), mine.take(sample), its.take(sample))


def confirmed(suspected: Suspicion, other: Candles, tolerance: float) -> bool | None:
    """Whether another provider's candles agree with the given ones (True) or with the stored ones (False);
    None if it has none of the sample, or agrees with neither."""
    mine, given, its = (
        only(suspected.stored, other.ts),
        only(suspected.given, other.ts),
        only(other, suspected.stored.ts),
    )
    if not len(its):
        return None
    for_given = int((difference(given, its).max(axis=0) <= tolerance).sum())
    for_stored = int((difference(mine, its).max(axis=0) <= tolerance).sum())
    if for_given == for_stored:
        return None
    return for_given > for_stored
