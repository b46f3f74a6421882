"""The candles of one provider for a validation: requested as in a sync, with its limits, circuit and retries.

Belongs here: the requests of a block and what they cost. Does not belong here: which candles are requested
(`validate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import parts_span
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange, before
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.settle import surroundings
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain, ProviderTask
from fks_backfill_dagster.pipeline.fetch.range_request import RangeRequest
from fks_backfill_dagster.pipeline.fetch.request import request_range
from fks_backfill_dagster.pipeline.validation_report import NotComparable, SourceTally, ValidationEstimate
from fks_backfill_dagster.providers.base import Cancelled, Provider, ProviderError, TooOld, UnknownSymbol

_MONTH = 28 * MICROS_PER_DAY

Advance = Callable[[int], None]
"""Called after each request with the number of its candles."""


def ignore(candles: int) -> None:
    """An `Advance` without effect."""


@dataclass(frozen=True, slots=True, eq=False)
class Requested:
    """The result for wanted candles: those that the provider has, ascending, and the opens whose request failed."""

    candles: Candles
    failed: Instants


def request_candles(
    chain: ProviderChain,
    name: str,
    provider: Provider,
    wanted: Instants,
    tally: SourceTally,
    advance: Advance = ignore,
) -> Requested:
    """Requests the wanted candles from one provider; `tally` counts those that it does not have, and the requests.

    Its errors are counted and not raised, except Cancelled.
    """
    task = chain.task(name, provider, wanted, first=False)
    for opens, _ in task.excluded:
        tally.miss(NotComparable.BEYOND, len(opens))
    found = [_NOTHING]
    for opens in _pieces(task, chain.series):
        if (message := _not_requested(chain, name)) is not None:
            found.append(_unanswered(opens, f"{name}: {message}", tally))
            continue
        try:
            found.append(_request(chain, task, opens, tally))
        except Cancelled:
            raise
        except ProviderError as error:
            found.append(_failed(chain, task, opens, error, tally))
        advance(len(opens))
    candles = Candles.concat([one.candles for one in found]).sorted()
    failed = np.concatenate([one.failed for one in found])
    return Requested(candles.take(np.isin(candles.ts, wanted)), failed)


_NOTHING = Requested(Candles.empty(), np.empty(0, dtype=np.int64))


def estimate_candles(
    chain: ProviderChain, name: str, provider: Provider, wanted: Instants
) -> ValidationEstimate:
    """The cost of `request_candles`; sends no request."""
    task, grid = chain.task(name, provider, wanted, first=False), grid_of(chain.series)
    native = chain.series.at(provider.capabilities.parts(chain.series))
    requests, seconds = 0, 0.0
    for opens in _pieces(task, chain.series):
        window = _window(opens, grid)
        one = provider.estimate(native, window if native == chain.series else parts_span(grid, window))
        requests, seconds = requests + one.requests, seconds + one.seconds
    return ValidationEstimate(requests, len(task.wanted), seconds)


def _pieces(task: ProviderTask, series: Series) -> list[Instants]:
    """The wanted opens by request: neighbours that one page covers, or those of a month where a page covers less.

    A month is what archives contain. A failed request costs its piece only.
    """
    opens = task.wanted
    if not len(opens):
        return []
    length = task.provider.capabilities.candles_a_request(series) * series.timeframe.micros
    if length < _MONTH:
        pages = opens.astype("datetime64[us]").astype("datetime64[M]").astype(np.int64)
    else:
        pages = (opens - opens[0]) // length
    edges = np.flatnonzero((np.diff(pages) != 0) | (np.diff(opens) > length)) + 1
    return np.split(opens, edges)


def _not_requested(chain: ProviderChain, name: str) -> str | None:
    return chain.dropped.get(name) or chain.cool_down(name)


def _request(chain: ProviderChain, task: ProviderTask, opens: Instants, tally: SourceTally) -> Requested:
    options, series = chain.options, chain.series
    window = _window(opens, grid_of(series))
    parts = series.at(task.provider.capabilities.parts(series))
    request = RangeRequest(
        series,
        opens,
        window,
        task.requested_at,
        task.since,
        closed=options.closed(parts, surroundings(window, grid_of(parts))),
        declared=options.declared(parts),
        tolerance=options.tolerance,
    )
    answer = request_range(task.provider, request)
    tally.requests += answer.requests
    tally.warnings |= dict.fromkeys(f"{task.name}: {message}" for message in answer.warnings)
    tally.warnings |= dict.fromkeys(chain.remember_success(task.name))
    lacking = missing_of(opens, answer.candles.ts)
    if answer.error is None:
        tally.miss(NotComparable.ABSENT, len(lacking))
        return Requested(answer.candles, _NOTHING.failed)
    # Whether it lacks them is not known: the request that would have confirmed it failed.
    tally.fail(answer.error, len(lacking))
    return Requested(answer.candles, lacking)


def _failed(
    chain: ProviderChain, task: ProviderTask, opens: Instants, error: ProviderError, tally: SourceTally
) -> Requested:
    """Counts a failed request; where only older candles are not available, the newer ones are requested."""
    tally.requests += error.requests
    if isinstance(error, TooOld) and len(older := before(opens, error.since)):
        chain.remember_depth(task.name, error.since)
        newer = opens[len(older) :]
        tally.miss(NotComparable.BEYOND, len(older))
        return request_candles(chain, task.name, task.provider, newer, tally)
    if isinstance(error, UnknownSymbol):
        chain.drop(task.name, error)
    else:
        tally.warnings |= dict.fromkeys(chain.remember_failure(task.name, error))
    return _unanswered(opens, str(error), tally)


def _unanswered(opens: Instants, error: str, tally: SourceTally) -> Requested:
    tally.fail(error, len(opens))
    return Requested(Candles.empty(), opens)


def _window(opens: Instants, grid: Grid) -> TimeRange:
    return TimeRange(int(opens[0]), int(grid.closes(opens[-1:])[0]))
