"""`export` and `read_candles` return the stored candles, bit for bit."""

from __future__ import annotations

import csv
import gzip
import io
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fks_backfill_dagster import read_candles
from fks_backfill_dagster.cli import export
from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.delivery import Delivery, Origin, Transport
from fks_backfill_dagster.domain.grid import grid_of
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import MICROS_PER_DAY, Timeframe, to_micros
from fks_backfill_dagster.reading import UnknownSeries
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster.store.database import Database
from fks_backfill_dagster.store.ledger import register
from fks_backfill_dagster.store.writer.commit import commit_batch
from fks_backfill_dagster.store.writer.records import BatchWrite
from fks_backfill_dagster_tests.cli.conftest import Command, start, until
from fks_backfill_dagster_tests.interrupting import interrupted_everywhere

SERIES = Series("EUR/USD", Timeframe.D1, AssetClass.FOREX)
COLUMNS = ["open", "high", "low", "close", "volume"]


def delivered(provider: str, source: str, requested_at: int, candles: Candles) -> Delivery:
    origin = Origin(provider, Transport.REST, source, "https://market.example", "X", requested_at)
    return Delivery(candles, origin)


def store(database: Database, candles: Candles) -> None:
    window = TimeRange(int(candles.ts[0]), int(candles.ts[-1]) + 1)
    with database.begin() as connection:
        identity = register(connection, SERIES)
    delivery = delivered("oanda", "/v3", instant("2024-03-01"), candles)
    commit_batch(database, SERIES, identity, BatchWrite(window, (delivery,)), grid_of(SERIES))


@pytest.fixture
def stored(database: Database, database_url: str, settings: Path, monkeypatch: pytest.MonkeyPatch) -> Candles:
    """Candles with awkward digits, of a source that has volume on some days only."""
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    ts = grid_of(SERIES).opens(TimeRange(instant("2024-01-01"), instant("2024-02-01")))
    noise = np.random.default_rng(7).random(len(ts))
    low, high = 0.1 + 0.2 * noise, 1e5 / 3 + noise
    volume = np.where(noise < 0.5, np.nan, noise * 1e-7)
    candles = Candles(ts, low * 2, high, low, (low + high) / 2, volume)
    store(database, candles)
    return candles


def as_candles(frame: pd.DataFrame) -> Candles:
    ts = pd.DatetimeIndex(frame["ts"]).tz_convert("UTC").tz_localize(None).to_numpy()
    return Candles(
        ts.astype("datetime64[us]").view(np.int64), *(frame[name].to_numpy(np.float64) for name in COLUMNS)
    )


def from_csv(raw: bytes) -> Candles:
    """Read without any library that could round."""
    rows = list(csv.DictReader(io.StringIO(raw.decode())))
    ts = np.array([to_micros(datetime.fromisoformat(row["ts"])) for row in rows], dtype=np.int64)
    return Candles(ts, *(np.array([float(row[name] or "nan") for row in rows]) for name in COLUMNS))


@pytest.mark.parametrize("name", ["out.csv", "out.csv.gz", "OUT.CSV.GZ", "out.parquet"])
def test_a_file_holds_the_stored_candles(fks: Command, stored: Candles, tmp_path: Path, name: str) -> None:
    result = fks("export", "EUR/USD", "1d", "-o", name, "--json")
    assert result.exit_code == 0
    assert result.json == {"symbol": "EUR/USD", "timeframe": "1d", "file": name, "candles": len(stored)}
    file = tmp_path / name
    if name == "out.parquet":
        found = as_candles(pq.read_table(file).to_pandas())
    else:
        packed = name.lower().endswith("gz")
        found = from_csv(gzip.decompress(file.read_bytes()) if packed else file.read_bytes())
    assert found.equals(stored)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_the_csv_format(fks: Command, stored: Candles, tmp_path: Path) -> None:
    fks("export", "EUR/USD", "1d", "-o", "out.csv")
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert header == "ts,open,high,low,close,volume"
    assert rows[0].startswith("2024-01-01T22:00:00Z,")
    without = np.isnan(stored.volume)
    assert 0 < without.sum() < len(without)
    assert [row.endswith(",") for row in rows] == without.tolist()


