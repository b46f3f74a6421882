"""Several responses to one request: put together, compared where they overlap, and bounded in number.

Belongs here: seams (where another response begins), whether neighbours agree about a candle, and whether a chain
of pages gets on.
Does not belong here: how a page is requested or read (each provider), what a jump at a seam means (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants, TimeRange, among
from fks_backfill_dagster.providers.base import BadAnswer

Page = TypeVar("Page")

# So many pages in a row may bring nothing newer: an empty one between two full ones can be honest.
_IDLE_PAGES = 3
# Honest pages bring more rows than that on average, but for a few.
_ROWS_A_PAGE = 10
_SPARE_PAGES = 10


@dataclass(slots=True)
class Chain:
    """Pages of which each one names the next: whether they get on, and no further than the range goes.

    window: what is requested, which holds at most `candles` candles. page_size: the most rows of a page. All
    pages together may bring twice the rows of the range and of a page, so memory is bounded by the range.
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
        """Takes account of the rows of the next page, whether they are closed or not. Returns whether they reach
        beyond the range, so that no other page is needed.

        Raises BadAnswer when the pages do not get on, or are more than the range can need.
        """
        self.pages, self.rows = self.pages + 1, self.rows + len(stamps)
        newest = int(stamps.max()) if len(stamps) else None
        if newest is not None and (self.newest is None or newest > self.newest):
            self.newest, self.idle = newest, 0
        else:
            self.idle += 1
        if self.idle > _IDLE_PAGES:
            raise BadAnswer(
                self.provider,
                f"{self.place} leads from page to page, and the last {self.idle} of {self.pages:,} pages had no"
                " newer bar",
            )
        most_pages, most_rows = (
            _SPARE_PAGES + self.candles // _ROWS_A_PAGE,
            2 * (self.candles + self.page_size),
        )
        if self.pages > most_pages or self.rows > most_rows:
            raise BadAnswer(
                self.provider,
                f"{self.place} leads from page to page: {self.pages:,} pages had {self.rows:,} bars, for a range"
                f" of at most {self.candles:,}",
            )
        return newest is not None and newest >= self.window.end


def joined(pages: Sequence[Candles]) -> tuple[Candles, Instants]:
    """The rows of all responses, ascending, and their seams as `Delivery.seams` wants them.

    A seam is the open of a row that another response gave than the row before it. So a response that lies
    inside another one (a second request for what the first one lacked) has a seam where it begins, and where
    the first one goes on.
    """
    rows = Candles.concat(pages)
    response = np.repeat(np.arange(len(pages)), [len(page) for page in pages])
    if (rows.ts[1:] < rows.ts[:-1]).any():
        order = np.argsort(rows.ts, kind="stable")
        rows, response = rows.take(order), response[order]
    seams = np.unique(rows.ts[1:][response[1:] != response[:-1]])
    return rows, seams[seams > rows.ts[0]] if len(rows) else seams


def differing(one: Candles, other: Candles) -> bool:
    """Whether a candle that both hold has different values; NaN equals NaN."""
    mine, theirs = among(one.ts, other.ts), among(other.ts, one.ts)
    return not one.take(mine).equals(other.take(theirs))


def contradicting(pages: Sequence[Candles]) -> list[int]:
    """The indices of the pages that give a candle otherwise than a neighbour."""
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
    """The rows of each page; None when neighbours differ about a candle, also when requested once more.

    It costs no request where all agree, and each row of an overlap is still in both of its pages.
    """
    found = list(request(pages))
    wrong = contradicting(found)
    if wrong:
        for index, again in zip(wrong, request([pages[index] for index in wrong]), strict=True):
            found[index] = again
    return None if contradicting(found) else found
