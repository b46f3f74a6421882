"""Real candles from files instead of the synthetic market: `<venue>/<SYMBOL>-<TIMEFRAME>.csv[.gz]`.

In scope: the mapping of venues to providers' wire formats (VENUES), reading files, and serving crypto as a
`Market`. A file's own timeframe is served with the file's decimal texts; a coarser one is aggregated from
the coarsest file that divides it; a finer one is empty.
Out of scope: stocks and currencies, whose bars have other boundaries (`replay_closing`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.series import AssetClass
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.simulator.bars import Bars, Scale, Step, Units, aggregate
from fks_backfill_dagster.simulator.closing import ClosingMarket
from fks_backfill_dagster.simulator.market import NO_END, NO_HALT, Market, closed
from fks_backfill_dagster.simulator.replay_closing import CUTS, ReplayClosing, Traded
from fks_backfill_dagster.simulator.splits import Split, read_splits


@dataclass(frozen=True, slots=True)
class Venue:
    """A directory of real candles, the provider that serves it, and its asset class."""

    directory: str
    provider: str
    asset_class: AssetClass = AssetClass.CRYPTO


VENUES: tuple[Venue, ...] = (
    Venue("binance", "binance"),
    Venue("coinbase", "polygon"),
    Venue("bitstamp", "polygon"),
    Venue("bitstamp", "coingecko"),
    Venue("coinbase", "coingecko"),
    Venue("binance", "coingecko"),
    Venue("equity", "polygon", AssetClass.STOCKS),
    Venue("equity", "yahoo", AssetClass.STOCKS),
    Venue("equity", "alphavantage", AssetClass.STOCKS),
    Venue("forex", "oanda", AssetClass.FOREX),
    Venue("forex", "polygon", AssetClass.FOREX),
)
"""If two venues of one provider have the same symbol, the first one serves it."""

SPLITS = "equity/splits.csv"
"""Optional: the splits of the replayed stocks, with lines `symbol,date,new,old`."""

_COLUMNS = ("ts", "open", "high", "low", "close", "volume")
_DECIMAL = r"^(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"
_NAME = re.compile(r"(?P<symbol>[A-Z0-9.]+)-(?P<timeframe>[0-9]+[mhdw])\.csv(\.gz)?")


class ReplayError(ValueError):
    """A directory or file that cannot be replayed. The text names it and states the remedy."""


@dataclass(frozen=True, slots=True)
class ReplayMarket:
    """The files of one provider: blocks by symbol and timeframe."""

    files: Mapping[str, Mapping[Timeframe, Bars]]

    def has_symbol(self, symbol: str) -> bool:
        return symbol in self.files

    def symbols(self) -> tuple[str, ...]:
        return tuple(self.files)

    def listing(self, symbol: str) -> TimeRange:
        spans = [
            (int(b.ts[0]), int(b.ts[-1]) + timeframe.micros) for timeframe, b in self.files[symbol].items()
        ]
        return TimeRange(min(s for s, _ in spans), max(e for _, e in spans))

    def bars(self, symbol: str, step: Step, window: TimeRange, now: int, halts: RangeSet) -> Bars:
        """As in `Market`; rows are indivisible: a halt removes only rows that it covers completely."""
        timeframe, found = self._nearest(symbol, step)
        end = min(window.end, now + 1)
        start = min(window.start, end)
        found = found.within(TimeRange(step.ceil(start), max(step.ceil(end), step.ceil(start))))
        if halts:
            found = found.take(~_covered(found.ts, timeframe.micros, halts))
        return found if Step.of(timeframe) == step else aggregate(found, step)

    def _nearest(self, symbol: str, step: Step) -> tuple[Timeframe, Bars]:
        """The coarsest file whose rows fit into these bars; otherwise an empty block."""
        files = self.files[symbol]
        for timeframe in sorted(files, key=lambda t: -t.micros):
            own = Step.of(timeframe)
            if step.length % own.length == 0 and (step.origin - own.origin) % own.length == 0:
                return timeframe, files[timeframe]
        finest = min(files, key=lambda t: t.micros)
        return finest, files[finest].take(slice(0, 0))

    def truth(
        self,
        symbol: str,
        timeframe: Timeframe,
        window: TimeRange,
        *,
        now: int = NO_END,
        halts: RangeSet = NO_HALT,
    ) -> Candles:
        return closed(self, symbol, Step.of(timeframe), window, now, halts).candles()


@dataclass(frozen=True, slots=True)
class Replayed:
    """The markets of a replay directory: crypto by provider, the others by provider and asset class."""

    crypto: Mapping[str, Market]
    closing: Mapping[tuple[str, AssetClass], ClosingMarket]
    splits: tuple[Split, ...]


def load(directory: Path) -> Replayed:
    """Raises ReplayError if `directory` does not exist, contains no replay file, or contains a
    file whose content does not match its name."""
    if not directory.is_dir():
        raise ReplayError(
            f"{directory} is not a directory: --replay needs one with files <venue>/<SYMBOL>-1h.csv"
        )
    found: dict[tuple[str, AssetClass], dict[str, dict[Timeframe, Bars]]] = {}
    venues: dict[str, dict[str, dict[Timeframe, Bars]]] = {}
    for venue in VENUES:
        if venue.directory not in venues:
            venues[venue.directory] = _read_all(directory / venue.directory)
        served = found.setdefault((venue.provider, venue.asset_class), {})
        served |= {name: files for name, files in venues[venue.directory].items() if name not in served}
    if not any(venues.values()):
        names = ", ".join(venues)
        raise ReplayError(
            f"{directory} contains no file <venue>/<SYMBOL>-<TIMEFRAME>.csv of the venues {names}"
        )
    crypto: dict[str, Market] = {}
    closing: dict[tuple[str, AssetClass], ClosingMarket] = {}
    for (provider, asset_class), symbols in found.items():
        if asset_class is AssetClass.CRYPTO:
            crypto[provider] = ReplayMarket(symbols)
        else:
            cuts = CUTS.get(provider, frozenset()) if asset_class is AssetClass.STOCKS else frozenset()
            closing[provider, asset_class] = ReplayClosing(asset_class, _traded(symbols, asset_class), cuts)
    return Replayed(crypto, closing, _splits(directory / SPLITS))


def _traded(
    symbols: Mapping[str, Mapping[Timeframe, Bars]], asset_class: AssetClass
) -> dict[str, dict[Timeframe, Traded]]:
    return {
        symbol: {timeframe: Traded.of(rows, timeframe, asset_class) for timeframe, rows in files.items()}
        for symbol, files in symbols.items()
    }


def _read_all(venue: Path) -> dict[str, dict[Timeframe, Bars]]:
    found: dict[str, dict[Timeframe, Bars]] = {}
    for path in sorted(venue.glob("*.csv*")):
        if path.name == Path(SPLITS).name:
            continue
        symbol, timeframe = _parse_name(path)
        found.setdefault(symbol, {})[timeframe] = read(path, timeframe)
    return found


def _splits(path: Path) -> tuple[Split, ...]:
    try:
        return read_splits(path) if path.exists() else ()
    except ValueError as error:
        raise ReplayError(str(error)) from None


def _parse_name(path: Path) -> tuple[str, Timeframe]:
    match = _NAME.fullmatch(path.name)
    if match is None or match["timeframe"] not in list(Timeframe):
        known = " ".join(Timeframe)
        raise ReplayError(f"{path}: the name must be <SYMBOL>-<TIMEFRAME>.csv[.gz] with one of {known}")
    return match["symbol"], Timeframe(match["timeframe"])


def read(path: Path, timeframe: Timeframe) -> Bars:
    """Reads one file. Raises ReplayError with its path for wrong columns, values, order or grid."""
    try:
        table = csv.read_csv(
            path,
            convert_options=csv.ConvertOptions(
                include_columns=list(_COLUMNS),
                column_types=dict.fromkeys(_COLUMNS, pa.string()),
                strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
        raise ReplayError(
            f"{path} cannot be read as CSV with the columns {','.join(_COLUMNS)}: {error}"
        ) from None
    if table.num_rows == 0:
        raise ReplayError(f"{path} has no rows: remove it or add rows")
    ts = _instants(path, table["ts"])
    step = Step.of(timeframe)
    if bool((np.diff(ts) <= 0).any()):
        raise ReplayError(f"{path}: ts must be ascending without duplicates")
    if bool(((ts - step.origin) % step.length != 0).any()):
        raise ReplayError(f"{path}: a ts is not on the {timeframe} grid")
    prices = [_decimals(path, table[name], name) for name in _COLUMNS[1:5]]
    digits = max(scale for _, scale in prices)
    opened, high, low, close = (units * 10 ** (digits - scale) for units, scale in prices)
    without_volume = pc.all(pc.equal(table["volume"], "")).as_py()
    volume, volume_digits = (None, 0) if without_volume else _decimals(path, table["volume"], "volume")
    if digits > 12 or max(int(high.max()), 0 if volume is None else int(volume.max())) >= 2**53:
        raise ReplayError(f"{path}: a value has more digits than a float64 represents exactly")
    verbatim = tuple(table[name].to_numpy().astype(object) for name in _COLUMNS[1:])
    return Bars(ts, opened, high, low, close, volume, Scale(digits, volume_digits), verbatim)


def _instants(path: Path, column: pa.ChunkedArray) -> NDArray[np.int64]:
    try:
        stamps = pc.cast(pc.utf8_rtrim(column, "Z"), pa.timestamp("us"))
    except pa.ArrowInvalid as error:
        raise ReplayError(f"{path}: ts must be UTC such as 2024-01-01T00:00:00Z ({error})") from None
    instants: Units = stamps.to_numpy().astype("datetime64[us]").view(np.int64)
    return instants


def _decimals(path: Path, column: pa.ChunkedArray, name: str) -> tuple[Units, int]:
    """Plain non-negative decimals as scaled integers, and the number of digits."""
    plain = pc.match_substring_regex(column, _DECIMAL)
    if not pc.all(plain).as_py():
        row = pc.index(plain, pa.scalar(False)).as_py()
        raise ReplayError(
            f"{path}, row {row + 1}: {name} is {column[row].as_py()!r}, not a plain decimal number"
        )
    column = _without_exponents(column)
    point = pc.find_substring(column, ".")
    places = pc.if_else(pc.less(point, 0), 0, pc.subtract(pc.subtract(pc.utf8_length(column), point), 1))
    digits = int(pc.max(places).as_py())
    exact = pc.cast(column, pa.decimal128(38, digits)).combine_chunks()
    # A decimal128 is a 16-byte little-endian integer; values below 2**53 are in its low half.
    halves = np.frombuffer(exact.buffers()[1], dtype=np.int64).reshape(-1, 2)[exact.offset :][: len(exact)]
    if bool((halves[:, 1] != 0).any()):
        raise ReplayError(f"{path}: a {name} has more digits than a float64 represents exactly")
    return halves[:, 0].copy(), digits


def _without_exponents(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """`6.45e-06`, which occurs in real files for very small volumes, as `0.00000645`."""
    rows = pc.indices_nonzero(pc.match_substring(column, "e", ignore_case=True)).to_pylist()
    if not rows:
        return column
    texts = column.to_pylist()
    for row in rows:
        texts[row] = f"{Decimal(texts[row]):f}"
    return pa.chunked_array([texts])


def _covered(ts: NDArray[np.int64], length: int, halts: RangeSet) -> NDArray[np.bool_]:
    """Rows whose `[ts, ts + length)` lies completely in one range."""
    index = np.searchsorted(halts.starts, ts, side="right") - 1
    return (index >= 0) & (ts + length <= halts.ends[index])
