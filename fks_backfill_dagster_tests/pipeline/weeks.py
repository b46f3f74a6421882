"""Weeks of operation in seconds: a simulated clock, and at every step the actions of Dagster's schedules and sensor.

A `World` is a real database and a real local market with several providers. `run` moves both clocks; a step
refreshes series with closed candles (at the polling interval of each timeframe) and fills due gaps, by the
functions that schedules and sensor call, and compares all stored candles with the market once a day. A check to
run after every step (checks, `status`) is passed in.

Does not belong here: the events of these weeks, and the assertions (test_weeks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import parse_qs, urlsplit

import numpy as np

from fks_backfill_dagster.domain.candles import PRICES, Candles
from fks_backfill_dagster.domain.freshness import polling_interval
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.partitions import Grain
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, MICROS_PER_HOUR, Timeframe, iso, to_micros
from fks_backfill_dagster.ledger.gaps import missing_of
from fks_backfill_dagster.ledger.records import LedgerGap
from fks_backfill_dagster.pipeline.context import Context
from fks_backfill_dagster.pipeline.events import Planned, SyncEvent
from fks_backfill_dagster.pipeline.plan import Scope
from fks_backfill_dagster.pipeline.refresh import is_due, refresh_range
from fks_backfill_dagster.pipeline.sync import sync
from fks_backfill_dagster.providers.base import Provider
from fks_backfill_dagster.providers.http.limiter import ProcessLimiter
from fks_backfill_dagster.providers.http.pool import RequestPool
from fks_backfill_dagster.providers.registry import build, resolve_options
from fks_backfill_dagster.simulator import LocalMarket
from fks_backfill_dagster.store import queries
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.due_gaps import Place, Wanted, due_places
from fks_backfill_dagster.store.reaches import reaches

PLACES_A_STEP = 10


@dataclass(frozen=True)
class Down:
    """A provider responds to every request with 503."""

    provider: str
    window: TimeRange


@dataclass(frozen=True)
class Outage:
    """A range that some providers have no candles of; `published`: when they publish them after all."""

    series: Series
    window: TimeRange
    providers: tuple[str, ...]
    published: int | None = None


@dataclass(frozen=True)
class Request:
    """A request for candles of a crypto pair in the market's journal; `at` is the simulated clock."""

    at: int
    provider: str
    symbol: str
    window: TimeRange


