"""`launch` without a running Dagster."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from fks_backfill_dagster.cli import launch as lines
from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.host.graphql import Run
from fks_backfill_dagster.host.launch import Launched, Order, Seen, _left, count, order
from fks_backfill_dagster.settings.catalog import Catalog
from fks_backfill_dagster.settings.load import load_settings
from fks_backfill_dagster.settings.model import Settings
from fks_backfill_dagster.settings.sections import SymbolSettings
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.cli.conftest import Command

MINUTES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give one SYMBOL or more, such as BTC/USDT, or --all"),
        (("BTC/USDT", "--all"), "give one SYMBOL or more, such as BTC/USDT, or --all"),
        (
            ("DOGE/USDT",),
            "'DOGE/USDT' is not configured, so it is no asset in Dagster; the nearest: ETH/USDT, BTC/USDT, SOL/BTC;",
        ),
        (("BTC/USDT", "--timeframe", "2m"), "'2m' is not a timeframe"),
        (("ETH/USDT", "--timeframe", "1d"), "they have 1h"),
        (("BTC/USDT", "--start", "2023-01-01", "--end", "2023-06-01"), "ends before"),
        (("BTC/USDT", "--start", "2024-06-01", "--end", "2024-01-01"), "lies after --end"),
    ],
)
def test_invalid_arguments_are_usage_errors(fks: Command, arguments: tuple[str, ...], sentence: str) -> None:
    done = fks("launch", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr


@pytest.mark.parametrize(
    ("names", "timeframes", "chosen"),
    [
        (("BTC/USDT",), (), ["BTC/USDT 1h", "BTC/USDT 1d"]),
        (("BTC/USDT", "1h"), (), ["BTC/USDT 1h"]),
        (("BTC/USDT",), ("1h",), ["BTC/USDT 1h"]),
        (("btc_usdt", "SOL/*", "1d"), ("1h",), ["BTC/USDT 1h", "BTC/USDT 1d", "SOL/BTC 1h"]),
    ],
)
def test_the_timeframe_is_an_argument_or_an_option(
    settings: Path, names: tuple[str, ...], timeframes: tuple[str, ...], chosen: list[str]
) -> None:
    assert [str(one) for one in lines._chosen(Catalog(load_settings()), names, False, timeframes)] == chosen
    if not names[1:]:
        return
    assert [str(one) for one in lines._chosen(Catalog(load_settings()), names[-1:], True, timeframes)] == (
        ["BTC/USDT 1h", "BTC/USDT 1d", "ETH/USDT 1h", "SOL/BTC 1h"]
        if timeframes
        else ["BTC/USDT 1h", "ETH/USDT 1h", "SOL/BTC 1h"]
    )


def test_without_a_running_dagster_the_error_names_the_command_that_starts_it(fks: Command) -> None:
    done = fks("launch", "btc_usdt", "--start", "2024-01-01", "--json")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: Dagster is not up: start it with `fks-backfill up`, then launch again.\n"


@pytest.mark.parametrize(
    ("timeframe", "start", "end", "keys"),
    [
        (Timeframe.M1, "2024-01-31", "2024-03-01", ("2024-01-01", "2024-02-01")),
        (Timeframe.M1, "2024-01-31", "2024-03-01T00:01", ("2024-01-01", "2024-02-01", "2024-03-01")),
        (Timeframe.M1, "2023-11-15", "2024-02-01", ("2023-11-01", "2023-12-01", "2024-01-01")),
        (Timeframe.D1, "2022-12-31", "2024-01-01", ("2022-01-01", "2023-01-01")),
        (Timeframe.H1, "2016-01-01", "2018-06-01", ("2017-01-01", "2018-01-01")),
    ],
)
def test_a_range_covers_every_partition_that_it_overlaps(
    timeframe: Timeframe, start: str, end: str, keys: tuple[str, ...]
) -> None:
    series = Series("BTC/USDT", timeframe, AssetClass.CRYPTO)
    assert order(Catalog(Settings()), series, TimeRange(instant(start), instant(end))).keys == keys


def test_a_range_begins_with_the_start_of_the_series() -> None:
    """Before it nothing is expected; a start before history_start is valid as well."""
    entry = SymbolSettings(asset_class=AssetClass.CRYPTO, symbol="BTC/USDT", timeframes=(Timeframe.M1,))
    for start, first in (("2016-11-20", "2016-11-01"), ("2023-02-28", "2023-02-01")):
        dated = entry.model_copy(update={"start": instant(start)})
        settings = Settings(symbols=(dated,))
        window = TimeRange(instant("2015-01-01"), instant("2023-04-01"))
        found = order(Catalog(settings), MINUTES, window)
        assert (found.keys[0], found.keys[-1]) == (first, "2023-03-01")
        with pytest.raises(ValueError, match=r"starts at .*, and the range ends before"):
            order(Catalog(settings), MINUTES, TimeRange(instant("2015-01-01"), instant(start)))


BTC, ETH = ("ohlcv", "BTC_USDT", "1m"), ("ohlcv", "ETH_USDT", "1m")
OTHER = Series("ETH/USDT", Timeframe.M1, AssetClass.CRYPTO)
QUARTER = ("2024-01-01", "2024-02-01", "2024-03-01")


def test_materialized_partitions_are_counted() -> None:
    wanted = Order(MINUTES, QUARTER)
    first = Run("a", "SUCCESS", (BTC,), ("2024-01-01", "2024-02-01"))
    rest = Run("b", "STARTED", (BTC,), ("2024-03-01", "2024-03-01"))
    assert count([wanted], [], {}) == Seen(3, [])
    assert not count([wanted], [first], {"a": 2}).over
    going = count([wanted], [first, rest], {"a": 2})
    assert (going.materialized, going.failed, going.settled, going.ended) == (2, 0, 2, 1)
    assert not going.over
    ended = Run("b", "FAILURE", (BTC,), ("2024-03-01", "2024-03-01"))
    over = count([wanted], [first, ended], {"a": 2})
    assert (over.materialized, over.failed, over.over) == (2, 1, True)
    again = Run("c", "QUEUED", (BTC,), ("2024-03-01", "2024-03-01"))
    assert not count([wanted], [first, ended, again], {"a": 2}).over


def test_partitions_of_a_run_count_while_it_runs_and_a_canceled_one_fails_the_rest() -> None:
    orders = [Order(MINUTES, QUARTER), Order(OTHER, QUARTER[1:])]
    run = Run("a", "STARTED", (BTC, ETH), (QUARTER[0], QUARTER[-1]))
    assert count(orders, [run], {"a": 3}) == Seen(5, [run], materialized=3)
    canceled = Run("a", "CANCELED", (BTC, ETH), (QUARTER[0], QUARTER[-1]))
    assert count(orders, [canceled], {"a": 3}) == Seen(5, [canceled], materialized=3, failed=2, settled=5)


def test_a_run_whose_worker_was_lost_is_not_over_before_its_retry_is() -> None:
    wanted = Order(MINUTES, ("2024-01-01",))
    month = ("2024-01-01", "2024-01-01")
    lost = Run("a", "FAILURE", (BTC,), month, will_retry=True)
    assert not count([wanted], [lost], {}).over
    lost = Run("a", "FAILURE", (BTC,), month, will_retry=True, retried=True)
    again = Run("b", "SUCCESS", (BTC,), month)
    seen = count([wanted], [lost, again], {"a": 1, "b": 1})
    assert (seen.over, seen.materialized, seen.failed) == (True, 1, 0)
    assert Launched("id", [lost, again], {wanted: []}, []).succeeded
    assert not Launched("id", [lost, Run("b", "FAILURE", (BTC,), month)], {wanted: []}, []).succeeded


@pytest.mark.parametrize(
    ("status", "assets", "left"),
    [
        ("SUCCESS", (BTC, ETH), ()),
        ("STARTED", (BTC,), ()),
        ("FAILURE", (BTC,), ()),  # alone in its run: it would fail again
        ("FAILURE", (BTC, ETH), QUARTER[1:]),  # the run could not load, or ended early
        ("CANCELED", (BTC, ETH), QUARTER[1:]),  # by a daemon that fails such a backfill
    ],
)
def test_partitions_lost_with_a_removed_symbol_are_launched_again(
    status: str, assets: tuple[tuple[str, ...], ...], left: tuple[str, ...]
) -> None:
    kept, gone = Order(MINUTES, QUARTER), Order(OTHER, QUARTER)
    first = Run("a", "SUCCESS", (BTC, ETH), (QUARTER[0], QUARTER[0]))
    rest = Run("b", status, assets, (QUARTER[1], QUARTER[-1]))
    found = _left([kept, gone], {gone}, [first, rest])
    assert [(one.series, one.keys) for one in found] == ([(MINUTES, left)] if left else [])


def test_partitions_without_a_run_are_launched_again() -> None:
    kept, gone = Order(MINUTES, QUARTER), Order(OTHER, QUARTER)
    (found,) = _left([kept, gone], {gone}, [])
    assert found.keys == QUARTER


def test_the_log_has_a_line_every_half_minute_at_least_and_not_every_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Polls a second apart, some of which take a few seconds more; nothing changes for five minutes."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    show = lines._Lines(clock[0])
    printed = [clock[0]]
    seen = Seen(5, [Run("a", "STARTED", (BTC,), (QUARTER[0], QUARTER[-1]))], materialized=1)
    for poll in range(200):
        show(seen)
        if capsys.readouterr().err:
            printed.append(clock[0])
        clock[0] += 1 + 3 * (poll % 7 == 0)
    waits = [later - earlier for earlier, later in pairwise([*printed, clock[0]])]
    assert max(waits) <= 30
    assert len(printed) < 20
    show(replace(seen, materialized=2))
    clock[0] += 1
    show(replace(seen, materialized=3))
    assert len(capsys.readouterr().err.splitlines()) == 1, "changes are logged every few seconds"
    show(replace(seen, materialized=5, settled=5, runs=[]))
    assert "5 of 5 partitions materialized" in capsys.readouterr().err
