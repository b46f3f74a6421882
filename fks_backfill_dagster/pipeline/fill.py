"""Gap filling: a sync of the gaps of a series only, and the outcome for each gap.

Does not belong here: which gaps are due (`store.due_gaps`), when gaps are filled (the user interfaces).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.ledger.records import Known, LedgerGap, latest
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.events import Listener, silent
from fks_backfill_dagster.pipeline.gaps import find_gaps
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.report import SyncReport
from fks_backfill_dagster.pipeline.settings_changes import reopen
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.store.coverage import PartState, part_states
from fks_backfill_dagster.store.queries import what_is_known


@dataclass(frozen=True, slots=True)
class FilledGap:
    """The outcome for one gap: `gap` as it was before, `left` the ledger rows that remain of it.

    `providers` delivered its candles, the largest share first.
    """

    gap: LedgerGap
    filled: int
    left: tuple[LedgerGap, ...]
    providers: tuple[str, ...]

    @property
    def success(self) -> bool:
        """Whether no candle of it is missing any more."""
        return all(row.status is GapStatus.NO_TRADE for row in self.left)

    @property
    def error(self) -> str | None:
        """Why candles of it are still missing: the providers' last responses."""
        if self.success:
            return None
        responses = latest(item for row in self.left for item in row.evidence)
        text = "; ".join(f"{item.provider}: {item.text}" for item in responses)
        return text or "no provider could be requested"

    @property
    def coverage(self) -> float:
        """The share of its candles that was filled."""
        return self.filled / self.gap.missing


@dataclass(frozen=True, slots=True)
class FillReport:
    """The result of filling the gaps of one series."""

    sync: SyncReport
    gaps: tuple[FilledGap, ...]

    @property
    def complete(self) -> bool:
        return all(one.success for one in self.gaps)


def fill_gaps(
    context: Context,
    series: Series,
    priority: Sequence[str],
    start: int | None = None,
    end: int | None = None,
    *,
    listen: Listener = silent,
) -> FillReport:
    """Requests every gap that opens in `[start, end)`, due or not; without bounds all gaps of the series.

    Candles that closed since the last sync are not in the ledger yet: a refresh fetches them. History that was never
    synced is pending. Raises like `sync`.
    """
    reopen(context, [series])
    found = find_gaps(context.database, series, context.clock(), start or 0, end)
    wanted = [one.row for one in found if one.asked and one.row.status is not GapStatus.NO_TRADE]
    if not wanted:
        at = context.clock()
        return FillReport(SyncReport(series, TimeRange(at, at)), ())
    window = TimeRange(wanted[0].start, wanted[-1].end)
    report = sync(context, series, window, priority, scope=Scope.GAPS, recheck=True, listen=listen)
    windows = {str(number): TimeRange(gap.start, gap.end) for number, gap in enumerate(wanted)}
    parts = part_states(context.database, series, windows)
    known = what_is_known(context.database, series, window)
    return FillReport(
        report, tuple(_outcome(gap, parts[key], known) for key, gap in zip(windows, wanted, strict=True))
    )


def _outcome(gap: LedgerGap, part: PartState, known: Known) -> FilledGap:
    left = tuple(row for row in known.gaps if row.start < gap.end and row.end > gap.start)
    return FilledGap(gap, part.stored, left, tuple(part.providers))
