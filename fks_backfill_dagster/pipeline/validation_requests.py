"""The candles of one provider for a validation: requested as in a sync, with its limits, circuit and retries.

Belongs here: the requests of a block and what they cost. Does not belong here: which candles are requested
(`validate`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.derive import parts_span
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.ranges import Instants, TimeRange, before, inside
from fks_backfill_dagster.ledger.settle import surroundings
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain, ProviderTask
from fks_backfill_dagster.pipeline.fetch.range_request import RangeRequest
from fks_backfill_dagster.pipeline.fetch.request import request_range
from fks_backfill_dagster.pipeline.validation_report import NotComparable, SourceTally, ValidationEstimate
from fks_backfill_dagster.providers.base import Cancelled, Provider, ProviderError, TooOld, UnknownSymbol

Advance = Callable[[int], None]
"""Called after each request with the number of its candles."""


def ignore(candles: int) -> None:
    """An `Advance` without effect."""


def request_candles(
    chain: ProviderChain,
    name: str,
    provider: Provider,
    wanted: Instants,
    tally: SourceTally,
    advance: Advance = ignore,
) -> Candles:
    """The wanted candles that the provider has, ascending; `tally` counts the others and the requests.

    Its errors are counted and not raised, except Cancelled.
    """
    task = chain.task(name, provider, wanted, first=False)
    for opens, _ in task.excluded:
        tally.miss(NotComparable.BEYOND, len(opens))
    found = []
    for hull in task.hulls(chain.series):
        opens = inside(task.wanted, hull)
        if (message := _not_requested(chain, name)) is not None:
            tally.fail(f"{name}: {message}", len(opens))
            continue
        try:
            candles = _request(chain, task, opens, tally)
        except Cancelled:
            raise
        except ProviderError as error:
            candles = _failed(chain, task, opens, error, tally)
        found.append(candles)
        advance(len(opens))
    got = Candles.concat(found).sorted()
    return got.take(np.isin(got.ts, wanted))


def estimate_candles(
    chain: ProviderChain, name: str, provider: Provider, wanted: Instants
) -> ValidationEstimate:
    """The cost of `request_candles`; sends no request."""
    task, grid = chain.task(name, provider, wanted, first=False), grid_of(chain.series)
    native = chain.series.at(provider.capabilities.parts(chain.series))
    requests, seconds = 0, 0.0
    for hull in task.hulls(chain.series):
        window = _window(inside(task.wanted, hull), grid)
        one = provider.estimate(native, window if native == chain.series else parts_span(grid, window))
        requests, seconds = requests + one.requests, seconds + one.seconds
    return ValidationEstimate(requests, len(task.wanted), seconds)


def _not_requested(chain: ProviderChain, name: str) -> str | None:
    return chain.dropped.get(name) or chain.cool_down(name)


def _request(chain: ProviderChain, task: ProviderTask, opens: Instants, tally: SourceTally) -> Candles:
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
    lacking = len(np.setdiff1d(opens, answer.candles.ts))
    if answer.error is not None:
        # Whether it lacks them is not known: the request that would have confirmed it failed.
        tally.fail(answer.error, lacking)
    else:
        tally.miss(NotComparable.ABSENT, lacking)
    return answer.candles


def _failed(
    chain: ProviderChain, task: ProviderTask, opens: Instants, error: ProviderError, tally: SourceTally
) -> Candles:
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
    tally.fail(str(error), len(opens))
    return Candles.empty()


def _window(opens: Instants, grid: Grid) -> TimeRange:
    return TimeRange(int(opens[0]), int(grid.closes(opens[-1:])[0]))
