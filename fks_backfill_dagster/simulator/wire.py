"""The interface between server and wire formats: call, reply, answer, and the format of rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fks_backfill_dagster.domain.ranges import TimeRange
from fks_backfill_dagster.simulator.faults import Fault, Fields, Row

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Call:
    """A GET request below a provider's prefix. `base_url` is scheme, host and that prefix."""

    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    base_url: str


@dataclass(frozen=True, slots=True)
class Reply:
    """An HTTP response that is ready to be sent."""

    body: bytes
    status: int = 200
    media_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a JSON page, so that faults can change them.

    `take` returns the rows of a document with their values at the positions of `fields`; `put` returns the
    page with other rows. Times of rows are in units of `unit` microseconds.
    """

    fields: Fields
    take: Callable[[Any], list[Row]]
    put: Callable[[Any, list[Row]], bytes]
    unit: int = 1000


def dumped(document: Any) -> bytes:
    """JSON of a document with faults: NaN is the bare word, which is invalid JSON."""
    return json.dumps(document).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply with the data that journal and faults need.

    `symbol` (in the provider's format) and `span` (the requested time) are None if the request
    has none. `rows` locates the candles of a JSON page; None if row faults do not apply.
    `fault` is one that the wire format has already applied.
    """

    reply: Reply
    endpoint: str
    weight: int = 1
    symbol: str | None = None
    span: TimeRange | None = None
    rows: Rows | None = None
    fault: Fault | None = None


class WireFormat(Protocol):
    """A provider's wire format for the market."""

    name: str

    def answer(self, call: Call) -> Answer: ...

    def charge(self, call: Call) -> Reply | None:
        """Counts the request against the limits; the rejection if they are exceeded."""
        ...

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        """Headers of every response, rejections included."""
        ...

    def with_other_symbol(self, call: Call, symbol: str, other: str | None) -> Answer:
        """The response with the candles of another symbol: `other` if it exists, else any."""
        ...

    def spell(self, plain: str) -> str:
        """Converts a symbol without prefix and separator to the provider's format."""
        ...

    def error(self, status: int, retry_after: int) -> Reply:
        """The provider's own body for the status of a fault."""
        ...
