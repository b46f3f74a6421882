"""What a sync has fetched: the result of one span from all providers, and numbers for the report.

Belongs here: the values and how they are recorded. Does not belong here: requests (`fallback`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fks_backfill_dagster.domain.actions import ReportedActions
from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery, Origin, RejectedRows
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.ranges import Instants, among
from fks_backfill_dagster.ledger.records import Evidence
from fks_backfill_dagster.ledger.settle import Response

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbers of candles: requested from a provider, delivered (valid ones), rejected, failed (no response)."""

    asked: int = 0
    delivered: int = 0
    rejected: int = 0
    failed: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(
            self.asked + other.asked,
            self.delivered + other.delivered,
            self.rejected + other.rejected,
            self.failed + other.failed,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Withdrawn:
    """Stored candles that neither their own provider nor any other one has any more."""

    origin: Origin
    opens: Instants


@dataclass(slots=True)
class Fetched:
    """The verified result of all providers for one span.

    failed: candles are missing about which no provider responded, or a refetch was refused. recordable: a
    provider responded, or may respond later; False for a symbol that no provider offers. requested: the opens of the
    span. seen: by provider, all its verified candles, neighbours of the span included. distrusted: providers whose
    candles contradict those of the span before. actions: the corporate actions in the responses.
    """

    deliveries: list[Delivery] = field(default_factory=list)
    rejected: list[RejectedRows] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    withdrawn: list[Withdrawn] = field(default_factory=list)
    requests: int = 0
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failed: bool = False
    recordable: bool = False
    requested: Instants = field(default_factory=lambda: _NONE)
    seen: dict[str, Candles] = field(default_factory=dict)
    distrusted: set[str] = field(default_factory=set)
    actions: list[ReportedActions] = field(default_factory=list)

    @property
    def delivered(self) -> Instants:
        """The opens of all deliveries, ascending. Deliveries have no common candle, and each ascends."""
        return np.sort(np.concatenate([_NONE, *(d.candles.ts for d in self.deliveries)]), kind="stable")

    def respond(self, evidence: Evidence, opens: Instants) -> None:
        """Records a provider's response about missing candles."""
        if len(opens):
            self.responses.append(Response(evidence, opens))

    def reject(self, delivery: Delivery, candles: Candles, reason: Reason) -> None:
        """Quarantines candles of a delivery."""
        if len(candles):
            self.rejected.append(RejectedRows.of(delivery.origin, reason, candles.sorted()))

    def see(self, name: str, candles: Candles) -> None:
        """Records verified candles of a provider, neighbours of the span included."""
        known = self.seen.get(name, Candles.empty())
        self.seen[name] = Candles.concat([known, candles.take(~among(candles.ts, known.ts))]).sorted()
