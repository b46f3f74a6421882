"""PostgreSQL and TimescaleDB: the only package that knows SQL.

`schema` and `migrations` say what there is, `database` opens it, `commit` is the one module that
writes candles and everything that must change together with them, `ledger` answers what is known
of a series before it is fetched, `reading` serves stored candles and reports.

Does not belong here: what should exist (domain), who is asked for it (providers, pipeline).
"""
