"""The records of the gap ledger: what each provider responded, the gaps, and what is known of a window.

Belongs here: values and the questions that they alone can answer. Does not belong here: how they change
(`settle`), how they are checked (`reconcile`), how they are stored (`store.ledger`).
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
    """How a provider responded to a request for a candle that is missing."""

    ABSENT = "absent"  # it responded without the candle, or twice with the same rows that broke a rule
    REJECTED = "rejected"  # some of what it responded broke a rule and is in the quarantine
    REFUSED = "refused"  # it will not give it: not entitled, unknown symbol, beyond its depth
    ERROR = "error"  # it did not respond


@dataclass(frozen=True, slots=True)
class Evidence:
    """A provider's last response about a missing candle. `asked_at` in microseconds.

    `confirmed`: a provider that omits intervals without trades lacked it in two complete responses, with
    candles on both sides. `repeated`: it gave rows that broke a rule, which were in the quarantine already.
    """

    provider: str
    asked_at: int
    outcome: Outcome
    detail: str = ""
    confirmed: bool = False
    repeated: bool = False

    @property
    def answered(self) -> bool:
        return self.outcome in (Outcome.ABSENT, Outcome.REJECTED)

    @property
    def final(self) -> bool:
        """Another request soon would bring the same response."""
        return self.outcome in (Outcome.ABSENT, Outcome.REFUSED)

    @property
    def said(self) -> str:
        """Its text without the provider's name, which errors begin with."""
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
    """The newest response of every provider, in the order in which they were first named; of responses of
    one time the last one that says more than its outcome."""
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

    def heard(self) -> frozenset[str]:
        """The providers that have responded finally that they do not give its candles."""
        return frozenset(word.provider for word in self.evidence if word.final)

    def confirmed(self) -> frozenset[str]:
        """The providers that confirm the absence of its candles; see `Evidence`."""
        return frozenset(item.provider for item in self.evidence if item.confirmed)

    def rejected(self) -> frozenset[str]:
        """The providers that gave rows for its candles, all of which broke a rule."""
        return frozenset(
            item.provider for item in self.evidence if item.repeated or item.outcome is Outcome.REJECTED
        )

    def is_due(self, able: frozenset[str], now: int | None) -> bool:
        """See `Known.due`."""
        if self.status in (GapStatus.NO_TRADE, GapStatus.FILLED):
            return False
        if now is None or (self.next_attempt_at is not None and self.next_attempt_at <= now):
            return True
        if self.status is GapStatus.OPEN:
            return self.next_attempt_at is None or not able <= {word.provider for word in self.evidence}
        return not able <= self.heard()


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger says of one window."""

    synced: RangeSet
    gaps: tuple[LedgerGap, ...]

    def ranges(self, *statuses: GapStatus) -> RangeSet:
        return RangeSet([TimeRange(g.start, g.end) for g in self.gaps if g.status in statuses])

    def missing(self, window: TimeRange) -> RangeSet:
        """Where candles can be missing that nothing explains: never synced, or an open gap."""
        return (RangeSet([window]) - self.synced) | (self.ranges(GapStatus.OPEN) & RangeSet([window]))

    def due(self, window: TimeRange, able: frozenset[str], now: int | None) -> RangeSet:
        """The gaps that are to be requested: when their time has come, or when a provider of `able` was
        never requested for an open one, or has not responded about one that is explained (a new key, a new
        provider). With `now` None all of them. No-trade intervals are not due: a new provider reopens them
        (`store.ledger.reopen`)."""
        ranges = [TimeRange(g.start, g.end) for g in self.gaps if g.is_due(able, now)]
        return RangeSet(ranges) & RangeSet([window])

    def lacking(self, window: TimeRange) -> RangeSet:
        """Where candles are absent that did trade: never synced, or a gap in any state but no_trade."""
        gaps = self.ranges(GapStatus.OPEN, GapStatus.UNAVAILABLE, GapStatus.TOLERATED)
        return (RangeSet([window]) - self.synced) | (gaps & RangeSet([window]))

    def quiet(self, window: TimeRange) -> RangeSet:
        """Where nothing traded, so that nothing is lacking."""
        return self.ranges(GapStatus.NO_TRADE) & RangeSet([window])

    def absent(self, window: TimeRange) -> RangeSet:
        """Where no candle is stored: never synced, or any gap, explained or not."""
        return (RangeSet([window]) - self.synced) | (self.ranges(*GapStatus) & RangeSet([window]))
