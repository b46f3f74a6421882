"""One range from one provider: in its own candles, or derived from finer ones.

    request_range ─> native | derived from native ─> ProviderAnswer

Belongs here: the choice, and what holds for both. Does not belong here: which provider is requested next
(`fallback`), comparison with stored candles (`splice`), storing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.pipeline.fetch.clocks import closed_by_both
from fks_backfill_dagster.pipeline.fetch.derived import request_derived
from fks_backfill_dagster.pipeline.fetch.native import request_native
from fks_backfill_dagster.pipeline.fetch.range_request import ProviderAnswer, RangeRequest
from fks_backfill_dagster.providers.base import Contradiction, Provider, ProviderError


def request_range(provider: Provider, request: RangeRequest) -> ProviderAnswer:
    """Requests the wanted candles from one provider.

    Raises ProviderError if the first request fails, and Contradiction if its responses still contradict one another
    after everything was requested again: which of them are correct is unknown. Raises ClocksDiffer if its clock and
    ours differ by more than MOST_APART, and wanted candles are closed by only one of them.
    """
    try:
        return _request(provider, request)
    except Contradiction as contradiction:
        spent = contradiction.requests
    try:
        answer = _request(provider, request)
    except ProviderError as error:
        error.requests += spent
        raise
    return replace(answer, requests=answer.requests + spent)


def _request(provider: Provider, request: RangeRequest) -> ProviderAnswer:
    parts = provider.capabilities.parts(request.series)
    if parts is request.series.timeframe:
        answer = request_native(provider, request, widen=False).answer
    else:
        answer = request_derived(provider, request, replace(request.series, timeframe=parts))
    lacking = missing_of(request.wanted, answer.candles.ts)
    if answer.clocks is None:
        return replace(answer, lacking=lacking)
    grid = grid_of(request.series)
    closed_end = grid.closed_end(closed_by_both(request, answer.clocks))
    pending = lacking[int(np.searchsorted(lacking, closed_end)) :]
    return replace(answer, lacking=lacking, pending=pending)
