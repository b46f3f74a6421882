"""`correct` and `corrections`: a file replaces stored values, which stay readable, pinned, and can be taken back."""

from __future__ import annotations

import getpass
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from pyarrow import parquet as pq

from fks_backfill_dagster import read_candles
from fks_backfill_dagster.cli import main
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster_tests.cli.conftest import Command

JANUARY = ("BTC/USDT", "1h", "--start", "2024-01-01", "--end", "2024-01-03")
SERIES = ("BTC/USDT", "1h")


@pytest.fixture
def stored(world: LocalMarket, fks: Command) -> Command:
    """Two days of candles."""
    assert fks("backfill", *JANUARY).exit_code == 0
    return fks


def write(folder: Path, *lines: str) -> str:
    file = folder / "fix.csv"
    file.write_text("".join(f"{line}\n" for line in lines))
    return str(file)


def closes(as_of: str | None = None) -> list[float]:
    frame = read_candles("BTC/USDT", "1h", "2024-01-01", "2024-01-03", as_of=as_of)
    return [float(value) for value in frame["close"]]


def test_a_correction_from_a_file_to_its_undo(stored: Command, tmp_path: Path) -> None:
    """Before and after by `as_of`; a refetch, even forced, keeps the values; the undo restores the old ones."""
    before = closes()
    frame = read_candles("BTC/USDT", "1h", "2024-01-01", "2024-01-03")
    high, low = float(frame["high"].iloc[5]), float(frame["low"].iloc[7])
    file = write(tmp_path, "ts,close", f"2024-01-01T05:00Z,{high!r}", f"2024-01-01 07:00,{low!r}")
    done = stored("correct", file, *SERIES, "--reason", "published again", "--author", "alice", "--json")
    assert done.exit_code == 0
    assert {key: done.json[key] for key in ("inserted", "updated", "unchanged", "rejected")} == {
        "inserted": 0,
        "updated": 2,
        "unchanged": 0,
        "rejected": 0,
    }
    after = [*before[:5], high, before[6], low, *before[8:]]
    assert closes() == after
    (batch, *_) = stored("batches", "list", "--json").json
    assert (batch["id"], batch["kind"], batch["author"], batch["reason"], batch["source"]) == (
        done.json["batch"],
        "correction",
        "alice",
        "published again",
        "fix.csv",
    )
    assert closes(as_of=batch["committed_at"]) == after
    refetched = stored("backfill", *JANUARY, "--refetch", "--force", "--json")
    assert (refetched.json["pinned"], refetched.json["total_candles"]) == (2, 0)
    assert any("corrections release BTC/USDT 1h" in one for one in refetched.json["warnings"])
    assert closes() == after
    listed = stored("corrections", "list", *SERIES, "--pinned", "--json").json
    assert [(one["ts"], one["before"]["close"], one["after"]["close"], one["pinned"]) for one in listed] == [
        ("2024-01-01T05:00:00+00:00", before[5], high, True),
        ("2024-01-01T07:00:00+00:00", before[7], low, True),
    ]
    assert stored("batches", "undo", str(done.json["batch"]), "--yes").exit_code == 0
    assert closes() == before
    undo, undone, *_ = stored("batches", "list", "--json").json
    assert (undo["kind"], undo["undoes"], undone["undone_by"]) == ("undo", undone["id"], undo["id"])
    notes = stored("batches", "list").stdout
    assert f"undo of {undone['id']}" in notes
    assert f"alice: published again, undone by {undo['id']}" in notes
    assert stored("batches", "undo", str(undo["id"]), "--yes").exit_code == 0
    assert closes() == after
    assert stored("audit").exit_code == 0


