"""Dagster's definitions, one module per concept.

`groups` says which series share an op, `partitions` how time is cut, `assets` and `checks` what Dagster runs,
`schedules`, `gap_sensor` and `outage_sensor` what it starts, `resources` what those need; `build` puts them together,
and `definitions` is what Dagster loads.

Does not belong here: Dagster's processes and its storage (`host`), what a sync does (`pipeline`), what is stored
(`store`).
"""
