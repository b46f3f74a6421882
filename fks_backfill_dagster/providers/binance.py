"""Binance spot candles: the order of the sources of a range: monthly archives, daily archives, REST for the rest.

Belongs here: which files and pages are requested, and whether they agree. Does not belong here: one page
(`binance_klines.py`), one archive file (`binance_archive.py`), the validity of rows (`domain.quality`), the meaning of
a missing candle (`pipeline`).

Detection of wrong responses: neighbouring pages overlap by one candle, which must be equal in both. A page of another
market differs there and is requested again; if it still differs, nothing of the range is delivered. Candles missing
from a page are requested a second time and count as absent if both responses miss them: so a short or empty page is
repaired, and a real outage costs one more request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlencode

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.quality import verify
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange, among
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_SECOND, Timeframe
from fks_backfill_dagster.known_providers import BINANCE
from fks_backfill_dagster.providers.base import (
    Capabilities,
    Contradiction,
    Delivery,
    Estimate,
    FetchResult,
    Origin,
    ProviderOptions,
    Transport,
)
from fks_backfill_dagster.providers.binance_archive import ArchiveFile, Archives, Fetched, choose_files
from fks_backfill_dagster.providers.binance_klines import (
    KLINES_PATH,
    NAME,
    Klines,
    Page,
)
from fks_backfill_dagster.providers.http.errors import host_of
from fks_backfill_dagster.providers.http.limiter import Limiter, system_micros
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally, counted
from fks_backfill_dagster.providers.pages import contradicting, differing, joined

PAGE_SIZE = 1000
# Rounds of repeated requests for pages that contradict their neighbours.
_ROUNDS = 4
_MILLIS = 1000
# The duration of a download in an estimate; the archives have no rate limit.
_SECONDS_PER_FILE = 0.2


def page_ranges(window: TimeRange, step: int, size: int = PAGE_SIZE) -> list[TimeRange]:
    """Pages of at most `size` candles over a window of whole candles; neighbours share one candle."""
    count = window.duration // step
    if count == 0:
        return []
    return [
        TimeRange(window.start + first * step, window.start + min(first + size, count) * step)
        for first in range(0, max(count - 1, 1), size - 1)
    ]


class Binance:
    """Implements `Provider`; safe to call from several threads."""

    name = NAME
    capabilities = Capabilities(
        {AssetClass.CRYPTO: frozenset(Timeframe)}, page_size=PAGE_SIZE, confirms_absence=True
    )

    def __init__(
        self,
        options: ProviderOptions,
        pool: RequestPool,
        limiter: Limiter,
        clock: Callable[[], int] = system_micros,
    ) -> None:
        self._options = options
        self._clock = clock
        self._klines = Klines(options, pool, limiter, clock)
        self._archives = Archives(options, pool, limiter, clock)
        self._host = host_of(options.base_url)

    def missing_key(self) -> str | None:
        return None

    def instrument(self, series: Series) -> str:
        return symbol_of(series)

    def fetch(self, series: Series, window: TimeRange) -> FetchResult:
        with counted() as tally:
            return self._fetch(series, window, tally)

    def _fetch(self, series: Series, window: TimeRange, tally: Tally) -> FetchResult:
        plan = _Plan(symbol_of(series), series, self._opens(series, window))
        fetched = self._from_archives(plan, tally)
        deliveries = [one.delivery for one in fetched if one.delivery and len(one.delivery.candles)]
        archived = Candles.concat([delivery.candles for delivery in deliveries])
        if plan.missing(archived):
            covered = RangeSet(one.file.period for one in fetched if one.delivery)
            deliveries += self._from_rest(plan, archived, covered, tally)
        warnings = tuple(one.warning for one in fetched if one.warning)
        return FetchResult(tuple(deliveries), tally.count, warnings, tally.clocks)

    def estimate(self, series: Series, window: TimeRange) -> Estimate:
        """Assumes that every archive file that can be published exists and is complete."""
        plan = _Plan(symbol_of(series), series, self._opens(series, window))
        files: list[ArchiveFile] = []
        if self._archives.available:
            files = choose_files(plan.symbol, series.timeframe, plan.wanted, (), self._clock())
        remaining = plan.wanted - RangeSet(file.period for file in files)
        pages = sum(len(page_ranges(part, plan.step)) for part in remaining)
        a_minute = self._options.requests_per_minute or BINANCE.requests_per_minute
        return Estimate(2 * len(files) + pages, len(files) * _SECONDS_PER_FILE + pages * 60 / a_minute)

    def listed_at(self, series: Series) -> int | None:
        """The open of the first 1m candle, for every timeframe."""
        query: dict[str, str | int] = {
            "symbol": symbol_of(series),
            "interval": Timeframe.M1.value,
            "startTime": 0,
            "limit": 1,
        }
        everything = TimeRange(0, self._clock() + 60 * MICROS_PER_SECOND)
        page = self._klines.fetch([query], [everything], Tally())[0]
        return int(page.candles.ts[0]) if len(page.candles) else None

    def _opens(self, series: Series, window: TimeRange) -> Instants:
        """The opens on the grid in the window, except future ones."""
        end = min(window.end, max(self._clock(), window.start))
        return grid_of(series).opens(TimeRange(window.start, end))

    # --- archives

    def _from_archives(self, plan: _Plan, tally: Tally) -> list[Fetched]:
        """The candles of the plan that the archives have; cut to missing candles, so that deliveries do not overlap."""
        fetched: list[Fetched] = []
        missing = plan.wanted
        while missing and self._archives.available:
            files = choose_files(plan.symbol, plan.series.timeframe, missing, fetched, self._clock())
            if not files:
                break
            fetched += [_cut(one, missing) for one in self._archives.fetch(files, tally)]
            missing = plan.missing(Candles.concat([one.delivery.candles for one in fetched if one.delivery]))
        return fetched

    # --- REST

    def _from_rest(self, plan: _Plan, archived: Candles, covered: RangeSet, tally: Tally) -> list[Delivery]:
        """The missing candles; those missing from the first response too are requested a second time.

        covered: the periods of archive files, which count as the first response.
        """
        missing = plan.missing(archived)
        requested_at = self._clock()
        pages = self._pages(plan, missing, tally)
        blocks = _assemble(pages, missing)
        rows, seams = joined(blocks)
        now = min(page.server_time for page in pages)
        absent = plan.missing(rows)
        unconfirmed = (absent & plan.closed(now) & missing) - covered
        if unconfirmed:
            unconfirmed = self._shortened(plan, unconfirmed, tally)
            again = self._pages(plan, unconfirmed, tally)
            good = rows.take(~absent.contains(rows.ts))
            if any(differing(good, page.candles) for page in again):
                raise self._contradiction(plan)
            # A bad row in both responses is one row for the quarantine.
            blocks += [block.take(~_repeated(block, rows)) for block in _assemble(again, unconfirmed)]
            rows, seams = joined(blocks)
        query = _query(plan.symbol, plan.series.timeframe, missing.hull)
        source = f"{KLINES_PATH}?{urlencode(query)}"
        origin = Origin(NAME, Transport.REST, source, self._host, plan.symbol, requested_at)
        return [Delivery(rows, origin, seams)] if len(rows) else []

    def _shortened(self, plan: _Plan, unconfirmed: RangeSet, tally: Tally) -> RangeSet:
        """`unconfirmed` without the empty beginnings of long ranges, at the cost of one request for one row each.

        Before a listing, whole months are empty; this avoids a second request for all their pages.
        """
        long = [part for part in unconfirmed if part.duration > PAGE_SIZE * plan.step]
        queries = [_query(plan.symbol, plan.series.timeframe, part) | {"limit": 1} for part in long]
        empty = []
        for part, page in zip(long, self._klines.fetch(queries, long, tally), strict=True):
            first = int(page.candles.ts[0]) if len(page.candles) else part.end
            empty.append(TimeRange(part.start, first - (first - part.start) % plan.step))
        return unconfirmed - RangeSet(empty)

    def _pages(self, plan: _Plan, ranges: RangeSet, tally: Tally) -> list[Page]:
        """The pages over `ranges`; neighbours agree.

        Ranges closer than half a page share a request: the cost of a page does not depend on its size.
        """
        merged = ranges.merge_closer_than(PAGE_SIZE * plan.step // 2)
        windows = [window for part in merged for window in page_ranges(part, plan.step)]
        queries = [_query(plan.symbol, plan.series.timeframe, window) for window in windows]
        pages = self._klines.fetch(queries, windows, tally)
        for _ in range(_ROUNDS):
            wrong = contradicting([page.candles for page in pages])
            if not wrong:
                return pages
            again = self._klines.fetch([queries[i] for i in wrong], [windows[i] for i in wrong], tally)
            for index, page in zip(wrong, again, strict=True):
                pages[index] = page
        if contradicting([page.candles for page in pages]):
            raise self._contradiction(plan)
        return pages

    def _contradiction(self, plan: _Plan) -> Contradiction:
        return Contradiction(
            NAME,
            f"{self._klines.place} returned different values for the same candle of {plan.symbol} "
            f"{plan.series.timeframe}: some pages belong to another market",
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Plan:
    """One fetch: the symbol in Binance's notation, and the requested opens."""

    symbol: str
    series: Series
    opens: Instants

    @property
    def step(self) -> int:
        return self.series.timeframe.micros

    @property
    def wanted(self) -> RangeSet:
        return self.missing(Candles.empty())

    def missing(self, rows: Candles) -> RangeSet:
        """The candles without a valid row in `rows`.

        A row with a NaN or off the grid does not count, so that candle is requested from the next source; the bad row
        is delivered nevertheless, to be quarantined with its reason.
        """
        missing = self.opens
        if len(rows) and len(missing):
            window = TimeRange(int(missing[0]), int(missing[-1]) + self.step)
            good = verify(rows, window, grid_of(self.series), window.end).good
            missing = missing[~np.isin(missing, good.ts, assume_unique=True)]
        return RangeSet.from_arrays(missing, missing + self.step)

    def closed(self, now: int) -> RangeSet:
        """The range of candles that are closed at `now`."""
        end = grid_of(self.series).closed_end(now)
        return RangeSet([TimeRange(min(0, end), end)])


