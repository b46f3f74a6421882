"""The clock of a provider beside ours: which candles of an answer are closed by both.

Belongs here: the comparison, and the refusal of an answer that depends on it. Does not belong here: how a provider's
clock is read (`providers`).
"""

from __future__ import annotations

import numpy as np

from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.timeframe import MICROS_PER_MINUTE
from fks_backfill_dagster.pipeline.fetch.range_request import RangeRequest
from fks_backfill_dagster.pipeline.plan import GRACE
from fks_backfill_dagster.providers.base import Clocks, ClocksDiffer, FetchResult, Provider

# Up to this difference, candles that only one clock has closed are requested again later; beyond it, a response that
# depends on the difference is refused.
MOST_APART = 3 * MICROS_PER_MINUTE


def closed_by_both(request: RangeRequest, clocks: Clocks | None) -> int:
    """The instant before which a candle of a response must have closed: by our clock and by the provider's."""
    ours = request.now - GRACE
    return ours if clocks is None else min(ours, clocks.theirs)


def check_clocks(provider: Provider, request: RangeRequest, answer: FetchResult, grid: Grid) -> None:
    """Raises ClocksDiffer; see `request_range`.

    If the provider's clock is behind, it may not have candles that are closed by ours; if it is ahead, our clock may
    prevent a request for newer ones. A range that ends before both clocks does not depend on them.
    """
    clocks = answer.clocks
    if clocks is None or clocks.apart <= MOST_APART or not len(request.wanted):
        return
    newest = int(request.wanted[-1])
    following = grid.next_open(newest + 1)
    if clocks.theirs < clocks.ours:
        is_uncertain = newest >= grid.closed_end(clocks.theirs)
    elif following is None or following < grid.closed_end(request.now - GRACE):
        is_uncertain = False
    else:
        is_uncertain = int(grid.closes(np.array([following]))[0]) <= clocks.theirs
    if is_uncertain:
        error = ClocksDiffer(
            provider.name,
            f"{clocks}: which candles of {request.series} are closed is uncertain, so its response is refused: correct"
            " the clock of this machine, or request a range that ends before both",
        )
        error.requests = answer.requests
        raise error
