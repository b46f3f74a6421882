"""One figure of the bench: limit, verdict, output line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Result:
    """One figure: its values per run, the limit for its median, and details."""

    name: str
    values: Sequence[float]
    limit: float
    at_least: bool
    detail: str

    @property
    def passed(self) -> bool:
        return self.median >= self.limit if self.at_least else self.median <= self.limit

    @property
    def median(self) -> float:
        return median(self.values)

    def row(self) -> str:
        sign = ">=" if self.at_least else "<="
        spread = f"{min(self.values):.3f} .. {max(self.values):.3f}"
        verdict = "ok" if self.passed else "NOT MET"
        return f"{self.name:<46}{self.median:>8.3f}  {sign} {self.limit:<6g} {verdict:<9} {spread:<18} {self.detail}"