def test_parquet_has_time_zone_and_nulls(fks: Command, stored: Candles, tmp_path: Path) -> None:
    fks("export", "EUR/USD", "1d", "-o", "out.parquet")
    table = pq.read_table(tmp_path / "out.parquet")
    assert table.schema.field("ts").type == pa.timestamp("us", "UTC")
    assert table["volume"].null_count == np.isnan(stored.volume).sum()


def test_a_window_and_as_of(fks: Command, stored: Candles, database: Database, tmp_path: Path) -> None:
    with database.begin() as connection:
        before = connection.exec_driver_sql("SELECT clock_timestamp()").scalar_one()
    changed = stored.take(slice(3, 4))
    ts, *values = changed.columns()
    open_, high, low, close, volume = (column * 2 for column in values)
    store(database, Candles(ts, open_, high, low, close, volume))
    window = ("--start", "2024-01-03", "--end", "2024-01-09")
    fks("export", "EUR/USD", "1d", *window, "-o", "then.parquet", "--as-of", before.isoformat())
    fks("export", "EUR/USD", "1d", *window, "-o", "now.parquet")
    then, now = (as_candles(pq.read_table(tmp_path / f"{n}.parquet").to_pandas()) for n in ("then", "now"))
    expected = stored.within(TimeRange(instant("2024-01-03"), instant("2024-01-09")))
    assert then.equals(expected)
    assert now.close.tolist() == [
        2 * c if t == changed.ts[0] else c for t, c in zip(then.ts, then.close, strict=True)
    ]


def test_nothing_to_export_makes_no_file(fks: Command, stored: Candles, tmp_path: Path) -> None:
    for line in (
        ("export", "BTC/USDT", "1h", "-o", "none.csv"),
        ("export", "EUR/USD", "1d", "--start", "2020-01-01", "--end", "2020-02-01", "-o", "none.csv"),
        ("export", "EUR/USD", "1d", "-o", "none.csv", "--as-of", "2020-01-01"),
    ):
        result = fks(*line)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "othing" in result.stderr
        assert not (tmp_path / "none.csv").exists()


