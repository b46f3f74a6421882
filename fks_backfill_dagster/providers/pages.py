"""Several responses to one request: put together, and compared where they overlap.

Belongs here: seams (where another response begins), and whether neighbours agree about a candle.
Does not belong here: how a page is requested or read (each provider), what a jump at a seam means (`pipeline`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from fks_backfill_dagster.domain.candles import Candles
from fks_backfill_dagster.domain.ranges import Instants, among

Page = TypeVar("Page")


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
