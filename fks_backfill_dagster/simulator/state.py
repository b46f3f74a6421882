"""The state of a local market: its data, clock, outages, faults, limits, journal and prepared responses."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import Instants, RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import replay
from fks_backfill_dagster.simulator.absence import missing_rows
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.clock import Clock, Meter
from fks_backfill_dagster.simulator.closing import ClosingMarket, SyntheticClosing
from fks_backfill_dagster.simulator.config import Absence, MarketConfig, Outage
from fks_backfill_dagster.simulator.faults import Faults
from fks_backfill_dagster.simulator.frames import Frame
from fks_backfill_dagster.simulator.journal import Journal
from fks_backfill_dagster.simulator.market import NO_HALT, Market, SyntheticMarket, closed
from fks_backfill_dagster.simulator.sessions import trading_hours
from fks_backfill_dagster.simulator.splits import Split, of_symbol

_PREPARED_BYTES = 2 << 30


class Prepared:
    """Responses built in advance, by key; the least recently used are evicted beyond the memory budget."""

    def __init__(self, budget: int) -> None:
        self._lock = threading.Lock()
        self._budget = budget
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()
        self._size = 0

    def get(self, key: Hashable) -> bytes | None:
        with self._lock:
            if (body := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
            return body

    def put(self, key: Hashable, body: bytes) -> None:
        with self._lock:
            self._size += len(body) - len(self._kept.pop(key, b""))
            self._kept[key] = body
            while self._size > self._budget and len(self._kept) > 1:
                self._size -= len(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._size = 0


@dataclass(frozen=True, slots=True)
class Instrument:
    """A traded instrument: asset class, and the market's name of it."""

    asset_class: AssetClass
    name: str


CLOSING: tuple[tuple[str, AssetClass], ...] = (
    ("polygon", AssetClass.FOREX),
    ("polygon", AssetClass.STOCKS),
    ("yahoo", AssetClass.STOCKS),
    ("alphavantage", AssetClass.STOCKS),
    ("oanda", AssetClass.FOREX),
)
"""Providers and asset classes other than crypto."""

CRYPTO = ("binance", "polygon", "coingecko")


