"""Dagster: the only package that imports it, one module per concept.

`groups` says which series share an op, `partitions` how time is cut, `assets` and `checks` what
Dagster runs, `resources` what those need, `build` puts them together, `definitions` is what Dagster
loads. `storage` keeps Dagster's own tables in our database, `servers` starts and stops its processes,
`code_server` and `forking_server` serve the definitions to them, `guarded_webserver` is Dagster's behind our guard,
`webserver` talks to it over GraphQL.

Does not belong here: what a sync does (pipeline), what is stored (store). An op asks them and tells
Dagster what came of it.
"""
