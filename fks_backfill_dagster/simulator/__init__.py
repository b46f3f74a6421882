"""The local market: a server on loopback that speaks the providers' wire formats.

It serves users' experiments, the demo and the tests. In scope: markets (synthetic, replayed), the
providers' wire formats as servers, faults, and the control routes.

Out of scope: code of the real clients. The simulator imports `domain` and `loopback` only, so that an
error in a provider client cannot be repeated in the market that tests it.
"""

from fks_backfill_dagster.simulator.config import MarketConfig, Outage
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.simulator.replay import ReplayError
from fks_backfill_dagster.simulator.server import PortInUse, make_app, run
from fks_backfill_dagster.simulator.splits import Split

__all__ = ["LocalMarket", "MarketConfig", "Outage", "PortInUse", "ReplayError", "Split", "make_app", "run"]
