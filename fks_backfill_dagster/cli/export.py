"""`fks-backfill export`: stored candles as a CSV or Parquet file, written in blocks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from fks_backfill_dagster.cli.arguments import usage
from fks_backfill_dagster.cli.completion import complete_symbol, complete_timeframe
from fks_backfill_dagster.cli.output import Failed, example, json_option, many, print_json, print_line
from fks_backfill_dagster.cli.times import Moment, check_window, window_option

if TYPE_CHECKING:
    import pyarrow as pa

    from fks_backfill_dagster.domain.candles import Candles

_COLUMNS = ("ts", "open", "high", "low", "close", "volume")

# Opens a writer on a file; it takes blocks until the stack is closed.
_Sink = Callable[[ExitStack, IO[bytes]], "Callable[[Candles], None]"]


@click.command(
    epilog=example(
        "export BTC/USDT 1h --start 2024-01-01 --end 2024-02-01 -o btc.csv.gz",
        "export BTC/USDT 1h -o btc.parquet --as-of 2024-03-01T12:00:00Z",
    )
)
@click.argument("symbol", shell_complete=complete_symbol)
@click.argument("timeframe", shell_complete=complete_timeframe)
@window_option
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="A file that ends in .csv, .csv.gz or .parquet; an existing file is replaced.",
)
@click.option("--as-of", type=Moment(), help="Export the state of the database at this time.")
@json_option
def export(
    symbol: str,
    timeframe: str,
    start: int | None,
    end: int | None,
    output: Path,
    as_of: int | None,
    as_json: bool,
) -> None:
    """Write stored candles to a file: ts (the open, UTC), open, high, low, close, volume.

    Without --start from the oldest stored candle, without --end to the newest. An empty volume
    means that the source has none.
    """
    from fks_backfill_dagster.app import now, open_database
    from fks_backfill_dagster.domain.timeframe import iso, to_datetime
    from fks_backfill_dagster.settings.catalog import Catalog
    from fks_backfill_dagster.settings.load import load_settings
    from fks_backfill_dagster.store.queries import iterate_candles, stored_series, sync_status

    settings, present = load_settings(), now()
    catalog = Catalog(settings)
    with usage():
        series = catalog.find_series(symbol, timeframe)
        sink = _sink(output)
        if as_of is not None and as_of > present:
            raise ValueError(f"--as-of {iso(as_of)} lies in the future: that state can still change")
    with open_database(settings) as database:
        series = catalog.find_series(symbol, timeframe, stored_series(database))
        state = next(iter(sync_status(database, series)), None)
        oldest = None if state is None else state.oldest_data_time
        if oldest is None:
            raise Failed(f"Nothing is stored of {series}: run `fks-backfill backfill {series}` first.")
        first = int(oldest.timestamp()) * 1_000_000
        window = check_window(first if start is None else start, present if end is None else end, present)
        moment = None if as_of is None else to_datetime(as_of)
        count = _write(output, sink, iterate_candles(database, series, window, moment))
    if count == 0:
        raise Failed(
            f"Nothing of {series} was stored in {window}"
            + ("." if as_of is None else f" at {iso(as_of)}.")
            + " See `fks-backfill status` for the stored range."
        )
    if as_json:
        names = {"symbol": series.symbol, "timeframe": series.timeframe.value}
        print_json(names | {"file": str(output), "candles": count})
    else:
        print_line(f"{output}: {many(count, 'candle')} of {series}.")


def _write(output: Path, sink: _Sink, blocks: Iterable[Candles]) -> int:
    """Writes a temporary file and renames it, so that `output` is always complete; without candles no file.

    In a folder that other accounts can write, a predictable name may be a planted link, and a file opened twice
    may differ the second time: hence a random name, and only the descriptor is used. The name is known before the
    file exists, so that a signal at any moment leaves none behind.
    """
    part = output.with_name(f".fks-export-{os.urandom(8).hex()}.part")
    count = 0
    try:
        with part.open("xb") as file, ExitStack() as stack:
            take = sink(stack, file)
            for block in blocks:
                take(block)
                count += len(block)
        if count:
            part.replace(output)
    except OSError as error:
        raise Failed(f"{output} cannot be written: {error.strerror or error}. Choose another path.") from None
    finally:
        part.unlink(missing_ok=True)
    return count


# Formats ----------------------------------------------------------------------------------------------


def _sink(output: Path) -> _Sink:
    """The format of the suffix. Raises ValueError for an unknown one."""
    name = output.name.lower()
    if name.endswith((".csv", ".csv.gz")):
        return partial(_csv, "gzip" if name.endswith(".gz") else None)
    if name.endswith(".parquet"):
        return _parquet
    raise ValueError(f"{output.name} must end in .csv, .csv.gz or .parquet")


def _csv(compression: str | None, stack: ExitStack, file: IO[bytes]) -> Callable[[Candles], None]:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import csv

    stream = stack.enter_context(pa.output_stream(file, compression=compression))
    stream.write((",".join(_COLUMNS) + "\n").encode())  # pyarrow would quote the names
    options = csv.WriteOptions(include_header=False, quoting_style="none")

    def take(block: Candles) -> None:
        table = _table(block)
        seconds = table["ts"].cast(pa.timestamp("s", "UTC"))
        texts = pc.strftime(seconds, format="%Y-%m-%dT%H:%M:%SZ")
        csv.write_csv(table.set_column(0, "ts", texts), stream, options)

    return take


def _parquet(stack: ExitStack, file: IO[bytes]) -> Callable[[Candles], None]:
    import pyarrow.parquet as pq

    writer: Any = None

    def take(block: Candles) -> None:
        nonlocal writer
        table = _table(block)
        if writer is None:
            writer = stack.enter_context(pq.ParquetWriter(file, table.schema))
        writer.write_table(table)

    return take


def _table(block: Candles) -> pa.Table:
    """The block as Arrow columns; a volume of NaN is null."""
    import numpy as np
    import pyarrow as pa

    prices = {name: pa.array(getattr(block, name)) for name in _COLUMNS[1:-1]}
    return pa.table(
        {"ts": pa.array(block.ts, pa.timestamp("us", "UTC"))}
        | prices
        | {"volume": pa.array(block.volume, mask=np.isnan(block.volume))}
    )
