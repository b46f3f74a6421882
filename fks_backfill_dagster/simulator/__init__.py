"""The local market: a server on loopback that speaks the providers' wire formats.

It is the users' sandbox, the demo's data source and what the tests talk to. Belongs here: markets
(synthetic, replayed), wire formats of providers as servers, faults, and the control routes.

Does not belong here: anything of the real clients. The simulator imports `domain` and nothing else
of the project, so that an error in a provider cannot be mirrored by the market that tests it.
"""

from fks_backfill_dagster.simulator.config import MarketConfig, Outage
from fks_backfill_dagster.simulator.local import LocalMarket
from fks_backfill_dagster.simulator.replay import ReplayError
from fks_backfill_dagster.simulator.server import PortInUse, make_app, run
from fks_backfill_dagster.simulator.splits import Split

__all__ = ["LocalMarket", "MarketConfig", "Outage", "PortInUse", "ReplayError", "Split", "make_app", "run"]