def test_a_released_value_is_replaced_by_a_refetch(stored: Command, tmp_path: Path) -> None:
    before = closes()
    high = float(read_candles("BTC/USDT", "1h", "2024-01-01", "2024-01-03")["high"].iloc[5])
    file = write(tmp_path, "ts,close", f"2024-01-01T05:00Z,{high!r}")
    assert stored("correct", file, *SERIES, "--reason", "test").exit_code == 0
    released = stored("corrections", "release", *SERIES, "--start", "2024-01-01T05:00", "--json")
    assert released.json == {"symbol": "BTC/USDT", "timeframe": "1h", "released": 1}
    assert stored("corrections", "list", "--pinned", "--json").json == []
    assert closes() != before
    assert stored("backfill", *JANUARY, "--refetch", "--json").json["pinned"] == 0
    assert closes() == before


def test_many_pinned_candles_are_no_sign_of_another_symbol(stored: Command, tmp_path: Path) -> None:
    """Half of the range differs by a fifth; the refetch needs neither --force nor a second provider."""
    frame = read_candles("BTC/USDT", "1h", "2024-01-01", "2024-01-02")[["open", "high", "low", "close"]] * 1.2
    frame.to_csv(tmp_path / "fix.csv")
    assert stored("correct", "fix.csv", *SERIES, "--reason", "test", "--json").json["updated"] == 24
    result = stored("backfill", *JANUARY, "--refetch", "--json")
    assert (result.exit_code, result.json["errors"], result.json["pinned"]) == (0, [], 24)


def test_a_dry_run_shows_before_and_after(stored: Command, tmp_path: Path) -> None:
    before = closes()
    file = write(tmp_path, "ts,volume", *(f"2024-01-0{1 + n // 24}T{n % 24:02}:00,7.5" for n in range(30)))
    shown = stored("correct", file, *SERIES, "--reason", "test", "--dry-run")
    assert "2024-01-01 01:00" in shown.stdout
    assert "-> 7.5" in shown.stdout
    assert "and 10 more" in shown.stdout
    assert "would be 0 inserted, 30 updated, 0 unchanged; nothing was written" in shown.stdout
    counted = stored("correct", file, *SERIES, "--reason", "test", "--dry-run", "--json").json
    assert (counted["updated"], counted["batch"]) == (30, None)
    assert closes() == before
    assert stored("corrections", "list", "--json").json == []


def test_every_invalid_row_is_counted_and_the_first_are_named(stored: Command, tmp_path: Path) -> None:
    before = closes()
    file = write(
        tmp_path,
        "ts,close,volume",
        "2024-01-01T01:00Z,x,1",
        "yesterday,1,1",
        "2024-01-01T01:30Z,1,1",
        "2024-01-01T02:00Z,1,1",  # below the stored low
        "2024-01-01T03:00Z,100,-1",
        "2024-01-01T04:00Z,1,1,1",
        "2099-01-01T00:00Z,1,1",
        "2024-01-02T00:00Z,1,1",
        "2024-01-02 01:00+01:00,1,1",
        "2024-01-10T00:00Z,1,1",
        "",
        "2024-01-01T05:00Z,,1",
    )
    result = stored("correct", file, *SERIES, "--reason", "test", "--json")
    assert result.exit_code == 1
    assert (result.json["updated"], result.json["batch"], result.json["rejected"]) == (0, None, 11)
    assert [(one["line"], one["reason"]) for one in result.json["problems"]] == [
        (2, "its close is not a finite number"),
        (3, "its ts is not a time such as 2024-01-31T12:00:00Z"),
        (4, "off the grid: no candle of this timeframe opens then"),
        (5, "high is not the highest price, or low not the lowest"),
        (6, "high is not the highest price, or low not the lowest"),
        (7, "it has 4 cells, not 3"),
        (8, "not closed yet"),
        (9, "the same ts occurs more than once"),
        (10, "the same ts occurs more than once"),
        (11, "not stored, so the row must give open, high, low, too"),
        (13, "its close is not a finite number"),
    ]
    assert "Error: fix.csv: 11 rows invalid, so nothing was changed:" in result.stderr
    assert "line 13: its close is not a finite number" in result.stderr
    assert closes() == before