def test_a_missing_folder(fks: Command, stored: Candles) -> None:
    result = fks("export", "EUR/USD", "1d", "-o", "nowhere/out.csv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "nowhere/out.csv cannot be written" in result.stderr
    assert result.stderr.count("\n") == 1


def test_the_file_has_the_mode_of_any_new_file(fks: Command, stored: Candles, tmp_path: Path) -> None:
    for mask in (0o022, 0o077, 0o002):
        before = os.umask(mask)
        try:
            (tmp_path / "plain").write_text("x")
            fks("export", "EUR/USD", "1d", "-o", "out.csv")
            assert os.umask(mask) == mask, "the mask is restored"
        finally:
            os.umask(before)
        assert (tmp_path / "out.csv").stat().st_mode == (tmp_path / "plain").stat().st_mode
        (tmp_path / "plain").unlink()


def test_no_planted_link_is_followed(fks: Command, stored: Candles, tmp_path: Path) -> None:
    """Links planted at every predictable name, and at the target's name."""
    precious = tmp_path / "precious"
    precious.write_text("untouched")
    for name in ("out.csv", f".out.csv.{os.getpid()}.part", f"out.csv.{os.getpid()}", "out.csv.part"):
        (tmp_path / name).symlink_to(precious)
    assert fks("export", "EUR/USD", "1d", "-o", "out.csv").exit_code == 0
    assert precious.read_text() == "untouched"
    assert not (tmp_path / "out.csv").is_symlink()
    assert from_csv((tmp_path / "out.csv").read_bytes()).equals(stored)


def test_a_replaced_temporary_file_is_not_written_through(
    stored: Candles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The temporary file is replaced by a link: later blocks go into the file, not through the link."""
    precious = tmp_path / "precious"
    precious.write_text("untouched")

    def blocks() -> Iterator[Candles]:
        [part] = tmp_path.glob(".*.part")
        part.unlink()
        part.symlink_to(precious)
        yield stored

    for name in ("out.csv", "out.csv.gz", "out.parquet"):
        export._write(tmp_path / name, export._sink(tmp_path / name), blocks())
        assert precious.read_text() == "untouched"


def test_a_signal_leaves_no_partial_file(stored: Candles, tmp_path: Path, database: Database) -> None:
    """The signal arrives while the export waits for a lock on the candles' table."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with database.begin() as connection:
            connection.exec_driver_sql("LOCK TABLE fks.candles_1d IN ACCESS EXCLUSIVE MODE")
            with start("export", "EUR/USD", "1d", "-o", "out.csv") as running:
                until(lambda: bool(list(tmp_path.glob(".*.part"))))
                running.send_signal(number)
                stdout, stderr = running.communicate(timeout=30)
        assert (running.returncode, stdout) == (128 + number, "")
        assert stderr.strip() == "Interrupted."
        assert not list(tmp_path.glob("*out.csv*")) + list(tmp_path.glob(".*.part"))


def test_no_interruption_leaves_a_partial_file(tmp_path: Path) -> None:
    """Interrupted at each line in turn, also between the creation of the file and its use."""
    price = np.ones(3)
    block = Candles(np.arange(3) * MICROS_PER_DAY, price, price, price, price, price)
    output = tmp_path / "out.csv"
    for number in interrupted_everywhere(lambda: export._write(output, export._sink(output), [block])):
        assert not list(tmp_path.glob(".*.part")), number
    assert output.exists()


# For programs


def test_read_candles_returns_a_frame(stored: Candles) -> None:
    frame = read_candles("EUR/USD", "1d")
    assert list(frame.columns) == COLUMNS
    assert set(frame.dtypes) == {np.dtype(np.float64)}
    assert isinstance(frame.index, pd.DatetimeIndex)
    assert (frame.index.name, str(frame.index.tz)) == ("ts", "UTC")
    assert as_candles(frame.reset_index()).equals(stored)


def test_read_candles_takes_text_and_datetimes(stored: Candles) -> None:
    day = datetime(2024, 1, 3, tzinfo=UTC)
    wanted = [
        (read_candles("EUR_USD", "1d", *edges)) for edges in (("2024-01-03", "2024-01-05T00:00Z"), (day,))
    ]
    assert [len(frame) for frame in wanted] == [2, len(stored.ts[stored.ts >= instant("2024-01-03")])]
    assert wanted[0].index[0] == pd.Timestamp("2024-01-03T22:00Z")
    assert len(read_candles("EUR/USD", "1d", day.replace(tzinfo=None), "2024-01-05")) == 2
    assert len(read_candles("EUR/USD", "1d", "2019-01-01", "2019-02-01")) == 0


def test_read_candles_as_of_and_of_another_database(
    stored: Candles, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", "postgresql://nobody@127.0.0.1:1/nothing")
    assert len(read_candles("EUR/USD", "1d", url=database_url)) == len(stored)
    assert len(read_candles("EUR/USD", "1d", as_of="2020-01-01", url=database_url)) == 0


def test_read_candles_of_an_unknown_series(stored: Candles) -> None:
    with pytest.raises(UnknownSeries, match="Nothing is stored of BTC/USDT 1h"):
        read_candles("BTC/USDT", "1h")
    with pytest.raises(ValueError, match="1m 5m 15m"):
        read_candles("EUR/USD", "7m")
    with pytest.raises(ValueError, match="after its end"):
        read_candles("EUR/USD", "1d", "2024-02-01", "2024-01-01")


def test_a_long_export_is_written_in_blocks(
    fks: Command,
    database: Database,
    database_url: str,
    settings: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("FKS_DATABASE_URL", database_url)
    series = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)
    window = TimeRange(instant("2024-01-01"), instant("2024-01-01") + 70 * MICROS_PER_DAY)
    ts = grid_of(series).opens(window)
    price = np.full(len(ts), 42000.5)
    candles = Candles(ts, price, price, price, price, np.ones(len(ts)))
    with database.begin() as connection:
        identity = register(connection, series)
    delivery = delivered("binance", "/api", window.end, candles)
    commit_batch(database, series, identity, BatchWrite(window, (delivery,)), grid_of(series))
    assert fks("export", "BTC/USDT", "1m", "-o", "a.parquet").exit_code == 0
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert file.num_row_groups > 1
    assert as_candles(file.read().to_pandas()).equals(candles)
    assert fks("export", "BTC/USDT", "1m", "-o", "a.csv.gz").exit_code == 0
    with gzip.open(tmp_path / "a.csv.gz", "rt") as text:
        assert sum(1 for _ in text) == len(candles) + 1
