"""Paged responses: concatenated, compared where they overlap, and limited in number.

Belongs here: seams (where the next response begins), the comparison of neighbouring pages, the progress of a chain of
pages, and where the next page may be.
Does not belong here: the request and the parsing of a page (each provider), the meaning of a jump at a seam
(`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar
from urllib.parse import SplitResult, urljoin, urlsplit, urlunsplit

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants, TimeRange, among
from fks_backfill_dagster.providers.base import InvalidResponse, PermanentError
from fks_backfill_dagster.providers.http.errors import place_of

Page = TypeVar("Page")

# Consecutive pages without newer rows that are accepted: an empty page between two full ones can be legitimate.
_IDLE_PAGES = 3
# Legitimate pages have more rows than this on average, except for a few.
_ROWS_A_PAGE = 10
_SPARE_PAGES = 10


@dataclass(slots=True)
class Chain:
    """Checks the progress of linked pages, and that they end with the range.

    window: the requested range, of at most `candles` candles. page_size: maximum rows per page. All pages together
    may have twice the rows of the range and of a page, so memory is bounded by the range.
    """

    provider: str
    place: str
    window: TimeRange
    candles: int
    page_size: int
    pages: int = 0
    rows: int = 0
    idle: int = 0
    newest: int | None = None

    def is_done(self, stamps: Instants) -> bool:
        """Counts the rows of the next page, closed or not. Returns whether they reach the end of the range, so that
        no further page is needed.

        Raises InvalidResponse if the pages make no progress, or exceed what the range can need.
        """
        self.pages, self.rows = self.pages + 1, self.rows + len(stamps)
        newest = int(stamps.max()) if len(stamps) else None
        if newest is not None and (self.newest is None or newest > self.newest):
            self.newest, self.idle = newest, 0
        else:
            self.idle += 1
        if self.idle > _IDLE_PAGES:
            raise InvalidResponse(
                self.provider,
                f"{self.place} links page after page, and the last {self.idle} of {self.pages:,} pages had no"
                " newer bar",
            )
        most_pages, most_rows = (
            _SPARE_PAGES + self.candles // _ROWS_A_PAGE,
            2 * (self.candles + self.page_size),
        )
        if self.pages > most_pages or self.rows > most_rows:
            raise InvalidResponse(
                self.provider,
                f"{self.place} links page after page: {self.pages:,} pages had {self.rows:,} bars, for a range"
                f" of at most {self.candles:,}",
            )
        return newest is not None and newest >= self.window.end


def next_page(provider: str, following: object, url: str) -> str | None:
    """The address of the page after the one at `url`, as its response names it; None without one. Only on the host of
    `url`, because the request contains the key.

    Raises InvalidResponse for no address, PermanentError for another host.
    """
    if not following:
        return None
    try:
        theirs, ours = urlsplit(urljoin(url, str(following))), urlsplit(url)
        is_ours = _origin_of(theirs) == _origin_of(ours)
    except ValueError:
        raise InvalidResponse(
            provider, f"{place_of(url)} returned a next page that is not an address"
        ) from None
    if not is_ours:
        host = theirs.netloc.rpartition("@")[2]
        raise PermanentError(
            provider,
            f"the next page is at {theirs.scheme}://{host}, which is not the configured host: "
            f"set providers.{provider}.base_url to that if you trust it",
        )
    return urlunsplit((ours.scheme, ours.netloc, theirs.path, theirs.query, ""))


def _origin_of(url: SplitResult) -> tuple[str, str | None, int | None, bool]:
    """Identifies a server: scheme, host, port, and whether the address contains a user, who would replace the key.
    Raises ValueError for an invalid port."""
    port = url.port or {"http": 80, "https": 443}.get(url.scheme)
    return url.scheme, url.hostname, port, url.username is not None


def joined(pages: Sequence[Candles]) -> tuple[Candles, Instants]:
    """The rows of all responses, ascending, and their seams in the form of `Delivery.seams`.

    A seam is the open of a row from another response than the row before it. So a response inside another one (a
    second request for missing rows) has a seam where it begins, and one where the first response continues.
    """
    rows = Candles.concat(pages)
    response = np.repeat(np.arange(len(pages)), [len(page) for page in pages])
    if (rows.ts[1:] < rows.ts[:-1]).any():
        order = np.argsort(rows.ts, kind="stable")
        rows, response = rows.take(order), response[order]
    seams = np.unique(rows.ts[1:][response[1:] != response[:-1]])
    return rows, seams[seams > rows.ts[0]] if len(rows) else seams


def differing(one: Candles, other: Candles) -> bool:
    """Whether a candle that both contain has different values; NaN equals NaN."""
    mine, theirs = among(one.ts, other.ts), among(other.ts, one.ts)
    return not one.take(mine).equals(other.take(theirs))


def contradicting(pages: Sequence[Candles]) -> list[int]:
    """The indices of the pages that differ from a neighbour in a shared candle."""
    wrong = {
        side
        for index, (one, other) in enumerate(pairwise(pages))
        if differing(one, other)
        for side in (index, index + 1)
    }
    return sorted(wrong)


def agreeing(
    pages: Sequence[Page], request: Callable[[Sequence[Page]], Sequence[Candles]]
) -> list[Candles] | None:
    """The rows of each page; None if neighbours differ in a shared candle, also after a second request.

    Pages that agree cost no further request. Each row of an overlap remains in both of its pages.
    """
    found = list(request(pages))
    wrong = contradicting(found)
    if wrong:
        for index, again in zip(wrong, request([pages[index] for index in wrong]), strict=True):
            found[index] = again
    return None if contradicting(found) else found
