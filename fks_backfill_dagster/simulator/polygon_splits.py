"""Polygon's splits: GET /stocks/v1/splits.

Only the wire format: parameters, rows, the factor, cursors. The splits are those of the market up to its clock.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from math import prod
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson

from fks_backfill_dagster.simulator.splits import Split
from fks_backfill_dagster.simulator.wire import Reply

PATH = "/stocks/v1/splits"
DEFAULT_LIMIT, MAX_LIMIT = 100, 5000
_SORTS = ("execution_date.asc", "execution_date.desc")


def splits_reply(splits: Sequence[Split], query: Mapping[str, str], base_url: str) -> Reply:
    """The page that a request asks for. `splits`: those of the requested ticker, which have happened."""
    try:
        options = _cursor(query.get("cursor", "")) | dict(query)
        limit, first = _number(options, "limit", DEFAULT_LIMIT), _number(options, "after", 0)
        sort = options.get("sort", _SORTS[1])
        if not 0 < limit <= MAX_LIMIT or sort not in _SORTS:
            raise ValueError(f"limit is between 1 and {MAX_LIMIT}, sort one of {', '.join(_SORTS)}")
    except ValueError as error:
        return Reply(orjson.dumps({"status": "ERROR", "error": f"Invalid parameters: {error}"}), 400)
    ordered = sorted(splits, key=lambda one: one.day, reverse=sort == _SORTS[1])
    page = ordered[first : first + limit]
    request_id = blake2b(repr(sorted(options.items())).encode(), digest_size=16).hexdigest()
    document: dict[str, Any] = {
        "status": "OK",
        "request_id": request_id,
        "results": [_row(one, splits) for one in page],
    }
    if first + limit < len(ordered):
        kept = {name: options[name] for name in ("ticker", "limit", "sort") if name in options}
        text = urlencode(kept | {"after": str(first + limit)})
        cursor = base64.urlsafe_b64encode(text.encode()).decode()
        document["next_url"] = f"{base_url}{PATH}?cursor={cursor}"
    return Reply(orjson.dumps(document))


def _row(split: Split, splits: Sequence[Split]) -> dict[str, Any]:
    later = [one for one in splits if one.day >= split.day]
    return {
        "id": f"E{blake2b(repr(split).encode(), digest_size=32).hexdigest()}",
        "ticker": split.symbol,
        "execution_date": split.day.isoformat(),
        "adjustment_type": "forward_split" if split.new > split.old else "reverse_split",
        "split_from": split.old,
        "split_to": split.new,
        "historical_adjustment_factor": prod(one.old for one in later) / prod(one.new for one in later),
    }


def _number(options: Mapping[str, str], name: str, default: int) -> int:
    text = options.get(name, str(default))
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} is a number")
    return int(text)


def _cursor(text: str) -> dict[str, str]:
    return dict(parse_qsl(base64.b64decode(text, altchars=b"-_", validate=True).decode()))


def splits_cursor(query: Mapping[str, str]) -> dict[str, str]:
    """The parameters in the cursor of a request; none for a broken one, which the reply refuses."""
    with suppress(ValueError):
        return _cursor(query.get("cursor", ""))
    return {}
