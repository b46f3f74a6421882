"""Outages of whole venues from the ledger: the affected symbols, and the requested providers.

Belongs here: which gaps count (open, unavailable and tolerated ones; a no-trade interval is no outage),
and the report of an outage. Read-only, without requests to providers.
Does not belong here: how an outage is recognised (`domain.outages`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.outages import VenueOutage, recognise
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import to_datetime
from fks_backfill_dagster.ledger.gaps import GapStatus
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.outages import Absences, GapState, absences, gap_states


@dataclass(frozen=True, slots=True)
class Outage:
    """`symbols` of `synced` symbols of a venue miss candles within `window`.

    `missing` is the number of absent candles that open in it, of all timeframes together. `statuses` and
    `providers` are the states of their gaps and the providers that were requested. `series` are the affected ones.
    """

    venue: str
    window: TimeRange
    symbols: tuple[str, ...]
    synced: int
    missing: int
    statuses: tuple[GapStatus, ...]
    providers: tuple[str, ...]
    series: tuple[Series, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        """`crypto: 2020-02-19 11:00 .. 17:00: 3 of 3 symbols miss 6 h; requested: binance`."""
        start, end = to_datetime(self.window.start), to_datetime(self.window.end)
        until = f"{end:%H:%M}" if start.date() == end.date() else f"{end:%Y-%m-%d %H:%M}"
        return (
            f"{self.venue}: {start:%Y-%m-%d %H:%M} .. {until}: {len(self.symbols):,} of {self.synced:,} symbols"
            f" miss {_length(self.window.duration)}; requested: {', '.join(self.providers) or 'none yet'}"
        )


def find_outages(
    database: Database,
    series: Sequence[Series],
    window: TimeRange,
    end_of: Callable[[Series], int | None] = lambda one: None,
) -> tuple[Outage, ...]:
    """The outages of the venues of `series` within `window`, cut to it; ascending by venue and time.

    From its `end_of` on no candle of a series is missing (`Catalog.end_of`). Ranges that were not synced yet are
    no outage. Four queries, for any number of series.
    """
    series = list(dict.fromkeys(series))
    known = _until_their_ends(absences(database, series, window), [end_of(one) for one in series])
    found = recognise(series, known.synced, known.missing)
    part_of = [_rows_within(one, series, known) for one in found]
    attempts = gap_states(
        database, np.unique(np.concatenate([known.gaps[:0], *(known.gaps[r] for r in part_of)])).tolist()
    )
    return tuple(
        _outage(
            one, series, known, rows, [attempts[gap] for gap in known.gaps[rows].tolist() if gap in attempts]
        )
        for one, rows in zip(found, part_of, strict=True)
    )


def _until_their_ends(known: Absences, ends: Sequence[int | None]) -> Absences:
    last = np.array([np.iinfo(np.int64).max if end is None else end for end in ends], dtype=np.int64)
    synced, missing = (
        replace(spans, ends=np.minimum(spans.ends, last[spans.owner]))
        for spans in (known.synced, known.missing)
    )
    left = missing.starts < missing.ends
    return Absences(synced.of(synced.starts < synced.ends), missing.of(left), known.gaps[left])


def _rows_within(outage: VenueOutage, series: Sequence[Series], known: Absences) -> Instants:
    """The gaps of an outage, as positions."""
    missing, window = known.missing, outage.window
    rows = np.flatnonzero((missing.starts < window.end) & (missing.ends > window.start))
    mine = [series[owner].instrument.venue == outage.venue for owner in missing.owner[rows].tolist()]
    within: Instants = rows[np.array(mine, dtype=bool)]
    return within


def _outage(
    outage: VenueOutage,
    series: Sequence[Series],
    known: Absences,
    rows: Instants,
    attempts: Sequence[GapState],
) -> Outage:
    starts = np.maximum(known.missing.starts[rows], outage.window.start)
    ends = np.minimum(known.missing.ends[rows], outage.window.end)
    missing = 0
    owners = np.unique(known.missing.owner[rows]).tolist()
    for owner in owners:
        mine, grid = known.missing.owner[rows] == owner, grid_of(series[owner])
        missing += int((grid.rank(ends[mine]) - grid.rank(starts[mine])).sum())
    statuses = {one.status for one in attempts}
    return Outage(
        outage.venue,
        outage.window,
        outage.symbols,
        outage.synced,
        missing,
        tuple(status for status in GapStatus if status in statuses),
        tuple(sorted({name for one in attempts for name in one.providers})),
        tuple(series[owner] for owner in owners),
    )


def _length(micros: int) -> str:
    """A duration in its two largest units: `6 h`, `2 d 3 h`, `40 min`; below a minute `0 min`."""
    minutes = micros // 60_000_000
    units = (("d", minutes // 1440), ("h", minutes // 60 % 24), ("min", minutes % 60))
    largest = next((at for at, (_, number) in enumerate(units) if number), 2)
    return " ".join(f"{number} {unit}" for unit, number in units[largest : largest + 2] if number) or "0 min"
