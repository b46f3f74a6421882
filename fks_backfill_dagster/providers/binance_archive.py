"""The public archives of Binance: selection, download, verification and parsing of files.

Belongs here: paths, publication dates, checksums, zip and CSV, and which files are worth their cost.
Does not belong here: REST, or candles that are in no file (`binance.py`).

Format: a month's file appears on the first Monday of the next month or later, sometimes by weeks; a day's file on the
next day. Open times are microseconds from 2025-01-01 on and milliseconds before; the unit is detected per row. Some
files have a header line. A file may be replaced after publication, and a day may be missing in a monthly file although
its daily file has it.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum
from urllib.parse import quote

import numpy as np
import pyarrow as pa
from pyarrow import csv

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import RangeSet, TimeRange
from fks_backfill_dagster.domain.timeframe import (
    FIRST_MONDAY,
    MICROS_PER_DAY,
    MICROS_PER_WEEK,
    Timeframe,
    to_datetime,
)
from fks_backfill_dagster.providers.base import (
    Cancelled,
    Delivery,
    InvalidResponse,
    Origin,
    PermanentError,
    ProviderError,
    ProviderOptions,
    Transport,
)
from fks_backfill_dagster.providers.http.client import HttpClient, Reply
from fks_backfill_dagster.providers.http.errors import Unreachable, header_time, host_of, place_of
from fks_backfill_dagster.providers.http.limiter import Limiter
from fks_backfill_dagster.providers.http.pool import RequestPool, Tally

PROVIDER = "binance"
LANE = "binance-archive"

# A month of 1m candles is 6 MB of text and 2 MB zipped; only a zip bomb comes near these limits.
MAX_UNZIPPED = 64 * 1024 * 1024
MAX_ZIPPED = 32 * 1024 * 1024
MAX_CHECKSUM = 4096
# An unresponsive host must cost little, because REST is available; after a failure it has a cool-down.
RESPONSE_SECONDS = 15.0
COOL_DOWN_SECONDS = 300.0
# Files in memory at once, zipped.
_FILES_AT_ONCE = 8
# A file is worth its two requests if it replaces more than one REST page.
_WORTHWHILE_ROWS = 1000
# Milliseconds are below this until the year 5138, microseconds above since 1973.
_FIRST_MICROS = 10**14

_COLUMNS = [
    "ts",
    "open",
    "high",
    "low",
    "close",
    "volume",
    "close_ts",
    "quote",
    "trades",
    "base",
    "taker",
    "_",
]
_USED = _COLUMNS[:6]
_CONVERT = csv.ConvertOptions(
    include_columns=_USED,
    column_types={name: pa.int64() if name == "ts" else pa.float64() for name in _USED},
)
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")


@dataclass(frozen=True, slots=True)
class ArchiveFile:
    """One published file: a whole UTC month or day of one symbol and interval."""

    symbol: str
    timeframe: Timeframe
    period: TimeRange
    monthly: bool

    @property
    def stem(self) -> str:
        day = to_datetime(self.period.start)
        return f"{self.symbol}-{self.timeframe}-{day:%Y-%m}" + ("" if self.monthly else f"-{day:%d}")

    @property
    def path(self) -> str:
        """The path below archive_url."""
        kind = "monthly" if self.monthly else "daily"
        symbol, stem = quote(self.symbol, safe=""), quote(self.stem, safe="")
        return f"/data/spot/{kind}/klines/{symbol}/{self.timeframe}/{stem}.zip"

    @property
    def rows(self) -> int:
        """The number of candles of a full period."""
        return self.period.duration // self.timeframe.micros

    def published(self, now: int) -> bool:
        """Whether the file can be published at `now`; it may be late."""
        if not self.monthly:
            return now >= self.period.end
        weeks = -(-(self.period.end - FIRST_MONDAY) // MICROS_PER_WEEK)
        return now >= FIRST_MONDAY + weeks * MICROS_PER_WEEK


class Outcome(Enum):
    READ = "read"
    ABSENT = "absent"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Fetched:
    """The result for one file: a `delivery` if it was read, a `warning` if it failed."""

    file: ArchiveFile
    outcome: Outcome
    delivery: Delivery | None = None
    warning: str | None = None


# --- selection ------------------------------------------------------------------------------------


def month_of(instant: int) -> TimeRange:
    """The UTC month of an instant."""
    day = to_datetime(instant)
    year, month = (day.year + 1, 1) if day.month == 12 else (day.year, day.month + 1)
    return TimeRange.of(datetime(day.year, day.month, 1, tzinfo=UTC), datetime(year, month, 1, tzinfo=UTC))


def day_of(instant: int) -> TimeRange:
    """The UTC day of an instant."""
    start = instant - instant % MICROS_PER_DAY
    return TimeRange(start, start + MICROS_PER_DAY)


def choose_files(
    symbol: str, timeframe: Timeframe, missing: RangeSet, fetched: Sequence[Fetched], now: int
) -> list[ArchiveFile]:
    """The next files worth downloading; none if REST should take over.

    fetched: the files tried so far.

    Monthly files first, if at least half of one is missing; then daily files for days with more missing candles than
    a REST page has. (So 1m uses both, 5m to 30m monthly files, 1h and above none.) If a month has no file, only its
    newest missing day is requested at first: if that is absent as well (before a listing, after a delisting), the
    other thirty are not requested.
    """
    if month_of(missing.hull.start).duration // timeframe.micros <= _WORTHWHILE_ROWS:
        return []
    outcomes = {one.file: one.outcome for one in fetched}
    chosen: list[ArchiveFile] = []
    for period in _periods(missing, month_of):
        month = ArchiveFile(symbol, timeframe, period, monthly=True)
        part = missing & RangeSet([period])
        if month not in outcomes and _worthwhile(month, part, now, share=0.5):
            chosen.append(month)
            continue
        days = [ArchiveFile(symbol, timeframe, day, monthly=False) for day in _periods(part, day_of)]
        days = [day for day in days if _worthwhile(day, part & RangeSet([day.period]), now)]
        fresh = [day for day in days if day not in outcomes]
        if outcomes.get(month) is Outcome.ABSENT and days:
            newest = days[-1]
            if newest in fresh:
                fresh = [newest]
            elif outcomes[newest] is Outcome.ABSENT:
                fresh = []
        chosen.extend(fresh)
    return chosen


def _worthwhile(file: ArchiveFile, missing: RangeSet, now: int, share: float = 0.0) -> bool:
    rows = int((missing.ends - missing.starts).sum()) // file.timeframe.micros
    return rows > _WORTHWHILE_ROWS and rows >= share * file.rows and file.published(now)


def _periods(ranges: RangeSet, period_of: Callable[[int], TimeRange]) -> list[TimeRange]:
    """The periods that the ranges overlap, ascending, each once."""
    found: list[TimeRange] = []
    for part in ranges:
        instant = part.start if not found else max(part.start, found[-1].end)
        while instant < part.end:
            found.append(period_of(instant))
            instant = found[-1].end
    return found


# --- download -------------------------------------------------------------------------------------


class _HostFails(PermanentError):
    """The host fails, not a single file: no retry helps within this fetch."""


class Archives:
    """Reads archive files from `options.archive_url`. Safe to call from several threads."""

    def __init__(
        self, options: ProviderOptions, pool: RequestPool, limiter: Limiter, clock: Callable[[], int]
    ) -> None:
        self._clock = clock
        seconds = min(RESPONSE_SECONDS, options.timeout_seconds)
        quick = replace(options, timeout_seconds=seconds, retry_budget_seconds=seconds)
        self._client = HttpClient(LANE, quick, pool, limiter, setting="providers.binance.archive_url")
        self._base_url = (options.archive_url or "").rstrip("/")
        self._lock = threading.Lock()
        self._available_from = 0.0

    @property
    def available(self) -> bool:
        """False without an archive_url, and during the cool-down after the host failed."""
        return bool(self._base_url) and time.monotonic() >= self._available_from

    def fetch(self, files: Sequence[ArchiveFile], tally: Tally) -> list[Fetched]:
        """Downloads, verifies and reads the files, a few at a time; raises only Cancelled.

        A file that fails twice is skipped with a warning. If the host fails, there is one warning, a cool-down
        begins, and the remaining files are missing in the result.
        """
        fetched: list[Fetched] = []
        for first in range(0, len(files), _FILES_AT_ONCE):
            some = files[first : first + _FILES_AT_ONCE]
            try:
                read = self._attempt(some, tally)
                failed = [one.file for one in read if one.outcome is Outcome.FAILED]
                retried = {one.file: one for one in self._attempt(failed, tally)}
            except Cancelled:
                raise
            except ProviderError as error:
                fetched.append(Fetched(some[0], Outcome.FAILED, warning=self._cool_down(error)))
                break
            fetched.extend(retried.get(one.file, one) for one in read)
        return fetched

    def _attempt(self, files: Sequence[ArchiveFile], tally: Tally) -> list[Fetched]:
        """Downloads zips and checksums concurrently, then reads them; reading releases the interpreter lock."""
        wanted = [(file, extra) for file in files for extra in ("", ".CHECKSUM")]

        def download(item: tuple[ArchiveFile, str]) -> Reply | None:
            return self._download(*item, tally)

        replies = self._client.pool.map(LANE, download, wanted)
        return [
            self._result(file, zipped, checksum)
            for file, zipped, checksum in zip(files, replies[::2], replies[1::2], strict=True)
        ]

    def _download(self, file: ArchiveFile, extra: str, tally: Tally) -> Reply | None:
        """The reply; None for 404 (not published yet, or never). One retry of transient errors."""
        limit = MAX_CHECKSUM if extra else MAX_ZIPPED

        def attempt() -> Reply | None:
            try:
                reply = self._client.exchange(self._base_url + file.path + extra, max_bytes=limit)
            except Unreachable as error:
                raise _HostFails(LANE, str(error).removeprefix(f"{LANE}: ")) from None
            if reply.status == 404:
                return None
            if reply.status != 200:
                raise self._client.failure(reply)
            return reply

        return self._client.run(attempt, tally, attempts=2)

    def _result(self, file: ArchiveFile, zipped: Reply | None, checksum: Reply | None) -> Fetched:
        if zipped is None:
            return Fetched(file, Outcome.ABSENT)
        try:
            candles, sha256 = read_archive(
                file, zipped.body, checksum.body if checksum else None, self._base_url
            )
        except InvalidResponse as error:
            warning = f"{error}: skipped, its candles are fetched from other files or REST"
            return Fetched(file, Outcome.FAILED, warning=warning)
        now = self._clock()
        origin = Origin(
            provider=PROVIDER,
            transport=Transport.ARCHIVE,
            source=file.path,
            host=host_of(self._base_url),
            instrument=file.symbol,
            requested_at=now,
            published_at=min(now, published_at(file, zipped.headers)),
            sha256=sha256,
        )
        return Fetched(file, Outcome.READ, Delivery(candles, origin))

    def _cool_down(self, error: ProviderError) -> str | None:
        """Starts the cool-down. Returns the warning for the first thread only."""
        with self._lock:
            known = not self.available
            self._available_from = time.monotonic() + COOL_DOWN_SECONDS
        minutes = COOL_DOWN_SECONDS / 60
        return (
            None if known else f"{error}: cool-down of the archives for {minutes:.0f} minutes, REST is used"
        )


# --- parsing --------------------------------------------------------------------------------------


def published_at(file: ArchiveFile, headers: Mapping[str, str]) -> int:
    """The publication time of a file: its Last-Modified. Without that header the end of its period; a monthly file
    then counts as published after its first day, as it may be older than the daily file of any of its days
    (binance-public-data#475)."""
    named = header_time(headers, "Last-Modified")
    if named is not None:
        return named
    return file.period.start + MICROS_PER_DAY if file.monthly else file.period.end


def read_archive(
    file: ArchiveFile, zipped: bytes, checksum: bytes | None, base_url: str
) -> tuple[Candles, str]:
    """The unmodified candles of a verified file, ascending, and its SHA-256. Raises InvalidResponse."""
    place = place_of(base_url + file.path)
    actual = hashlib.sha256(zipped).hexdigest()
    named = re.match(rb"\s*([0-9a-fA-F]{64})\s+\*?(\S+)", checksum or b"")
    if named is None or named[2].decode("utf-8", "replace") != f"{file.stem}.zip":
        raise InvalidResponse(LANE, f"{place} has no matching checksum file")
    if named[1].decode().lower() != actual:
        raise InvalidResponse(LANE, f"{place} does not have the SHA-256 of its checksum file")
    try:
        text = _unzip(zipped, f"{file.stem}.csv")
        candles = _parse(text)
    except (zipfile.BadZipFile, zlib.error, struct.error, pa.ArrowInvalid, ValueError) as error:
        why = str(error).splitlines()[0][:200]
        raise InvalidResponse(LANE, f"{place} is not an archive of {file.stem} ({why})") from None
    # A row of another period would be stored twice, or under the wrong file's checksum.
    return candles.sorted().within(file.period), actual


def _unzip(zipped: bytes, member: str) -> bytes:
    """The only member of the archive, inflated in one call (a third faster than ZipFile.read)."""
    with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
        entries = archive.infolist()
    if [entry.filename for entry in entries] != [member]:
        raise zipfile.BadZipFile(f"it contains {', '.join(e.filename for e in entries[:3]) or 'nothing'}")
    entry = entries[0]
    if entry.compress_type != zipfile.ZIP_DEFLATED or entry.flag_bits & 1:
        raise zipfile.BadZipFile("it is not deflated, or encrypted")
    if entry.file_size > MAX_UNZIPPED:
        raise zipfile.BadZipFile(f"it would unzip to {entry.file_size} bytes")
    fields = _LOCAL_HEADER.unpack_from(zipped, entry.header_offset)
    start = entry.header_offset + _LOCAL_HEADER.size + fields[9] + fields[10]
    packed = memoryview(zipped)[start : start + entry.compress_size]
    text = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, entry.file_size + 1)
    if len(text) != entry.file_size or zlib.crc32(text) != entry.CRC:
        raise zipfile.BadZipFile("its content is damaged")
    return text


def _parse(text: bytes) -> Candles:
    """CSV to columns, correctly rounded; an empty or NaN cell becomes NaN.

    One block and no threads: the columns are contiguous, and files are processed in parallel instead.
    """
    header = text[:4].lower() == b"open"
    table = csv.read_csv(
        pa.BufferReader(text),
        read_options=csv.ReadOptions(
            column_names=_COLUMNS, skip_rows=int(header), use_threads=False, block_size=len(text) + 1
        ),
        convert_options=_CONVERT,
    )
    if table.num_rows == 0:
        raise ValueError("it has no rows")
    if table["ts"].null_count:
        raise ValueError("a row has no open time")
    ts = table["ts"].to_numpy()
    if ts.min() < 0:
        raise ValueError("a row opens before 1970")
    prices = [table[name].to_numpy() for name in _USED[1:]]
    return Candles(np.where(ts < _FIRST_MICROS, ts * 1000, ts), *prices)
