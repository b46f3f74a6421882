"""`launch` as far as no Dagster runs; with one it is tested beside the failed month."""

from __future__ import annotations

import pytest

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.domain.series import AssetClass, Series
from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.orchestration.launching import Launched, Order, Seen, _seen, order
from fks_backfill_dagster.orchestration.webserver import Run
from fks_backfill_dagster.settings import Settings
from fks_backfill_dagster.simulator.config import instant
from fks_backfill_dagster_tests.cli.conftest import Command

MINUTES = Series("BTC/USDT", Timeframe.M1, AssetClass.CRYPTO)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "give one SYMBOL or more, such as BTC/USDT, or --all"),
        (("BTC/USDT", "--all"), "give one SYMBOL or more, such as BTC/USDT, or --all"),
        (("DOGE/USDT",), "'DOGE/USDT' is not configured, so Dagster does not have it; there are: BTC/USDT,"),
        (("BTC/USDT", "--timeframe", "2m"), "'2m' is not a timeframe"),
        (("ETH/USDT", "--timeframe", "1d"), "they have 1h"),
        (("BTC/USDT", "--start", "2023-01-01", "--end", "2023-06-01"), "ends before"),
        (("BTC/USDT", "--start", "2024-06-01", "--end", "2024-01-01"), "lies after --end"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(
    fks: Command, arguments: tuple[str, ...], sentence: str
) -> None:
    done = fks("launch", *arguments)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_without_a_running_dagster_it_says_how_to_start_one(fks: Command) -> None:
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
def test_a_range_means_every_partition_that_it_reaches_into(
    timeframe: Timeframe, start: str, end: str, keys: tuple[str, ...]
) -> None:
    series = Series("BTC/USDT", timeframe, AssetClass.CRYPTO)
    assert order(Settings(), series, TimeRange(instant(start), instant(end))).keys == keys


def test_a_partition_is_done_when_no_run_of_it_is_left() -> None:
    wanted = Order(MINUTES, ("2024-01-01", "2024-02-01", "2024-03-01"))
    asset = (("ohlcv", "BTC_USDT", "1m"),)
    first = Run("a", "SUCCESS", asset, ("2024-01-01", "2024-02-01"))
    rest = Run("b", "STARTED", asset, ("2024-03-01", "2024-03-01"))
    assert _seen([wanted], []) == Seen(0, 3, [])
    assert not _seen([wanted], [first]).over
    going = _seen([wanted], [first, rest])
    assert (going.partitions, going.ended, going.over) == (2, 1, False)
    ended = Run("b", "FAILURE", asset, ("2024-03-01", "2024-03-01"))
    assert _seen([wanted], [first, ended]).over
    again = Run("c", "QUEUED", asset, ("2024-03-01", "2024-03-01"))
    assert not _seen([wanted], [first, ended, again]).over


def test_a_run_whose_worker_was_lost_is_not_over_before_its_retry_is() -> None:
    wanted = Order(MINUTES, ("2024-01-01",))
    asset, month = (("ohlcv", "BTC_USDT", "1m"),), ("2024-01-01", "2024-01-01")
    lost = Run("a", "FAILURE", asset, month, will_retry=True)
    assert not _seen([wanted], [lost]).over
    lost = Run("a", "FAILURE", asset, month, will_retry=True, retried=True)
    again = Run("b", "SUCCESS", asset, month)
    assert _seen([wanted], [lost, again]).over
    assert Launched("id", [lost, again], {wanted: []}, []).succeeded
    assert not Launched("id", [lost, Run("b", "FAILURE", asset, month)], {wanted: []}, []).succeeded
