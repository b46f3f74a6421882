"""A block of stored candles and the result of a rule over it: what all rules of findings share.

Belongs here: the two records. Does not belong here: a rule (a module of its own, as `spikes`), and what becomes of a
suspicious candle (`ledger.findings`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fks_backfill_dagster.domain.candles import Candles, Floats
from fks_backfill_dagster.domain.grid import Grid
from fks_backfill_dagster.domain.timeframe import Timeframe

Mask = NDArray[np.bool_]
Evidence = Mapping[str, object]
"""Values of JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Stored candles, ascending and on the grid; the first and the last ones are the context of the others."""

    candles: Candles
    grid: Grid
    timeframe: Timeframe

    def joined(self) -> Mask:
        """For each candle but the last whether the next one is its neighbour: bool, one element less than candles.

        Intraday candles are neighbours if one opens when the other closes: no candle is missing between them, and no
        closed hours lie there, in which the price moves unseen. Days and weeks are neighbours in the grid.
        """
        ts = self.candles.ts
        if self.timeframe.is_intraday:
            touching: Mask = self.grid.closes(ts[:-1]) == ts[1:]
            return touching
        neighbours: Mask = np.diff(self.grid.rank(ts)) == 1
        return neighbours


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """The result of a rule: one element per candle of the block.

    evaluated: whether the candle has what the rule compares it with. flagged: whether it is suspicious; only evaluated
    candles are. strength: how far it exceeds the limit of the rule, larger is worse; 0 where not flagged. detail: the
    evidence of a flagged candle, by its index.
    """

    evaluated: Mask
    flagged: Mask
    strength: Floats
    detail: Callable[[int], Evidence]
