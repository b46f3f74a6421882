"""Dagster's definitions, one module per concept.

- `groups`: which series share an op; `partitions`: the partition definitions
- `assets`, `checks`, `audit`, `run_retention`: the ops
- `schedules`, `gap_sensor`, `outage_sensor`, `before_start`: automation
- `resources`: database and providers
- `build`: all definitions together; `definitions`: the module that Dagster loads

Does not belong here: Dagster's processes and its storage (`host`), what a sync does (`pipeline`), what is stored
(`store`).
"""
