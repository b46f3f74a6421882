"""The running sandbox: its markets, clock, outages, faults, limits, journal and prepared answers."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator import replay
from fks_backfill_dagster.simulator.bars import Bars, Step
from fks_backfill_dagster.simulator.clock import Clock, Meter
from fks_backfill_dagster.simulator.config import PROVIDERS, MarketConfig, Outage
from fks_backfill_dagster.simulator.faults import Faults
from fks_backfill_dagster.simulator.journal import Journal
from fks_backfill_dagster.simulator.market import NO_OUTAGE, Market, SyntheticMarket, closed

_PREPARED_BYTES = 2 << 30


class Prepared:
    """Answers made beforehand, by key; the ones unused longest leave when the memory is used up."""

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


class Sandbox:
    """Everything the wire formats and the control routes share. Raises ReplayError on a bad directory."""

    def __init__(self, config: MarketConfig) -> None:
        self.config = config
        self.clock = Clock(config.now, runs=config.clock_runs)
        self.markets: dict[str, Market] = (
            replay.load(config.replay)
            if config.replay is not None
            else dict.fromkeys(PROVIDERS, SyntheticMarket(config.seed, config.listed))
        )
        self.faults = Faults(config.seed)
        self.journal = Journal()
        self.prepared = Prepared(_PREPARED_BYTES)
        self.meters = {
            "binance": Meter(
                config.weight_per_minute if config.limits else None, config.ban_after, config.ban_seconds
            ),
            "polygon": Meter(config.polygon_per_minute),
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

    def outage(self, provider: str, symbol: str) -> RangeSet:
        """The minutes that `provider` does not have of the market's `symbol`."""
        mine = [
            o.window for o in self._outages if o.provider == provider and self._meant(o, provider, symbol)
        ]
        return RangeSet(mine) if mine else NO_OUTAGE

    def _meant(self, outage: Outage, provider: str, symbol: str) -> bool:
        return outage.symbol is None or self.market_symbol(provider, outage.symbol) == symbol

    def market_symbol(self, provider: str, plain: str) -> str | None:
        """The market's name of a provider's plain symbol (no prefix, no separator); None if unknown.

        Polygon quotes in USD: its BTCUSD is the replayed BTCUSD, or the synthetic BTCUSDT. Asked
        for in the project's own spelling, BTCUSDT, it is the same market.
        """
        market = self.markets[provider]
        names = [plain]
        if provider == "polygon":
            usd = plain.removesuffix("T") if plain.endswith("USDT") else plain
            names = [usd, f"{usd}T"] if usd.endswith("USD") else [plain]
        return next((name for name in names if market.knows(name)), None)

    def bars(self, provider: str, symbol: str, step: Step, window: TimeRange) -> Bars:
        """What `provider` gives of the market's `symbol` now, a forming candle included."""
        market, outage = self.markets[provider], self.outage(provider, symbol)
        bars = market.bars(symbol, step, window, self.clock.now(), outage)
        return bars.shifted(self._offset(provider))

    def closed(self, provider: str, symbol: str, step: Step, window: TimeRange) -> Bars:
        """The same without the forming candle."""
        market, outage = self.markets[provider], self.outage(provider, symbol)
        bars = closed(market, symbol, step, window, self.clock.now(), outage)
        return bars.shifted(self._offset(provider))

    def truth(self, provider: str, symbol: str, timeframe: Timeframe, window: TimeRange) -> Candles:
        """The closed candles of `window` that an honest `provider` would give; `symbol` in any spelling.

        Raises KeyError for a symbol it does not know.
        """
        name = self.market_symbol(provider, symbol)
        if name is None:
            raise KeyError(symbol)
        return self.closed(provider, name, Step.of(timeframe), window).candles()

    def _offset(self, provider: str) -> int:
        return self.config.polygon_offset_ppm if provider == "polygon" else 0

    def other_symbol(self, provider: str, symbol: str) -> str | None:
        """A symbol of the market that is another one; None where a replay has only this one."""
        return next((s for s in self.markets[provider].symbols() if s != symbol), None)