@dataclass
class World:
    """The series with their providers in order of priority, maintained since `since`.

    `keys`: the providers with a key, and from when on. All events are given beforehand. `requests`: the number of
    requests to the market; `asked`: those for candles of crypto pairs. `look`: called after every step.
    """

    database: Database
    market: LocalMarket
    series: Mapping[Series, Sequence[str]]
    since: int
    now: int
    keys: Mapping[str, int]
    outages: Sequence[Outage] = ()
    downs: Sequence[Down] = ()
    requests: int = 0
    asked: list[Request] = field(default_factory=list)
    look: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self._threads = ThreadPoolExecutor(4)
        self._pool = RequestPool(5)
        self._down: frozenset[str] = frozenset()
        self._keys = self._granted()
        self.context = self._context()
        for one in self.outages:
            for provider in one.providers:
                self.market.plant_outage(provider, one.window, one.series.symbol, published=one.published)

    def run(self, until: int, step: int = MICROS_PER_HOUR, *, refreshing: bool = True) -> None:
        """Runs steps up to, not including, `until`."""
        while self.now + step < until:
            self.now += step
            self.market.set_clock(self.now)
            self._apply_events()
            if refreshing:
                self.refresh(step)
            self.fill()
            self._read_journal()
            self.look()
            if self.now % MICROS_PER_DAY < step:
                for one in self.series:
                    self.compare(one, step)

    def close(self) -> None:
        self._threads.shutdown()
        self._pool.close()

    # Steps ------------------------------------------------------------------------------------------------

    def refresh(self, step: int) -> None:
        """Like the schedules and the op of a refresh, with a few series at once."""
        known = reaches(self.database, list(self.series))
        polled = [
            one
            for one in self.series
            if self.now % (every := polling_interval(one.timeframe)) < min(step, every)
        ]
        due = [one for one in polled if is_due(known.get(one), grid_of(one), self.now)]

        def refresh_one(one: Series) -> None:
            window = refresh_range(known.get(one), grid_of(one), one.timeframe, self.since, self.now)
            sync(self.context, one, window, self.series[one], listen=self._watch)

        list(self._threads.map(refresh_one, due))

    def due(self) -> list[Place]:
        wanted = {
            one: Wanted(
                self.since, Grain.YEAR if _is_yearly(one) else Grain.MONTH, self.context.eligible(one)
            )
            for one in self.series
        }
        return due_places(self.database, wanted, self.now, PLACES_A_STEP)

    def fill(self) -> None:
        """Like the sensor and the op of gap filling: the gaps of one partition of one series at a time."""
        for place in self.due():
            window = _partition(place)
            window = TimeRange(max(window.start, self.since), window.end)
            sync(
                self.context,
                place.series,
                window,
                self.series[place.series],
                scope=Scope.GAPS,
                listen=self._watch,
            )

    def _watch(self, event: SyncEvent) -> None:
        """Asserts that no stored candle is requested."""
        if isinstance(event, Planned):
            stored = queries.read_candles(self.database, event.series, event.plan.window).ts
            again = stored[event.plan.missing_ranges.contains(stored)]
            assert not len(again), f"{event.series}: {len(again)} stored candles are requested again"

    def _apply_events(self) -> None:
        """Applies changes of provider faults and keys."""
        down = frozenset(one.provider for one in self.downs if one.window.contains(self.now))
        if down != self._down:
            self.market.clear_faults()
            for provider in down:
                self.market.plant_fault(provider, "status", status=503, count=None)
            self._down = down
        if self._granted() != self._keys:
            self._keys = self._granted()
            self.context = self._context()

    def _granted(self) -> frozenset[str]:
        return frozenset(provider for provider, since in self.keys.items() if since <= self.now)

    def _read_journal(self) -> None:
        journal = self.market.journal()
        came = journal["total"] - self.requests
        self.requests = journal["total"]
        assert came <= len(journal["last"]), "the market keeps the last thousand"
        fresh = journal["last"][len(journal["last"]) - came :]
        found = (_request(self.now, one["provider"], one["target"]) for one in fresh)
        self.asked += [one for one in found if one is not None]

    def _context(self) -> Context:
        by_instrument = {one.instrument: names for one, names in self.series.items()}
        return Context(
            self.database,
            {name: self._provider(name) for names in self.series.values() for name in names},
            lambda: self.now,
            # A sync of hours asks for the order of the days, too: their splits are used in it.
            priority=lambda one: by_instrument[one.instrument],
        )

    def _provider(self, name: str) -> Provider:
        options = resolve_options(
            name,
            base_url=f"{self.market.url}/{'yahoo' if name == 'yfinance' else name}",
            key="any" if name in self._keys else None,
            retry_budget_seconds=0.001,
            timeout_seconds=5,
        )
        return build(name, options, self._pool, ProcessLimiter({}), lambda: self.now)

    # State --------------------------------------------------------------------------------------------------

    def gaps(self, series: Series) -> tuple[LedgerGap, ...]:
        return queries.ledger_gaps(self.database, series, TimeRange(self.since, self.now))

    def compare(self, series: Series, step: int) -> None:
        """Asserts that every expected candle is stored or in exactly one gap, that stored candles equal the market's,
        and that no available candle stays missing for longer than the age of its gap at that time, plus a step."""
        (reach,) = reaches(self.database, [series]).values()
        window = TimeRange(self.since, reach.synced_end)
        expected = grid_of(series).opens(window)
        stored = queries.read_candles(self.database, series, window)
        truth = self.truth(series, window)
        given = truth.take(np.isin(truth.ts, stored.ts))
        assert _same(stored, given), f"{series}: stored candles differ from the market's"
        gaps = self.gaps(series)
        lacking = [grid_of(series).opens(TimeRange(gap.start, gap.end)) for gap in gaps]
        assert [len(opens) for opens in lacking] == [gap.missing for gap in gaps]
        known = np.sort(np.concatenate([np.empty(0, np.int64), *lacking]))
        assert np.array_equal(known, missing_of(expected, stored.ts)), f"{series}: the ledger is wrong"
        for gap, opens in zip(gaps, lacking, strict=True):
            assert gap.found_at is not None
            assert gap.found_at <= self.now, "known by another clock"
            available = opens[np.isin(opens, truth.ts)]
            if len(available):
                since = max(self._fillable_since(series, available), gap.found_at)
                limit = max(MICROS_PER_HOUR, since - gap.found_at) + step
                assert self.now <= since + limit, f"{series}: available since {iso(since)}: {gap}"

    def lacking(self, series: Series) -> Instants:
        """The candles that a provider has by now and that are not stored."""
        window = TimeRange(self.since, self.now)
        return missing_of(
            self.truth(series, window).ts, queries.read_candles(self.database, series, window).ts
        )

    def _fillable_since(self, series: Series, opens: Instants) -> int:
        """The time since which the last of `opens` can be fetched: published, no provider down, keys present."""
        late = [
            one.published
            for one in self.outages
            if one.series == series
            and one.published is not None
            and RangeSet([one.window]).contains(opens).any()
        ]
        downs = [
            min(one.window.end, self.now)
            for one in self.downs
            if one.provider in self.series[series] and one.window.start <= self.now
        ]
        keys = [self.keys[name] for name in self.series[series] if name in self.keys]
        return max(at for at in (int(opens[-1]), *late, *downs, *keys) if at <= self.now)

    def truth(self, series: Series, window: TimeRange) -> Candles:
        """The candles that the eligible providers have of a series by now; all of them quote the same market."""
        names = self.context.eligible(series)
        both = Candles.concat(
            [self.market.truth(name, series.symbol, series.timeframe, window) for name in names]
        )
        _, first = np.unique(both.ts, return_index=True)
        return both.take(first)

    def filled_at(self, outage: Outage) -> int:
        """When the last candle of the outage was fetched."""
        fetched = [
            to_micros(one.fetched_at)
            for one in queries.batches(self.database, outage.series)
            if to_micros(one.range_start) < outage.window.end
            and to_micros(one.range_end) > outage.window.start
        ]
        return max(fetched)

    def requests_for(self, series: Series, window: TimeRange) -> list[Request]:
        """The requests of a crypto pair that intersect `window`."""
        symbols = (series.symbol.replace("/", ""), f"X:{series.symbol.replace('/', '').removesuffix('T')}")
        return [one for one in self.asked if one.symbol in symbols and one.window.intersect(window)]


