"""What passes between the server and a wire format: a call, its answer, and how a row is spelt."""

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
    """An HTTP answer that is ready to be sent."""

    body: bytes
    status: int = 200
    media_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Rows:
    """How a JSON page keeps its rows, so that faults can change them.

    `take` gives the rows of a document, each with its values where `fields` says; `put` writes the
    page with other rows in their place. Times of rows are in units of `unit` microseconds.
    """

    fields: Fields
    take: Callable[[Any], list[Row]]
    put: Callable[[Any, list[Row]], bytes]
    unit: int = 1000


def dumped(document: Any) -> bytes:
    """JSON of a spoilt document: NaN is written as the bare word, as careless servers do."""
    return json.dumps(document).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply with what the journal and the faults need to know about it.

    `symbol` (as the provider writes it) and `span` (the time asked for) are None where the request
    has none. `rows` tells where a JSON page keeps its candles; None where row faults cannot apply.
    `fault` is one that the wire format has already applied by itself.
    """

    reply: Reply
    endpoint: str
    weight: int = 1
    symbol: str | None = None
    span: TimeRange | None = None
    rows: Rows | None = None
    fault: Fault | None = None


class Face(Protocol):
    """A provider's wire format over the market."""

    name: str

    def answer(self, call: Call) -> Answer: ...

    def charge(self, call: Call) -> Reply | None:
        """Counts the request against the limits; the refusal if they are used up."""
        ...

    def extra_headers(self) -> tuple[tuple[str, str], ...]:
        """Headers that stand on every answer, refusals included."""
        ...

    def impostor(self, call: Call, symbol: str, other: str | None) -> Answer:
        """The same request answered with the candles of another symbol: of `other`, if that is one."""
        ...

    def spell(self, plain: str) -> str:
        """A symbol without prefix and separator as the provider writes it."""
        ...

    def error(self, status: int, retry_after: int) -> Reply:
        """The provider's own body for a status that a fault asks for."""
        ...
