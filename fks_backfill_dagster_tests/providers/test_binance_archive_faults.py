"""Archives that are damaged, of another file, or unreachable: skipped, and replaced by REST."""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from fks_backfill_dagster.domain.timeframe import Timeframe
from fks_backfill_dagster.providers import binance_archive
from fks_backfill_dagster.providers.base import InvalidResponse
from fks_backfill_dagster.providers.binance_archive import ArchiveFile, read_archive
from fks_backfill_dagster_tests.providers.archives import JANUARY, fetch, kinds, of
from fks_backfill_dagster_tests.providers.conftest import Make
from fks_backfill_dagster_tests.providers.scripted import (
    Received,
    Scripted,
    SmallBinance,
    candles_at,
    checksum_of,
    crypto,
    csv_of,
    serve,
    span,
    zipped_csv,
)

pytestmark = pytest.mark.server


def other_member(zipped: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        return zipped_csv(archive.read(archive.namelist()[0]), "ETHUSDT-1m-2024-01-05")


def with_own_checksum(change: Callable[[bytes], bytes]) -> Callable[[Received, Scripted], Scripted]:
    """A changed file with a valid checksum, so that the zip itself must be checked."""

    def archive(asked: Received, honest: Scripted) -> Scripted:
        name = asked.path.rsplit("/", 1)[1].removesuffix(".CHECKSUM")
        zipped = change(SmallBinance()(Received(asked.path.removesuffix(".CHECKSUM"), {}, {}, 0)).body)
        return checksum_of(zipped, name) if asked.path.endswith(".CHECKSUM") else Scripted(zipped)

    return archive


def csv_only(text: bytes) -> Callable[[bytes], bytes]:
    return lambda _: zipped_csv(text, "BTCUSDT-1m-2024-01-05")


def no_checksum(asked: Received, honest: Scripted) -> Scripted:
    return Scripted(b"", 404) if asked.path.endswith(".CHECKSUM") else honest


def bad_checksum(asked: Received, honest: Scripted) -> Scripted:
    return Scripted(b"0" * 64 + honest.body[64:]) if asked.path.endswith(".CHECKSUM") else honest


class TestFailing:
    DAY = span("2024-01-05", "2024-01-06")

    @pytest.mark.parametrize(
        ("archive", "text"),
        [
            (bad_checksum, "does not have the SHA-256"),
            (no_checksum, "has no matching checksum file"),
            (with_own_checksum(lambda zipped: b"PK garbage"), "is not an archive of BTCUSDT-1m-2024-01-05"),
            (with_own_checksum(lambda z: z[:200] + bytes(16) + z[216:]), "is not an archive of"),
            (with_own_checksum(lambda z: z[: len(z) // 2]), "is not an archive of"),
            (with_own_checksum(other_member), "it contains ETHUSDT"),
            (with_own_checksum(csv_only(b"")), "is not an archive of"),
            (with_own_checksum(csv_only(b"<html>\n")), "is not an archive of"),
            (with_own_checksum(csv_only(b"1704412800000,1,2,3\n")), "is not an archive of"),
            (with_own_checksum(csv_only(b"1704412800000,a,2,1,1,1,1,1,1,1,1,0\n")), "is not an archive of"),
        ],
    )
    def test_is_tried_twice_then_skipped(
        self, make: Make, archive: Callable[[Received, Scripted], Scripted], text: str
    ) -> None:
        answer, server = fetch(make, SmallBinance(archive=archive), self.DAY)
        assert kinds(server) == ["daily", "daily", "rest", "rest"]
        (warning,) = answer.warnings
        assert text in warning
        assert "skipped" in warning

    def test_a_transient_failure_is_retried(self, make: Make) -> None:
        failures = [bad_checksum]

        def archive(asked: Received, honest: Scripted) -> Scripted:
            if asked.path.endswith(".CHECKSUM") and failures:
                return failures.pop()(asked, honest)
            return honest

        answer, server = fetch(make, SmallBinance(archive=archive), self.DAY)
        assert kinds(server) == ["daily", "daily"]
        assert answer.warnings == ()

    def test_a_zip_bomb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(binance_archive, "MAX_UNZIPPED", 10_000)
        file = ArchiveFile("BTCUSDT", Timeframe.M1, self.DAY, monthly=False)
        zipped = zipped_csv(b"0" * 20_000, file.stem)
        with pytest.raises(InvalidResponse, match="would unzip to 20000 bytes"):
            read_archive(file, zipped, checksum_of(zipped, f"{file.stem}.zip").body, "http://h")

    def test_another_files_checksum(self) -> None:
        file = ArchiveFile("BTCUSDT", Timeframe.M1, self.DAY, monthly=False)
        zipped = zipped_csv(b"1,2\n", file.stem)
        with pytest.raises(InvalidResponse, match="no matching checksum file"):
            read_archive(file, zipped, checksum_of(zipped, "ETHUSDT-1m-2024-01-05.zip").body, "http://h")

    def test_rows_of_another_period_are_left_out(self) -> None:
        file = ArchiveFile("BTCUSDT", Timeframe.M1, self.DAY, monthly=False)
        opens = np.arange(self.DAY.start - 120_000_000, self.DAY.end + 60_000_000, 60_000_000)
        zipped = zipped_csv(csv_of(candles_at(opens, "BTCUSDT"), Timeframe.M1), file.stem)
        got = read_archive(file, zipped, checksum_of(zipped, f"{file.stem}.zip").body, "http://h")[0]
        assert got.equals(candles_at(opens[2:-1], "BTCUSDT"))

    @pytest.mark.parametrize("status", [500, 403, 429])
    def test_a_failing_host_has_a_cool_down(self, make: Make, status: int) -> None:
        market = SmallBinance(archive=lambda *_: Scripted(b"no", status))
        with serve(market) as server:
            provider = make("binance", server.url, archive_url=server.url)
            first, second = provider.fetch(crypto(), self.DAY), provider.fetch(crypto(), self.DAY)
        (warning,) = first.warnings
        assert "cool-down of the archives for 5 minutes" in warning
        assert second.warnings == ()
        assert kinds(server).count("daily") <= 2
        for answer in (first, second):
            assert of(answer).equals(market.truth(crypto(), self.DAY))

    def test_an_unreachable_host(self, make: Make) -> None:
        with serve(lambda _: Scripted()) as gone:
            unreachable = gone.url
        with serve(SmallBinance()) as server:
            provider = make("binance", server.url, archive_url=unreachable, retry_budget_seconds=60.0)
            began = time.monotonic()
            answer = provider.fetch(crypto(), JANUARY)
            assert time.monotonic() - began < 45
        assert len(of(answer)) == 44_640
        assert len(answer.warnings) == 1

    def test_an_unresponsive_host_costs_its_timeout_once(self, make: Make) -> None:
        with serve(SmallBinance(archive=lambda _, honest: Scripted(honest.body, delay=1.0))) as server:
            provider = make(
                "binance", server.url, archive_url=server.url, timeout_seconds=0.5, retry_budget_seconds=60.0
            )
            began = time.monotonic()
            answers = [provider.fetch(crypto(), self.DAY) for _ in range(3)]
            assert time.monotonic() - began < 45
        assert [len(answer.warnings) for answer in answers] == [1, 0, 0]
        assert all(len(of(answer)) == 1440 for answer in answers)