def _is_yearly(series: Series) -> bool:
    return series.timeframe.micros >= Timeframe.H1.micros


def _partition(place: Place) -> TimeRange:
    """The month or year of a place."""
    start = datetime.fromisoformat(place.key).replace(tzinfo=UTC)
    year, month = divmod(start.year * 12 + start.month - 1 + (12 if _is_yearly(place.series) else 1), 12)
    return TimeRange.of(start, start.replace(year=year, month=month + 1))


def _same(one: Candles, other: Candles) -> bool:
    """Bit for bit; the volume of a derived candle is a sum of floats."""
    exact = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ts", *PRICES))
    return exact and np.allclose(one.volume, other.volume, rtol=1e-12, atol=0, equal_nan=True)


def _request(at: int, provider: str, target: str) -> Request | None:
    """A request for candles of a crypto pair; None for anything else."""
    url = urlsplit(target)
    if provider == "binance" and url.path.endswith("/klines"):
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if "endTime" not in query:  # a request for the listing time
            return None
        edges = TimeRange(int(query["startTime"]) * 1000, int(query["endTime"]) * 1000 + 1)
        return Request(at, provider, query["symbol"], edges)
    if provider == "polygon" and "/X:" in url.path.replace("%3A", ":"):
        parts = url.path.replace("%3A", ":").split("/")
        ticker, start, end = parts[parts.index("ticker") + 1], parts[-2], parts[-1]
        return Request(at, provider, ticker, TimeRange(int(start) * 1000, int(end) * 1000 + 1))
    return None
