"""The spans of a plan, fetched a few ahead and returned in order; each is compared with its neighbours.

A response of another instrument that fills a whole span is consistent inside. It is detected at its edges:
neighbouring spans have a common candle where neighbours were requested too, and a span that begins with a jump and
ends with the same jump back is not of the market around it. A suspect span is fetched once more; if it stays
suspect, the provider's candles are quarantined and the next providers are requested.

Belongs here: the order, the look-ahead and the comparison. Does not belong here: what one span is (`fallback`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.continuity import contradict, doubtful, foreign
from fks_backfill_dagster.domain.delivery import RejectedRows
from fks_backfill_dagster.domain.grid import Grid, grid_of
from fks_backfill_dagster.domain.quality import Reason
from fks_backfill_dagster.domain.ranges import Instants, TimeRange
from fks_backfill_dagster.ledger.records import Evidence, Outcome
from fks_backfill_dagster.ledger.settle import Response
from fks_backfill_dagster.pipeline.fetch.chain import ProviderChain
from fks_backfill_dagster.pipeline.fetch.fallback import fetch_span
from fks_backfill_dagster.pipeline.fetch.fetched import Fetched
from fks_backfill_dagster.pipeline.plan import Batch, Plan

Span = tuple[Batch, ...]

_NONE = np.empty(0, dtype=np.int64)


def fetch_spans(
    chain: ProviderChain, plan: Plan, spans: Sequence[Span], ahead: int
) -> Iterator[tuple[Span, Fetched]]:
    """The providers' candles of every span, in order; at most `ahead` + 2 spans are in memory."""
    remaining = iter(spans)
    waiting: deque[tuple[Span, Future[Fetched]]] = deque()
    chain.start()
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="fetch")

    def fill() -> None:
        while len(waiting) <= ahead and (span := next(remaining, None)) is not None:
            waiting.append((span, pool.submit(fetch_span, chain, span, plan)))

    try:
        before: Fetched | None = None
        fill()
        while waiting:
            span, future = waiting.popleft()
            fill()
            found = future.result()
            if before is not None or waiting:
                found = _checked(chain, plan, span, found, before, waiting)
            yield span, found
            before = found
    finally:
        chain.stop()
        # A fetcher may be in a retry: an interruption does not wait for it.
        pool.shutdown(wait=False, cancel_futures=True)


def _checked(
    chain: ProviderChain,
    plan: Plan,
    span: Span,
    found: Fetched,
    before: Fetched | None,
    waiting: deque[tuple[Span, Future[Fetched]]],
) -> Fetched:
    """The span to commit: as fetched, fetched once more, or without a suspect provider."""

    def following(count: int) -> Fetched | None:
        return waiting[count][1].result() if count < len(waiting) else None

    grid = grid_of(chain.series)
    if before is not None and all(_continues(before, found, name, grid) for name in found.seen):
        return found
    name = _suspect(found, before, following)
    if name is None:
        return _beside_a_jump(chain, plan, span, found, before, following)
    found = _again(chain, plan, span, found)
    name = _suspect(found, before, following)
    if name is not None and _disagree(following(0), found.seen[name], name):
        # Either this span or the next is wrong: the next one is fetched once more, too.
        following_span, future = waiting[0]
        renewed: Future[Fetched] = Future()
        renewed.set_result(_again(chain, plan, following_span, future.result()))
        waiting[0] = (following_span, renewed)
        name = _suspect(found, before, following)
    if name is None:
        return found
    after = following(0)
    proved_wrong = bool(_disagree(before, found.seen[name], name))
    if after is not None and not proved_wrong and _disagree(after, found.seen[name], name):
        after.distrusted.add(name)  # either of the two is wrong
    return _without(chain, plan, span, found, name)


def _continues(before: Fetched, found: Fetched, name: str, grid: Grid) -> bool:
    """Whether the span before proves that a provider's candles are of the same instrument, so that the next span is
    not needed."""
    if name in found.distrusted:
        return False
    left = _disagree(before, found.seen[name], name)
    if left is not None:
        return not left
    mine, theirs = _own(found, name), _own(before, name)
    return not len(mine) or (_adjacent(theirs, mine, grid) and not _jumps(theirs, mine, grid))