def test_many_invalid_rows_are_not_all_named(stored: Command, tmp_path: Path) -> None:
    file = write(tmp_path, "ts,close", *(f"2024-01-01T01:{n:02}Z,1" for n in range(1, 31)))
    result = stored("correct", file, *SERIES, "--reason", "test")
    assert result.exit_code == 1
    assert "fix.csv: 30 rows invalid" in result.stderr
    assert "line 21: off the grid" in result.stderr
    assert "line 22" not in result.stderr
    assert "and 10 more" in result.stderr


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "fix.csv is empty: the first line names the columns, ts, open, high, low, close, volume"),
        (b"ts,close\n", "fix.csv has no rows"),
        (b"ts,clse\n2024-01-01,1\n", "unknown column 'clse'; did you mean close?"),
        (b"ts;close\n2024-01-01;1\n", "does not separate its columns by commas"),
        ("ts,close\n2024-01-01,1\n2024-01-02,\xe4\n".encode("latin-1"), r"is not UTF-8 (line 3)"),
        (b"close\n1\n", "has no column ts"),
        (b"ts\n2024-01-01\n", "has no column to correct"),
        (b"ts,close,close\n2024-01-01,1,1\n", "has the column close more than once"),
    ],
)
def test_a_file_that_is_no_correction_file(
    settings: Path, fks: Command, tmp_path: Path, content: bytes, sentence: str
) -> None:
    (tmp_path / "fix.csv").write_bytes(content)
    result = fks("correct", "fix.csv", *SERIES, "--reason", "test")
    assert result.exit_code == 2
    assert sentence in result.stderr


def test_a_file_that_is_not_there(settings: Path, fks: Command) -> None:
    result = fks("correct", "fix.csv", *SERIES, "--reason", "test")
    assert (result.exit_code, "fix.csv cannot be read" in result.stderr) == (2, True)


def test_a_reason_is_required(settings: Path, fks: Command, tmp_path: Path) -> None:
    file = write(tmp_path, "ts,close", "2024-01-01,1")
    assert "Missing option '--reason'" in fks("correct", file, *SERIES).stderr
    result = fks("correct", file, *SERIES, "--reason", " ")
    assert (result.exit_code, "--reason is empty" in result.stderr) == (2, True)