def symbol_of(series: Series) -> str:
    """`BTC/USDT` -> `BTCUSDT`, unless set in the settings."""
    return series.provider_symbol(NAME) or series.symbol.replace("/", "")


def _query(symbol: str, timeframe: Timeframe, window: TimeRange) -> dict[str, str | int]:
    """The query; both bounds are inclusive, in milliseconds."""
    return {
        "symbol": symbol,
        "interval": timeframe.value,
        "startTime": window.start // _MILLIS,
        "endTime": window.end // _MILLIS - 1,
        "limit": PAGE_SIZE,
    }


# --- columns --------------------------------------------------------------------------------------


def _cut(fetched: Fetched, missing: RangeSet) -> Fetched:
    """A file's delivery, restricted to missing candles, so that deliveries do not overlap."""
    if fetched.delivery is None:
        return fetched
    candles = fetched.delivery.candles
    kept = candles.take(missing.contains(candles.ts))
    return Fetched(fetched.file, fetched.outcome, fetched.delivery.with_candles(kept), fetched.warning)


def _assemble(pages: Sequence[Page], wanted: RangeSet) -> list[Candles]:
    """The wanted rows of each page; candles shared by pages only once, in the earlier page.

    Repeated rows inside one page remain: `domain.quality` checks them.
    """
    blocks: list[Candles] = []
    shared = np.empty(0, dtype=np.int64)
    for page in pages:
        fresh = page.candles.take(~among(page.candles.ts, shared))
        blocks.append(fresh.take(wanted.contains(fresh.ts)))
        shared = page.candles.ts
    return blocks


def _repeated(rows: Candles, before: Candles) -> NDArray[np.bool_]:
    """Which of `rows` are in `before` (ascending) with the same values; NaN equals NaN."""
    if not len(before):
        return np.zeros(len(rows), dtype=bool)
    index = np.minimum(np.searchsorted(before.ts, rows.ts), len(before) - 1)
    same = np.ones(len(rows), dtype=bool)
    for mine, theirs in zip(rows.columns(), before.take(index).columns(), strict=True):
        same &= (mine == theirs) | ((mine != mine) & (theirs != theirs))
    return same