class Sandbox:
    """State shared by wire formats and control routes. Raises ReplayError on a bad directory."""

    def __init__(self, config: MarketConfig) -> None:
        self.config = config
        self.clock = Clock(config.now, runs=config.clock_runs)
        markets = _synthetic(config) if config.replay is None else replay.load(config.replay)
        self.crypto: Mapping[str, Market] = markets.crypto
        self._closing: Mapping[tuple[str, AssetClass], ClosingMarket] = markets.closing
        self.splits = (*markets.splits, *config.splits)
        self.faults = Faults(config.seed)
        self.journal = Journal()
        self.prepared = Prepared(_PREPARED_BYTES)
        self.meters = {
            "binance": Meter(
                config.weight_per_minute if config.limits else None, config.ban_after, config.ban_seconds
            ),
            "polygon": Meter(config.polygon_per_minute),
            "yahoo": Meter(config.yahoo_per_minute),
            "alphavantage": Meter(config.alphavantage_per_day, seconds=86_400),
            "alphavantage_burst": Meter(config.alphavantage_per_second, seconds=1),
            "oanda": Meter(config.oanda_per_second, seconds=1),
            "coingecko": Meter(config.coingecko_per_minute),
        }
        self._outages = list(config.outages)

    @property
    def replays(self) -> bool:
        return self.config.replay is not None

    def outages(self) -> list[Outage]:
        return list(self._outages)

    def plant_outage(self, outage: Outage) -> None:
        self._outages.append(outage)
        self.prepared.clear()

    def clear_outages(self) -> None:
        self._outages.clear()
        self.prepared.clear()

    def set_clock(self, now: int | None, *, runs: bool) -> None:
        self.clock.set(now, runs=runs)
        self.prepared.clear()

    def absences(self, provider: str, symbol: str, *kinds: Absence) -> RangeSet:
        """The planted absences of `provider` and the market's `symbol` that are in effect at the clock's
        time, of these kinds or of all, cut off at the clock's time."""
        now = self.clock.now()
        past = TimeRange(min(0, now), now + 1)
        windows = [
            o.window.intersect(past)
            for o in self._outages
            if o.applies_to(provider)
            and o.kind in (kinds or tuple(Absence))
            and (o.published is None or now < o.published)
            and self._applies_to_symbol(o, provider, symbol)
        ]
        return RangeSet(windows) if windows else NO_HALT

    def _halts(self, provider: str, symbol: str) -> RangeSet:
        return self.absences(provider, symbol, Absence.HALT)

    def without_outages(
        self, provider: str, what: Instrument, bars: Bars, ends: Instants, *, extended: bool
    ) -> Bars:
        """The rows without those missing because of outages of `provider`; `ends` are the ends of `bars`,
        `extended` as in a frame."""
        outage = self.absences(provider, what.name, Absence.OUTAGE)
        if not outage or len(bars) == 0:
            return bars
        return bars.take(~missing_rows(bars.ts, ends, outage, trading_hours(what.asset_class, extended)))

    def _applies_to_symbol(self, outage: Outage, provider: str, symbol: str) -> bool:
        if outage.symbol is None:
            return True
        found = self.find(provider, outage.symbol)
        return found is not None and found.name == symbol

    def find(self, provider: str, plain: str) -> Instrument | None:
        """The instrument of a provider's plain symbol (no prefix, no separator); None if unknown."""
        # Forex first: EURUSD could also be a crypto symbol.
        kinds = (AssetClass.FOREX, AssetClass.CRYPTO, AssetClass.STOCKS)
        return next((found for kind in kinds if (found := self.known(provider, kind, plain))), None)

    def known(self, provider: str, asset_class: AssetClass, plain: str) -> Instrument | None:
        """Like `find`, of one asset class."""
        if asset_class is AssetClass.CRYPTO:
            name = self._coin(provider, plain) if provider in self.crypto else None
            return None if name is None else Instrument(asset_class, name)
        market = self._closing.get((provider, asset_class))
        return Instrument(asset_class, plain) if market is not None and market.has_symbol(plain) else None

    def _coin(self, provider: str, plain: str) -> str | None:
        """The crypto market's name of a symbol.

        Polygon and CoinGecko quote in USD: their BTCUSD is the replayed BTCUSD, or the market's BTCUSDT.
        The project's own symbol, BTCUSDT, means the same market.
        """
        market = self.crypto[provider]
        names = [plain]
        if provider != "binance":
            usd = plain.removesuffix("T") if plain.endswith("USDT") else plain
            names = [usd, f"{usd}T"] if usd.endswith("USD") else [plain]
        return next((name for name in names if market.has_symbol(name)), None)

    def symbols(self, provider: str) -> tuple[str, ...]:
        """Available symbols of `provider` (examples, for a synthetic market)."""
        coins = self.crypto[provider].symbols() if provider in self.crypto else ()
        return (*coins, *(s for (p, _), m in self._closing.items() if p == provider for s in m.symbols()))

    def listing(self, provider: str, what: Instrument) -> TimeRange:
        """From the first candle's open to the end of the last one's."""
        return self._market(provider, what).listing(what.name)

    def _market(self, provider: str, what: Instrument) -> Market | ClosingMarket:
        if what.asset_class is AssetClass.CRYPTO:
            return self.crypto[provider]
        return self._closing[provider, what.asset_class]

    def bars(self, provider: str, symbol: str, step: Step, window: TimeRange) -> Bars:
        """The current response of `provider` for the crypto market's `symbol`, with the forming candle."""
        market, halts = self.crypto[provider], self._halts(provider, symbol)
        bars = market.bars(symbol, step, window, self.clock.now(), halts)
        return self._as_served(provider, symbol, step, bars)

    def closed(self, provider: str, symbol: str, step: Step, window: TimeRange) -> Bars:
        """The same without the forming candle."""
        market, halts = self.crypto[provider], self._halts(provider, symbol)
        bars = closed(market, symbol, step, window, self.clock.now(), halts)
        return self._as_served(provider, symbol, step, bars)

    def _as_served(self, provider: str, symbol: str, step: Step, bars: Bars) -> Bars:
        what = Instrument(AssetClass.CRYPTO, symbol)
        served = self.without_outages(provider, what, bars, bars.ts + step.length, extended=False)
        return served.shifted(self._offset(provider))

    def framed(self, provider: str, what: Instrument, frame: Frame) -> Bars:
        """The current bars of `frame` at `provider` for a stock or a currency pair, prices as traded."""
        market = self._closing[provider, what.asset_class]
        bars = market.bars(what.name, frame, self.clock.now(), self._halts(provider, what.name))
        return self.framed_without_outages(provider, what, bars, frame)

    def framed_without_outages(self, provider: str, what: Instrument, bars: Bars, frame: Frame) -> Bars:
        """Like `without_outages`, for bars of `frame`."""
        ends = frame.ends[np.searchsorted(frame.opens, bars.ts)]
        return self.without_outages(provider, what, bars, ends, extended=frame.extended)

    def splits_of(self, symbol: str) -> tuple[Split, ...]:
        """The splits of a stock up to the market's clock."""
        now = self.clock.now()
        return tuple(split for split in of_symbol(self.splits, symbol) if split.begins <= now)

    def truth(self, provider: str, what: Instrument, timeframe: Timeframe, window: TimeRange) -> Bars:
        """The closed candles of `window` that are available from `provider` without faults, on the project's grid.

        A candle is present if the provider has data of every minute of its trading hours. It then aggregates
        all trades, whether the provider serves it natively or a client derives it. A candle that an outage
        overlaps is absent in every timeframe; with a halt it contains the remaining trades.
        """
        if what.asset_class is not AssetClass.CRYPTO:
            market = self._closing[provider, what.asset_class]
            halts = self._halts(provider, what.name)
            bars = market.truth(what.name, timeframe, window, self.clock.now(), halts)
            ends = grid_of(Series("", timeframe, what.asset_class)).closes(bars.ts)
            return self.without_outages(provider, what, bars, ends, extended=False)
        bars = self.closed(provider, what.name, Step.of(timeframe), window)
        if provider == "coingecko":  # without volume per bar
            return replace(bars, volume=None, verbatim=_without_volume(bars))
        return bars

    def _offset(self, provider: str) -> int:
        return self.config.polygon_offset_ppm if provider == "polygon" else 0

    def other_symbol(self, provider: str, what: Instrument, preferred: str | None = None) -> str | None:
        """Another symbol of the same asset class: `preferred` (a plain symbol) if it exists, else any other; None
        if a replay has only this one."""
        found = None if preferred is None else self.known(provider, what.asset_class, preferred)
        names = [*([found.name] if found else []), *self._market(provider, what).symbols()]
        return next((name for name in names if name != what.name), None)


def _synthetic(config: MarketConfig) -> replay.Replayed:
    coins = SyntheticMarket(config.seed, config.listed)
    closing = {
        (provider, asset_class): SyntheticClosing(asset_class, config.seed, config.listed, config.splits)
        for provider, asset_class in CLOSING
    }
    return replay.Replayed(dict.fromkeys(CRYPTO, coins), closing, ())


def _without_volume(bars: Bars) -> tuple[NDArray[np.object_], ...] | None:
    if bars.verbatim is None:
        return None
    return (*bars.verbatim[:4], np.full(len(bars), "", dtype=np.object_))
