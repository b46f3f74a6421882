"""Candles with their origin: the type that is passed from a provider to the lineage of the database.

Belongs here: the origin of candles, and rejected rows with the same origin.
Does not belong here: whether candles are valid (`quality`), how they are requested or stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.ranges import Instants, TimeRange


class Transport(StrEnum):
    REST = "rest"
    ARCHIVE = "archive"
    DERIVED = "derived"  # aggregated by us from finer candles of the same provider
    CORRECTION = "correction"  # given by a person


MANUAL: Final = "manual"
"""The provider of candles that a person gave."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The content of one lineage row. All instants in microseconds.

    provider: its name. instrument: the symbol as the provider writes it.
    host: scheme, host and port of the server, such as `https://api.binance.com`.
    source: the path of the request or of the archive, without any key.
    requested_at: when it was requested. published_at: the publication time that an archive declares; None: it
        is as new as its request.
    sha256: the verified checksum of an archive; None for REST.
    author, reason: who gave a correction, and why; None for what a provider gave.
    """

    provider: str
    transport: Transport
    source: str
    host: str
    instrument: str
    requested_at: int
    published_at: int | None = None
    sha256: str | None = None
    author: str | None = None
    reason: str | None = None

    @property
    def as_of(self) -> int:
        """The instant of its values: of two publications of one provider the newer one is correct."""
        return self.requested_at if self.published_at is None else self.published_at


_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Candles of one origin, in the order of the response; ascending once verified.

    `seams`: the opens at which another response of the same request begins (its first row), ascending,
    without the first one: a response that belongs to another instrument begins and ends at seams.
    """

    candles: Candles
    origin: Origin
    seams: Instants = field(default_factory=lambda: _NONE)

    def with_candles(self, candles: Candles) -> Delivery:
        return replace(self, candles=candles)

    def within(self, window: TimeRange) -> Delivery:
        """The candles that open in `window`; needs `ts` ascending."""
        return replace(self, candles=self.candles.within(window))


@dataclass(frozen=True, slots=True, eq=False)
class RejectedRows:
    """Rows of one origin that broke a rule; for the quarantine.

    `owners`: for each row an instant inside the batch that it belongs to: the row's own open, or for a part of a
    derived candle the open of that candle.
    """

    origin: Origin
    reason: Reason
    candles: Candles
    owners: Instants

    @classmethod
    def of(cls, origin: Origin, reason: Reason, candles: Candles) -> RejectedRows:
        return cls(origin, reason, candles, candles.ts)

    def take(self, mask: NDArray[np.bool_]) -> RejectedRows:
        """The rows selected by `mask`."""
        return replace(self, candles=self.candles.take(mask), owners=self.owners[mask])

    def within(self, window: TimeRange) -> RejectedRows:
        """The rows that belong to `window`."""
        return self.take((self.owners >= window.start) & (self.owners < window.end))


def holding_rejected(opens: Instants, rejected: Iterable[RejectedRows], grid: Grid) -> NDArray[np.bool_]:
    """Which of these candles (`opens` ascending) own rejected rows, on the grid or off it."""
    ts = np.sort(np.concatenate([_NONE, *(part.owners for part in rejected)]))
    return np.searchsorted(ts, opens) < np.searchsorted(ts, grid.closes(opens))