def test_an_account_without_a_name(
    settings: Path, fks: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container often runs under a user id that passwd does not list."""

    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 4242")

    monkeypatch.setattr(getpass, "getuser", unknown)
    file = write(tmp_path, "ts,close", "2024-01-01,1")
    result = fks("correct", file, *SERIES, "--reason", "test")
    sentence = "Error: This account has no name: state who decides with --author NAME.\n"
    assert (result.exit_code, result.stderr) == (1, sentence)


def test_an_unknown_series(world: LocalMarket, fks: Command, tmp_path: Path) -> None:
    file = write(tmp_path, "ts,close", "2024-01-01,1")
    result = fks("correct", file, "BTX/USDT", "1h", "--reason", "test")
    assert result.exit_code == 2
    assert "BTX/USDT 1h is neither configured nor stored; did you mean BTC/USDT?" in result.stderr
    result = fks("correct", file, "BTC/USDT", "5m", "--reason", "test")
    assert (result.exit_code, "BTC/USDT is configured with 1h 1d" in result.stderr) == (2, True)
    assert fks("series", "list", "BTX/USDT", "1h", "--json").json[0]["total_candles"] == 0


def test_a_parquet_file_creates_a_configured_series(world: LocalMarket, fks: Command, tmp_path: Path) -> None:
    ts = pa.array([1_704_067_200_000_000, 1_704_070_800_000_000], pa.timestamp("us"))
    prices = {name: pa.array([2.0, 3.0]) for name in ("open", "high", "low", "close")}
    pq.write_table(pa.table({"ts": ts, **prices}), tmp_path / "fix.parquet")
    result = fks("correct", "fix.parquet", "ETH/USDT", "1h", "--reason", "first", "--json")
    assert (result.exit_code, result.json["inserted"]) == (0, 2)
    frame = read_candles("ETH/USDT", "1h", "2024-01-01", "2024-01-02")
    assert frame["close"].tolist() == [2.0, 3.0]
    assert frame["volume"].isna().all()
    (state,) = [one for one in fks("status", "--json").json if one["symbol"] == "ETH/USDT"]
    assert (state["total_candles"], state["open_gaps"]) == (2, 0)


def test_rows_from_stdin(stored: Command) -> None:
    """A file that changes nothing writes no batch."""
    result = CliRunner().invoke(
        main,
        ["correct", "-", *SERIES, "--reason", "test", "--json"],
        input="ts,volume\n2024-01-01T03:00Z,12.25\n",
        prog_name="fks-backfill",
    )
    assert (result.exit_code, '"updated": 1' in result.stdout) == (0, True)
    again = CliRunner().invoke(
        main,
        ["correct", "-", *SERIES, "--reason", "test"],
        input="ts,volume\n2024-01-01T03:00Z,12.25\n",
        prog_name="fks-backfill",
    )
    assert "0 inserted, 0 updated, 1 unchanged: the file holds the stored values" in again.stdout
    (batch, before) = stored("batches", "list", "--limit", "2", "--json").json
    assert (batch["source"], before["kind"]) == ("stdin", "delivery")
    assert batch["author"] == getpass.getuser()


def test_an_exported_file_changes_nothing(stored: Command, tmp_path: Path) -> None:
    assert stored("export", *SERIES, "-o", "all.csv").exit_code == 0
    result = stored("correct", "all.csv", *SERIES, "--reason", "test", "--json")
    assert (result.json["unchanged"], result.json["updated"], result.json["batch"]) == (48, 0, None)


def test_a_gap_beside_a_corrected_candle_is_filled(
    stored: Command, world: LocalMarket, tmp_path: Path
) -> None:
    """A corrected price beside the gap is no sign of another market."""
    frame = read_candles("BTC/USDT", "1h", "2024-01-01", "2024-01-03")
    last = frame.iloc[-1] * 1.2
    row = ",".join(repr(float(last[name])) for name in ("open", "high", "low", "close"))
    file = write(tmp_path, "ts,open,high,low,close", f"2024-01-02T23:00Z,{row}")
    assert stored("correct", file, *SERIES, "--reason", "test").exit_code == 0
    more = stored("backfill", *SERIES, "--start", "2024-01-03", "--end", "2024-01-04", "--json")
    assert (more.exit_code, more.json["total_candles"], more.json["missing"]) == (0, 24, 0)


def test_history_around_a_corrected_candle_is_fetched(
    world: LocalMarket, fks: Command, tmp_path: Path
) -> None:
    """The candle was inserted before the first sync; the sync requests the others, and keeps it."""
    file = write(tmp_path, "ts,open,high,low,close", "2024-01-01T05:00Z,2,3,1,2", "2024-01-02T05:00Z,2,3,1,2")
    assert fks("correct", file, *SERIES, "--reason", "test").exit_code == 0
    result = fks("backfill", *JANUARY, "--json")
    assert (result.exit_code, result.json["total_candles"], result.json["missing"]) == (0, 46, 0)
    assert [n for n, close in enumerate(closes()) if close == 2.0] == [5, 29]
    (newest, *_) = fks("corrections", "list", "BTC/USDT", "--json").json
    assert newest["before"] == dict.fromkeys(("open", "high", "low", "close", "volume"))
    assert newest["after"] == {"open": 2.0, "high": 3.0, "low": 1.0, "close": 2.0, "volume": None}
    assert newest["pinned"]
    assert fks("audit").exit_code == 0
