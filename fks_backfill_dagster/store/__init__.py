"""PostgreSQL and TimescaleDB: the only package that knows SQL.

`schema` and `migrations` define the tables, `database` opens them, `writer` is the one package that writes
candles and everything that must change together with them, `ledger` reads what is known of a series before
it is fetched, `queries` reads stored candles and reports.

Does not belong here: which candles should exist (domain), which provider is requested (providers, pipeline).
"""
