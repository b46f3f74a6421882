"""The records of the gap ledger: the providers' responses, the gaps, and the recorded state of a window.

Belongs here: values, and what follows from them alone. Does not belong here: how they change (`settle`), how
they are checked (`reconcile`), how they are stored (`store.ledger`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import to_datetime, to_micros
from fks_backfill_dagster.ledger.gaps import GapStatus


class Outcome(StrEnum):
    """The outcome of a request for a candle that is missing."""

    ABSENT = "absent"  # the provider responded without the candle, or twice with the same invalid rows
    REJECTED = "rejected"  # some of its rows broke a rule and are in the quarantine
    REFUSED = "refused"  # it does not serve the candle: not entitled, unknown symbol, beyond its depth
    ERROR = "error"  # it did not respond
    UNDONE = "undone"  # no response: the batch that had delivered the candle was undone


@dataclass(frozen=True, slots=True)
class Evidence:
    """A provider's last response about a missing candle. `asked_at` in microseconds.

    `confirmed`: a provider that omits intervals without trades omitted it in two complete responses, with
    candles on both sides. `repeated`: it gave rows that broke a rule and were in the quarantine already.
    """

    provider: str
    asked_at: int
    outcome: Outcome
    detail: str = ""
    confirmed: bool = False
    repeated: bool = False

    @property
    def final(self) -> bool:
        """Whether an early retry would return the same response."""
        return self.outcome in (Outcome.ABSENT, Outcome.REFUSED)

    @property
    def text(self) -> str:
        """The detail without the provider's name, which errors begin with."""
        return self.detail.removeprefix(f"{self.provider}: ") or self.outcome.value

    def to_json(self) -> dict[str, object]:
        found: dict[str, object] = {
            "provider": self.provider,
            "asked_at": to_datetime(self.asked_at).isoformat(),
            "outcome": self.outcome.value,
        }
        if self.detail:
            found["detail"] = self.detail
        if self.confirmed:
            found["confirmed"] = True
        if self.repeated:
            found["repeated"] = True
        return found

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Evidence:
        return cls(
            found["provider"],
            to_micros(datetime.fromisoformat(found["asked_at"])),
            Outcome(found["outcome"]),
            found.get("detail", ""),
            found.get("confirmed", False),
            found.get("repeated", False),
        )


def latest(evidence: Iterable[Evidence]) -> tuple[Evidence, ...]:
    """The newest response of every provider, in the order of their first occurrence; of responses of the same
    time the last one with a detail."""
    newest: dict[str, Evidence] = {}
    for item in evidence:
        known = newest.get(item.provider)
        if known is None or (item.asked_at, bool(item.detail)) >= (known.asked_at, bool(known.detail)):
            newest[item.provider] = item
    return tuple(newest.values())


@dataclass(frozen=True, slots=True)
class LedgerGap:
    """One row of the ledger. `start` is the first missing open, `end` the close of the last one."""

    start: int
    end: int
    missing: int
    status: GapStatus
    attempts: int = 0
    evidence: tuple[Evidence, ...] = ()
    found_at: int | None = None
    next_attempt_at: int | None = None

    def declined(self) -> frozenset[str]:
        """The providers whose last response is final: they do not have its candles."""
        return frozenset(item.provider for item in self.evidence if item.final)

    def confirmed(self) -> frozenset[str]:
        """The providers that confirm the absence of its candles; see `Evidence`."""
        return frozenset(item.provider for item in self.evidence if item.confirmed)

    def rejected(self) -> frozenset[str]:
        """The providers that gave rows for its candles, all of which broke a rule."""
        return frozenset(
            item.provider for item in self.evidence if item.repeated or item.outcome is Outcome.REJECTED
        )

    def is_due(self, eligible: frozenset[str], now: int | None) -> bool:
        """See `Known.due`."""
        if self.status in (GapStatus.NO_TRADE, GapStatus.FILLED):
            return False
        if now is None or (self.next_attempt_at is not None and self.next_attempt_at <= now):
            return True
        if self.status is GapStatus.OPEN:
            return self.next_attempt_at is None or not eligible <= {item.provider for item in self.evidence}
        return not eligible <= self.declined()


@dataclass(frozen=True, slots=True)
class Known:
    """The state of one window in the ledger."""

    synced: RangeSet
    gaps: tuple[LedgerGap, ...]

    def ranges(self, *statuses: GapStatus) -> RangeSet:
        return RangeSet([TimeRange(g.start, g.end) for g in self.gaps if g.status in statuses])

    def missing(self, window: TimeRange) -> RangeSet:
        """Where candles can be missing without an explanation: never synced, or an open gap."""
        return (RangeSet([window]) - self.synced) | (self.ranges(GapStatus.OPEN) & RangeSet([window]))

    def due(self, window: TimeRange, eligible: frozenset[str], now: int | None) -> RangeSet:
        """The gaps that are to be requested: those whose next attempt is due, open ones for which an eligible
        provider was never requested, and explained ones about which it has not responded (a new key, a new
        provider). With `now` None all of them. No-trade intervals are not due: a new provider reopens them
        (`store.ledger.reopen`)."""
        ranges = [TimeRange(g.start, g.end) for g in self.gaps if g.is_due(eligible, now)]
        return RangeSet(ranges) & RangeSet([window])

    def lacking(self, window: TimeRange) -> RangeSet:
        """Where candles are missing: never synced, or a gap in any state but no_trade."""
        gaps = self.ranges(GapStatus.OPEN, GapStatus.UNAVAILABLE, GapStatus.TOLERATED)
        return (RangeSet([window]) - self.synced) | (gaps & RangeSet([window]))

    def no_trade(self, window: TimeRange) -> RangeSet:
        """The no-trade intervals, in which no candle is missing."""
        return self.ranges(GapStatus.NO_TRADE) & RangeSet([window])

    def absent(self, window: TimeRange) -> RangeSet:
        """Where no candle is stored: never synced, or any gap, explained or not."""
        return (RangeSet([window]) - self.synced) | (self.ranges(*GapStatus) & RangeSet([window]))
