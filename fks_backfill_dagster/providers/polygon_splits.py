"""Polygon's splits of one ticker, as actions (`/stocks/v1/splits`, which replaces `/v3/reference/splits`).

Belongs here: the rows. Does not belong here: requests, pages, and errors (`polygon`).

A row has execution_date (the first date that trades in new shares, at 00:00 New York), split_from old and split_to new
shares. A stock dividend is such a row too: it changes the number of shares in the same way. The
historical_adjustment_factor is not read: it includes all later rows, so it changes with each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlencode

from fks_backfill_dagster.domain.actions import Action, combined, split_of
from fks_backfill_dagster.providers.base import InvalidResponse

PATH = "/stocks/v1/splits"
# The documented maximum of rows per page, more than the splits of any stock; MOST_PAGES bounds the memory.
LIMIT, MOST_PAGES = 5000, 10


def splits_url(base_url: str, ticker: str) -> str:
    """The first page of all splits of a ticker."""
    parameters = {"ticker": ticker, "limit": LIMIT, "sort": "execution_date.asc"}
    return f"{base_url}{PATH}?{urlencode(parameters)}"


def rows_of(document: dict[str, object], provider: str, place: str) -> list[object]:
    """The rows of a page. Raises InvalidResponse for another shape; a page without splits may lack `results`."""
    rows = document.get("results", [])
    if not isinstance(rows, list):
        raise InvalidResponse(provider, f"{place} returned splits of another shape")
    return rows


def read_splits(
    rows: Iterable[object], provider: str, symbol: str, ticker: str
) -> tuple[tuple[Action, ...], tuple[str, ...]]:
    """The splits of a ticker by date, and a sentence for each bad row. A row that is listed twice counts once."""
    found, refused = dict[Action, None](), []
    for row in rows:
        try:
            found[_split(row, symbol, ticker)] = None
        except ValueError as error:
            refused.append(f"{provider}: {symbol}: {error}: {ascii(row)[:160]}")
    return combined(found), tuple(refused)


def _split(row: object, symbol: str, ticker: str) -> Action:
    if not isinstance(row, dict):
        raise ValueError("a split of another shape")
    if row.get("ticker") != ticker:
        raise ValueError(f"a split of another ticker than {ticker}")
    shares = [row.get("split_to"), row.get("split_from")]
    if not all(isinstance(one, int | float) and not isinstance(one, bool) and one > 0 for one in shares):
        raise ValueError("split_from and split_to are not numbers of shares above 0")
    new, old = (float(one) for one in shares if one is not None)
    return split_of(symbol, str(row.get("execution_date")), new / old)
