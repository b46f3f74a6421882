"""validate(series, range): stored candles compared with those of other providers. It changes no candle.

    plan ─> estimate ─> blocks of stored candles ─> requests ─> compare ─> verdict

Candles are compared by sample unless all are requested. Blocks bound the memory, whatever the length of the range. No
candle is compared with the provider that delivered it.

Belongs here: the order of the steps. Does not belong here: the comparison (`domain.comparison`), the choice of
providers (`validators`), requests (`validation_requests`), the verdict (`validation_report`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fks_backfill_dagster.domain.comparison import STORED, compare, odd_ones
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.sampling import FEW, MOST_EDGES, SPREAD, Moves, sample_of, unit_of
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.eligible import Eligible
from fks_backfill_dagster.pipeline.fetch.chain import ChainOptions, ProviderChain
from fks_backfill_dagster.pipeline.stored_rows import stored_rows
from fks_backfill_dagster.pipeline.validation_blocks import StoredBlock, read_blocks
from fks_backfill_dagster.pipeline.validation_report import (
    NotComparable,
    SourceTally,
    ValidationEstimate,
    ValidationReport,
)
from fks_backfill_dagster.pipeline.validation_requests import (
    Advance,
    estimate_candles,
    ignore,
    request_candles,
)
from fks_backfill_dagster.pipeline.validators import Validators, choose_validators
from fks_backfill_dagster.store import queries, validations
from fks_backfill_dagster.store.validations import ValidationRecord

_NONE = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class ValidationOptions:
    """How a series is validated.

    providers: by list in order of preference, see `choose_validators`. share: of the candles, 0 < share <= 1; None: a
    sample of bounded size. heed_circuit: whether a provider in cool-down is left out; off for a manual choice.
    obstacle: why nothing is to be compared at all.
    """

    providers: Sequence[Sequence[str]]
    tolerance: float
    share: float | None = None
    heed_circuit: bool = True
    obstacle: str | None = None


class Validation:
    """One validation: its plan, made at once and without a request, and its conduct.

    stored: candles of the window. extent: from the first of them to the last. sample: the part of it to compare;
    complete: all of it. Without a provider or without candles `obstacle` says why there is nothing to compare.
    """

    def __init__(
        self, context: Context, series: Series, window: TimeRange, options: ValidationOptions
    ) -> None:
        self.context, self.series, self.window, self.options = context, series, window, options
        delivered = validations.delivered(context.database, series, window)
        self.stored = sum(one.candles for one in delivered)
        self.obstacle: str | None = options.obstacle or f"no candle of {series} is stored in {window}"
        self.validators = Validators(series, Eligible({}, ()))
        self.extent, self.sample, self.complete = TimeRange(0, 0), RangeSet(), False
        if delivered and options.obstacle is None:
            self.validators = choose_validators(context, series, delivered, options.providers)
            self.obstacle = self.validators.reason
        self.chain = _chain(context, self.validators, options)
        if self.obstacle is None:
            last = np.array([max(one.last for one in delivered)], dtype=np.int64)
            end = int(grid_of(series).closes(last)[0])
            self.extent = TimeRange(min(one.first for one in delivered), end)
            self.sample = self._sampled()
            self.complete = self.sample == RangeSet([self.extent])

    @property
    def warnings(self) -> tuple[str, ...]:
        return self.validators.chosen.warnings

    def estimate(self) -> dict[str, ValidationEstimate]:
        """The estimated cost by provider. Sends no request."""
        nothing = ValidationEstimate(0, 0, 0.0)
        found = dict.fromkeys(self.validators.chosen.providers, nothing)
        for block in self._blocks():
            for name, provider in self.validators.chosen.providers.items():
                wanted = missing_of(block.candles.ts, block.own[name])
                if len(wanted):
                    found[name] += estimate_candles(self.chain, name, provider, wanted)
        return found

    def run(self, advance: Advance = ignore) -> ValidationReport:
        """Requests and compares the sample. Errors of providers are part of the report."""
        counts, odd = Counter[str](), Counter[str]()
        tallies = {name: SourceTally(name) for name in self.validators.chosen.providers}
        for block in self._blocks():
            counts.update(self._compared(block, tallies, odd, advance))
        messages = (message for one in tallies.values() for message in one.warnings)
        return ValidationReport(
            series=self.series,
            window=self.window,
            compared_series=self.validators.series,
            tolerance=self.options.tolerance,
            validated_at=self.context.clock(),
            stored=self.stored,
            sampled=counts["sampled"],
            compared=counts["compared"],
            unverified=counts["unverified"],
            incomplete=counts["incomplete"],
            complete=self.complete,
            ranges=len(self.sample),
            sources=tallies,
            odd=odd,
            warnings=tuple(dict.fromkeys((*self.warnings, *messages))),
            obstacle=self.obstacle,
        )

    def _compared(
        self, block: StoredBlock, tallies: Mapping[str, SourceTally], odd: Counter[str], advance: Advance
    ) -> dict[str, int]:
        """Compares a block with every provider; returns numbers of candles."""
        seen, failed = _NONE, _NONE
        sources = {STORED: block.candles}
        for name, tally in tallies.items():
            wanted = missing_of(block.candles.ts, block.own[name])
            tally.miss(NotComparable.OWN, len(block.candles) - len(wanted))
            if not len(wanted):
                continue
            provider = self.validators.chosen.providers[name]
            found = request_candles(self.chain, name, provider, wanted, tally, advance)
            failed = np.union1d(failed, found.failed)
            if len(other := found.candles):
                tally.add(compare(block.candles, other, self.options.tolerance), other)
                sources[name], seen = other, np.union1d(seen, other.ts)
        odd.update(odd_ones(sources, self.options.tolerance))
        return {
            "sampled": len(block.candles),
            "compared": len(seen),
            "unverified": len(missing_of(failed, seen)),
            "incomplete": block.incomplete,
        }

    def _blocks(self) -> Iterator[StoredBlock]:
        return read_blocks(
            self.context.database,
            self.series,
            self.validators.series,
            self.sample,
            self.validators.chosen.providers,
        )

    def _sampled(self) -> RangeSet:
        """The part of the extent to compare: all of it if it is as short as a sample, or has few candles."""
        compared, share = self.validators.series, self.options.share
        is_short = self.extent.duration <= SPREAD * unit_of(compared.timeframe) or self.stored <= FEW
        if share == 1 or (share is None and is_short):
            return RangeSet([self.extent])
        database, moves = self.context.database, Moves.none()
        for candles in queries.iterate_candles(database, self.series, self.extent):
            moves = moves.after(candles)
        special = np.concatenate([moves.ts, self._edges_of_gaps()])
        return sample_of(compared, self.extent, share, special)

    def _edges_of_gaps(self) -> Instants:
        """The last open before and the first one after the longest gaps."""
        gaps = queries.ledger_gaps(self.context.database, self.series, self.extent)
        longest = sorted(gaps, key=lambda gap: gap.missing, reverse=True)[: MOST_EDGES // 2]
        return np.array([edge for gap in longest for edge in (gap.start - 1, gap.end)], dtype=np.int64)


def record(context: Context, report: ValidationReport) -> bool:
    """Stores the verdict of a validation; returns whether there is one. One without a verdict leaves no record: its
    zero discrepancies could be read as agreement."""
    if report.valid is None:
        return False
    verdict = ValidationRecord(
        window=report.window,
        stored=report.stored,
        compared=report.compared,
        compared_at=report.compared_series.timeframe,
        discrepancies=report.discrepancies,
        providers=report.providers,
        tolerance=report.tolerance,
        validated_at=report.validated_at,
    )
    validations.record(context.database, report.series, verdict)
    return True


def _chain(context: Context, validators: Validators, options: ValidationOptions) -> ProviderChain:
    """The providers with their state: as in a sync, a provider that fails repeatedly is not requested further."""
    database, series = context.database, validators.series
    chosen = ChainOptions(
        clock=context.clock,
        stored=lambda opens: queries.read_opens(database, series, opens),
        stored_within=lambda window: queries.read_candles(database, series, window),
        stored_rows=lambda window: stored_rows(database, series, window),
        tolerance=context.tolerance,
        closed=context.closed,
        declared=context.declared,
        eligible=validators.chosen.names,
    )
    circuit, heeds = context.circuit, options.heed_circuit
    return ProviderChain(series, validators.chosen, chosen, circuit, heed_circuit=heeds)