def _beside_a_jump(
    chain: ProviderChain,
    plan: Plan,
    span: Span,
    found: Fetched,
    before: Fetched | None,
    following: Callable[[int], Fetched | None],
) -> Fetched:
    """A span that begins or ends with a jump without a jump back: a real move, or the first or the last span is
    of another instrument. It is fetched once more; a provider whose candles differ then is not trusted."""

    grid = grid_of(chain.series)

    def jumps(one: Fetched) -> list[str]:
        edges = ((before, one), (one, following(0)))
        return [
            name
            for name in one.seen
            if any(_jumps(_own(left, name), _own(right, name), grid) for left, right in edges)
        ]

    names = jumps(found)
    if not names:
        return found
    again = _again(chain, plan, span, found)
    known = [name for name in names if name in again.seen]
    differ = [name for name in known if contradict(found.seen[name], again.seen[name], _TOLERANCE)]
    if not differ:
        kept = again if known == names else found
        kept.warnings += [
            f"{name}: its candles of {TimeRange(span[0].window.start, span[-1].window.end)}"
            " begin or end with a jump of 20 % or more: a split, a crash, or another symbol"
            for name in names
        ]
        return kept
    still = [name for name in jumps(again) if name in differ]
    return _without(chain, plan, span, again, still[0]) if still else again


def _jumps(before: Candles, after: Candles, grid: Grid) -> bool:
    """Whether adjacent candles `before` and `after` end and begin at different levels."""
    if not _adjacent(before, after, grid):
        return False
    edge = Candles.concat([before.take(slice(-_AROUND, None)), after.take(slice(0, _AROUND))])
    return bool(doubtful(edge, after.ts[:1]).any())


def _adjacent(before: Candles, after: Candles, grid: Grid) -> bool:
    if not (len(before) and len(after)):
        return False
    last, first = grid.rank(np.array([before.ts[-1], after.ts[0]])).tolist()
    return bool(0 < first - last <= _BESIDE)


def _again(chain: ProviderChain, plan: Plan, span: Span, found: Fetched) -> Fetched:
    again = fetch_span(chain, span, plan)
    again.requests += found.requests
    again.distrusted |= found.distrusted
    return again


def _suspect(
    found: Fetched, before: Fetched | None, following: Callable[[int], Fetched | None]
) -> str | None:
    """The provider whose candles of the span belong to another instrument, by comparison with the neighbours."""
    for name, mine in found.seen.items():
        after = following(0)
        left, right = _disagree(before, mine, name), _disagree(after, mine, name)
        if left or (name in found.distrusted and right is not False):
            return name
        if right and left is None:
            # No earlier span shows which of the two is wrong: the one after the next may.
            beyond = following(1)
            if after is None or not _disagree(beyond, after.seen[name], name):
                return name
        if _jumps_in_and_out(_own(before, name), _own(found, name), _own(after, name)):
            return name
    return None


def _disagree(other: Fetched | None, mine: Candles, name: str) -> bool | None:
    """Whether a neighbouring span has other values for a common candle; None: they have no common candle."""
    if other is None or name not in other.seen:
        return None
    return contradict(mine, other.seen[name], _TOLERANCE)


# Two responses of one sync about a closed candle differ at most by a correction of its last digits.
_TOLERANCE = 0.01

# The number of candles on either side of an edge from which the usual steps are measured.
_AROUND = 500

# Candles that are further apart (scattered ones of a fallback) may be at different levels.
_BESIDE = 3


def _own(found: Fetched | None, name: str) -> Candles:
    """The candles that a provider gave for a span, without its neighbours."""
    if found is None:
        return Candles.empty()
    blocks = [d.candles for d in found.deliveries if d.origin.provider == name]
    return blocks[0] if len(blocks) == 1 else Candles.concat(blocks).sorted()


def _jumps_in_and_out(before: Candles, mine: Candles, after: Candles) -> bool:
    if not (len(before) and len(mine) and len(after)):
        return False
    last, first = before.take(slice(-1, None)), after.take(slice(0, 1))
    seams: Instants = np.array([mine.ts[0], first.ts[0]])
    if not last.ts[0] < mine.ts[0] <= mine.ts[-1] < first.ts[0]:
        return False
    return bool(foreign(Candles.concat([last, mine, first]), seams).any())


def _without(chain: ProviderChain, plan: Plan, span: Span, found: Fetched, name: str) -> Fetched:
    """The span from the other providers; the candles of the suspect one are quarantined."""
    others = fetch_span(chain, span, plan, without=frozenset((name,)))
    others.requests += found.requests
    mine = [delivery for delivery in found.deliveries if delivery.origin.provider == name]
    others.rejected += [RejectedRows.of(d.origin, Reason.WRONG_SYMBOL, d.candles) for d in mine]
    count = sum(len(d.candles) for d in mine)
    text = "its candles do not continue those around them: they are quarantined as another symbol's"
    evidence = Evidence(name, chain.options.clock(), Outcome.REJECTED, text)
    others.responses.append(Response(evidence, found.requested))
    others.warnings.append(
        f"{name}: {count:,} of its candles are quarantined: they do not continue those around them"
    )
    others.recordable, others.failed = True, False
    return others
