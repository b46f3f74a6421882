"""Requests to the local market: counts, and the last requests, without keys."""

from __future__ import annotations

import re
import threading
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import Any

_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Entry:
    """One request: real time of arrival in ISO 8601, the response's status, seconds until it was ready."""

    at: str
    provider: str
    endpoint: str
    target: str
    status: int
    seconds: float
    weight: int
    fault: str | None


class Journal:
    """Requests to providers since the start or the last reset; /sim is not counted."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        with self._lock:
            self._last: deque[Entry] = deque(maxlen=_KEPT)
            self._count: Counter[tuple[str, str, int]] = Counter()
            self._weight: Counter[str] = Counter()

    def add(self, entry: Entry) -> None:
        with self._lock:
            self._last.append(entry)
            self._count[entry.provider, entry.endpoint, entry.status] += 1
            self._weight[entry.provider] += entry.weight

    def summary(self, last: int) -> dict[str, Any]:
        """JSON: total, providers {name: {requests, weight, endpoints, statuses}}, last."""
        with self._lock:
            providers: dict[str, Any] = {}
            for (provider, endpoint, status), count in self._count.items():
                of = providers.setdefault(
                    provider,
                    {"requests": 0, "weight": self._weight[provider], "endpoints": {}, "statuses": {}},
                )
                of["requests"] += count
                of["endpoints"][endpoint] = of["endpoints"].get(endpoint, 0) + count
                of["statuses"][str(status)] = of["statuses"].get(str(status), 0) + count
            tail = list(self._last)[-last:] if last else []
            return {
                "total": sum(self._count.values()),
                "providers": providers,
                "last": [asdict(entry) for entry in tail],
            }


def without_key(target: str) -> str:
    """A path and query with the values of apiKey, api_key and crumb redacted."""
    return re.sub(r"(?i)(api_?key=|crumb=)[^&]*", r"\1...", target)
